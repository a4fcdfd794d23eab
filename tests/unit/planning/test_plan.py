"""The plan: steps and positions, LR, layouts, epochs, domains, faults, the JSON."""

import json
from fractions import Fraction

import pytest
from plans import COSINE, INFINITE, SLIMPAJAMA, drawn, ordinals, stage

from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.planning.plan import AdamWHyperparameters
from titan_cpt.planning.plan_json import batch_as_json, lr_as_json, plan_as_json
from titan_cpt.planning.planner import final_window

PAPER = {"= 20\n": "= 1104\n", "local_batch_size = 2": "local_batch_size = 4", "= 16\n": "= 2048\n"}


def paper_batch(head):
    for old, new in PAPER.items():
        head = head.replace(old, new)
    return head


@pytest.mark.parametrize(("tokens", "steps"), [("100B", 44_229), ("300B", 132_686), ("2_260_992", 1), ("2_260_993", 2)])
def test_tokens_are_rounded_up_to_whole_steps(head, make, tokens, steps):
    """Batches of 1104 x 2048 = 2,260,992 tokens; an exact multiple is not rounded."""
    plan = make(paper_batch(head) + stage("a", "pile", tokens))

    assert plan.step_tokens == 2_260_992
    assert plan.stages[0].steps == steps


@pytest.mark.parametrize(
    ("position", "end"),
    [("0.29", 29.0), ("0.57", 57.0), ("0.07", 7.0), ("29", 29.0), ('"9280"', 29.0), ('"9.28K"', 29.0), ("0.285", 28.5)],
)
def test_end_points_are_exact(head, make, position, end):
    """0.29 x 100 is step 29, not 28.999...; tokens count in steps of 320; a share may fall between steps."""
    plan = make(head + stage("a", "pile", 100, f"{COSINE}, warmup_until = {position}"))

    assert plan.stages[0].schedule[0].end == end


def test_step_s_runs_at_eta_of_s_plus_one(head, make):
    """No step at LR 0: with four steps of warm-up the first runs at a quarter of max, the last at min."""
    first = make(head + stage("a", "pile", 100, f"{COSINE}, warmup_until = 4")).stages[0]

    assert [first.lr_at(step) for step in range(4)] == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3]
    assert first.lr_at(99) == 1e-4


@pytest.mark.parametrize(
    ("lr", "start", "peak", "final"),
    [
        ('schedule = "cosine", max = 1e-3, warmup_until = 10', 1e-4, 1e-3, 1e-4),
        ('schedule = "linear", max = 1e-3, min = 0, warmup_until = 0', 9.9e-4, 9.9e-4, 0.0),
        ('schedule = "constant", max = 1e-3', 1e-3, 1e-3, 1e-3),
        ('schedule = "constant", max = 1e-3, warmup_until = 0.5', 2e-5, 1e-3, 1e-3),
        (INFINITE, 1e-3, 1e-3, 1e-4),
        (INFINITE.replace("0.85", "1.0"), 1e-3, 1e-3, 5e-4),
        (
            'schedule = "infinite_cosine", constant = 5e-4, warmup_until = 0, cooldown_until = 0, constant_until = 0.5',
            5e-4,
            5e-4,
            5e-5,
        ),
        (
            'schedule = "infinite_inv_sqrt", max = 1e-3, constant = 5e-4, warmup_until = 0.025, cooldown_until = 0.6, '
            "constant_until = 0.85, alpha = 0.001",
            4e-4,
            1e-3,
            1e-4,
        ),
        ('schedule = "wsd", max = 1e-3, warmup_until = 0.1, decay_from = 0.8, decay = "cosine"', 1e-4, 1e-3, 1e-4),
        ('schedule = "inv_sqrt", max = 1e-3, warmup_until = 1, timescale = 33', 1e-3, 1e-3, 5e-4),
    ],
)
def test_every_schedule_starts_peaks_and_ends_where_its_keys_say(head, make, lr, start, peak, final):
    """Start, peak and end in the JSON, by hand; a left-out min is a tenth of max, or of constant without one."""
    (answer,) = plan_as_json(make(head + stage("a", "pile", 100, lr)))["stages"]

    assert answer["start_lr"] == pytest.approx(start, rel=1e-12)
    assert answer["peak_lr"] == pytest.approx(peak, rel=0.01)  # between two steps where the warm-up ends there
    assert answer["final_lr"] == pytest.approx(final, rel=1e-12)


