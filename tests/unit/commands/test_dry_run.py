"""`--dry-run` is the same option of every command that writes, and nothing is written; old names still work."""

import json

import pytest
import training

from titan_cpt.cli import main, parse_command_line

pytestmark = training.THEIR_WARNINGS_IGNORED


def run(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert leaving.value.code == 0, printed.err
    return printed.out


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Two languages; the working directory is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return training.two_stages(training.write_languages(tmp_path / "data"), tmp_path / "here" / "out")


def test_train_prints_the_plan_for_its_number_of_ranks(raw, tmp_path, capsys, monkeypatch):
    """Rank 0 does; the run folder is named, and not made."""
    config = training.write_config(raw, tmp_path / "c.toml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = run(capsys, "train", config, "--dry-run")
    assert "2 ranks, 2 data-parallel" in printed
    assert f"dry run: nothing was written; {tmp_path}/here/out/run would be the run folder" in " ".join(printed.split())
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", config, "--dry-run") == ""
    assert list((tmp_path / "here").iterdir()) == []


def test_baselines_and_sweep_list_what_they_would_train(raw, tmp_path, capsys):
    """A stage that all runs share counts once in the sum: 12 steps of English, 3 times 10 of German, 64 tokens each."""
    config = training.write_config(raw, tmp_path / "c.toml")
    assert "/no-replay.toml: " in run(capsys, "baselines", config, "--dry-run", "--output", "made")
    sweep = training.write_config(raw | {"sweep": {"stages.german.lr.max": [1e-3, 2e-3, 3e-3]}}, tmp_path / "s.toml")
    for name in ("--dry-run", "--plan"):
        printed = run(capsys, "sweep", sweep, name)
        assert f"to train: 3 of 3 runs, {(12 + 3 * 10) * 64:,} tokens, " in printed
        assert "GPU hours at 50% of an H100 SXM's 989 TFLOP/s" in printed
    assert list((tmp_path / "here").iterdir()) == []


def test_prepare_lists_texts_and_outputs(tmp_path, capsys, monkeypatch):
    """Of a config and of --input; the tokenizer that would be trained is named."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text" / "english"
    text.mkdir(parents=True)
    (text / "a.txt").write_text("x" * 2048, encoding="utf-8")
    run(capsys, "init", "laptop", "mine.toml", "--text", "text/english/*.txt", "--text", "text/english/*.txt")
    before = sorted(tmp_path.rglob("*"))
    assert run(capsys, "prepare", "mine.toml", "--dry-run").splitlines() == [
        "tokenizer: would be trained on the text of english -> data/mine/tokenizer.json",
        "dataset english: 1 file (0MiB) -> data/mine/english",
        "dataset german: 1 file (0MiB) -> data/mine/german",
    ]
    assert run(capsys, "prepare", "--input", "text/english/*.txt", "--output", "x", "--dry-run") == (
        "1 file (0MiB) -> x\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_anneal_prints_the_plan_of_the_branch(raw, tmp_path, capsys):
    """From a checkpoint of the constant phase, here step 8; --prepare-only writes the folder of the branch."""
    outcome = training.train(training.write_config(raw, tmp_path / "c.toml"))
    assert outcome.status == 0, outcome.output
    checkpoint = tmp_path / "here" / "out" / "run" / "english" / "step-00000009"
    words = ("anneal", checkpoint, "--tokens", "128")
    assert "run-anneal-english-9 would be the run folder" in " ".join(run(capsys, *words, "--dry-run").split())
    assert [path.name for path in (tmp_path / "here" / "out").iterdir()] == ["run"]
    run(capsys, *words, "--prepare-only")
    assert (tmp_path / "here" / "out" / "run-anneal-english-9").is_dir()

    report = json.loads(run(capsys, "report", checkpoint.parents[1], "--json"))
    summary = json.loads((checkpoint.parents[1] / "summary.json").read_text(encoding="utf-8"))
    assert report["runs"][0]["stages"] == summary["stages"]
    assert report["unread"] == []


def test_the_old_name_in_a_sweep_is_hidden():
    """As other old names are."""
    parser = parse_command_line(["sweep", "a.toml", "--plan"]).parser
    assert "--plan" not in parser.format_help()
