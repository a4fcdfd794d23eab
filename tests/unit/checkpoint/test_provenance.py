"""The longest sequence that a checkpoint's weights know: over its stages, earlier runs and the base model."""

import json

import pytest
from manifests import manifest_with

from titan_cpt.checkpoint.provenance import BaseModelInfo, max_sequence_length


def record(*, stage="last", **stages):
    """A manifest of a run with training.seq_len = 16; `stages` are (init, seq_len or None) by name."""
    recipe = {"training.seq_len": 16}
    for name, (init, seq_len) in stages.items():
        recipe[f"stages.{name}.init"] = init
        recipe |= {} if seq_len is None else {f"stages.{name}.seq_len": seq_len}
    return manifest_with(recipe, stage)


def base(positions):
    return BaseModelInfo("there", {} if positions is None else {"max_position_embeddings": positions}, None)


@pytest.mark.parametrize(
    ("stages", "positions", "expected"),
    [
        ({"last": ("random", None)}, None, 16),
        ({"last": ("random", 64)}, None, 64),
        ({"first": ("random", 64), "last": ("first@5", 8)}, None, 64),
        ({"first": ("random", 8), "last": ("first@5", 4)}, None, 8),
        ({"first": ("random", None), "other": ("first@5", 64), "last": ("first@5", None)}, None, 16),
        ({"last": ("hf:there", 64)}, 32, 64),
        ({"last": ("hf:there", 64)}, 2048, 2048),
    ],
)
def test_the_longest_sequence_is_that_of_any_stage_of_the_lineage(stages, positions, expected):
    """A stage that did not train these weights does not count; nor does [training]'s length where no stage has it."""
    assert max_sequence_length(record(**stages), base(positions)) == expected


def test_stages_of_the_run_that_the_weights_came_from_count_too(tmp_path):
    """As far as its manifest can be read."""
    (tmp_path / "manifest.json").write_text(json.dumps(record(stage="long", long=("random", 128))))

    assert max_sequence_length(record(last=(f"checkpoint:{tmp_path}", 8)), None) == 128
    assert max_sequence_length(record(last=(f"checkpoint:{tmp_path}/gone", 8)), None) == 8
    assert max_sequence_length({"recipe": {}, "stage": "imported", "steps_done": 0}, base(64)) == 64
