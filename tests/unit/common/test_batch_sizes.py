"""Global batch sizes of steps: prefix sums and their inverse."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.batch_sizes import BatchPhase, BatchSizes


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4))
def test_prefix_sums_and_steps_are_those_of_a_list_of_sizes(phases):
    """The last phase has no end; everything else follows from the size of every step, written out."""
    sizes = [size for steps, size in phases for _ in range(steps)] + [phases[-1][1]] * 3
    firsts = [sum(steps for steps, _ in phases[:number]) for number in range(len(phases))]
    batch_sizes = BatchSizes(
        tuple(BatchPhase(first, sum(sizes[:first]), size) for first, (_, size) in zip(firsts, phases, strict=True))
    )

    assert [batch_sizes.at(step) for step in range(len(sizes))] == sizes
    assert [batch_sizes.sequences_before(step) for step in range(len(sizes))] == [
        sum(sizes[:step]) for step in range(len(sizes))
    ]
    assert [batch_sizes.step_of(sequence) for sequence in range(sum(sizes))] == [
        step for step, size in enumerate(sizes) for _ in range(size)
    ]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=5, unique_by=lambda each: each[0]),
    st.integers(1, 4),
)
def test_a_ramp_changes_with_the_first_step_that_begins_at_or_after_its_tokens(sizes, seq_len):
    """Compared with a count of the tokens step by step; prefix sums, seeking and points between steps agree with it."""
    sizes = [(0, 3), *((tokens, size) for tokens, size in sorted(sizes) if tokens)]
    ramp = BatchSizes.ramp(sizes, seq_len=seq_len)
    expected, tokens = [], 0
    for _ in range(80):
        expected.append([size for begin, size in sizes if begin <= tokens][-1])
        tokens += expected[-1] * seq_len

    assert [ramp.at(step) for step in range(80)] == expected
    assert [ramp.sequences_before(step) for step in range(80)] == [sum(expected[:step]) for step in range(80)]
    assert [ramp.step_at(Fraction(ramp.sequences_before(step))) for step in range(80)] == list(range(80))
    assert ramp.step_at(ramp.sequences_before(7) + Fraction(ramp.at(7), 3)) == 7 + Fraction(1, 3)
    assert all(before.size != after.size for before, after in pairwise(ramp.phases))
    assert ramp.within(5) == tuple(phase for phase in ramp.phases if phase.first_step < 5)


def test_a_constant_size_is_one_phase():
    """Step 10 of 4 sequences begins at sequence 40."""
    batch_sizes = BatchSizes.constant(4)

    assert (batch_sizes.at(10), batch_sizes.sequences_before(10), batch_sizes.step_of(43)) == (4, 40, 10)
