"""Baselines: each changes one thing of the config, has its compute, and shares stages with the others."""

import extended
import pytest
import training
from sweeps import stages_trained_in, status_of

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.planner import make_plan
from titan_cpt.runs.baselines import derive_baselines
from titan_cpt.runs.shared_stages import count_shared_stages
from titan_cpt.runs.sweep_runs import SweepRun, read_sweep_runs

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """English with an infinite schedule for 12 steps, then German for 10 with 25 % replay."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path / "out")


def plans_of(raw, tmp_path):
    """The plan of every baseline, by name."""
    config = load_config(training.write_config(raw, tmp_path / "c.toml"))
    plan = make_plan(config, take_inventory(config))
    found = list(derive_baselines(config, plan))
    assert len({baseline.name for baseline in found}) == len(found)
    return {baseline.name: make_plan(baseline.config, take_inventory(baseline.config)) for baseline in found}


def lrs(stage):
    return [stage.lr_at(step) for step in range(stage.steps)]


def test_every_baseline_differs_in_what_its_name_says(raw, tmp_path):
    """By hand: 12 + 10 steps in the union, 12 : 10; 10 of German only; no sequence replayed; LRs that stay."""
    plans = plans_of(raw, tmp_path)
    union, alone, bare = (plans[name].stages for name in ("union", "alone-german", "no-replay"))

    assert [*plans] == ["union", "alone-english", "alone-german", "no-replay", "constant-min", "constant-max"]
    assert [(stage.steps, stage.init) for stage in union] == [(22, "random")]
    assert {name: float(share) for name, share in union[0].shares.items()} == pytest.approx(
        {"en": 12 / 22, "de": 10 / 22}
    )
    assert max(lrs(union[0])) == pytest.approx(3e-3, rel=0.5)
    assert lrs(union[0])[-1] == pytest.approx(3e-4)
    assert [(stage.steps, stage.init, stage.datasets) for stage in alone] == [(10, "random", ("de",))]
    assert [stage.name for stage in plans["alone-english"].stages] == ["english"]
    assert {use.replayed_tokens for use in bare[1].use_by_dataset.values()} == {0}


def test_baselines_of_a_mixture_by_tokens_have_the_weights_of_its_plan(raw, tmp_path):
    """Also without replay, where the same bound on epochs would give others."""
    raw["stages"][1]["dataset"] = {"of": ["en", "de"], "by": "tokens", "temperature": 0.5}
    raw["stages"][1]["replay"]["from"] = "en"
    config = load_config(training.write_config(raw, tmp_path / "m.toml"))
    plan = make_plan(config, take_inventory(config))
    weights = plan.stages[1].recipe["dataset"]
    bare = next(each.config for each in derive_baselines(config, plan) if each.name == "no-replay")

    assert make_plan(bare, take_inventory(bare)).stages[1].recipe["dataset"] == weights
    assert isinstance(bare.stages[1].dataset, dict)


def test_the_constant_baselines_have_the_last_lr_of_the_stage_before_and_the_peak(raw, tmp_path):
    """German begins before the annealing, at the constant 2e-3; after a cosine it would begin at its minimum, 3e-4."""
    infinite = plans_of(raw, tmp_path)
    raw["stages"][0]["lr"] = {"schedule": "cosine", "max": 3e-3}
    raw["stages"][1]["lr"] = {"schedule": "cosine", "max": 4e-3, "warmup_until": 2}
    cosine = plans_of(raw, tmp_path)

    assert lrs(infinite["constant-min"].stages[1]) == pytest.approx([2e-3] * 10)
    assert lrs(cosine["constant-min"].stages[1]) == pytest.approx([3e-4] * 10)
    assert lrs(cosine["constant-max"].stages[1]) == pytest.approx([2e-3, *[4e-3] * 9])
    assert cosine["constant-max"].stages[0].recipe == cosine["no-replay"].stages[0].recipe


def test_domains_come_one_after_another_in_the_same_number_of_steps(raw, tmp_path):
    """Weights 1 : 2 of 10 steps are 3 and 7; the mixed dataset is still validated on; replay stays."""
    parts = {name: {"train": str(tmp_path / "de"), "weight": weight} for name, weight in (("a", 1.0), ("b", 2.0))}
    raw["datasets"]["de"] = {"validation": str(tmp_path / "de-validation"), "domains": parts}
    plan = plans_of(raw, tmp_path)["domain-after-domain"]

    assert [(stage.name, stage.steps) for stage in plan.stages] == [("english", 12), ("german-a", 3), ("german-b", 7)]
    assert plan.stages[1].datasets == ("de-a",)
    assert float(plan.stages[1].shares["en"]) == 0.25


def test_shorter_stages_warm_up_on_their_own_steps_and_pull_their_weights_at_the_end(raw, tmp_path):
    """German's 10 steps become 3 and 7: a warm-up of 5 passes and pulls after every fifth step fit only the second."""
    parts = {name: {"train": str(tmp_path / "de"), "weight": weight} for name, weight in (("a", 1.0), ("b", 2.0))}
    raw["datasets"]["de"] = {"validation": str(tmp_path / "de-validation"), "domains": parts}
    raw["stages"][1] |= {"optimizer_state": "warm:5", "reptile": {"every": 5, "step": 0.1}}
    plans = plans_of(raw, tmp_path)
    kept, parted = plans["no-replay"].stages[1:], plans["domain-after-domain"].stages[1:]

    assert [(stage.warm_up_passes, stage.reptile.every) for stage in (*kept, *parted)] == [(5, 5), (3, 3), (5, 5)]
    assert plans["union"].stages[0].reptile is None  # as the first stage, whose settings it has