def test_the_papers_schedule_through_the_plan(head, make):
    """METHOD.md section 2 from the TOML on: 132,366 steps, 0.01 / 0.60 / 0.85, both cool-downs and the plain cosine."""
    infinite = (
        "max = 3e-4, constant = 1.65e-4, min = 3e-5, warmup_until = 0.01, cooldown_until = 0.6, constant_until = 0.85"
    )
    text = (
        head
        + stage("cosine", "pile", 132_366, 'schedule = "cosine", max = 3e-4, min = 3e-5')
        + stage("infinite", "pile", 132_366, f'schedule = "infinite_cosine", {infinite}')
        + stage("inv_sqrt", "pile", 132_366, f'schedule = "infinite_inv_sqrt", {infinite}')
    )
    found = lr_as_json(make(text), (1, 662, 20_000, 100_000, 132_366, 10**6))

    assert {name: [f"{lr:.6e}" for lr in lrs.values()] for name, lrs in found.items()} == {
        "cosine": ["2.266443e-07", "1.500385e-04", "2.866925e-04", "6.864185e-05", "3.000000e-05", "3.000000e-05"],
        "infinite": ["2.266443e-07", "1.500385e-04", "2.818292e-04", "1.650000e-04", "3.000000e-05", "3.000000e-05"],
        "inv_sqrt": ["2.266443e-07", "1.500385e-04", "2.116752e-04", "1.650000e-04", "3.000000e-05", "3.000000e-05"],
    }


def test_the_optimizers_numbers_can_change_in_a_stage(two_stages, make):
    """What [stages.optimizer] leaves out stays as [optimizer] has it; "keep" keeps."""
    plan = make(
        two_stages,
        ("optimizer.eps", "1e-6"),
        ("stages.second.optimizer.beta2", "0.99"),
        ("stages.second.optimizer.weight_decay", "0"),
        ("stages.second.optimizer_state", "keep"),
    )

    assert [stage.optimizer for stage in plan.stages] == [
        AdamWHyperparameters((0.9, 0.95), 1e-6, 0.1),
        AdamWHyperparameters((0.9, 0.99), 1e-6, 0.0),
    ]
    assert [stage.keep_optimizer for stage in plan.stages] == [False, True]


def test_the_final_window_is_the_papers():
    """The last 100 iterations sampled every 10: ten samples, the last step among them; never before the first step."""
    assert final_window(1000, 100, 10) == (910, 920, 930, 940, 950, 960, 970, 980, 990, 1000)
    assert final_window(25, 100, 10) == (5, 15, 25)
    assert final_window(20, 100, 10) == (10, 20)
    assert final_window(1000, 1, 10) == (1000,)
    assert final_window(1000, 0, 10) == ()


def test_the_final_window_follows_the_config(one_stage, make):
    """Off by default; validation.final_window_steps and _every put it on."""
    asked = make(one_stage, ("validation.final_window_steps", "50"), ("validation.final_window_every", "25"))

    assert make(one_stage).stages[0].final_window == ()
    assert asked.stages[0].final_window == (75, 100)


# Ranks


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 10), (2, 5), (5, 2), (10, 1)])
def test_the_batches_do_not_depend_on_the_ranks(two_stages, make, world_size, accumulation):
    """The same global batches, LRs and fingerprint on 1, 2, 5 and 10 ranks; only the accumulation follows."""
    alone, plan = make(two_stages), make(two_stages, world_size=world_size)

    assert (plan.data_parallel, plan.gradient_accumulation_steps) == (world_size, accumulation)
    assert plan.fingerprint == alone.fingerprint
    assert plan.stages == alone.stages
    assert drawn(plan, "second") == drawn(alone, "second")


@pytest.mark.parametrize("world_size", [3, 4, 20])
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(one_stage, make, world_size):
    """20 sequences over 3, 4 or 20 ranks of 2: never a remainder that is dropped."""
    with pytest.raises(PlanError, match=f"20 is not a multiple of data-parallel ranks .* = {2 * world_size}"):
        make(one_stage, world_size=world_size)


def test_a_shard_degree_must_be_the_ranks_there_are(one_stage, make):
    """On five ranks only 5; the message says so."""
    with pytest.raises(PlanError, match=r"data_parallel_shard_degree: must be 5 on 5 ranks, or omitted, got 2"):
        make(one_stage, ("parallelism.data_parallel_shard_degree", "2"), world_size=5)

    assert make(one_stage, ("parallelism.data_parallel_shard_degree", "5"), world_size=5).data_parallel == 5


def test_all_faults_of_a_plan_are_told_at_once(two_stages, make):
    """The batch, the schedule, the replay, the data: one refusal."""
    with pytest.raises(PlanError) as refusal:
        make(
            two_stages,
            ("stages.first.lr.warmup_until", "101"),
            ("stages.second.replay.from", '["german", "pile"]'),
            tokens={"german": 16},
            world_size=3,
        )
    head, *faults = str(refusal.value).splitlines()

    assert head == "4 problems in the plan of 'tested':"
    assert [fault.split(":")[0] for fault in faults] == [
        "  - training.global_batch_size",
        "  - datasets.german.train",
        "  - stages.first.lr",
        "  - stages.second.replay.from",
    ]


