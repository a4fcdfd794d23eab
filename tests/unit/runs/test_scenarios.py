"""The configs that `init` writes: each one plans, has comments on its values, and the laptop's one trains."""

import json
import random
import re
from pathlib import Path

import pytest
import training

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import ConfigError
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.planner import make_plan
from titan_cpt.runs.scenarios import SCENARIOS, ScenarioOptions, scenario_text, write_scenario

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder without data, in which `mine.toml` is the config of a run."""
    monkeypatch.chdir(tmp_path)
    write_scenario("laptop", Path("mine.toml"), ScenarioOptions())
    return tmp_path


def write_text(folder, seed, documents=120):
    """A .jsonl file of sentences of made-up words."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(documents)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_plans_and_explains_itself(scenario):
    """Without data on the disk; three header lines, and a comment on most keys."""
    config = write_scenario(scenario, Path("new.toml"), ScenarioOptions())
    text = Path("new.toml").read_text(encoding="utf-8")

    make_plan(config, take_inventory(config), min_world_size(config))
    assert load_config(Path("new.toml")) == config
    assert all(line.startswith("# ") for line in text.splitlines()[:3])
    assert "titan-cpt plan new.toml" in text or scenario == "sweep"
    assert text.count("  # ") >= 3
    assert "${" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_laptop_scenario_trains_word_for_word(here):
    """From text to a model with one command; nothing of the written file is changed."""
    write_text(here / "text" / "dogs", 1)
    write_text(here / "text" / "cats", 2)
    options = ScenarioOptions(name="pets", texts=["dogs=text/dogs/*.jsonl", "cats=text/cats/*.jsonl"], steps=6)
    write_scenario("laptop", Path("pets.toml"), options)
    outcome = training.train(Path("pets.toml"))

    assert outcome.status == 0, outcome.output
    summary = json.loads(Path("outputs/pets/summary.json").read_text(encoding="utf-8"))
    assert [(stage["name"], stage["is_done"]) for stage in summary["stages"]] == [("dogs", True), ("cats", True)]
    assert summary["stages"][1]["replayed_tokens"]["dogs"] > 0


def test_new_data_extends_the_run_of_another_file():
    """The same run name and the same first stages, so that only the new stage is left to train."""
    base = load_config(Path("mine.toml"))
    Path("later").mkdir()
    config = write_scenario("new-data", Path("later/news.toml"), ScenarioOptions(base=Path("mine.toml")))

    assert config.job == base.job
    assert config.stages[:2] == base.stages
    assert [stage.name for stage in config.stages] == ["english", "german", "news"]
    assert 'extends = "../mine.toml"' in Path("later/news.toml").read_text(encoding="utf-8")


def test_new_data_after_an_infinite_stage_continues_its_constant_phase():
    """With the same learning rate and the optimizer state; after any other stage it is re-warmed to the same peak."""
    write_scenario("infinite", Path("infinite.toml"), ScenarioOptions())
    last = write_scenario("new-data", Path("a.toml"), ScenarioOptions(base=Path("infinite.toml"))).stages[-1]
    rewarmed = write_scenario("new-data", Path("b.toml"), ScenarioOptions(base=Path("mine.toml"))).stages[-1]

    assert (last.optimizer_state, last.lr.schedule, last.lr.constant) == ("keep", "infinite_cosine", 1.5e-3)
    assert (last.lr.warmup_until, last.lr.cooldown_until) == (0, 0)
    assert (rewarmed.optimizer_state, rewarmed.lr.schedule, rewarmed.lr.max) == ("reset", "cosine", 1.5e-3)
    assert rewarmed.steps == 300