def test_runs_from_scratch_train_all_weights(raw, tmp_path):
    """Not only those that the first stage trains; factors of the learning rate stay where it trains all."""
    raw["stages"][0] |= {"trainable": ["embedding", "head"], "lr_scale": {"head": 2.0}}
    scratch = ("union", "alone-english", "alone-german")
    some = plans_of(raw, tmp_path)
    del raw["stages"][0]["trainable"]
    every = plans_of(raw, tmp_path)

    assert [some[name].stages[0].partition for name in scratch] == [None] * 3
    assert [every[name].stages[0].partition.scales for name in scratch] == [{"head": 2.0}] * 3
    assert some["no-replay"].stages[0].partition.parts["final_norm.weight"] == ()


def test_only_the_first_of_several_domains_initializes_rows(raw, tmp_path):
    """Otherwise each domain would begin with rows that have forgotten the domains before it."""
    raw["tokenizer"] = extended.write_tokenizers(tmp_path)
    parts = {name: {"train": str(tmp_path / "de"), "weight": 1.0} for name in ("a", "b")}
    raw["datasets"]["de"] = {"validation": str(tmp_path / "de-validation"), "domains": parts}
    rows = {"init": "hf:somewhere", "optimizer_state": "reset", "new_rows": "mean", "weak_rows": "mean"}
    raw["stages"][1] |= rows
    raw["stages"][1]["replay"]["from"] = ["en"]
    first, second = plans_of(raw, tmp_path)["domain-after-domain"].stages[1:]

    assert (first.init, first.new_rows.kind, first.recipe["weak_rows"]) == ("hf:somewhere", "mean", "mean")
    assert second.init == StageCheckpoint("german-a", 5)
    assert second.new_rows is None
    assert "weak_rows" not in second.recipe


def test_a_stage_that_starts_from_a_mixed_one_starts_from_the_last_of_its_domains(raw, tmp_path):
    """The stage that its `init` names has another name there."""
    parts = {name: {"train": str(tmp_path / "de"), "weight": 1.0} for name in ("a", "b")}
    raw["datasets"]["de"] = {"validation": str(tmp_path / "de-validation"), "domains": parts}
    raw["stages"].append(training.third_stage() | {"init": "stage:german@average"})
    raw["averaging"] = {"kind": "mean"}
    plan = plans_of(raw, tmp_path)["domain-after-domain"]

    assert plan.stages[3].init == StageCheckpoint("german-b", 5, average=True)


def test_a_start_from_released_weights_has_no_union(raw, tmp_path):
    """Its data is not known; the other baselines start from the same weights."""
    raw["stages"] = [raw["stages"][1] | {"init": "hf:somewhere", "optimizer_state": "reset"}]
    raw["stages"][0]["replay"]["from"] = ["en"]
    plans = plans_of(raw, tmp_path)

    assert [*plans] == ["no-replay", "constant-min", "constant-max"]
    assert lrs(plans["constant-min"].stages[0]) == pytest.approx([2e-4] * 10)


def test_a_single_stage_from_scratch_has_no_baselines(raw, tmp_path, capsys):
    """The command says so, with status 2."""
    raw["stages"] = raw["stages"][:1]
    path = training.write_config(raw, tmp_path / "c.toml")

    assert status_of("baselines", "--config", path) == 2
    assert "has no baselines" in capsys.readouterr().err


