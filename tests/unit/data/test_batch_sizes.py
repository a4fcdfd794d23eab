"""Global batch sizes of steps: prefix sums and their inverse."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.batch_sizes import BatchPhase, BatchSizes


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


def test_a_constant_size_is_one_phase():
    """Step 10 of 4 sequences begins at sequence 40."""
    batch_sizes = BatchSizes.constant(4)

    assert (batch_sizes.at(10), batch_sizes.sequences_before(10), batch_sizes.step_of(43)) == (4, 40, 10)
