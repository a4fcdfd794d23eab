"""Reading TOML files, and merging a file over those that it extends."""

import os
from pathlib import Path

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.errors import ConfigError


def test_a_file_is_merged_over_the_file_it_extends(one_stage, write):
    """Tables key by key; other values are replaced, and keys of the base that are not replaced stay."""
    write(one_stage, "base.toml")
    path = write('extends = "base.toml"\n[job]\nname = "child"\n[training]\nseq_len = 32\n')
    config = load_config(path)

    assert (config.job.name, config.training.seq_len, config.training.global_batch_size) == ("child", 32, 20)
    assert [stage.name for stage in config.stages] == ["first"]


def test_a_later_base_wins_over_an_earlier_one_and_the_file_over_all(one_stage, write):
    """From left to right, then the file itself."""
    write(one_stage, "base.toml")
    write("[job]\nseed = 1\ndescription = 'one'\noutput_dir = 'one'\n", "one.toml")
    write("[job]\nseed = 2\ndescription = 'two'\n", "two.toml")
    config = load_config(write("extends = ['base.toml', 'one.toml', 'two.toml']\n[job]\nseed = 3\n"))

    assert (config.job.seed, config.job.description, config.job.output_dir) == (3, "two", "one")


def test_stages_are_merged_by_name_and_new_ones_appended(two_stages, write):
    """In the order of the base; other lists are replaced."""
    write(two_stages + '\n[datasets.books]\ntrain = ["a", "b"]\n', "base.toml")
    child = """
extends = "base.toml"
datasets.books.train = ["c"]
[[stages]]
name = "third"
dataset = "pile"
steps = 5
lr = { schedule = "constant", max = 1e-4 }
[[stages]]
name = "first"
steps = 7
"""
    config = load_config(write(child))

    assert [(stage.name, stage.steps) for stage in config.stages] == [("first", 7), ("second", 50), ("third", 5)]
    assert config.stages[0].lr.max == 1e-3
    assert config.datasets["books"].train == ("c",)


def test_an_lr_table_with_another_schedule_replaces_that_of_the_base(one_stage, write):
    """Its keys are different; with the same schedule the tables are merged key by key."""
    write(one_stage, "base.toml")
    stage = 'extends = "base.toml"\n[[stages]]\nname = "first"\n'
    other = load_config(write(stage + 'lr = { schedule = "constant", max = 2e-3 }', "other.toml")).stages[0].lr
    same = load_config(write(stage + "lr = { max = 2e-3 }", "same.toml")).stages[0].lr

    assert other.model_dump() == {"schedule": "constant", "max": 2e-3, "warmup_until": 0}
    assert (same.schedule, same.max, same.min) == ("cosine", 2e-3, 1e-4)


def test_bases_are_found_beside_the_file_that_names_them(one_stage, write, tmp_path, monkeypatch):
    """Not in the working directory, and over more than one level."""
    write(one_stage, "bases/deep/base.toml")
    write('extends = "deep/base.toml"\njob.seed = 5', "bases/middle.toml")
    path = write('extends = "bases/middle.toml"')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert load_config(path).job.seed == 5
    assert load_config(Path(os.path.relpath(path))).job.seed == 5


def test_two_bases_can_extend_the_same_file(one_stage, write):
    """A diamond is not a cycle."""
    write(one_stage, "base.toml")
    write('extends = "base.toml"', "a.toml")
    write('extends = "base.toml"', "b.toml")

    assert load_config(write('extends = ["a.toml", "b.toml"]')).job.name == "tested"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.toml": 'extends = "config.toml"'}, "extends itself: config.toml -> config.toml"),
        (
            {"config.toml": 'extends = "b.toml"', "b.toml": 'extends = "config.toml"'},
            "extends itself: config.toml -> b.toml -> config.toml",
        ),
        ({"config.toml": 'extends = "gone.toml"'}, "gone.toml: no such file (relative to config.toml's folder)"),
        ({"config.toml": "a = True"}, "`a = True`; write true and false in lower case"),
        ({"config.toml": 'a = 1\nb = "x'}, '`b = "x`; a closing quote is missing'),
        ({"config.toml": "a = 1\na = 2"}, "`a = 2`; it is in the file twice: remove one"),
        ({"config.toml": "a = data/x"}, "`a = data/x`; text needs quotes"),
        ({"config.toml": "extends = 3"}, "extends: must be a file or a list of files, got 3"),
        ({"config.toml": "extends = ['a', 3]"}, "extends: must be a file or a list of files, got ['a', 3]"),
        ({"config.toml": 'extends = "a\\u0000"'}, "extends: must be a file or a list of files"),
        ({"config.toml": 'extends = "."'}, "cannot be read: Is a directory"),
        ({"config.toml": "[job"}, "not valid TOML: "),
        ({"config.toml": "seed = " + "9" * 5000}, "not valid TOML: "),
        ({"config.toml": "a = [0x" + "f" * 5000 + "]"}, "not valid TOML: integers must fit into 64 bits"),
        ({"config.toml": "a = { b = 9223372036854775808 }"}, "not valid TOML: integers must fit into 64 bits"),
        ({"config.toml": "a = " + "[" * 5000}, "not valid TOML: "),
    ],
)
def test_files_that_cannot_be_read_are_refused(write, tmp_path, files, expected):
    """Cycles, missing and damaged files: one message that names the file."""
    for name, text in files.items():
        write(text, name)
    with pytest.raises(ConfigError) as refusal:
        load_config(tmp_path / "config.toml")

    assert expected in str(refusal.value)
    assert ".toml: " in str(refusal.value) or "cannot be read" in expected


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    """The message names it."""
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        load_config(tmp_path / "config.toml")


def test_a_stage_without_a_name_in_a_base_is_refused(one_stage, write):
    """It cannot be merged by name."""
    write("[[stages]]\nsteps = 3\n", "base.toml")
    with pytest.raises(ConfigError, match=r"stages\.\[0\]\.name: is missing"):
        load_config(write('extends = "base.toml"\n' + one_stage))


def test_a_fetch_script_is_found_beside_the_file_that_names_it(one_stage, write, tmp_path, monkeypatch):
    """From any working directory, like the files of `extends`."""
    dataset = '\n[datasets.web]\ntrain = "web"\nsource = { text = "web.jsonl", fetch = "../fetch.py" }\n'
    path = write(one_stage + dataset, "configs/config.toml")
    monkeypatch.chdir(tmp_path)
    here = load_config(path).datasets["web"].source.fetch
    monkeypatch.chdir(tmp_path / "configs")
    there = load_config(Path("config.toml")).datasets["web"].source.fetch

    assert (here, there) == ("fetch.py", "../fetch.py")