def test_the_annealing_that_a_comment_suggests_is_of_the_end_of_the_constant_phase():
    """80 % of the steps: the step of the pre-anneal checkpoint."""
    text = scenario_text("infinite", Path("i.toml"), ScenarioOptions(steps=50))
    config = write_scenario("infinite", Path("i.toml"), ScenarioOptions(steps=50))
    plan = make_plan(config, take_inventory(config))

    (step,) = re.findall(r"titan-cpt anneal outputs/mine/english/step-(\d{8}) ", text)
    assert int(step) == plan.stages[0].pre_anneal_step == 40


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("EleutherAI/pythia-1.4b", None, ("gpt_neox", "1.4b")),
        ("EleutherAI/pythia-410m@step143000", None, ("gpt_neox", "410m")),
        ("meta-llama/Llama-3.2-1B", None, ("llama", "llama3.2-1b")),
        ("someone/llama", "llama3.2-1b", ("llama", "llama3.2-1b")),
    ],
)
def test_a_released_model_gets_its_family_and_size(model, size, expected):
    """The size of a release follows from its hub name; of another model it is given."""
    config = write_scenario("released", Path("r.toml"), ScenarioOptions(model=model, size=size))

    assert (config.model.family, config.model.size) == expected
    assert config.stages[0].init == f"hf:{model}"


@pytest.mark.parametrize(
    ("scenario", "options", "message"),
    [
        ("labtop", {}, "unknown scenario 'labtop'; did you mean 'laptop'? known are laptop, released, "),
        ("laptop", {"model": "x"}, "--model is not an option of the scenario 'laptop', but of released"),
        ("cluster", {"steps": 3}, "--steps is not an option of the scenario 'cluster', but of laptop, "),
        ("new-data", {"name": "x"}, "--name is not an option of 'new-data'"),
        ("new-data", {"base": Path("gone.toml")}, "gone.toml: no such file; --base names the config of the run"),
        ("released", {"model": "a/b"}, "--size must name the size of the model 'a/b'; known are debug, "),
        ("laptop", {"texts": ["a", "b", "c"]}, "--text is given 3 times; this scenario has 2 datasets: english, ger"),
        ("laptop", {"texts": ["x=a", "x=b"]}, "two datasets have the name 'x'"),
        ("released", {"model": ""}, "--size must name the size of the model ''; known are debug, "),
        ("laptop", {"name": "../up"}, "job.name: is the name of a folder"),
        ("laptop", {"name": 'a"b\\c\n'}, "job.name: is the name of a folder"),
        ("laptop", {"name": ""}, "job.name: is the name of a folder"),
        ("laptop", {"size": "huge"}, "--size: unknown size 'huge'; known are debug, tiny, mini, "),
    ],
)
def test_a_mistake_writes_nothing(scenario, options, message):
    """Neither the file nor a draft of it is left."""
    before = sorted(Path().iterdir())
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_scenario(scenario, Path("x.toml"), ScenarioOptions(**options))

    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "folder: is a folder. Give the path of the file to write, such as folder/laptop.toml"),
        ("gone/x.toml", "gone/x.toml: gone is not a folder that exists; make it, or give another path"),
        ("file/x.toml", "file/x.toml: file is not a folder that exists; make it, or give another path"),
    ],
)
def test_a_path_that_cannot_be_a_file_is_a_mistake(path, message):
    """--force does not replace a folder."""
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_scenario("laptop", Path(path), ScenarioOptions(), force=True)


def test_values_of_the_user_are_toml_strings():
    """Quotes, backslashes, and what looks like a comment or a placeholder."""
    files = 'a "b" \\ # ${name}  # x\x7f.jsonl'
    config = write_scenario("laptop", Path("odd.toml"), ScenarioOptions(texts=[files]))

    assert config.datasets["english"].source.text == (files,)


def test_a_file_that_exists_is_replaced_only_by_force():
    """Its content stays."""
    Path("mine.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.toml: exists already and was not changed; give another name, or --f"):
        write_scenario("laptop", Path("mine.toml"), ScenarioOptions())
    assert Path("mine.toml").read_text(encoding="utf-8") == "mine"
    write_scenario("laptop", Path("mine.toml"), ScenarioOptions(), force=True)
    assert load_config(Path("mine.toml")).job.name == "mine"
