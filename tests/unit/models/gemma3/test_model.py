"""The Gemma 3 family: the same answers as transformers in every variant, initial weights, refusals."""

import dataclasses
import json
import math

import family_models
import pytest
import torch
from family_models import TOKENS_BL, assert_same_logits_and_gradients, in_transformers, with_all_weights_drawn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from titan_cpt.checkpoint.hf_import import fill, open_released, verify_against_transformers
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.gemma3.model import ZeroCenteredRMSNorm, embedding_scale
from titan_cpt.models.huggingface_config import spec_from_config
from titan_cpt.models.registry import SIZES, as_config_table, named_size, spec_from_recipe

VARIANTS = {  # overrides of debug: 3 layers, the last global, window 16, width 64, 2 heads of 32, 1 for keys, tied
    "as released": {},
    "untied, other bases": {"tie_embeddings": False, "local_rope_base": 300.0, "rope_base": 5000.0},
    "linear scaling of global layers": {"rope_scaling": {"kind": "linear", "factor": 8.0}, "rope_base": 500.0},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}},
    "scores scaled otherwise than by the head width": {"query_pre_attn_scalar": 100.0},
    "heads of 256": {"head_width": 256, "sliding_window": 5},
    "more local layers than the interval": {"layers": 4, "global_interval": 2, "heads": 4, "kv_heads": 2},
    "no global layer": {"global_interval": 4, "sliding_window": 100},
    "no local layer": {"global_interval": 1},
}


def built(*size, **overrides):
    return family_models.built("gemma3", *size, **overrides)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(overrides, tmp_path):
    """The same weights give the same logits and gradients; config.json and the recipe give the spec again."""
    model = with_all_weights_drawn(built(**overrides))
    theirs = in_transformers(model, tmp_path)
    theirs.config.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]

    assert type(theirs).__name__ == "Gemma3ForCausalLM"
    assert_same_logits_and_gradients(model, theirs)
    assert [spec_from_config(json.loads(text), "config.json") for text in texts] == [model.spec, model.spec]
    assert spec_from_recipe(json.loads(json.dumps(model.spec.as_recipe()))) == model.spec


def test_in_bfloat16_the_embedding_is_scaled_by_the_rounded_number(tmp_path):
    """sqrt(1152) = 33.94 is 34 in bfloat16, as transformers computes; a width of 56 has 7.48 and 7.5."""
    model = with_all_weights_drawn(built(width=56))
    theirs = in_transformers(model, tmp_path, torch.bfloat16)
    ours = model.to(torch.bfloat16)
    with torch.no_grad():
        embedded_BLD = ours.embedding(TOKENS_BL) * embedding_scale(56, torch.bfloat16)
        logits_BLV, their_logits_BLV = ours(TOKENS_BL).float(), theirs(TOKENS_BL).logits.float()

    assert embedding_scale(1152, torch.bfloat16) == 34.0
    assert embedding_scale(56, torch.float32) == pytest.approx(math.sqrt(56), rel=1e-7)
    assert torch.equal(embedded_BLD, theirs.model.embed_tokens(TOKENS_BL))
    assert (logits_BLV - their_logits_BLV).norm() / their_logits_BLV.norm() < 0.02


def test_a_norm_multiplies_by_one_plus_its_weight_in_float32():
    """By hand: (3, 4) has the mean square 12.5; the weights 0 and 1 and the factor 2 multiply by 2 and 4."""
    norm = ZeroCenteredRMSNorm(2, eps=0.0, factor=2.0)
    norm.weight.data = torch.tensor([0.0, 1.0])
    expected = torch.tensor([3.0 * 2, 4.0 * 4]) / math.sqrt(12.5)

    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)
    assert norm(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)).dtype is torch.bfloat16
    tiny = torch.full((2,), 2.0**-9)  # 1 + 2^-9 is 1 in bfloat16
    norm.weight.data, norm.factor = tiny, 1.0
    assert (norm.to(torch.bfloat16)(torch.ones(2)) > 1.0).all()


