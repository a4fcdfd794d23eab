"""make_plan: the batch does not depend on the ranks, and all problems are reported together."""

import pytest
from plans import drawn

from titan_cpt.errors import ConfigError, PlanError


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 10), (2, 5), (5, 2), (10, 1)])
def test_the_batches_do_not_depend_on_the_ranks(two_stages, make, world_size, accumulation):
    """The same global batches, LRs and fingerprint on 1, 2, 5 and 10 ranks; only gradient accumulation changes."""
    alone, plan = make(two_stages), make(two_stages, world_size=world_size)

    assert (plan.data_parallel, plan.gradient_accumulation_steps) == (world_size, accumulation)
    assert plan.fingerprint == alone.fingerprint
    assert plan.stages == alone.stages
    assert drawn(plan, "second") == drawn(alone, "second")


@pytest.mark.parametrize("world_size", [3, 4, 20])
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(one_stage, make, world_size):
    """20 sequences on 3, 4 or 20 ranks with a local batch of 2: no remainder is dropped."""
    with pytest.raises(PlanError, match=f"20 is not a multiple of data-parallel ranks .* = {2 * world_size}"):
        make(one_stage, world_size=world_size)


@pytest.mark.parametrize(
    ("world_size", "suggestion"),
    [(4, r"change one of the two \(local_batch_size 1 fits\), or"), (3, "change one of the two, or")],
)
def test_a_batch_that_does_not_divide_names_a_local_batch_that_does(one_stage, make, world_size, suggestion):
    """Four ranks get 5 of 20 sequences, which 1 divides and the local batch of 2 does not; three get no equal share."""
    with pytest.raises(PlanError, match=suggestion):
        make(one_stage, world_size=world_size)


def test_a_shard_degree_must_use_all_ranks(one_stage, make):
    """On five ranks only 5; the message says so."""
    with pytest.raises(PlanError, match=r"data_parallel_shard_degree: must be 5 on 5 ranks, or omitted, got 2"):
        make(one_stage, ("parallelism.data_parallel_shard_degree", "2"), world_size=5)

    assert make(one_stage, ("parallelism.data_parallel_shard_degree", "5"), world_size=5).data_parallel == 5


def test_all_problems_of_a_plan_are_in_one_message(two_stages, make):
    """The batch, the schedule, the replay, the data."""
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


def test_an_invalid_model_is_refused(one_stage, make):
    """Fewer rows than the tokenizer has tokens, or an unknown size."""
    with pytest.raises(ConfigError, match=r"model\.vocab_size: must be at least 257, the number of tokens"):
        make(one_stage, ("model.vocab_size", "256"))
    with pytest.raises(ConfigError, match=r"model\.size: unknown size 'debgu'; did you mean 'debug'"):
        make(one_stage, ("model.size", "debgu"))
