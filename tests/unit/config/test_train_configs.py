"""Every shipped TOML file loads and plans, and has the paper's numbers, computed by hand."""

import json
from pathlib import Path

import pytest

from titan_cpt.config.toml_files import read_with_bases
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.planner import make_plan
from titan_cpt.runs.sweep_runs import SweepRun, read_sweep_runs

CONFIGS = Path(__file__).resolve().parents[3] / "train_configs"
RUNS = sorted(CONFIGS.glob("*.toml"))
PAPERS = [path for path in RUNS if path.name.startswith(("405m", "10b"))]

STEP_TOKENS = 1104 * 2048
PARAMETERS = {"405m": 405_334_016, "10b": 9_642_249_216}  # embeddings included
PEAK = {"405m": 3e-4, "10b": 1.2e-4}
T300, T100, GERMAN = 132_366, 44_229, 86_000
LR_IS_VARIED = {"lr", "constant", "average", "infinite"}  # in a file's name: tests below check their LRs
OF_USUAL_LR = [path for path in PAPERS if not LR_IS_VARIED & {*path.stem.split("_")}]

# Steps of each stage, by the last words of the file's name; tokens of the domains over 2,260,992, rounded up by hand.
STEPS = {
    "pile": [T300],
    "german": [GERMAN],
    "slimpajama": [T300],
    "slimpajama_infinite": [T300],
    "union_pile_slimpajama": [264_732],
    "union_pile_german": [218_366],
    "pile_to_german": [T300, GERMAN],
    "pile_to_slimpajama": [T300, T300],
    "pile_to_pile_lr": [T300, T300],
    "iid_splits": [T100] * 3,
    "pile_to_slimpajama_splits": [T300, T100, T100, T100],
    "pile_to_slimpajama_domains": [T300, 5308, 5573, 35_414, 4472, 6927, 69_116, 5878],
}
STEPS |= {f"pile_to_{d}_{of}": STEPS[f"pile_to_{d}"] for d in ("german", "slimpajama") for of in ("lr", "replay")}
STEPS |= {f"pile_to_{d}_{of}": STEPS[f"pile_to_{d}"] for d in ("german", "slimpajama") for of in ("warmup", "constant")}
STEPS |= {
    f"iid_splits_{kind}": STEPS["iid_splits"] for kind in ("average", "cosine", "infinite_cosine", "infinite_inv_sqrt")
}

SHARES_OF_THE_SPLITS = {  # in percent of the stage's sequences, computed from the authors' rule
    "split1": {"pile": 5.0, "split1": 95.0},
    "split2": {"pile": 3.8125, "split1": 1.1875, "split2": 95.0},
    "split3": {"pile": 3.088125, "split1": 0.961875, "split2": 0.95, "split3": 95.0},
}


def sweep_runs_of(path):
    """The sweep runs of a file, all of them valid."""
    runs = read_sweep_runs([path])
    assert all(isinstance(run, SweepRun) for run in runs), runs
    return runs


def plans_of(path):
    """The plans of its sweep runs, or of its only run, with the fewest ranks of its parallelism."""
    return [run.plan for run in sweep_runs_of(path)]


@pytest.fixture(params=PAPERS, ids=lambda path: path.stem)
def paper(request):
    """A file of the paper's runs: its size, the rest of its name, and its path."""
    size, _, what = request.param.stem.partition("_")
    return size, what, request.param


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_plans(path, tmp_path, monkeypatch):
    """Each of its sweep runs, with the fewest ranks of its parallelism; job.name is the name of the file."""
    monkeypatch.chdir(tmp_path)
    if base := read_with_bases(path).get("tokenizer", {}).get("extend"):
        Path(base["base"]).parent.mkdir(parents=True)
        Path(base["base"]).write_text(json.dumps(byte_tokenizer_json(256)))
    runs = sweep_runs_of(path)

    assert read_with_bases(path)["job"]["name"] == path.stem
    for run in runs:
        plan = make_plan(run.config, take_inventory(run.config), min_world_size(run.config))
        assert plan.fingerprint == run.plan.fingerprint


