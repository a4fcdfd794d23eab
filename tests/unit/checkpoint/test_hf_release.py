"""A Hugging Face model whose files do not match its config.json, or that cannot be trained on, is refused by name."""

import json
import math
import re

import pytest
import torch
from releases import SPECS, release
from safetensors.torch import load_file, save_file

from titan_cpt.checkpoint.hf_import import fill, import_released
from titan_cpt.checkpoint.hf_release import open_released
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)


def test_weights_that_do_not_match_config_json_are_refused_by_name(tmp_path):
    """One with another shape, one missing and one too many: all are listed."""
    release(tmp_path / "released", SPECS["llama"], shard="5GB")
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    changed = config | {"intermediate_size": 100}
    (tmp_path / "released" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError) as refusal:
        open_released(str(tmp_path / "released"))

    assert "mlp.up_proj.weight: has shape [192, 64], but config.json requires [100, 64]" in str(refusal.value)
    (tmp_path / "released" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=re.escape("model.layers.2.mlp.down_proj.weight: missing")):
        open_released(str(tmp_path / "released"))
    (tmp_path / "released" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=re.escape("model.layers.1.mlp.up_proj.weight: not a weight")):
        open_released(str(tmp_path / "released"))


def changed_release(folder, spec, change):
    """Save a Hugging Face model in one file, with weights that `change` has edited."""
    release(folder, spec, shard="5GB")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([7]), math.nan), "has values that are NaN or infinite"),
        (lambda weight: weight.index_fill(0, torch.tensor([7]), -math.inf), "has values that are NaN or infinite"),
        (lambda weight: (weight * 100).to(torch.int8), "has the dtype int8: quantized weights cannot"),
    ],
    ids=["NaN", "infinite", "int8"],
)
def test_weights_that_cannot_be_trained_on_are_refused_by_name(change, message, tmp_path):
    """NaN, infinite values and integers; nothing is written, and a run that loads the folder is refused too."""

    def edit(weights):
        weights[name] = change(weights[name])

    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed_release(tmp_path / "released", SPECS["llama"], edit)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} {message}")):
        import_released(folder, tmp_path / "imported", log=print)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} {message}")):
        fill(build_model(SPECS["llama"]), open_released(folder), SPECS["llama"])
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_float8_weights_without_scales_are_read_by_value(tmp_path):
    """0.5 and -448, the largest magnitude. Models with scales have more tensors, and are refused for these."""

    def edit(weights):
        weights[name] = torch.tensor([0.5, -448.0]).repeat(weights[name].numel() // 2).to(torch.float8_e4m3fn)
        weights[name] = weights[name].view(wanted)

    name = "model.layers.1.mlp.up_proj.weight"
    wanted = (SPECS["llama"].mlp_width, SPECS["llama"].width)
    released = open_released(changed_release(tmp_path / "released", SPECS["llama"], edit))
    assert set(released.read("blocks.1.mlp.up.weight", SPECS["llama"]).float().unique().tolist()) == {0.5, -448.0}


def test_a_separate_head_of_a_tied_model_must_equal_its_embedding(tmp_path):
    """transformers 5 would keep both, 4 only the embedding; an equal copy is accepted."""

    def repeat(weights, factor):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * factor

    spec = SPECS["tied qwen3"]
    changed_release(tmp_path / "copy", spec, lambda weights: repeat(weights, 1))
    changed_release(tmp_path / "other", spec, lambda weights: repeat(weights, 2))

    assert open_released(str(tmp_path / "copy")).spec == spec
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings = true, but lm_head.weight differs from model"):
        open_released(str(tmp_path / "other"))


def test_a_weight_in_two_shards_is_refused_with_both_files(tmp_path):
    """The index lists one of them; it is unknown which one is right."""
    release(tmp_path / "released", SPECS["llama"])
    first, second = sorted((tmp_path / "released").glob("*.safetensors"))[:2]
    weights = load_file(first)
    name = next(iter(weights))
    save_file({**load_file(second), name: weights[name] + 1}, second, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=re.escape(f"{first.name} and {second.name} both hold {name}")):
        open_released(str(tmp_path / "released"))
