"""Which kernels a run's attention has, across documents and inside them; on a CPU, where most are torch's choice."""

import pytest
import torch
import training
from torch.nn.attention import SDPBackend

from titan_cpt.distributed.attention_backend import BACKENDS
from titan_cpt.training.cuda.attention import choose_attention
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """The two-stage config of the tests of training."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


def chosen(raw, requested, **mask):
    """What the log gets, and the kernels of the first layer: across documents, and with a boolean mask inside them.

    Args:
        mask: document_mask of [training], as `run`, and of the second stage, as `second`.
    """
    stages = [raw["stages"][0], {**raw["stages"][1], "document_mask": mask["second"]}]
    keys = {"attention_backend": requested, "document_mask": mask["run"]}
    with training.built_trainer(training.config_of(training.changed(raw, training=keys, stages=stages))) as trainer:
        core = trainer.model.attentions()[0].core
        return dict(trainer.attention.chosen), core.backend, core.document_backend


MATH = SDPBackend.MATH
BOTH = {"attention_backend": "math", "document_attention_backend": "math"}


@pytest.mark.parametrize(
    ("requested", "run", "second", "expected"),
    [
        ("default", False, False, ({}, None, None)),
        ("default", True, True, ({}, None, None)),
        ("math", False, False, ({"attention_backend": "math"}, MATH, None)),
        ("math", True, True, ({"document_attention_backend": "math"}, None, MATH)),
        ("math", False, True, (BOTH, MATH, MATH)),
        ("math", True, False, (BOTH, MATH, MATH)),
        ("flash", True, True, ({}, None, None)),  # the CPU's path computes document by document with the flash kernel
        ("fastest", True, True, ({}, None, None)),
    ],
)
def test_kernels_are_chosen_for_the_masks_that_stages_and_validation_have(raw, requested, run, second, expected):
    """Validation has the mask of [training], even if no stage has it."""
    assert chosen(raw, requested, run=run, second=second) == expected


def test_the_fastest_kernel_across_documents_is_recorded_for_resumed_runs(raw):
    """As before; on a CPU there is one way inside documents."""
    mixed = training.changed(raw, training={"attention_backend": "fastest"})
    mixed["stages"][1]["document_mask"] = True
    with training.built_trainer(training.config_of(mixed)) as trainer:
        assert trainer.attention.measured.keys() == {"fastest_attention", "fastest_attention_by_length"}
        assert trainer.attention.chosen["attention_backend"] == trainer.attention.measured["fastest_attention"]
        assert len(trainer.attention.notes) == 1


def test_a_boolean_mask_trains_as_document_by_document(raw):
    """In float32, within rounding; without a mask the losses differ."""
    losses = {}
    for name, keys in {
        "math": {"document_mask": True, "attention_backend": "math"},
        "documents": {"document_mask": True},
        "unmasked": {},
    }.items():
        with training.built_trainer(training.config_of(training.changed(raw, training=keys))) as trainer:
            stage = trainer.plan.stages[0]
            begin_stage(trainer, stage)
            loader = training.loader_of(trainer, stage)
            found = [trainer.train_step(loader, stage, step).loss for step in range(4)]
            losses[name] = torch.stack(found)

    torch.testing.assert_close(losses["math"], losses["documents"], rtol=1e-5, atol=1e-6)
    assert (losses["unmasked"] - losses["documents"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ({"fastest_attention_by_length": {"16": "math", "64": "flash"}}, ("math", "flash")),
        ({"fastest_attention_by_length": {"16": "flash", "64": "math"}}, ("flash", "math")),
        ({"fastest_attention": "math"}, ("math", "math")),  # by a version that knew one length
    ],
)
def test_each_length_has_the_kernel_that_was_the_fastest_for_it(raw, manifest, expected):
    """A resumed run uses those of the checkpoint; a stage that begins computes with its own."""
    raw = training.changed(raw, training={"attention_backend": "fastest"})
    raw["stages"][1] |= {"seq_len": 64, "local_batch_size": 1, "steps": 4}
    with training.built_trainer(training.config_of(raw)) as trainer:
        models = trainer.runner.models
        found = choose_attention(trainer.config, trainer.plan, models, trainer.mesh, manifest, group=None)
        used = []
        for stage in ("english", "german"):
            found.use(stage, models)
            used.append(models[0].attentions()[0].core.backend)

        assert trainer.attention.measured["fastest_attention_by_length"].keys() == {"16", "64"}
    assert used == [BACKENDS[name] for name in expected]
    assert tuple(found.by_stage.values()) == expected
