"""Any bytes in a file from an untrusted source (untrusted.py lists the kinds) are read or raise our error, quickly."""

import json
import resource
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from untrusted import KINDS, read_as

from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.config.load import load_config
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import ConfigError, DataError

SOON = settings(max_examples=80, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
JSON_KINDS = [kind for kind, (name, _, _) in KINDS.items() if name.endswith(".json")]


@pytest.fixture(autouse=True)
def limited_memory():
    """Limit the process to one more gibibyte: beyond that a reader raises MemoryError, which is not our error."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def corrupted(draw, content):
    """A valid file with some bytes replaced, removed or doubled, or truncated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 12)))
        between = draw(
            st.binary(max_size=12) | st.sampled_from([content[start:stop] * 2, b"9" * 30, b"[" * 2000, b"-1"])
        )
        content = content[:start] + between + content[stop:]
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_file_is_read(kind, tmp_path):
    """Otherwise corrupting it would prove nothing. The manifest lists itself with a wrong size."""
    name, content, reads = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    if kind == "manifest":
        with pytest.raises(Exception, match="the manifest says 1"):
            reads(tmp_path)
    else:
        reads(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@SOON
@given(data=st.data())
def test_a_corrupted_file_is_read_or_raises_our_error(kind, data):
    """No other exception, no hang, no gibibyte of memory."""
    read_as(kind, data.draw(corrupted(KINDS[kind][1])))


@pytest.mark.parametrize("kind", KINDS)
@SOON
@given(content=st.binary(max_size=200))
@example(content=b"[" * 100_000)
@example(content=b"a." * 50_000 + b"a = 1")
@example(content=b"\xff" * 64)
@example(content=b"\x00" * 64)
@example(content=b'{"a":' + b"9" * 5000 + b"}")
def test_arbitrary_bytes_are_read_or_raise_our_error(kind, content):
    """With some examples that parsers are known to fail on."""
    read_as(kind, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", JSON_KINDS)
@SOON
@given(data=st.data())
def test_any_value_anywhere_in_a_json_file_is_read_or_raises_our_error(kind, data):
    """One value of the valid file, at any depth, is replaced."""
    whole = json.loads(KINDS[kind][1])
    here = whole
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        here[key] = data.draw(VALUES)
        break
    read_as(kind, json.dumps(whole).encode())


def test_no_line_of_a_valid_metrics_file_is_skipped(tmp_path):
    """The lines are as train.py writes them: a transition's `lr` is a string."""
    (tmp_path / "metrics.jsonl").write_bytes(KINDS["metrics"][1])
    found = read_metrics(tmp_path)

    assert found.problems == []
    assert (len(found.trains), len(found.validations), len(found.events)) == (1, 1, 2)


@SOON
@given(data=st.data())
def test_any_value_in_a_metrics_line_is_read_or_skipped(data):
    """One key of one line has another value."""
    lines = [json.loads(line) for line in KINDS["metrics"][1].splitlines()]
    line = data.draw(st.sampled_from(lines))
    line[data.draw(st.sampled_from(sorted(line)))] = data.draw(VALUES)
    read_as("metrics", "".join(json.dumps(each) + "\n" for each in lines).encode())


@pytest.mark.parametrize("place", ["job.name", "stages.s.name"])
@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", "/etc", "a\\\\b", "", "a\\u0000b", " ", "x" * 300])
def test_a_name_outside_the_output_folder_is_refused(tmp_path, place, name):
    """Run and stage names become folder names."""
    toml = KINDS["toml"][1].decode()
    old = 'name = "a"' if place == "job.name" else 'name = "s"'
    (tmp_path / "config.toml").write_text(toml.replace(old, f'name = "{name}"'))
    with pytest.raises(ConfigError, match="name"):
        load_config(tmp_path / "config.toml")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "."])
def test_a_config_cannot_extend_something_that_is_not_a_file(tmp_path, path):
    """Reading a device would never end."""
    (tmp_path / "config.toml").write_text(f'extends = "{path}"')
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.toml")


@pytest.mark.parametrize("number", [10**12, 1 << 24, -1, True, 1.5, "7", None])
@pytest.mark.parametrize("place", ["vocabulary", "added token"])
def test_an_invalid_id_is_refused_with_the_name_of_the_token(tmp_path, number, place):
    """Ids index a table: a trillion would need a terabyte, and -1 would be the last entry."""
    spec = json.loads(KINDS["tokenizer"][1])
    if place == "vocabulary":
        spec["model"]["vocab"]["ab"] = number
    else:
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "ab", "id": number})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"the id of 'ab' must be an integer from 0 to 16777215"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
