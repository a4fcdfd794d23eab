"""Megatron-LM's batch sizes: a ramp has the size that Megatron-LM computes, in every step."""

import pytest
from converted import converted, found, planned
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.convert import megatron
from unit.convert.test_megatron import BASE

SAMPLES = {key: value for key, value in BASE.items() if key != "train-iters"} | {"train-samples": "4000"}


def theirs(*, first, increment, samples, last, total):
    """The batch size of every step of RampupBatchsizeNumMicroBatchesCalculator, from the samples done before it."""
    per_increment = samples / ((last - first) // increment)
    done, sizes = 0, []
    while done < total:
        sizes.append(last if done > samples else first + int(done / per_increment) * increment)
        done += sizes[-1]
    return sizes


@pytest.mark.parametrize(
    ("first", "increment", "samples", "last"),
    [(2, 2, 300, 8), (4, 4, 1000, 32), (2, 6, 1, 8), (2, 2, 333, 16), (8, 8, 3999, 16)],
)
def test_every_step_has_the_batch_size_of_megatron(first, increment, samples, last):
    """Also where a size begins within a step, with S / n that is no whole number, and to the last step."""
    ramp = {"rampup-batch-size": [str(first), str(increment), str(samples)], "global-batch-size": str(last)}
    conversion = converted(megatron, SAMPLES | ramp)
    stage = planned(conversion)[1].stages[0]
    expected = theirs(first=first, increment=increment, samples=samples, last=last, total=4000)

    assert [stage.batch_sizes.at(step) for step in range(stage.steps)] == expected
    assert "the same step as there" in found(conversion.decisions, "rampup-batch-size").text


def test_the_schedule_of_a_ramp_ends_its_phases_at_the_same_tokens():
    """By hand: 320 samples of warm-up are 40 steps of 2, 20 of 4, 14 of 6, which end at 244, and 9.5 of 8."""
    keys = {"rampup-batch-size": ["2", "2", "240"], "lr-warmup-samples": "320", "lr-decay-style": "cosine"}
    config, plan = planned(converted(megatron, SAMPLES | keys))
    stage = plan.stages[0]

    assert config.stages[0].tokens == 4000 * 512
    assert (stage.schedule[0].name, stage.schedule[0].end) == ("warmup", 83.5)
    assert (stage.schedule[0].lr_to, stage.final_lr) == (3e-4, 3e-5)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("$RAMP", "three whole numbers"),
        (["2", "2"], "three whole numbers"),
        (["2", "4", "100"], "no ramp from 2 to 8"),
        (["8", "2", "100"], "no ramp from 8 to 8"),
        (["2", "0", "100"], "no ramp from 2"),
    ],
)
def test_a_ramp_that_megatron_refuses_or_that_is_not_in_the_file_is_listed(value, why):
    conversion = converted(megatron, SAMPLES | {"rampup-batch-size": value})
    assert why in found(conversion.unmatched, "rampup-batch-size").text
    assert len(planned(conversion)[1].stages[0].batch_sizes.phases) == 1


def test_a_ramp_needs_samples_there_too():
    conversion = converted(megatron, BASE | {"rampup-batch-size": ["2", "2", "100"]})
    assert "--train-samples" in found(conversion.unmatched, "rampup-batch-size").text


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 2000))
def test_the_micro_batches_of_a_pipeline_fit_every_size(first, sizes, samples):
    """The local batch is the share of the largest batch that divides every size."""
    last = str(2 * first * (sizes + 1))
    ramp = {"rampup-batch-size": [str(2 * first), str(2 * first), str(samples)], "global-batch-size": last}
    conversion = converted(megatron, SAMPLES | ramp | {"pipeline-model-parallel-size": "2", "micro-batch-size": "1"})
    assert conversion.values["training.local_batch_size"] == 2 * first
    planned(conversion)
