"""Export to torchtitan: its names and order of features in a DCP folder, and the same bits on the way back."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan_checkpoints import SPECS, config_json, in_their_order, their_name

from titan_cpt.checkpoint.other_trainers.import_trained import import_from_trainer, write_checkpoint
from titan_cpt.checkpoint.other_trainers.torchtitan.export import export_to_torchtitan
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import ImportRequest, StoredTensor, TrainedCheckpoint
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)


def quiet(line):
    """Print nothing."""


def checkpoint(folder, spec):
    """A checkpoint of a model with random weights; returns the model."""
    model = build_model(spec)
    model.init_weights(5)
    weights = {
        name: StoredTensor(name, tuple(weight.shape), weight.detach) for name, weight in model.named_parameters()
    }
    write_checkpoint(TrainedCheckpoint(trainer="here", spec=spec, weights=weights), "model", folder, log=quiet)
    return model


@pytest.mark.parametrize("name", SPECS)
def test_torchtitans_state_dict_loads_from_an_export(name, tmp_path):
    """DCP fills a state dict with torchtitan's names and shapes; llama3's queries and keys are in its order."""
    spec = SPECS[name]
    model = checkpoint(tmp_path / "ours", spec)
    lines = []
    export_to_torchtitan(tmp_path / "ours", tmp_path / "out", dtype="float32", log=lines.append)
    expected = {their_name(key): in_their_order(key, weight, spec) for key, weight in model.named_parameters()}
    if spec.tied:
        expected["lm_head.weight"] = expected["tok_embeddings.weight"]
    state = {key: torch.empty_like(weight) for key, weight in expected.items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "out"), no_dist=True)

    assert all(torch.equal(state[key], weight) for key, weight in expected.items())
    assert f"n_heads 4, n_kv_heads 2, head_dim {spec.head_width}, hidden_dim 24" in lines[1]
    assert lines[2].startswith("not exported: the optimizer's state")


@pytest.mark.parametrize("name", SPECS)
def test_the_way_back_has_the_same_bits(name, tmp_path):
    """In float32; in bfloat16 the weights are rounded once."""
    spec = SPECS[name]
    model = checkpoint(tmp_path / "ours", spec)
    (tmp_path / "config.json").write_text(json.dumps(config_json(spec)))
    for dtype in (torch.float32, torch.bfloat16):
        text = str(dtype).removeprefix("torch.")
        export_to_torchtitan(tmp_path / "ours", tmp_path / text, dtype=text, log=quiet)
        request = ImportRequest(tmp_path / text, tmp_path / "config.json")
        import_from_trainer("torchtitan", request, tmp_path / f"{text}-again", log=quiet)
        again = build_model(spec)
        load_state(tmp_path / f"{text}-again", again, None)

        assert all(
            torch.equal(weight, model.state_dict()[key].to(dtype).float()) for key, weight in again.state_dict().items()
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (named_size("gpt_neox", "debug", 257), "do not have the family gpt_neox"),
        (named_size("smollm3", "debug", 257), "do not have the family smollm3"),
        (replace(SPECS["llama3"], sliding_window=8), "do not have a sliding window"),
        (replace(SPECS["llama3"], qkv_bias=True), "do not have biases of queries, keys and values"),
        (
            replace(SPECS["qwen3"], rope_scaling=SPECS["llama3"].rope_scaling),
            "do not have RoPE scaling 'llama3' with norms of queries and keys",
        ),
    ],
    ids=["family", "extended", "window", "bias", "rope"],
)
def test_a_model_that_torchtitan_does_not_have_is_refused(spec, message, tmp_path):
    """Nothing is written."""
    checkpoint(tmp_path / "ours", spec)
    with pytest.raises(CheckpointError) as refused:
        export_to_torchtitan(tmp_path / "ours", tmp_path / "out", dtype="float32", log=quiet)

    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()
