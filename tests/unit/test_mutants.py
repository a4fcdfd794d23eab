"""The list of hand-made faults; `python tests/mutants.py` applies them, which takes longer than a test may."""

import mutants


def test_every_mutant_can_be_applied():
    """Its text stands in its file exactly once, and its tests are there: code that moves takes its mutants along."""
    stale = [mutant.what for mutant in mutants.read_mutants() if mutant.is_stale()]

    assert not stale