def test_the_command_writes_files_that_a_sweep_trains_with_english_once(raw, tmp_path, capsys):
    """Seven TOMLs; every run that begins with English shares it, the union and German from scratch share nothing.

    Of two of them that are trained, the second links the first one's English.
    """
    path = training.write_config(raw, tmp_path / "c.toml")
    status = status_of("baselines", "--config", path, "--job.seed", "5")
    said = capsys.readouterr().out
    files = sorted((tmp_path / "out" / "run-baselines" / "configs").glob("*.toml"))
    runs = [run for run in read_sweep_runs(files) if isinstance(run, SweepRun)]
    shared = {run.name: count_shared_stages(run, runs) for run in runs}
    trained = status_of("sweep", files[0], files[4])  # alone-english and constant-min

    assert status == 0
    assert f"titan-cpt sweep {files[0].parent}/*.toml" in said
    assert {run.config.job.seed for run in runs} == {5}
    assert shared == {
        "run": 1,
        "alone-english": 1,
        "alone-german": 0,
        "constant-max": 1,
        "constant-min": 1,
        "no-replay": 1,
        "union": 0,
    }
    assert trained == 0
    assert stages_trained_in(runs[4].folder) == ["german"]


def test_the_command_trains_all_of_them(raw, tmp_path, capsys):
    """--run trains the run itself and its six baselines, each with the --launch command."""
    path = training.write_config(raw, tmp_path / "c.toml")
    status = status_of("baselines", "--config", path, "--run", "--launch", "true")
    said = capsys.readouterr().out

    assert status == 0
    assert "[1/7] run" in said
    assert "[7/7] constant-max" in said


def test_the_command_replaces_only_what_it_wrote_for_this_job(raw, tmp_path, capsys):
    """It replaces its own file of another config; an edited one, another job's and the user's are named and stay."""
    path, out = training.write_config(raw, tmp_path / "c.toml"), tmp_path / "configs"
    words = ("baselines", "--config", path, "--output", out)
    assert status_of(*words) == 0
    assert status_of(*words, "--job.seed", "5") == 0
    first = (out / "union.toml").read_text()
    assert "seed = 5" in first

    for name, text in (
        ("union.toml", first.replace("seed = 5", "seed = 6")),
        ("union.toml", "# mine\n"),
        ("no-replay.toml", first.replace("# run, ", "# other, ")),
    ):
        before = (out / name).read_text()
        (out / name).write_text(text)
        capsys.readouterr()
        assert status_of(*words) == 2
        assert f"{out / name}: is not what `titan-cpt baselines` wrote for run" in capsys.readouterr().err
        assert (out / name).read_text() == text
        assert "seed = 5" in (out / "configured.toml").read_text(), "nothing else was changed"
        (out / name).write_text(before)
    assert status_of(*words) == 0


def test_files_of_a_version_without_checksums_and_with_fewer_keys_are_its_own(raw, tmp_path, capsys):
    """As commit 987a5cd wrote them: missing keys have their defaults. A comment shows that somebody edited the file."""
    path, out = training.write_config(raw, tmp_path / "c.toml"), tmp_path / "configs"
    words = ("baselines", "--config", path, "--output", out)
    assert status_of(*words) == 0
    now = {file.name: file.read_text() for file in out.iterdir()}
    for name, text in now.items():
        about, _, rest = text.partition("\n")
        tables = rest.partition("\n\n")[2].replace("allow_mismatch = false\n", "")
        assert tables != rest.partition("\n\n")[2]
        (out / name).write_text(f"{about}\n\n{tables}")
    assert status_of(*words) == 0
    assert {file.name: file.read_text() for file in out.iterdir()} == now

    old = (out / "union.toml").read_text().replace("allow_mismatch = false\n", "# mine\n")
    lines = old.splitlines(keepends=True)
    (out / "union.toml").write_text("".join([lines[0], *lines[2:]]))
    capsys.readouterr()
    assert status_of(*words) == 2
    assert capsys.readouterr().out == "", "nothing is listed that was not written"


def test_baselines_of_stages_with_other_lengths_have_the_same_tokens(raw, tmp_path):
    """768 tokens of English and 10 steps of 4 x 32 of German: the union has 2,048 tokens, in steps of 64."""
    raw["stages"][1] |= {"seq_len": 32, "local_batch_size": 1}
    plans = plans_of(raw, tmp_path)
    (union,), (alone,) = (plans[name].stages for name in ("union", "alone-german"))

    assert (union.tokens, union.steps, union.seq_len) == (2048, 32, 16)
    assert {name: float(share) for name, share in union.shares.items()} == {"en": 768 / 2048, "de": 1280 / 2048}
    assert (alone.tokens, alone.steps, alone.seq_len, alone.local_batch_size) == (1280, 10, 32, 1)


