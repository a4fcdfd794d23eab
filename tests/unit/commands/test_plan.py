"""`titan-cpt plan`: exit statuses, JSON, the table, overrides, real token files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from titan_cpt.cli import main
from titan_cpt.config.toml_files import read_with_bases
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json

CONFIGS = Path(__file__).parents[3] / "train_configs"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run(*words): exit status, stdout and stderr of titan-cpt, in the test's own working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as leaving:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return leaving.value.code, out, err

    return run


@pytest.fixture
def plan(run, write):
    """plan(text, *words): the JSON of titan-cpt plan."""

    def plan(text, *words):
        status, out, err = run("plan", "--config", write(text), "--json", *words)
        assert (status, err) == (0, "")
        return json.loads(out)

    return plan


def in_a_process(folder, *words):
    """Run titan-cpt as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "titan_cpt", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def write_tokens(prefix, tokens):
    """A Megatron pair of one document of uint16 tokens, by its published layout."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack("<iqqq", len(tokens), 0, 0, 1))


def test_a_mistake_is_status_2_and_one_message_without_a_traceback(tmp_path, write, one_stage):
    """In a process: every error on stderr with its dotted key, nothing on stdout."""
    path = write(one_stage.replace("seq_len = 16", 'seq_len = "16"').replace("[job]", "[jbo]"))
    answer = in_a_process(tmp_path, "plan", "--config", path)

    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    assert answer.stderr.splitlines()[0] == f"ConfigError: {path}: 3 problems"
    assert {line.split(": ")[0] for line in answer.stderr.splitlines()[1:]} == {
        "  - job",
        "  - jbo",
        "  - training.seq_len",
    }


def test_the_table_names_stages_budgets_and_replay_and_draws_the_lr(run, write, two_stages):
    """All in the output of one command."""
    status, out, err = run("plan", "--config", write(two_stages))
    lines = out.splitlines()
    (second,) = [line for line in lines if line.startswith("second")]
    words = " ".join(out.split())  # without line breaks
    drawing = [line for line in lines if "█" in line]

    assert (status, err) == (0, "")
    assert lines[0].startswith("tested  plan ")
    assert lines[2].startswith("step: 20 sequences x 16 = 320 tokens; 1 rank, ")
    assert [word in second for word in ("50", "16K", "1.00e-03", "1.00e-04")] == [True] * 4
    assert "from first @ 100; data (replay): german 12K, ? ep; pile 4K (4K), ? ep" in words
    assert "total: 48K tokens" in out
    assert (
        "continual pre-training on 'second': 16K tokens; retraining from scratch on all data: 48K (ratio 0.33)" in words
    )
    assert "data does not exist yet: pile, german" in out
    assert len(drawing) == 6
    assert drawing[0].startswith("1.0e-03 ")
    assert all(line.count("│") <= 2 for line in drawing)


def test_quiet_prints_notes_only_and_verbose_the_settings_first(run, write, two_stages):
    """The plan itself is the same."""
    path = write(two_stages)
    _, normal, _ = run("plan", "--config", path)
    _, quiet, _ = run("plan", "--config", path, "--quiet")
    _, verbose, _ = run("plan", "--config", path, "--verbose")

    assert quiet
    assert normal.endswith(quiet)
    assert quiet.startswith("note ")
    assert verbose.endswith(normal)
    assert "training.seq_len = 16" in verbose.splitlines()
    assert "training.gc_freq" not in verbose


def test_the_drawing_shows_where_the_lr_is_high(run, write, head):
    """A constant stage at the maximum has six rows, one at a third of it two."""
    stages = "".join(
        f'[[stages]]\nname = "{name}"\ndataset = "pile"\nsteps = 40\nlr = {{ schedule = "constant", max = {lr} }}\n'
        for name, lr in (("high", 3e-3), ("low", 1e-3))
    )
    _, out, _ = run("plan", "--config", write(head + stages))
    drawing = [line[8:] for line in out.splitlines() if "│" in line]

    assert drawing == ["█" * 35 + "│" + " " * 35 + "│"] * 4 + ["█" * 35 + "│" + "█" * 35 + "│"] * 2


def test_the_json_is_one_object_on_stdout(plan, two_stages):
    """Without the data files epochs are null, and a note says so; everything else is there."""
    answer = plan(two_stages)

    assert [stage["name"] for stage in answer["stages"]] == ["first", "second"]
    assert [stage["tokens"] for stage in answer["stages"]] == [32_000, 16_000]
    assert answer["stages"][1]["datasets"]["pile"] == {"tokens": 4000, "replayed_tokens": 4000, "epochs": None}
    assert answer["notes"] == [
        "data does not exist yet: pile, german; until then, epochs and the limits of replay are unknown"
    ]
    assert answer["model"]["family"] == "gpt_neox"


def test_epochs_come_from_the_token_files(plan, tmp_path, one_stage):
    """1000 tokens on disk, 32,000 trained: 32 epochs."""
    write_tokens(tmp_path / "data" / "pile", list(range(250)) * 4)
    answer = plan(one_stage)

    assert answer["stages"][0]["datasets"]["pile"]["epochs"] == 32.0
    assert answer["notes"] == [
        "data does not exist yet: german; until then, epochs and the limits of replay are unknown",
        "validation data does not exist yet: pile; training needs it",
        "pile: the tokenizer of these tokens is not recorded (`prepare` writes it into PREFIX.json); bytes is assumed",
        "stages.first: trains 32.0 epochs on pile; beyond 4 epochs, repeated tokens improve the model less and less: "
        "shorten the stage, or mix in other data",
    ]


def test_lr_at_counts_steps_from_1(plan, one_stage):
    """t = 1 is the first step, at the maximum after a warm-up of one step; after the end the LR is constant."""
    answer = plan(one_stage, "--lr-at", "0,1,100,1000")

    assert answer["lr_at"] == {"first": {"0": 0.0, "1": 1e-3, "100": 1e-4, "1000": 1e-4}}


def test_batch_lists_the_sequences_of_a_step(plan, two_stages):
    """[[source, ordinal], ...]: with five replayed sequences a batch, batch 3 (0-based) has those from 15 to 19."""
    batch = plan(two_stages, "--batch", "second", "3")["batch"]

    assert len(batch) == 20
    assert [ordinal for source, ordinal in batch if source == "pile"] == [15, 16, 17, 18, 19]
    assert [ordinal for source, ordinal in batch if source == "german"] == list(range(45, 60))


def test_the_world_size_changes_only_gradient_accumulation(plan, two_stages):
    """The steps of the plan are the same on any number of ranks."""
    one = plan(two_stages)
    ten = plan(two_stages, "--world-size", "10")
    keys = {"world_size", "accumulation", "layout"}

    assert (one["accumulation"], ten["accumulation"]) == (10, 1)
    assert {key: ten[key] for key in ten.keys() - keys} == {key: one[key] for key in one.keys() - keys}


@pytest.mark.parametrize(
    "words",
    [
        ("--stages.second.replay.fraction", "0.5", "--training.seq_len", "32"),
        ("--stages.second.replay.fraction=0.5", "--training.seq_len=32"),
        ("--training.seq_len=32", "--stages.second.replay.fraction", "0.5", "--job.description", "a b -- c"),
    ],
)
def test_keys_are_overridden_on_the_command_line(plan, two_stages, words):
    """As `--key value` and `--key=value`, between other options."""
    answer = plan(two_stages, *words)

    assert answer["step_tokens"] == 640
    assert answer["stages"][1]["datasets"]["pile"]["replayed_tokens"] == 16_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--stages.secnod.steps", "3"), "there is no stage 'secnod'; did you mean 'second'?"),
        (("--training.seq_len",), "--training.seq_len has no value"),
        (("--loud", "3"), "unknown argument '--loud'"),
        (("stray",), "two files are given, stray and --config "),
        (("--job.seed", "-1"), "job.seed: must be in [0, "),
        (
            ("--world-size", "3"),
            "training.global_batch_size: 20 is not a multiple of data-parallel ranks (3) x",
        ),
        (("--batch", "third", "0"), "there is no stage 'third'"),
        (("--recipe", "second", "x"), "the 0-based step must be an integer, got 'x'"),
        (("--world-size", "0"), "--world-size: must be an integer of 1 or more, got '0'"),
        (("--world-size", "many"), "--world-size"),
        (("--lr-at", "1,-2"), "--lr-at: must be comma-separated steps of 0 or more, such as 1,100, got '1,-2'"),
        (("--lr-at", "x"), "--lr-at"),
        (("--model.size", "huge"), "model.size: unknown size 'huge'"),
        (("--tokenizer.path", "data"), "data"),
    ],
)
def test_an_invalid_argument_is_status_2_with_a_message(run, write, two_stages, tmp_path, words, expected):
    """Unknown arguments, missing values, numbers out of range, impossible plans."""
    (tmp_path / "data").mkdir()
    status, out, err = run("plan", "--config", write(two_stages), *words)

    assert status == 2
    assert out == ""
    assert expected in err


def test_damaged_token_files_are_status_2(run, write, one_stage, tmp_path):
    """A DataError that names the file."""
    write_tokens(tmp_path / "data" / "pile", [1, 2, 3])
    (tmp_path / "data" / "pile.idx").write_bytes(b"not an index, though long enough to be one")
    status, _, err = run("plan", "--config", write(one_stage))

    assert status == 2
    assert err.startswith("DataError: datasets.pile.train: data/pile.idx")


def test_a_missing_config_is_status_2(run):
    """The message has its path."""
    status, _, err = run("plan", "--config", "gone.toml")

    assert (status, err.splitlines()) == (
        2,
        ["ConfigError: gone.toml: cannot be read: No such file or directory. Give the path of a TOML file"],
    )


def test_names_with_brackets_do_not_break_the_table(run, write, two_stages):
    """A path may contain markup of the terminal library."""
    words = ("--stages.second.init", "checkpoint:runs/[/red]x", "--stages.second.replay.from", "pile")
    status, out, err = run("plan", "--config", write(two_stages), "--tokenizer.path", "gone/[/bold].json", *words)

    assert (status, err) == (0, "")
    assert "runs/[/red]x" in out
    assert "tokenizer does not exist yet: gone/[/bold].json" in out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_can_be_planned_without_its_data(run, path):
    """On its minimum world size, in a folder with nothing but the tokenizer that it extends, if any."""
    if extend := read_with_bases(path).get("tokenizer", {}).get("extend"):
        Path(extend["base"]).parent.mkdir(parents=True)
        Path(extend["base"]).write_text(json.dumps(byte_tokenizer_json(256)))
    status, out, err = run("plan", "--config", path, "--json")

    assert (status, err) == (0, "")
    assert json.loads(out)["total_tokens"] > 0
