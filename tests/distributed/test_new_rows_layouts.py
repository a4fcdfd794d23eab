"""Rows of new tokens on two ranks: the same bits as in one process, under FSDP, CPU offload, TP and a pipeline.

The learning rate is so small that a step does not change a weight of any size that the vocabulary has: the checkpoint
after it holds the initial weights.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training
from extensions import base_spec, extended
from parity_launch import TOML, launch, make_data
from releases import release

from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.config.load import load_config
from titan_cpt.models.registry import named_size
from titan_cpt.training.stage_start import load_initial

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
]
PARALLEL = "parallelism.{}_parallel_degree"
LAYOUTS = {
    "fsdp": {},
    "offload": {"training.enable_cpu_offload": "true"},
    "tp": {PARALLEL.format("tensor"): "2"},
    "pp": {PARALLEL.format("pipeline"): "2", "parallelism.pipeline_parallel_schedule": "1F1B"},
    "normal": {"stages.first.new_rows": "normal"},
    "released": {"stages.first.init": "hf:released"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token files, a released model of the base with 300 rows, its import, and the config of a model with 384."""
    folder = tmp_path_factory.mktemp("layouts")
    make_data(folder)
    (folder / "base.json").write_text(json.dumps(base_spec()))
    (folder / "new.json").write_text(json.dumps(extended(base_spec())))
    shape = {"layers": 4, "width": 96, "heads": 12, "rotary_fraction": 0.5, "vocab_size": 300}
    release(folder / "released", named_size("gpt_neox", "debug", 257, overrides=shape))
    (folder / "released" / "tokenizer.json").write_text(json.dumps(base_spec()))
    import_released(str(folder / "released"), folder / "imported", log=lambda line: None)
    tokenizer = '[tokenizer]\npath = "new.json"\nextend = { base = "base.json" }\n'
    stage = TOML.replace("steps = 3", 'steps = 1\ninit = "checkpoint:imported"').replace("max = 1e-3", "max = 1e-30")
    (folder / "gpt_neox.toml").write_text(tokenizer + stage)
    launch(folder, [{"job.name": name, "training.local_batch_size": "4", **keys} for name, keys in LAYOUTS.items()], 2)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_begin_with_the_bits_of_one(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    keys = {key: value for key, value in LAYOUTS[name].items() if key.startswith("stages.")}
    config = load_config(Path("gpt_neox.toml"), list({"job.name": f"one-{name}", **keys}.items()))
    with training.built_trainer(config) as trainer:
        load_initial(trainer, trainer.plan.stages[0])
        one = {key: weight.detach().clone() for key, weight in trainer.model.state_dict().items()}
    two = training.tensors_of(folder / "outputs" / name / "first/step-00000001")
    for weight in ("embedding.weight", "head.weight"):
        assert one[weight].shape == (384, 96)
        assert torch.equal(two[weight], one[weight])
    assert "new rows of embedding and head" in training.events_of(folder / "outputs" / name, "transition")[0]["weights"]