def test_domains_one_after_another_have_the_batch_of_the_mixed_steps(raw, tmp_path):
    """A ramp from 2 to 4 sequences at step 8 of 10: the first domain has steps 0 to 2, the second one 3 to 9."""
    parts = {name: {"train": str(tmp_path / "de"), "weight": weight} for name, weight in (("a", 1.0), ("b", 2.0))}
    raw["datasets"]["de"] = {"validation": str(tmp_path / "de-validation"), "domains": parts}
    raw["stages"][1]["global_batch_size"] = {"0": 2, "256": 4}
    plan = plans_of(raw, tmp_path)["domain-after-domain"]
    sizes = [[stage.batch_sizes.at(step) for step in range(stage.steps)] for stage in plan.stages[1:]]

    assert sizes == [[2] * 3, [2] * 5 + [4] * 2]


def test_baselines_of_stages_under_one_schedule_keep_it_one(raw, tmp_path):
    """German continues English's cosine: no LR of its own to make constant; the third stage has one."""
    raw["stages"] = [
        {
            "name": "english",
            "dataset": "en",
            "steps": 12,
            "lr": {"schedule": "cosine", "max": 3e-3, "warmup_until": 14},
        },
        {"name": "german", "dataset": "de", "steps": 8, "lr": {"schedule": "continue"}, "replay": {"fraction": 0.25}},
    ]
    spanned = plans_of(raw, tmp_path)
    raw["stages"] += [
        {"name": "again", "dataset": "en", "steps": 4, "lr": {"schedule": "cosine", "max": 2e-3}},
        {"name": "more", "dataset": "de", "steps": 4, "lr": {"schedule": "continue"}},
    ]
    longer = plans_of(raw, tmp_path)

    assert [*spanned] == ["union", "alone-english", "alone-german", "no-replay"]
    assert max(lrs(spanned["union"].stages[0])) == max(lrs(spanned["no-replay"].stages[1])) == 3e-3
    # 70 % of the schedule is warm-up, of a shorter one too.
    assert lrs(spanned["alone-german"].stages[0])[:6] == pytest.approx(
        [3e-3 * t / 5.6 for t in (1, 2, 3, 4, 5, 5.6)], rel=0.1
    )
    assert lrs(longer["constant-max"].stages[3]) == [2e-3] * 4
    assert lrs(longer["constant-min"].stages[2]) == pytest.approx([3e-4] * 4)
    assert [stage.keep_optimizer for stage in longer["constant-max"].stages] == [False, True, False, True]


def test_domains_one_after_another_share_the_schedule_that_their_stage_begins(raw, tmp_path):
    """A cosine over German's three domains and the stage that continues it stays one cosine, over the same steps."""
    tables = {name: {"train": raw["datasets"]["de"]["train"], "weight": 1.0} for name in ("a", "b", "c")}
    raw["datasets"]["de"] = {"domains": tables}
    raw["stages"][1] = {"name": "german", "dataset": "de", "steps": 9, "lr": {"schedule": "cosine", "max": 2e-3}}
    raw["stages"].append({"name": "again", "dataset": "en", "steps": 3, "lr": {"schedule": "continue"}})
    config = load_config(training.write_config(raw, tmp_path / "c.toml"))
    configured = make_plan(config, take_inventory(config))
    plan = plans_of(raw, tmp_path)["domain-after-domain"]

    assert [stage.name for stage in plan.stages] == ["english", "german-a", "german-b", "german-c", "again"]
    assert [lr for stage in plan.stages for lr in lrs(stage)] == [
        lr for stage in configured.stages for lr in lrs(stage)
    ]


def test_the_baseline_of_a_stage_has_the_rope_that_its_stage_inherits(raw, tmp_path):
    """The second stage changes base and scaling, the third one has them from it; the fourth removes the scaling."""
    yarn = {"base": 50_000.0, "kind": "yarn", "factor": 2.0, "original_seq_len": 16, "beta_fast": 20.0}
    lr = {"schedule": "constant", "max": 1e-3}
    raw["stages"][1]["rope"] = yarn
    raw["stages"] += [{"name": "third", "dataset": "en", "steps": 2, "lr": lr}]
    raw["stages"] += [{"name": "fourth", "dataset": "de", "steps": 2, "lr": lr, "rope": {"kind": "none"}}]
    plans = plans_of(raw, tmp_path)
    ropes = [plans[f"alone-{name}"].stages[0].spec.rope for name in ("english", "german", "third", "fourth")]
    configured = make_plan(config := load_config(tmp_path / "c.toml"), take_inventory(config)).stages

    assert ropes == [stage.spec.rope for stage in configured]
    assert [rope.scaling and rope.scaling.beta_fast for rope in ropes] == [None, 20.0, 20.0, None]
    assert [rope.base for rope in ropes] == [10_000.0, 50_000.0, 50_000.0, 50_000.0]
