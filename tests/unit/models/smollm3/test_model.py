"""The SmolLM3 family: the same answers as transformers, which layers rotate, what of a config.json is refused."""

import json

import family_models
import pytest
import torch
from family_models import assert_same_logits_and_gradients, in_transformers, with_all_weights_drawn

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import spec_from_config
from titan_cpt.models.registry import SIZES, as_config_table, named_size, spec_from_recipe

VARIANTS = {  # overrides of debug: 4 layers, the last without RoPE, width 64, 2 heads, 1 for keys, tied
    "as released": {},
    "untied, every other layer": {"nope_interval": 2, "tie_embeddings": False, "rope_base": 500.0},
    "no layer without rotary positions": {"nope_interval": 5, "heads": 4, "kv_heads": 2},
    "no rotary positions": {"nope_interval": 1},
    "yarn, wide heads": {
        "head_width": 48,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16},
    },
    "a window where no positions are": {"nope_interval": 3, "sliding_window": 7},
}


def built(*size, **overrides):
    return family_models.built("smollm3", *size, **overrides)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(overrides, tmp_path):
    """The same weights give the same logits and gradients; config.json and the recipe give the spec again."""
    model = with_all_weights_drawn(built(**overrides))
    theirs = in_transformers(model, tmp_path)
    theirs.config.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]

    assert type(theirs).__name__ == "SmolLM3ForCausalLM"
    assert_same_logits_and_gradients(model, theirs)
    assert [spec_from_config(json.loads(text), "config.json") for text in texts] == [model.spec, model.spec]
    assert spec_from_recipe(json.loads(json.dumps(model.spec.as_recipe()))) == model.spec


def test_every_fourth_layer_has_no_rotary_positions():
    """Layers 3, 7, ... 35 of 36 (https://huggingface.co/blog/smollm3); a window is only there."""
    spec = named_size("smollm3", "3b", 257, overrides={"sliding_window": 9})
    without = [layer for layer in range(36) if spec.layer_rope(layer) is None]

    assert without == list(range(3, 36, 4))
    assert [layer for layer, window in enumerate(spec.layer_windows) if window == 9] == without


def test_the_release_has_the_published_parameter_count():
    """3,075,098,624 in the safetensors index of SmolLM3-3B; every size as the built model."""
    assert named_size("smollm3", "3b", 257).parameters == 3_075_098_624
    for size in SIZES["smollm3"]:
        spec = named_size("smollm3", size, 257)
        with torch.device("meta"):
            model = build_model(spec)

        assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters


RELEASE = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65_536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5_000_000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128_256,
}
"""config.json of SmolLM3-3B, without the keys that no model reads; its embeddings are tied by default."""


def test_the_released_configuration_is_the_named_size():
    """Nothing more is to set; with or without the list of layers."""
    short = {key: value for key, value in RELEASE.items() if key not in ("no_rope_layers", "layer_types")}
    spec = spec_from_config(RELEASE, "config.json")

    assert spec == named_size("smollm3", "3b", 257) == spec_from_config(short, "config.json")
    assert as_config_table(spec).splitlines() == ["[model]", 'family = "smollm3"', 'size = "3b"']


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # https://github.com/huggingface/smollm/issues/130 shows a list with 1 for layers without rotary positions
        ({"no_rope_layers": [0, 0, 0, 1] * 9}, "no_rope_layers: must leave out rotary positions in every n-th layer"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers: must be a list of 36 zeros"),
        ({"no_rope_layers": [2] * 36}, "no_rope_layers: must be a list of 36 zeros"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval: must be above 0, got 0"),
        ({"layer_types": ["sliding_attention"] * 36}, "layer_types: only a sliding window in exactly the layers"),
        (
            {"layer_types": ["sliding_attention"] * 36, "use_sliding_window": True, "sliding_window": 8},
            "layer_types: only a sliding window in exactly the layers",
        ),
        ({"attention_bias": True}, "attention_bias: only False is supported"),
    ],
)
def test_a_config_that_no_interval_describes_is_refused(changes, expected):
    """The message names the key of config.json."""
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(RELEASE | changes, "config.json")

    assert expected in str(refusal.value)


def test_a_window_that_layer_types_turn_off_is_none():
    """layer_types overrides use_sliding_window; without layer_types the window is where no rotary positions are."""
    windowed = RELEASE | {"use_sliding_window": True, "sliding_window": 8}

    assert spec_from_config(windowed, "config.json").sliding_window is None
    assert spec_from_config(windowed | {"layer_types": None}, "config.json").sliding_window == 8


@pytest.mark.parametrize("name", ["qkv_bias", "qk_norm"])
def test_parts_of_other_families_are_refused(name):
    """transformers' SmolLM3 could not compute the model."""
    with pytest.raises(ConfigError, match=f"model.{name}: must be false in the family smollm3"):
        built(**{name: True})