# Data


def test_epochs_are_told_where_the_data_is_there(two_stages, make):
    """40,000 pile tokens: 32,000 are 0.8 epochs; replay counts towards epochs too; absent data has none and a note."""
    plan = make(two_stages, tokens={"pile": 40_000})
    first, second = (stage["datasets"] for stage in plan_as_json(plan)["stages"])

    assert first["pile"] == {"tokens": 32_000, "replayed_tokens": 0, "epochs": 0.8}
    assert second["pile"] == {"tokens": 4000, "replayed_tokens": 4000, "epochs": 0.1}
    assert second["german"] == {"tokens": 12_000, "replayed_tokens": 0, "epochs": None}
    assert any(note.startswith("data does not exist yet: german;") for note in plan.notes)
    assert plan.sequences == {"pile": 2499, "german": None}


def test_a_source_shorter_than_a_sequence_is_refused(one_stage, make):
    """A window is seq_len + 1 tokens: 17 are one sequence, 16 are none."""
    with pytest.raises(PlanError, match=r"datasets\.pile\.train: 16 tokens are fewer than one sequence of 16 \+ 1"):
        make(one_stage, tokens={"pile": 16})

    assert make(one_stage, tokens={"pile": 17}).sequences["pile"] == 1


@pytest.fixture
def domains(head):
    """The seven domains of SlimPajama, with their weights."""
    return head + "".join(
        f'[datasets.slim.domains.{name}]\ntrain = "{name}"\nweight = {weight}\n' for name, weight in SLIMPAJAMA.items()
    )


def test_domains_have_their_weights_to_less_than_two_sequences(domains, make):
    """SlimPajama's seven add up to 100 %: of 10,000 sequences each gets its hundredths, the sum is the dataset's."""
    (answer,) = plan_as_json(make(domains + stage("a", "slim", 500)))["stages"]
    got = {name: use["tokens"] / 16 for name, use in answer["domains"].items()}

    assert got.keys() == {f"slim.{name}" for name in SLIMPAJAMA}
    assert all(abs(got[f"slim.{name}"] - 100 * weight) < 2 for name, weight in SLIMPAJAMA.items())
    assert sum(got.values()) * 16 == answer["datasets"]["slim"]["tokens"] == answer["tokens"]


def test_domains_are_replayed_by_their_weights_from_their_own_cursors(domains, make):
    """10 % of 1000 sequences: 52 of CommonCrawl, its first ones in order; epochs only where all domains are there."""
    text = domains + stage("a", "slim", 500) + stage("b", "german", 50, replay="{ fraction = 0.1 }")
    tokens = {f"slim.{name}": 16_001 for name in SLIMPAJAMA}
    plan = make(text, tokens=tokens)
    crawl = ordinals(plan, "b", "slim.commoncrawl", replayed=True)

    assert crawl == list(range(len(crawl)))
    assert abs(len(crawl) - 52.09) < 2
    assert plan_as_json(plan)["stages"][1]["datasets"]["slim"]["tokens"] == 100 * 16
    assert plan.stages[0].use_by_dataset["slim"].epochs == pytest.approx(10_000 / 7000, rel=1e-3)
    assert make(text, tokens=tokens | {"slim.book": None}).stages[0].use_by_dataset["slim"].epochs is None


def test_the_union_baseline_mixes_as_it_says(head, make):
    """{ pile = 0.5, german = 0.5 }: half and half in every prefix; 3 and 1 are relative."""
    half = make(head + stage("a", "{ pile = 0.5, german = 0.5 }", 10))
    more = make(head + stage("a", "{ german = 1, pile = 3 }", 10))

    assert {sum(draw.source == "pile" for draw in drawn(half, "a")[i : i + 2]) for i in range(0, 200, 2)} == {1}
    assert dict(more.stages[0].shares) == {"pile": Fraction(3, 4), "german": Fraction(1, 4)}
    assert {draw.replayed for draw in drawn(half, "a")} == {False}


def test_a_dataset_without_validation_is_noted(one_stage, make):
    """Its forgetting will not be measured; nobody should find that out afterwards."""
    bare = one_stage.replace('validation = "data/pile-validation"\n', "")

    assert any("datasets.pile: has no validation tokens" in note for note in make(bare).notes)
    assert not any("validation" in note for note in make(one_stage).notes)


