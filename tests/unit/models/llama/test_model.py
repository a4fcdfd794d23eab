"""The Llama family: the same answers as transformers in every variant, first weights, stages, refusals."""

import dataclasses
import json
import math
import sys

import family_models
import pytest
import torch
from family_models import TOKENS_BL, assert_same_logits_and_gradients, in_transformers, with_all_weights_drawn

from titan_cpt.errors import ConfigError
from titan_cpt.models.common.layers import RotaryCausalAttention, rotary_tables
from titan_cpt.models.huggingface_config import spec_from_config
from titan_cpt.models.llama.model import Llama
from titan_cpt.models.registry import SIZES, as_config_table, named_size, spec_from_recipe

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
VARIANTS = {  # name: (architecture that transformers is to take, overrides of debug: width 64, 2 heads, 1 for keys)
    "grouped queries": ("llama", {}),
    "a head of keys for each": ("llama", {"kv_heads": 2}),
    "four queries on one key": ("llama", {"heads": 4, "kv_heads": 1}),
    "tied embeddings": ("llama", {"tie_embeddings": True}),
    "heads wider than the model": ("llama", {"head_width": 48}),
    "other base and epsilon": ("llama", {"rope_base": 500.0, "norm_eps": 1e-3}),
    "llama3 scaling": ("llama", {"rope_scaling": LLAMA3}),
    "linear scaling": ("llama", {"rope_scaling": {"kind": "linear", "factor": 8.0}}),
    "yarn scaling": ("llama", {"rope_scaling": YARN}),
    "yarn whose ramp begins between two features": ("llama", {"rope_scaling": YARN | {"original_seq_len": 1024}}),
    "yarn with a given attention factor": (
        "llama",
        {"rope_scaling": YARN | {"attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 0.5}},
    ),
    "window shorter than the sequence": ("mistral", {"sliding_window": 7}),
    "window as long as the sequence": ("mistral", {"sliding_window": 48}),
    "window longer than the sequence": ("mistral", {"sliding_window": 100}),
    "window over four heads on two": ("mistral", {"heads": 4, "kv_heads": 2, "sliding_window": 11}),
    "qwen2": ("qwen2", {"qkv_bias": True}),
    "qwen2 tied, in a window": ("qwen2", {"qkv_bias": True, "tie_embeddings": True, "sliding_window": 9}),
    "qwen2 with yarn": ("qwen2", {"qkv_bias": True, "rope_scaling": YARN}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_width": 48}),
    "qwen3 tied, in a window": ("qwen3", {"qk_norm": True, "tie_embeddings": True, "sliding_window": 9}),
}

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def built(*size, **overrides):
    return family_models.built("llama", *size, **overrides)


@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(architecture, overrides, tmp_path):
    """The same weights give the same logits and, for a random scalar of them, the same gradient of every weight."""
    model = with_all_weights_drawn(built(**overrides))
    theirs = in_transformers(model, tmp_path)

    assert theirs.config.model_type == architecture
    assert_same_logits_and_gradients(model, theirs)


@pytest.mark.parametrize("overrides", [overrides for _, overrides in VARIANTS.values()], ids=VARIANTS)
def test_a_spec_round_trips_through_every_format(overrides, tmp_path):
    """config.json as we write it, as transformers writes it again, the recipe through JSON, and a [model] table."""
    model = built(**overrides)
    spec = model.spec
    in_transformers(model, tmp_path).config.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]

    assert [spec_from_config(json.loads(text), "config.json") for text in texts] == [spec, spec]
    assert spec_from_recipe(json.loads(json.dumps(spec.as_recipe() | {"other": 1}))) == spec


def test_each_variant_differs_from_the_plain_model():
    """Each option above has an effect: the same weights give other logits."""
    plain = with_all_weights_drawn(built())
    options = {"rope_scaling": [LLAMA3, YARN], "sliding_window": [7], "rope_base": [500.0], "norm_eps": [1e-3]}
    for name, values in options.items():
        for value in values:
            other = Llama(built(**{name: value}).spec)
            other.load_state_dict(plain.state_dict())

            assert (other(TOKENS_BL) - plain(TOKENS_BL)).abs().max() > 1e-3, name


def test_a_built_model_has_the_parameter_count_of_its_spec():
    """Counted from the spec and from the modules, in every size."""
    for size in SIZES["llama"]:
        spec = named_size("llama", size, 257)
        with torch.device("meta"):
            model = Llama(spec)
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        embeddings = sum(count for name, count in counts.items() if name in ("embedding.weight", "head.weight"))

        assert sum(counts.values()) == spec.parameters, size
        assert sum(counts.values()) - embeddings == spec.parameters_without_embeddings, size


def test_initial_weights_have_the_documented_standard_deviation():
    """mini (6 layers): 0.02, and 0.02 / sqrt(12) = 0.0057735 into the residual; norms 1, biases 0."""
    for overrides in ({"qkv_bias": True}, {"qk_norm": True}):
        for name, parameter in built("mini", **overrides).named_parameters():
            into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            if parameter.ndim == 2:
                assert parameter.std().item() == pytest.approx(0.0057735 if into_residual else 0.02, rel=0.02), name
            else:
                assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_initial_weights_depend_on_the_seed_and_no_two_are_equal():
    """The same seed gives the same bits, another seed others, and no matrix repeats another's draw."""
    first, again, other = built(seed=1), built(seed=1), built(seed=2)
    matrices = {name: parameter for name, parameter in first.named_parameters() if parameter.ndim == 2}

    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in first.named_parameters())
    assert not any(torch.equal(parameter, other.get_parameter(name)) for name, parameter in matrices.items())
    assert len({round((p.flatten()[:8].sum() / p.std()).item(), 4) for p in matrices.values()}) == len(matrices) == 16


def test_initial_weights_are_the_same_after_the_meta_device():
    """Built on meta, emptied onto memory full of rubbish, initialised: weights and logits as if built directly."""
    for overrides in ({"tie_embeddings": True, "qk_norm": True}, {"qkv_bias": True, "rope_scaling": YARN}):
        with torch.device("meta"):
            model = Llama(built(**overrides).spec)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(math.nan)
        model.init_weights(11)

        assert torch.equal(model(TOKENS_BL), built(**overrides)(TOKENS_BL))


def test_pipeline_stages_have_the_models_weights_and_compute_its_logits():
    """Two stages, initialized separately: the weights of the whole model and, one after the other, its logits."""
    first, second = Llama(built("tiny").spec), Llama(built("tiny").spec)
    first.final_norm = first.head = second.embedding = None
    for layer in range(4):
        del (second if layer < 3 else first).blocks[str(layer)]
    first.init_weights(11)
    second.init_weights(11)

    assert list(second.blocks) == ["3"]
    assert torch.equal(second(first(TOKENS_BL)), built("tiny")(TOKENS_BL))


def test_a_tied_embedding_is_one_weight_that_learns_from_both_ends():
    """One name in the state dict, and a gradient at rows that only the head has touched."""
    model = built(tie_embeddings=True)
    model(TOKENS_BL[:, :4])[..., 300].sum().backward()

    assert "head.weight" not in model.state_dict()
    assert model.embedding.weight.grad[300].abs().max() > 0
    assert model.embedding.weight.grad[TOKENS_BL[0, 0]].abs().max() > 0


@pytest.mark.parametrize("window", [1, 5])
def test_a_position_attends_to_its_sliding_window_only(window):
    """Of 12 positions, the one at 9 draws from 9 - window + 1 to 9: the gradient of its result says from where."""
    core = RotaryCausalAttention(rotary_width=8, rope_base=10_000.0, window=window)
    q_BLNH, k_BLNH, v_BLNH = torch.randn(3, 1, 12, 2, 8, generator=torch.Generator().manual_seed(1))
    v_BLNH.requires_grad_()
    core(q_BLNH, k_BLNH, v_BLNH)[0, 9].sum().backward()
    seen = [position for position in range(12) if v_BLNH.grad[0, position].abs().max() > 0]

    assert seen == list(range(9 - window + 1, 10))


def test_llama3_frequencies_by_hand():
    """Base 16, 8 features: frequencies 1, 1/2, 1/4, 1/8. Over 8 pi positions they turn 4, 2, 1, 1/2 times.

    Kept at 4 turns, divided by 3 at 1 turn and fewer, and at 2 turns 1/3 kept: 1/2 * (1/3 + 2/9) = 5/18. (The length
    must be whole: with 25 in the place of 25.13, within 1 %.)
    """
    scaling = named_size(
        "llama", "debug", 257, overrides={"rope_scaling": LLAMA3 | {"factor": 3.0, "original_seq_len": 25}}
    ).rope_scaling
    cos_LR, sin_LR = rotary_tables(torch.tensor([1]), rotary_width=8, base=16.0, scaling=scaling)
    frequencies = torch.atan2(sin_LR, cos_LR)[0].tolist()

    assert frequencies == pytest.approx([1, 5 / 18, 1 / 12, 1 / 24], rel=0.01)


def test_yarn_multiplies_both_tables():
    """cos^2 + sin^2 is the square of 0.1 ln 4 + 1."""
    scaling = built(rope_scaling=YARN).spec.rope_scaling
    cos_LR, sin_LR = rotary_tables(torch.arange(9), rotary_width=8, base=100.0, scaling=scaling)

    torch.testing.assert_close(cos_LR**2 + sin_LR**2, torch.full((9, 4), (0.1 * math.log(4) + 1) ** 2))


def test_autocast_to_bf16_stays_close_to_fp32():
    """Logits in bf16, within a few roundings of fp32's, with norms on queries and keys and with biases."""
    for overrides in ({"qk_norm": True}, {"qkv_bias": True, "tie_embeddings": True}):
        model = with_all_weights_drawn(built(**overrides))
        exact_BLV = model(TOKENS_BL)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BLV = model(TOKENS_BL)

        assert logits_BLV.dtype is torch.bfloat16
        assert (logits_BLV.float() - exact_BLV).norm() / exact_BLV.norm() < 0.03


PUBLISHED = {  # parameters, as the hub counts them
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def test_every_released_size_has_the_published_parameter_count():
    """All except the three sizes for a CPU."""
    assert {size: named_size("llama", size, 257).parameters for size in SIZES["llama"][3:]} == PUBLISHED


LLAMA_32_3B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 128,
"hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
"mlp_bias": false, "model_type": "llama", "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
"low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256}"""
QWEN25_14B = """{"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 5120,
"intermediate_size": 13824, "max_position_embeddings": 131072, "model_type": "qwen2", "num_attention_heads": 40,
"max_window_layers": 48, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
"rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
"use_sliding_window": false, "vocab_size": 152064}"""
QWEN3_4B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
"model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
"rms_norm_eps": 0.000001, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
"tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
"tie_word_embeddings": false, "vocab_size": 32000}"""
LLAMA2_7B = """{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
"intermediate_size": 11008, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
 "rms_norm_eps": 1e-05, "rope_scaling": null,
"tie_word_embeddings": false, "vocab_size": 32000}"""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (LLAMA_32_3B, "llama3.2-3b"),
        (QWEN25_14B, "qwen2.5-14b"),
        (QWEN3_4B, "qwen3-4b"),
        (MISTRAL_7B, "mistral-7b"),
        (LLAMA2_7B, "llama2-7b"),
    ],
)
def test_a_released_configuration_is_the_named_size(text, size):
    """The keys as the releases' config.json have them; the size is found by its numbers, and nothing more is to set."""
    spec = spec_from_config(json.loads(text), "config.json")

    assert spec == named_size("llama", size, 257)
    assert as_config_table(spec).splitlines() == ["[model]", 'family = "llama"', f'size = "{size}"']


def test_a_spec_without_a_named_size_is_written_as_a_config_table():
    """Read back as TOML and laid over the size, it is the spec again; no size with a window can be its base."""
    mistral = named_size("llama", "mistral-7b", 257)
    wanted = [
        dataclasses.replace(mistral, sliding_window=None, vocab_size=32_064),
        dataclasses.replace(mistral, sliding_window=None),
        dataclasses.replace(mistral, width=2048, rope_scaling=built(rope_scaling=YARN).spec.rope_scaling),
        built(qk_norm=True, heads=4, vocab_size=300).spec,
        named_size("gpt_neox", "160m", 257, overrides={"width": 512, "heads": 4, "parallel_residual": False}),
    ]
    for spec in wanted:
        table = tomllib.loads(as_config_table(spec))["model"]
        family, size = table.pop("family"), table.pop("size")

        assert named_size(family, size, 1, overrides=table) == spec


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"heads": 3}, "model.heads: must divide model.width = 64 if model.head_width is not set, got 3"),
        ({"heads": 2, "kv_heads": 4}, "model.kv_heads: must divide model.heads = 2, got 4"),
        ({"head_width": 31}, "model.head_width: must be even"),
        ({"kv_heads": 0}, "model.kv_heads: must be above 0, got 0"),
        ({"sliding_window": 0}, "model.sliding_window: must be above 0, got 0"),
        ({"tie_embeddings": 1}, "model.tie_embeddings: must be bool, got 1"),
        ({"parallel_residual": True}, "model.parallel_residual: the family 'llama' has no such"),
        ({"qkv_bias": True, "qk_norm": True}, "model.qk_norm: must be false if model.qkv_bias is true"),
        (
            {"rope_scaling": YARN | {"kind": "ntk"}},
            "model.rope_scaling.kind: must be one of linear, llama3, yarn, got 'ntk'",
        ),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "model.rope_scaling.factor: must be 1 or more, got 0.5"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "model.rope_scaling.low_freq_factor: must be above 0"),
        ({"rope_scaling": YARN | {"original_seq_len": 0}}, "model.rope_scaling.original_seq_len: must be above 0"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(overrides, expected):
    """The message names the key of [model], what was found and what is allowed."""
    with pytest.raises(ConfigError) as refusal:
        built(**overrides)

    assert expected in str(refusal.value)
