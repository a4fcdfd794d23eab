"""Which rank orthogonalizes which matrix; tests/distributed/test_resume_layouts.py exchanges them between ranks."""

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.training.optimization.matrix_exchange import assign_owners, newton_schulz_cost


def test_the_cost_of_an_iteration_by_hand():
    """2 x 3: X X^T has 4 elements of 3 products, A A 4 of 2, and the last product 6 of 2; a product counts as two."""
    assert newton_schulz_cost(2, 3) == newton_schulz_cost(3, 2) == 2 * (4 * 3 + 4 * 2 + 6 * 2)


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks=st.integers(1, 12))
def test_no_rank_has_more_than_its_share_and_one_matrix(costs, ranks):
    """The law of assigning each item to the least busy rank."""
    work = [0] * ranks
    for owner, cost in zip(assign_owners(costs, ranks), costs, strict=True):
        work[owner] += cost

    assert sum(work) == sum(costs)
    assert max(work) <= sum(costs) / ranks + max(costs)


def test_equal_matrices_go_to_different_ranks():
    """Four blocks over four ranks; two more begin again."""
    assert sorted(assign_owners([5] * 4, 4)) == [0, 1, 2, 3]
    assert sorted(assign_owners([5] * 6, 4)) == [0, 0, 1, 1, 2, 3]


def test_the_largest_matrix_is_assigned_first():
    """1, 1 and 2: in their order one rank would have 3."""
    assert assign_owners([1, 1, 2], 2) == [1, 1, 0]