def test_every_sixth_layer_is_global():
    """Layers 5, 11, ... of 26 (arXiv:2503.19786, section 2: five local ones, then a global one)."""
    spec = named_size("gemma3", "1b", 257)
    rotated = spec.with_rope(dataclasses.replace(spec.rope, base=8e6))

    assert [layer for layer, window in enumerate(spec.layer_windows) if window is None] == [5, 11, 17, 23]
    assert set(spec.layer_windows) == {512, None}
    assert [spec.ropes[spec.layer_rope(layer)].base for layer in (4, 5)] == [10_000.0, 1_000_000.0]
    assert [rotated.ropes[rotated.layer_rope(layer)].base for layer in (4, 5)] == [10_000.0, 8_000_000.0]


def test_a_stages_rope_changes_the_global_layers():
    """The same weights with another RoPE are a model built with it; local layers keep their own."""
    model, other = built(rope_base=500.0), built(rope_base=90.0)
    model.set_rope(other.spec.rope)

    assert torch.equal(model(TOKENS_BL), other(TOKENS_BL))
    assert [core.rope_base for core in (block.attention.core for block in model.blocks.values())] == [1e4, 1e4, 90.0]


PUBLISHED = {  # parameters without those of images: KerasHub's gemma3 presets, and with rounding the technical report
    "270m": 268_098_176,
    "1b": 999_885_952,
    "4b": 3_880_099_328,
    "12b": 11_765_788_416,
    "27b": 27_009_002_240,
}


def test_every_released_size_has_the_published_parameter_count():
    """And every size that of the built model; 302M of embedding and 698M without in 1b (arXiv:2503.19786, table 1)."""
    one = named_size("gemma3", "1b", 257)
    for size in SIZES["gemma3"]:
        spec = named_size("gemma3", size, 257)
        with torch.device("meta"):
            model = build_model(spec)

        assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters
    assert {size: named_size("gemma3", size, 257).parameters for size in SIZES["gemma3"][3:]} == PUBLISHED
    assert [round(n / 1e6) for n in (one.embedding_parameters, one.parameters_without_embeddings)] == [302, 698]


def test_initial_weights_are_those_documented():
    """Every matrix 0.02, every norm 0; the same after the meta device; other seeds, other matrices."""
    model = built("tiny", tie_embeddings=False)
    with torch.device("meta"):
        again = build_model(model.spec)
    again.to_empty(device="cpu")
    again.init_weights(11)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05) if parameter.ndim == 2 else not parameter.any()
    assert len({round(matrix.flatten()[:8].sum().item(), 6) for matrix in matrices}) == len(matrices) == 44


def test_pipeline_stages_compute_the_models_logits():
    """Two stages of an untied model, one after the other; only the first scales the embedding."""
    first, second = built(tie_embeddings=False), built(tie_embeddings=False)
    first.final_norm = first.head = second.embedding = None
    for layer in range(3):
        del (second if layer < 2 else first).blocks[str(layer)]

    assert torch.equal(second(first(TOKENS_BL)), built(tie_embeddings=False)(TOKENS_BL))


GEMMA_1B = """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": null,
"cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912,
"max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
"num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
"rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
"sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144}"""
"""config.json of gemma-3-1b-it, as a test of https://github.com/NVIDIA/TensorRT-LLM has it."""
LONG = {
    "hidden_size": 5376,
    "head_dim": 128,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}
"""What 27b changes."""
TABLES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}