@pytest.mark.parametrize("path", [*RUNS, *sorted((CONFIGS / "base").glob("*.toml"))], ids=lambda path: path.stem)
def test_every_config_begins_with_three_comment_lines(path):
    """What it trains; hardware and expected result; token arithmetic. Then an empty line."""
    lines = path.read_text().splitlines()

    assert [line.startswith("# ") for line in lines[:4]] == [True, True, True, False]
    assert max(map(len, lines)) <= 120


def test_every_base_is_extended_by_a_run():
    """A base is removed together with the last run that extends it."""
    texts = "".join(path.read_text() for path in CONFIGS.rglob("*.toml"))
    unused = [path.name for path in (CONFIGS / "base").glob("*.toml") if f'{path.name}"' not in texts]

    assert unused == []


def test_the_papers_model_and_batch_of_every_config(paper):
    """Parameters, and 2,260,992 tokens a step."""
    size, _, path = paper

    for plan in plans_of(path):
        assert plan.spec.parameters == PARAMETERS[size]
        assert plan.step_tokens == STEP_TOKENS == 2_260_992


def test_the_papers_steps_of_every_config(paper):
    """132,366 steps are 300B tokens, 44,229 are 100B; a domain's steps are its tokens over a step's, rounded up."""
    _, what, path = paper

    for plan in plans_of(path):
        assert [stage.steps for stage in plan.stages] == STEPS[what]


