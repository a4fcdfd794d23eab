"""Building a run: settings of the config arrive where they act, and the run folder has its config and plan."""

import json

import pytest
import torch
import training

from titan_cpt.config.load import load_config
from titan_cpt.distributed.options import Float8Options, ParallelOptions
from titan_cpt.models.common import ops
from titan_cpt.training.build import parallel_options

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {}),
        (
            {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2"},
            {"recompute": "selective", "selection": "2"},
        ),
        (
            {"activation_checkpoint.mode": "memory_budget", "activation_checkpoint.memory_budget": "0.25"},
            {"recompute": "memory_budget", "memory_budget": 0.25},
        ),
        ({"compile.enable": "true"}, {"compiled": True}),
        ({"compile.scope": "model"}, {"compile_scope": "model"}),
        ({"compile.mode": "max-autotune-no-cudagraphs"}, {"compile_mode": "max-autotune-no-cudagraphs"}),
        ({"training.enable_cpu_offload": "true"}, {"offloaded": True}),
        ({"parallelism.enable_async_tensor_parallel": "true"}, {"async_tp": True}),
        (
            {"parallelism.context_parallel_method": "ring", "parallelism.context_parallel_degree": "2"},
            {"ring_attention": True},
        ),
        ({"parallelism.context_parallel_method": "ring"}, {}),
        ({"stages.first.trainable": '["head", "blocks.1"]'}, {"compiled_versions": 8 + 4 + 12}),
        ({"float8.recipe_name": "rowwise"}, {"float8": Float8Options("rowwise", False, ())}),
    ],
)
def test_settings_of_the_config_are_options_of_parallelization(write, one_stage, overrides, options):
    """Each key changes its own option."""
    plain = parallel_options(load_config(write(one_stage)))
    configured = parallel_options(load_config(write(one_stage), list(overrides.items())))
    expected = {name: getattr(plain, name) for name in ParallelOptions.__dataclass_fields__} | options

    assert plain.precision is torch.bfloat16
    assert {name: getattr(configured, name) for name in expected} == expected


def test_float32_products_are_onednns_in_a_run_that_enables_it(tmp_path, monkeypatch):
    """training.enable_onednn acts on a CPU on which oneDNN is faster, until a run without it is built."""
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: True)
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    found = []
    for name, enable in (("with", True), ("without", False)):
        raw["job"]["name"] = name
        raw["training"]["enable_onednn"] = enable
        with training.built_trainer(training.config_of(raw)):
            found.append(ops._onednn_multiplies(torch.zeros(2, 2), torch.zeros(2, 2)))

    assert found == [True, False]


def test_the_parts_of_a_run_have_its_configs_numbers(tmp_path):
    """Sequence length, validation and world size; config.toml and plan.json are written before training."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    with training.built_trainer(training.config_of(raw)) as state:
        loader = training.loader_of(state, state.plan.stages[0])
        run = tmp_path / "run"

        assert set(state.validator.identities) == {"en", "de"}
        assert {f"datasets.{name}.{part}" for name in ("en", "de") for part in ("train", "validation")} == (
            set(state.identities) - {"tokenizer"}
        )
        assert loader is not None
        assert json.loads((run / "plan.json").read_text())["fingerprint"] == state.plan.fingerprint
        assert "global_batch_size = 4" in (run / "config.toml").read_text()
        assert state.model.spec.width == 64
        assert next(state.model.parameters()).dtype is torch.float32
