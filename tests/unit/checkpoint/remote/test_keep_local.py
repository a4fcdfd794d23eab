"""Local checkpoints are removed only if they are uploaded, not needed, and not among the newest."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from remote_checkpoints import save

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.checkpoint.remote.keep_local import prune_uploaded

STEPS = (5, 4, 3, 2, 1)


@example(keep=0, uploaded={5}, needed=set())
@settings(max_examples=12)
@given(keep=st.integers(0, 6), uploaded=st.sets(st.sampled_from(STEPS)), needed=st.sets(st.sampled_from(STEPS)))
def test_exactly_the_old_uploaded_and_unneeded_ones_go(tmp_path_factory, keep, uploaded, needed):
    run = tmp_path_factory.mktemp("run")
    folders = {steps: save(run, steps=steps) for steps in STEPS}
    listed = [FoundCheckpoint(folders[steps], manifest.read(folders[steps])) for steps in STEPS]

    removed = prune_uploaded(
        listed,
        keep,
        is_uploaded=lambda folder: folder in {folders[steps] for steps in uploaded},
        needed={folders[steps] for steps in needed},
    )
    expected = {steps for steps in uploaded - needed if STEPS.index(steps) >= max(1, keep)}

    assert set(removed) == {folders[steps] for steps in expected}
    assert {steps for steps in STEPS if folders[steps].exists()} == set(STEPS) - expected
