"""torch.compile with scope "model": the same losses as without it, one graph for training, one for validation."""

from functools import partial

import pytest
import torch
import training
from torch._dynamo.config import patch
from torch._dynamo.utils import counters

from titan_cpt.distributed.compile import apply_compile
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallelize import freeze, plain_name
from titan_cpt.models.llama.model import Llama
from titan_cpt.models.registry import named_size
from titan_cpt.training.stage_start import begin_stage

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # raised inside torch's compiler
]


def losses_of(raw, folder, name, *, steps=2, **compile_keys):
    """Losses and gradient norms of some steps, the validation loss after them, and the number of compiled graphs."""
    torch._dynamo.reset()
    counters.clear()
    raw = training.changed(raw, job={"name": name, "output_dir": str(folder)}, compile=compile_keys)
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader = training.loader_of(trainer, stage)
        results = [trainer.train_step(loader, stage, step) for step in range(steps)]
        graphs = [counters["stats"]["unique_graphs"]]
        batch = loader.batch(steps, 0)
        nats = trainer.runner.per_sequence_loss(batch).sum()
        graphs.append(counters["stats"]["unique_graphs"])
    numbers = [value.item() for result in results for value in (result.loss, result.grad_norm)]
    return [*numbers, nats.item()], graphs


def test_the_whole_model_as_one_graph_trains_as_without_compile(tmp_path):
    """Losses and gradient norms agree to 1e-5; the second step, with another LR and batch, compiles nothing."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["model"] = {"family": "llama", "size": "debug"}
    eager, none = losses_of(raw, tmp_path, "eager")
    model, graphs = losses_of(raw, tmp_path, "model", enable=True, scope="model")

    assert none == [0, 0]
    assert graphs == [1, 2]
    assert model == pytest.approx(eager, rel=1e-5)
    assert model[0] == pytest.approx(eager[0], rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside torch's compiler
@pytest.mark.parametrize("scope", ["model", "block"])
def test_every_length_is_compiled_by_itself_however_many_there_are(scope, monkeypatch):
    """Ten lengths give ten graphs, without sizes that vary, so that the bits of none depend on those before it.

    Graphs are captured as always, and run by torch's eager backend, because Inductor takes ten seconds for each.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    spec = named_size("llama", "debug", 257, {"layers": 1, "width": 16, "heads": 2})
    plain, compiled = Llama(spec), Llama(spec)
    for model in (plain, compiled):
        model.init_weights(0)
    versions = 8 + 4 * 3
    options = ParallelOptions(torch.float32, compiled=True, compile_scope=scope, compiled_versions=versions)
    with patch(recompile_limit=8):
        apply_compile(compiled, options)
        for length in range(4, 14):
            tokens_BL = torch.arange(2 * length).view(2, length)
            for _ in range(2):
                torch.testing.assert_close(compiled(tokens_BL), plain(tokens_BL), rtol=1e-4, atol=1e-5)

    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside torch's compiler
def test_blocks_that_train_other_weights_are_compiled_apart_and_stay_within_the_limit(monkeypatch):
    """Three patterns on eight blocks, in training and validation: no more versions than `parallel_options` allows, and
    the gradients of blocks that are not compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    spec = named_size("llama", "debug", 257, {"layers": 8, "width": 16, "heads": 2})
    plain, compiled = Llama(spec), Llama(spec)
    tokens_BL = torch.arange(10).view(2, 5)
    trained = [f"blocks.{layer}.mlp.up.weight" for layer in (1, 2, 5)] + [
        f"blocks.{layer}.attention.q.weight" for layer in (2, 3, 7)
    ]
    versions = 8 + 4 + 6 * 3
    with patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        apply_compile(compiled, ParallelOptions(torch.float32, compiled=True, compiled_versions=versions))
        for model in (plain, compiled):
            model.init_weights(0)
            freeze([model], trained)
            model(tokens_BL).square().mean().backward()
            with torch.no_grad():
                model(tokens_BL)

    gradients = [{plain_name(n): w.grad for n, w in model.named_parameters()} for model in (plain, compiled)]
    assert {name for name, gradient in gradients[1].items() if gradient is not None} == set(trained)
    for name in trained:
        torch.testing.assert_close(gradients[1][name], gradients[0][name])
    assert 8 < counters["stats"]["unique_graphs"] <= versions


def test_the_whole_model_compiles_in_bfloat16(tmp_path):
    """With a parallel residual, whose output projections get the same gradient, and with float32 gradients."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["training"]["mixed_precision_param"] = "bfloat16"
    eager, _ = losses_of(raw, tmp_path, "eager", steps=1)
    model, graphs = losses_of(raw, tmp_path, "model", steps=1, enable=True, scope="model")

    assert graphs == [1, 2]
    assert model == pytest.approx(eager, rel=2e-2)
    assert model[0] == pytest.approx(eager[0], rel=1e-3)
