"""Whole runs with the Triton optimizer, on the CPU by Triton's interpreter, against runs with torch's."""

import gc
from dataclasses import replace

import interpreted
import pytest
import torch
import training
from recorded_graphs import RecordedGraphs

import titan_cpt.training.build
from titan_cpt.training.cuda.graphs import EAGER_STEPS, CapturedStep
from titan_cpt.training.stage_start import begin_stage, resume_stage

pytestmark = [*interpreted.NEEDS_TRITON, *training.THEIR_WARNINGS_IGNORED]


@pytest.fixture
def on_cpu(monkeypatch):
    """Allow the setting on a CPU, where the interpreter runs the kernels."""
    monkeypatch.setattr(titan_cpt.training.build, "check_device", lambda *_: None)
    with interpreted.interpreted("titan_cpt.training.cuda.adamw_kernel"):
        yield
    gc.enable()


def config_of(tmp_path, name, implementation, **settings):
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"] |= {"mixed_precision_param": "bfloat16", "local_batch_size": 4, **settings}
    raw["job"]["name"] = name
    raw["optimizer"] = {"implementation": implementation}
    raw["validation"]["interval"] = 100
    for stage in raw["stages"]:
        stage["steps"] = 3
    return training.config_of(raw)


def losses_of(config):
    """Training losses of both stages."""
    with training.built_trainer(config) as trainer:
        assert trainer.train(None) == 0
    lines = training.lines_of(trainer.folder, "train")
    return [line["loss_nats_per_token"] for line in lines]


@pytest.mark.parametrize("local_batch_size", [2, 4])
def test_a_run_has_the_losses_of_a_run_with_torchs_optimizer(tmp_path, on_cpu, local_batch_size):
    """Two stages, the second keeps the moments, with and without accumulation. The interpreter cuts off bf16 copies."""
    found = {}
    for implementation in ("fused", "triton"):
        config = config_of(tmp_path, implementation, implementation, local_batch_size=local_batch_size)
        found[implementation] = losses_of(config)

    assert len(found["triton"]) == 6
    assert found["triton"] == pytest.approx(found["fused"], rel=3e-3)
    assert found["triton"] != found["fused"]


def test_each_implementation_resumes_the_others_checkpoint(tmp_path, on_cpu):
    """Saved with torch's, resumed and saved with Triton's, resumed with torch's: the step counts continue."""
    counts = []
    for implementation in ("fused", "triton", "fused"):
        config = config_of(tmp_path, "run", implementation)
        with training.built_trainer(config) as trainer:
            stage = trainer.plan.stages[0]
            checkpoint = trainer.checkpoints.newest_valid(print)
            done = begin_stage(trainer, stage) if checkpoint is None else resume_stage(trainer, checkpoint)
            loader = trainer.open_loader(stage, done)
            trainer.train_step(loader, stage, done)
            titan_cpt.train.save_checkpoint(trainer, stage, done + 1, "interval")
            trainer.checkpoints.wait()
            state = trainer.optimizer.state[next(trainer.model.parameters())]
            counts.append(state["step"].item())

    assert counts == [1, 2, 3]


def test_gradients_stay_in_bfloat16_except_the_heads_and_have_the_same_values(tmp_path, on_cpu):
    """One micro-batch a step: the gradients that autograd would cast to float32 one by one."""
    gradients = {}
    for implementation in ("fused", "triton"):
        with training.built_trainer(config_of(tmp_path, implementation, implementation)) as trainer:
            stage = trainer.plan.stages[0]
            begin_stage(trainer, stage)
            trainer.runner.backward(training.loader_of(trainer, stage).batch(0, 0), stage.step_tokens(0))
            gradients[implementation] = {name: p.grad for name, p in trainer.model.named_parameters()}

    dtypes = {name: gradient.dtype for name, gradient in gradients["triton"].items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"head.weight"}
    assert training.same_bits(
        {name: gradient.float() for name, gradient in gradients["triton"].items()}, gradients["fused"]
    )


def test_after_a_step_the_compute_copy_is_not_cast_again(tmp_path, on_cpu, monkeypatch):
    """The kernel has written it; new weights, as from a checkpoint, are cast."""
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: casts.append(cast(*tensors)))
    with training.built_trainer(config_of(tmp_path, "run", "triton")) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader = training.loader_of(trainer, stage)
        counts = []
        for step in range(2):
            trainer.train_step(loader, stage, step)
            counts.append(len(casts))
        before = trainer.model.head.weight.detach().clone()
        trainer.model.init_weights(1)
        trainer.runner.copy.refresh()
        counts.append(len(casts))

    assert counts == [1, 1, 2]
    assert not torch.equal(before, trainer.model.head.weight)
    assert torch.equal(trainer.runner.model.head.weight, trainer.model.head.weight.bfloat16())


class _WithLaunches(RecordedGraphs):
    """A recorder that also records a launch of the optimizer's kernels, at the end of the work."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def capture(self, work):
        launches = []
        self.optimizer.launch = lambda: launches.append("launch")
        replay = super().capture(work)
        del self.optimizer.launch

        def replay_and_launch():
            replay()
            for _ in launches:
                self.optimizer.launch()

        return replay_and_launch


@pytest.mark.parametrize("local_batch_size", [2, 4])
def test_captured_steps_are_eager_steps_to_the_last_bit(tmp_path, on_cpu, local_batch_size):
    """The update is captured with the addresses of captured gradients, and each replay reads its step's LR."""
    found = []
    for captured in (False, True):
        config = config_of(tmp_path, str(captured), "triton", local_batch_size=local_batch_size)
        with training.built_trainer(config) as built:
            trainer = built
            if captured:
                graphs = _WithLaunches(built.optimizer)
                trainer = replace(built, stepper=CapturedStep(built.stepper, built.runner.copy, graphs))
            stage = trainer.plan.stages[0]
            begin_stage(trainer, stage)
            trainer.stepper.restart()
            loader = training.loader_of(trainer, replace(stage, steps=5))
            results = [trainer.train_step(loader, stage, step) for step in range(EAGER_STEPS + 3)]
            found.append([(result.loss.item(), result.grad_norm.item()) for result in results])

    assert graphs.events.count("capture") == 4 // local_batch_size + 1
    assert found[0] == found[1]
    assert len(set(found[0])) == EAGER_STEPS + 3
