"""An operating system error is one message with the path, the reason and what to do, and exit status 2."""

import pytest
import training
from permissions import modes_count

from titan_cpt.cli import main

pytestmark = training.THEIR_WARNINGS_IGNORED
BAD = {"a file on the way": "file/x", "a loop of links": "loop/x", "a name too long": "n" * 300}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two languages, a config, a text, a run's folder of two files, and names that cannot be read or written."""
    folder = tmp_path_factory.mktemp("place")
    training.write_config(training.two_stages(training.write_languages(folder), folder / "out"), folder / "c.toml")
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "a.txt").write_text("text")
    for name in ("plan.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    return folder


def ended(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "words",
    [
        "plan --config BAD",
        "train --config BAD",
        "train --config CONFIG --job.output_dir BAD",
        "sweep CONFIG --job.output_dir BAD --prepare-only",
        "baselines --config CONFIG --output BAD",
        "baselines --config CONFIG --job.output_dir BAD",
        "prepare --input TEXT --output BAD --tokenizer bytes",
        "prepare --input TEXT --output BAD --train-tokenizer 257",
        "prepare --input TEXT --output o --tokenizer BAD",
        "prepare --input BAD --output o --tokenizer bytes",
        "report BAD",
        "verify BAD",
        "export BAD o",
        "import BAD o",
        "anneal BAD --tokens 10",
        "generate BAD --prompt a",
    ],
)
def test_an_unusable_path_is_an_error_of_one_line(place, tmp_path, monkeypatch, capsys, words, bad):
    """Every command, every path that it reads or writes: one line, with the name and no traceback."""
    monkeypatch.chdir(tmp_path)
    known = {"BAD": place / BAD[bad], "CONFIG": place / "c.toml", "TEXT": place / "a.txt"}
    before = sorted(path for path in place.rglob("*") if not path.is_symlink())
    status, lines = ended(capsys, *(known.get(word, word) for word in words.split()))

    assert (status, len(lines)) == (2, 1), lines
    assert str(place / BAD[bad].split("/")[0]) in lines[0]
    assert "not written by a run" not in lines[0]
    assert sorted(path for path in place.rglob("*") if not path.is_symlink()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder that cannot be written", "folder that cannot be entered"])
@pytest.mark.parametrize(
    "words",
    [
        "plan --config CONFIG --datasets.en.train CLOSED/x",
        "train --config CONFIG --job.output_dir CLOSED",
        "sweep CONFIG --job.output_dir CLOSED",
        "baselines --config CONFIG --output CLOSED/x",
        "prepare --input TEXT --output CLOSED/x --tokenizer bytes",
        "prepare --input TEXT --output CLOSED/x --train-tokenizer 257",
        "prepare --input CLOSED/x.txt --output CLOSED/x --tokenizer bytes",
        "report CLOSED",
        "verify CLOSED",
    ],
)
def test_a_folder_without_permission_is_an_error_of_one_line(tmp_path, capsys, words, kind):
    """EACCES on reading and writing is not reported as damage or absence, prints no traceback and changes nothing."""
    closed = tmp_path / "closed"
    closed.mkdir()
    data = training.write_languages(tmp_path)
    config = training.write_config(training.two_stages(data, tmp_path / "out"), tmp_path / "c.toml")
    (tmp_path / "a.txt").write_text("text " * 99)
    closed.chmod(0o555 if kind == "folder that cannot be written" else 0o000)
    filled = (
        words.replace("CLOSED", str(closed)).replace("CONFIG", str(config)).replace("TEXT", str(tmp_path / "a.txt"))
    )
    with modes_count():
        status, lines = ended(capsys, *filled.split())
    expected_to_be_absent = kind == "folder that cannot be written" and "plan" in words

    assert (status, len(lines)) == ((0, 0) if expected_to_be_absent else (2, 1)), lines
    assert expected_to_be_absent or str(closed) in lines[0]