def test_a_released_configuration_is_the_named_size():
    """In the spelling of transformers 4 and in that of 5, with the list of layers and with the interval."""
    config = json.loads(GEMMA_1B)
    in_4 = config | LONG
    without = {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}
    kinds = [("sliding" if (layer + 1) % 6 else "full") + "_attention" for layer in range(62)]
    in_5 = {key: value for key, value in in_4.items() if key not in without}
    in_5 |= {"rope_parameters": TABLES, "layer_types": kinds, "use_bidirectional_attention": False}

    assert spec_from_config(config, "") == named_size("gemma3", "1b", 257)
    assert spec_from_config(in_4, "") == spec_from_config(in_5, "") == named_size("gemma3", "27b", 257)
    assert as_config_table(spec_from_config(in_5, "")).splitlines()[1:] == ['family = "gemma3"', 'size = "27b"']


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: soft-capping, which Gemma 3 does not have"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: soft-capping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: only False is supported, got True"),
        ({"attention_bias": True}, "attention_bias: only False is supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation: only 'gelu_pytorch_tanh' is supported, got 'gelu'"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 13},
            "layer_types: only full_attention in every n-th",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types: must be a list of 26 full_attention or sliding_attention"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: must be above 0, got 0"),
        ({"sliding_window": None}, "sliding_window: must be a number, got None"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters: must have a table for full_attention and one for"),
        (
            {"rope_parameters": TABLES | {"full_attention": 3}},
            "rope_parameters.full_attention: must be an object, got 3",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            "rope_parameters.sliding_attention: only RoPE without scaling is supported in local layers",
        ),
        (
            {"rope_parameters": TABLES, "rope_theta": 5e5},
            "rope_theta: is 500000.0, but rope_parameters.full_attention.r",
        ),
    ],
)
def test_a_config_that_the_model_does_not_compute_is_refused(changes, expected):
    """The message names the key of config.json."""
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(json.loads(GEMMA_1B) | changes, "config.json")

    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kv_heads": 3}, "model.kv_heads: must divide model.heads = 2, got 3"),
        ({"head_width": 31}, "model.head_width: must be even"),
        ({"global_interval": 0}, "model.global_interval: must be above 0, got 0"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "model.rope_scaling.factor: must be 1 or more, got 0.5"),
        ({"qkv_bias": True}, "model.qkv_bias: the family 'gemma3' has no such"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(overrides, expected):
    """The message names the key of [model]."""
    with pytest.raises(ConfigError) as refusal:
        built(**overrides)

    assert expected in str(refusal.value)


def test_the_text_part_of_a_multimodal_release_is_read():
    """The keys that gemma-3-4b-pt has, as https://github.com/NVIDIA/TensorRT-LLM has 27b's: the others are defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": LONG["rope_scaling"], "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    spec = spec_from_config(config, "config.json")

    assert spec == dataclasses.replace(named_size("gemma3", "4b", 257), vocab_size=262_208)
    with pytest.raises(CheckpointError, match="text_config: must be an object, got None"):
        spec_from_config({"model_type": "gemma3"}, "config.json")
    with pytest.raises(CheckpointError, match="quantized weights cannot be trained"):
        spec_from_config(config | {"quantization_config": {"bits": 4}}, "config.json")


def test_the_text_model_of_a_release_with_images_is_imported(tmp_path):
    """Logits of the whole model on text, from files as transformers saves them; the vision weights are named."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    text |= {"num_key_value_heads": 1, "sliding_window": 16, "sliding_window_pattern": 3, "vocab_size": 300}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    theirs = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    theirs.save_pretrained(tmp_path / "released", max_shard_size="100KB")
    released = open_released(str(tmp_path / "released"))
    model = build_model(released.spec)
    fill(model, released, released.spec)
    compared = verify_against_transformers(released, released.spec, lambda model: fill(model, released, released.spec))
    with torch.no_grad():
        logits_BLV, their_logits_BLV = model(TOKENS_BL), theirs(TOKENS_BL).logits

    torch.testing.assert_close(logits_BLV, their_logits_BLV, rtol=1e-4, atol=1e-4)
    assert compared.startswith("logits are those of transformers")
    assert len(list((tmp_path / "released").glob("*.safetensors"))) > 1
    (note,) = released.notes
    assert note.startswith("only its text model is used: ")
    assert note.endswith("weights of multi_modal_projector, vision_tower were ignored")