@pytest.mark.parametrize("path", OF_USUAL_LR, ids=lambda path: path.stem)
def test_the_papers_lr_of_every_config(path):
    """From the peak (within 1e-5, because it is between two steps) down to a tenth of it on the last step."""
    size = path.stem.partition("_")[0]

    for plan in plans_of(path):
        for stage in plan.stages:
            peak = max(stage.lr_at(step) for step in range(stage.steps // 40))
            assert peak == pytest.approx(PEAK[size], rel=1e-5)
            assert stage.lr_at(stage.steps - 1) == pytest.approx(PEAK[size] / 10, rel=1e-12)


def test_the_infinite_schedules_have_the_papers_numbers():
    """Steps 662, 20,000, 60,000, 120,000 and the last, computed from the formulas of the paper; and the cosine."""
    cosine, infinite_cosine, infinite_inv_sqrt = (
        plan.stages[0] for plan in plans_of(CONFIGS / "405m_slimpajama_infinite.toml")
    )

    def at(stage):
        return [stage.lr_at(t - 1) for t in (662, 20_000, 60_000, 120_000, 132_366)]

    ends = [8.674269e-05, 3.000000e-05]
    assert at(infinite_cosine) == pytest.approx([1.500385e-04, 2.818292e-04, 1.845703e-04, *ends], rel=1e-6)
    assert at(infinite_inv_sqrt) == pytest.approx([1.500385e-04, 2.116752e-04, 1.729661e-04, *ends], rel=1e-6)
    assert at(cosine)[:2] == pytest.approx([1.500385e-04, 2.866925e-04], rel=1e-6)


@pytest.mark.parametrize("kind", ["infinite_cosine", "infinite_inv_sqrt"])
def test_later_splits_begin_before_the_annealing_at_the_constant_lr(kind):
    """Split 2 starts from the weights at 85 % of split 1 (37,594.65: after step 37,594), with an LR of 1.65e-4."""
    (plan,) = plans_of(CONFIGS / f"405m_iid_splits_{kind}.toml")

    for earlier, stage in zip(plan.stages, plan.stages[1:], strict=False):
        assert (stage.init.stage, stage.init.steps_done) == (earlier.name, 37_594)
        assert stage.lr_at(0) == pytest.approx(1.65e-4)
        assert stage.lr_at(stage.steps - 1) == pytest.approx(3e-5)


@pytest.mark.parametrize(
    ("name", "stage", "fractions"),
    [
        ("405m_pile_to_slimpajama_replay", "slimpajama", [0, 0.5, 1, 5, 10, 50]),
        ("405m_pile_to_german_replay", "german", [0, 1, 5, 10, 25, 50]),
        ("10b_pile_to_slimpajama_replay", "slimpajama", [0, 5]),
        ("10b_pile_to_german_replay", "german", [0, 5, 25]),
    ],
)
def test_replay_has_its_fraction_of_an_unchanged_budget(name, stage, fractions):
    """Replayed tokens of the Pile, within one sequence of the configured percentage, in every sweep run."""
    for plan, percent in zip(plans_of(CONFIGS / f"{name}.toml"), fractions, strict=True):
        last = plan.stage(stage)
        replayed = sum(use.replayed_tokens for use in last.use_by_dataset.values())
        budget = sum(use.tokens for use in last.use_by_dataset.values())

        assert abs(replayed - percent / 100 * budget) < 2048
        assert budget == last.steps * STEP_TOKENS


@pytest.mark.parametrize("dataset", ["slimpajama", "german"])
def test_the_sweeps_of_peak_warm_up_and_constant_lr(dataset):
    """Peaks of 1.5e-4, 3e-4 and 6e-4; warm-ups of 0, 0.5, 1 and 2 %; constant 3e-5 and 3e-4. None has replay."""

    def last_of(which):
        return [plan.stages[-1] for plan in plans_of(CONFIGS / f"405m_pile_to_{dataset}_{which}.toml")]

    peaks = [max(stage.lr_at(step) for step in range(3000)) for stage in last_of("lr")]
    firsts = [stage.lr_at(0) for stage in last_of("warmup")]
    steps = STEPS[f"pile_to_{dataset}"][-1]
    ends = [stage.lr_at(stage.steps - 1) for stage in last_of("constant")]

    assert peaks == pytest.approx([1.5e-4, 3e-4, 6e-4], rel=1e-5)
    assert firsts[0] == pytest.approx(3e-4, rel=1e-6)
    assert firsts[1:] == pytest.approx([3e-4 / (share * steps) for share in (0.005, 0.01, 0.02)])
    assert ends == pytest.approx([3e-5, 3e-4])
    for stage in [*last_of("lr"), *last_of("warmup"), *last_of("constant")]:
        assert sum(use.replayed_tokens for use in stage.use_by_dataset.values()) == 0


@pytest.mark.parametrize("size", ["405m", "10b"])
def test_joint_training_weights_each_dataset_by_its_tokens(size):
    """Equal weights with SlimPajama; 132,366 to 86,000 with German."""
    (weak,) = plans_of(CONFIGS / f"{size}_union_pile_slimpajama.toml")
    (strong,) = plans_of(CONFIGS / f"{size}_union_pile_german.toml")

    assert {name: float(share) for name, share in weak.stages[0].shares.items()} == {"pile": 0.5, "slimpajama": 0.5}
    assert float(strong.stages[0].shares["pile"]) == pytest.approx(132_366 / 218_366, rel=1e-12)


def test_four_stages_replay_earlier_datasets_as_in_the_paper():
    """In percent of the sequences of each stage."""
    (plan,) = plans_of(CONFIGS / "405m_pile_to_slimpajama_splits.toml")

    for name, expected in SHARES_OF_THE_SPLITS.items():
        shares = {dataset: 100 * float(share) for dataset, share in plan.stage(name).shares.items()}
        assert shares == pytest.approx(expected, abs=3e-3)  # its 300B are 299.28B in whole steps


def test_slimpajamas_domains_have_the_papers_weights():
    """In percent of the sequences; the largest is Common Crawl with 52.09."""
    (plan,) = plans_of(CONFIGS / "405m_slimpajama.toml")
    use = {name.partition(".")[2]: use.tokens for name, use in plan.stages[0].use_by_source.items()}
    percent = {name: 100 * tokens / (T300 * STEP_TOKENS) for name, tokens in use.items()}

    assert percent == pytest.approx(
        {
            "wikipedia": 4.00,
            "book": 4.20,
            "c4": 26.69,
            "stackexchange": 3.37,
            "github": 5.22,
            "commoncrawl": 52.09,
            "arxiv": 4.43,
        },
        abs=1e-5,
    )