def test_the_json_has_what_is_promised(two_stages, make):
    """Every key of DESIGN.md section 3b, and sums that hold."""
    answer = json.loads(json.dumps(plan_as_json(make(two_stages))))

    assert {"fingerprint", "model", "stages", "total_tokens", "retraining_tokens"} <= answer.keys()
    assert {"family", "parameters", "parameters_without_embeddings"} <= answer["model"].keys()
    for planned in answer["stages"]:
        assert {"name", "steps", "tokens", "start_lr", "peak_lr", "final_lr", "flops", "datasets"} <= planned.keys()
        assert planned["tokens"] == planned["steps"] * 320
        assert sum(use["tokens"] for use in planned["datasets"].values()) == planned["tokens"]
        assert all(use.keys() == {"tokens", "replayed_tokens", "epochs"} for use in planned["datasets"].values())
    assert answer["total_tokens"] == answer["retraining_tokens"] == 150 * 320
    assert [planned["union_tokens"] for planned in answer["stages"]] == [100 * 320, 150 * 320]
    assert answer["accumulation"] * answer["world_size"] * 2 * 16 == answer["step_tokens"] == 320


@pytest.mark.parametrize(("size", "parameters"), [("405m", 405_334_016), ("10b", 9_642_249_216)])
def test_the_papers_models_have_the_papers_parameters(one_stage, make, size, parameters):
    """METHOD.md section 4, embeddings included, also where the tokenizer is not there yet."""
    answer = plan_as_json(make(one_stage, ("model.size", size), vocab_size=None))

    assert answer["model"]["parameters"] == parameters
    assert any("tokenizer does not exist yet" in note for note in answer["notes"])


def test_flops_are_counted_per_token(one_stage, make):
    """debug with 257 ids, length 16: 6 x 124,672 parameters that multiply + 12 x 2 x 64 x 16, for 32,000 tokens."""
    (answer,) = plan_as_json(make(one_stage))["stages"]

    assert answer["flops"] == (6 * 124_672 + 12 * 2 * 64 * 16) * 32_000


def test_the_recipe_of_a_batch_is_its_draws(two_stages, make):
    """[[source, ordinal], ...] in batch order: a quarter of the 20 replayed, the first at the second place."""
    plan = make(two_stages)
    batches = [batch_as_json(plan, "second", str(step)) for step in range(2)]

    assert batches[0][:4] == [("german", 0), ("pile", 0), ("german", 1), ("german", 2)]
    assert batches[1][0] == ("german", 15)
    assert [len(batch) for batch in batches] == [20, 20]


@pytest.mark.parametrize(
    ("stage_name", "step", "expected"),
    [
        ("third", "0", "there is no stage 'third'; stages are 'first', 'second'"),
        ("second", "50", "stages.second: has steps 0 to 49, got 50"),
        ("second", "-1", "the 0-based step must be an integer, got '-1'"),
        ("second", "1.5", "the 0-based step must be an integer, got '1.5'"),
    ],
)
def test_a_batch_that_is_not_there_is_refused(two_stages, make, stage_name, step, expected):
    """Unknown stages and steps past the end."""
    with pytest.raises(PlanError) as refusal:
        batch_as_json(make(two_stages), stage_name, step)

    assert expected in str(refusal.value)


def test_a_model_that_cannot_be_is_refused(one_stage, make):
    """Too few rows for the tokenizer, or a size that nobody named."""
    with pytest.raises(ConfigError, match=r"model\.vocab_size: must be at least 257, the number of tokens"):
        make(one_stage, ("model.vocab_size", "256"))
    with pytest.raises(ConfigError, match=r"model\.size: unknown size 'debgu'; did you mean 'debug'"):
        make(one_stage, ("model.size", "debgu"))


def test_run_steps_and_disk_are_counted_over_the_stages(head, make):
    """100 steps before the second stage; ends, one pre-anneal point, two kept and one being written are six."""
    plan = make(head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 50))

    assert [plan.steps_before(stage) for stage in plan.stages] == [0, 100]
    assert plan.disk_bytes(2) == 6 * plan.spec.parameters * 12


def test_a_plan_for_trillions_of_tokens_answers_at_once(head, make):
    """The last batch of a 10^13-token stage is found without walking there: fresh ordinals, replay in proportion."""
    text = paper_batch(head) + stage("a", "pile", "10T") + stage("b", "german", "10T", replay="{ fraction = 0.05 }")
    plan = make(text)
    last = plan.batch(plan.stage("b"), plan.stage("b").steps - 1)
    sequences = plan.stage("b").steps * 1104

    assert len(last) == 1104
    assert max(draw.ordinal for draw in last if draw.replayed) == pytest.approx(sequences * 0.05, abs=2)
    assert max(draw.ordinal for draw in last if not draw.replayed) == pytest.approx(sequences * 0.95, abs=2)
