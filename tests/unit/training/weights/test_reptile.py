"""Old weights by hand: what a pull leaves, and what is computed from the weights after it."""

import pytest
import torch
import training

from titan_cpt.common.weights.reptile import Reptile
from titan_cpt.training.stage_start import begin_stage
from titan_cpt.training.weights.reptile import OldWeights

pytestmark = training.THEIR_WARNINGS_IGNORED


def test_two_pulls_by_hand():
    """From 0 and 8 to 4 and 0, a quarter of the way is 1 and 6; from there to 9 and 2: 3 and 5."""
    weight = torch.tensor([0.0, 8.0])
    old = OldWeights(Reptile(2, 0.25), torch.empty_like, {"weight": weight})
    found = []
    for trained in ((4.0, 0.0), (9.0, 2.0)):
        weight.copy_(torch.tensor(trained))
        old.pull({"weight": weight})
        found.append(weight.tolist())

    assert found == [[1.0, 6.0], [3.0, 5.0]]


def test_a_checkpoint_has_the_old_weights_only_between_two_pulls():
    """After a pull, and before the first step, they are the weights. They are a copy: training changes the weights."""
    weight = torch.tensor([1.0])
    old = OldWeights(Reptile(2, 0.5), torch.empty_like, {"weight": weight})
    weight.fill_(5.0)

    assert {steps_done: [*old.copies(steps_done)] for steps_done in range(5)} == {
        **{0: [], 2: [], 4: []},
        **{1: ["reptile"], 3: ["reptile"]},
    }
    assert old.copies(1)["reptile"]["weight"].item() == 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_passes_and_snapshots_after_a_pull_see_the_pulled_weights(tmp_path, precision):
    """A bf16 compute copy is cast again at once; the average of one snapshot is the pulled weights."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"]["mixed_precision_param"] = precision
    raw["stages"][0] |= {
        "reptile": {"every": 3, "step": 0.5, "keep_on": "device"},
        "averaging": {"kind": "mean", "last": 3, "every": 3},
    }
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        initial = [weight.clone() for weight in trainer.model.parameters()]
        trainer.train_step(training.loader_of(trainer, stage), stage, 0)
        trained = [weight.clone() for weight in trainer.model.parameters()]
        trainer.copies.take(stage, 3)
        copies, _ = trainer.copies.to_save("interval", 4)
        pulled = dict(trainer.model.named_parameters())

        for before, after, now in zip(initial, trained, pulled.values(), strict=True):
            torch.testing.assert_close(now, (before + after) / 2, rtol=0, atol=1e-6)
        assert not all(torch.equal(*pair) for pair in zip(trained, pulled.values(), strict=True))
        for weight, computed in zip(pulled.values(), trainer.runner.model.parameters(), strict=True):
            assert torch.equal(weight.to(computed.dtype), computed)
        for name in ("average", "reptile"):
            assert all(torch.equal(pulled[key], copy) for key, copy in copies[name].items())
