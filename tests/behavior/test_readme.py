"""README.md: its configuration and commands do what the text says, and its table shows our results."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from prepared import jsonl, words

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.planning.planner import make_plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN, NEWS = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
(COMMANDS,) = re.findall(r"```bash\n(titan-cpt plan.*?)```", README, flags=re.DOTALL)
GERMAN_END = "german/step-00000489"
SMALL = {  # a step of 64 tokens in place of 4,096, and a model for tests
    "tiny": "debug",
    "8192": "300",
    "= 256 ": "= 32 ",
    "= 256\n": "= 32\n",
    "batch_size = 16": "batch_size = 2",
    "batch_size  = 8": "batch_size  = 2",
    '"4M"': '"192"',
    '"2M"': '"128"',
    '"1M"': '"64"',
}


def small(text):
    """The README's TOML with the numbers of SMALL."""
    for before, after in SMALL.items():
        text = text.replace(before, after)
    return text


def test_the_checkpoint_that_the_readme_verifies_is_the_last_one_of_the_german_stage(write):
    """2M tokens at 4,096 a step are 489 steps; the appended stage replays both earlier datasets."""
    config = load_config(write(RUN + NEWS))
    _, german, news = make_plan(config, DataInventory({"english": None, "german": None, "news": None}, 8192)).stages

    assert f"outputs/mine/{GERMAN_END}" in COMMANDS
    assert german.steps == 489
    assert set(news.shares) == {"english", "german", "news"}


def test_the_commands_of_the_readme_run_and_only_an_appended_stage_is_trained(tmp_path):
    """Every command ends with status 0, on a small model; then the same training command trains only `news`."""
    for seed, language in enumerate(("english", "german", "news")):
        (tmp_path / "text" / language).mkdir(parents=True)
        (tmp_path / "text" / language / "a.jsonl").write_text(jsonl(words(200, seed)))
    config = tmp_path / "mine.toml"
    config.write_text(small(RUN))
    commands = [line.replace(GERMAN_END, "german/step-00000002") for line in COMMANDS.splitlines()]
    for command in commands:
        run(command, tmp_path)
    before = transitions(tmp_path / "outputs" / "mine")
    config.write_text(small(RUN + NEWS))
    run(commands[1], tmp_path)

    assert before == ["english", "german"]
    assert transitions(tmp_path / "outputs" / "mine") == ["english", "german", "news"]
    assert (tmp_path / "outputs" / "no_replay" / "german" / "step-00000002" / "manifest.json").exists()


def run(command, folder):
    """A command of the README, typed in `folder`; `run_train.sh` with one process is `titan-cpt train`."""
    words = shlex.split(command, comments=True)
    arguments = {"titan-cpt": words[1:], "./run_train.sh": ["train", *words[1:]]}[words[0]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "titan_cpt", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def transitions(folder):
    """The stages that a run began, in order."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["stage"] for line in lines if line.get("name") == "transition"]


def test_the_table_of_the_readme_has_the_results_of_the_reproduction():
    """Forgetting, loss on German and mean of each replay fraction are those of docs/reproduction/full.md, rounded."""
    full = (ROOT / "docs" / "reproduction" / "full.md").read_text(encoding="utf-8")
    for fraction, *shown in re.findall(r"^\| (0[.\d]*) \| (.*?) \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE):
        (row,) = re.findall(rf"^\| replay/fraction-{fraction} \|(.*)\|$", full, flags=re.MULTILINE)
        _, german, _, mean, forgetting, seeds = row.split("|")

        assert int(seeds) == 3
        assert shown == [rounded(forgetting, 2), rounded(german, 3), rounded(mean, 3)]


def rounded(text, digits):
    """`1.2345 ± 0.0678` with this number of digits."""
    return " ± ".join(f"{float(number):.{digits}f}" for number in text.split("±"))
