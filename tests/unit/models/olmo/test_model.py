"""The OLMo family: the same logits and gradients as transformers, initial weights, pipeline stages, refusals."""

import dataclasses
import json
import math

import family_models
import pytest
import torch
from family_models import TOKENS_BL, assert_same_logits_and_gradients, in_transformers, with_all_weights_drawn

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.common.kv_cache import kv_cache
from titan_cpt.models.huggingface_config import spec_from_config
from titan_cpt.models.olmo.model import Olmo
from titan_cpt.models.registry import SIZES, as_config_table, named_size, spec_from_recipe
from titan_cpt.models.spec import Rope, RopeScaling

YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THREE_OF_FOUR = {"layers": 4, "sliding_window": 7, "global_interval": 4}
VARIANTS = {  # name: (model_type, overrides of debug: 2 layers, width 64, 2 heads, 1 of keys)
    "grouped queries": ("olmo2", {}),
    "a head of keys for each": ("olmo2", {"kv_heads": 2}),
    "tied, other head width": ("olmo2", {"tie_embeddings": True, "head_width": 48}),
    "other base and epsilon": ("olmo2", {"rope_base": 500.0, "norm_eps": 1e-3}),
    "olmo2 with yarn": ("olmo2", {"rope_scaling": YARN}),
    "olmo3": ("olmo3", THREE_OF_FOUR),
    "olmo3 with yarn": ("olmo3", {**THREE_OF_FOUR, "heads": 4, "kv_heads": 4, "rope_scaling": YARN}),
    "olmo3 with llama3 scaling and another base": (
        "olmo3",
        {"layers": 3, "sliding_window": 11, "global_interval": 2, "rope_base": 700.0, "rope_scaling": LLAMA3},
    ),
    "a window in all layers": ("olmo3", {"sliding_window": 9}),
}


def built(*size, **overrides):
    return family_models.built("olmo", *size, **overrides)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(model_type, overrides, tmp_path):
    """The same weights give the same logits and, for a random scalar of them, the same gradient of every weight."""
    model = with_all_weights_drawn(built(**overrides))
    theirs = in_transformers(model, tmp_path, eos_token_id=0)

    assert theirs.config.model_type == model_type
    assert theirs.get_input_embeddings().padding_idx is None  # else transformers does not train that row
    assert_same_logits_and_gradients(model, theirs)


@pytest.mark.parametrize("overrides", [overrides for _, overrides in VARIANTS.values()], ids=VARIANTS)
def test_a_spec_round_trips_through_every_format(overrides, tmp_path):
    """config.json as we write it, as transformers writes it again, the recipe through JSON, and a [model] table."""
    model = built(**overrides)
    spec = model.spec
    in_transformers(model, tmp_path, eos_token_id=0).config.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]

    assert [spec_from_config(json.loads(text), "config.json") for text in texts] == [spec, spec]
    assert spec_from_recipe(json.loads(json.dumps(spec.as_recipe() | {"other": 1}))) == spec


def test_windows_and_scaling_belong_to_their_layers():
    """Of OLMo 3's 32 layers, 3, 7, ... 31 have full attention and YaRN; a stage's RoPE scales only those."""
    long, short = named_size("olmo", "olmo3-7b-long", 257), named_size("olmo", "olmo3-7b", 257)
    full = [layer for layer in range(32) if long.layer_window(layer) is None]
    scaling = RopeScaling(kind="yarn", factor=8.0, original_seq_len=8192)
    model = built(**THREE_OF_FOUR)
    model.set_rope(Rope(700.0, scaling))
    cores = [attention.core for attention in model.attentions()]

    assert full == [3, 7, 11, 15, 19, 23, 27, 31]
    assert {long.layer_window(layer) for layer in range(32) if layer not in full} == {4096}
    assert [long.ropes[long.layer_rope(layer)].scaling for layer in (0, 2, 3)] == [None, None, scaling]
    assert short.with_rope(Rope(500_000.0, scaling)) == long
    assert [(core.rope_base, core.scaling) for core in cores] == [(700.0, None)] * 3 + [(700.0, scaling)]


def test_cached_tokens_have_the_logits_of_the_whole_sequence():
    """20 tokens after 15 cached ones, one by one, with windows of 7 and RoPE of two kinds."""
    model = with_all_weights_drawn(built(**THREE_OF_FOUR, rope_scaling=YARN))
    whole_BLV = model(TOKENS_BL[:, :35])
    found = []
    with torch.no_grad(), kv_cache(model, sequences=2, capacity=40, device=TOKENS_BL.device) as cache:
        for first, last in [(0, 15), *((place, place + 1) for place in range(15, 35))]:
            found.append(model(TOKENS_BL[:, first:last]))
            cache.advance(torch.tensor([last - first] * 2))

    torch.testing.assert_close(torch.cat(found, dim=1), whole_BLV, rtol=1e-4, atol=1e-4)


def test_a_built_model_has_the_parameters_of_its_spec():
    """Names, shapes and their number, in every size."""
    for size in SIZES["olmo"]:
        spec = named_size("olmo", size, 257)
        with torch.device("meta"):
            model = Olmo(spec)
        block = {name: tuple(parameter.shape) for name, parameter in model.blocks["0"].named_parameters()}

        assert block == {parameter.name: parameter.size for parameter in spec.block_parameters()}
        assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters, size


def test_initial_weights_are_cut_off_at_three_standard_deviations():
    """mini: N(0, 0.02^2) within 0.06 has the standard deviation 0.02 * sqrt(1 - 6 phi(3) / (2 Phi(3) - 1)); norms 1."""
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    expected = 0.02 * math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    parameters = dict(built("mini").named_parameters())
    matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim == 2}

    assert all((parameters[name] == 1.0).all() for name in parameters.keys() - matrices.keys())
    for name, matrix in matrices.items():
        assert matrix.std().item() == pytest.approx(expected, rel=0.02), name
        assert 0.055 < matrix.abs().max() <= 0.06 + 1e-8, name
    assert torch.cat([matrix.flatten() for matrix in matrices.values()]).std().item() == pytest.approx(expected, 1e-3)


def test_initial_weights_depend_on_the_seed_and_the_name():
    """The same seed gives the same bits, after the meta device too; no matrix repeats another's draw."""
    first, other = built(seed=11), built(seed=2)
    with torch.device("meta"):
        again = Olmo(first.spec)
    again.to_empty(device="cpu")
    for tensor in again.parameters():
        tensor.data.fill_(math.nan)
    again.init_weights(11)
    matrices = {name: parameter for name, parameter in first.named_parameters() if parameter.ndim == 2}

    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in first.named_parameters())
    assert not any(torch.equal(parameter, other.get_parameter(name)) for name, parameter in matrices.items())
    assert len({round(p.flatten()[:8].sum().item(), 5) for p in matrices.values()}) == len(matrices) == 16


def test_pipeline_stages_have_the_models_weights_and_compute_its_logits():
    """Two stages, initialized separately; the layers of the second keep their window and RoPE."""
    whole = built("tiny", **THREE_OF_FOUR, rope_scaling=YARN)
    first, second = Olmo(whole.spec), Olmo(whole.spec)
    first.final_norm = first.head = second.embedding = None
    for layer in range(4):
        del (second if layer < 3 else first).blocks[str(layer)]
    first.init_weights(11)
    second.init_weights(11)

    assert torch.equal(second(first(TOKENS_BL)), whole(TOKENS_BL))


def test_autocast_to_bf16_stays_close_to_fp32():
    """Logits in bf16, within a few roundings of fp32's."""
    model = with_all_weights_drawn(built(tie_embeddings=True))
    exact_BLV = model(TOKENS_BL)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(TOKENS_BL)

    assert logits_BLV.dtype is torch.bfloat16
    assert (logits_BLV.float() - exact_BLV).norm() / exact_BLV.norm() < 0.03


PUBLISHED = {  # parameters, as the hub counts them; OLMo 3's embedding has 100,278 rows there
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
}


def test_every_released_size_has_the_published_parameter_count():
    """All except the three sizes for a CPU; a longer context adds no parameter."""
    rows = {size: {"vocab_size": 100_278} if size.startswith("olmo3") else {} for size in SIZES["olmo"][3:]}
    counts = {size: named_size("olmo", size, 257, overrides).parameters for size, overrides in rows.items()}

    assert counts == PUBLISHED | {f"{size}-long": PUBLISHED[size] for size in ("olmo3-7b", "olmo3-32b")}


OLMO2_13B = """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
"intermediate_size": 13824, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 40,
"num_hidden_layers": 40, "num_key_value_heads": 40, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
"rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": false, "torch_dtype": "float32",
"use_cache": true, "vocab_size": 100352}"""
OLMO3_32B = """{"architectures": ["Olmo3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 27648,
"max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 40, "num_hidden_layers": 64,
"num_key_value_heads": 8, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": {
"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
"original_max_position_embeddings": 8192, "rope_type": "yarn"}, "rope_theta": 500000, "sliding_window": 4096,
"tie_word_embeddings": false, "vocab_size": 100278}"""


@pytest.mark.parametrize(
    ("text", "size", "more"),
    [(OLMO2_13B, "olmo2-13b", []), (OLMO3_32B, "olmo3-32b-long", ["vocab_size = 100278"])],
)
def test_a_released_configuration_is_the_named_size(text, size, more):
    """The keys as the releases' config.json have them; the list layer_types is transformers' default."""
    spec = spec_from_config(json.loads(text), "config.json")

    assert dataclasses.replace(spec, vocab_size=100_352) == named_size("olmo", size, 257)
    assert as_config_table(spec).splitlines() == ["[model]", 'family = "olmo"', f'size = "{size}"', *more]


OLMO3 = {**json.loads(OLMO3_32B), "num_hidden_layers": 4}
NESTED = {"full_attention": {"rope_theta": 700.0}, "sliding_attention": {"rope_theta": 700.0}}
OTHER_BASE = {**OLMO3, "rope_scaling": None, "rope_theta": 700.0}


def test_the_spellings_of_transformers_4_and_5_mean_the_same():
    """OLMo 3's RoPE as separate keys, in tables by kind of layer, or in both; other bases only where both agree."""
    yarn = OLMO3["rope_scaling"]
    plain = {"rope_type": "default", "rope_theta": 5e5}
    bare = {key: value for key, value in OLMO3.items() if not key.startswith("rope")}
    nested = {"full_attention": {**plain, **yarn}, "sliding_attention": plain}
    spellings = [bare | {"rope_parameters": nested}, OLMO3 | {"rope_parameters": {"sliding_attention": plain}}]
    flat = bare | {"rope_parameters": plain}

    assert {spec_from_config(config, "") for config in spellings} == {spec_from_config(OLMO3, "")}
    assert spec_from_config(flat, "") == spec_from_config(OLMO3 | {"rope_scaling": None}, "")
    assert spec_from_config(OTHER_BASE | {"rope_parameters": NESTED}, "").rope == Rope(700.0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OTHER_BASE, "rope_theta: is 700, but transformers 5 computes the layers with a sliding window with 500,000"),
        (
            OTHER_BASE | {"rope_theta": None},
            "config.json: describes a model that is not supported:\n  - rope_theta: is miss",
        ),
        (OTHER_BASE | {"rope_parameters": {"full_attention": NESTED["full_attention"]}}, "rope_theta: is 700, but"),
        (
            {**OTHER_BASE, "rope_theta": 5e5, "rope_parameters": OLMO3["rope_scaling"]},
            "rope_parameters: must have a table full_attention and a table sliding_attention: transformers 5 ignores",
        ),
        (
            OTHER_BASE | {"rope_parameters": NESTED | {"sliding_attention": {"rope_theta": 700, "rope_type": "ntk"}}},
            "rope_parameters.sliding_attention: only RoPE scaling of type",
        ),
        (
            {**OLMO3, "rope_theta": 500_000, "rope_parameters": {"sliding_attention": {"rope_theta": 10_000.0}}},
            "rope_theta: is 500000, but rope_parameters.sliding_attention.rope_theta is 10000.0",
        ),
        (
            {key: value for key, value in OTHER_BASE.items() if key != "rope_theta"}
            | {"rope_parameters": NESTED | {"sliding_attention": {"rope_theta": 10_000.0}}},
            "rope_parameters.sliding_attention: only base 700 without scaling, the base of full_attention, is suppor",
        ),
        ({**OLMO3, "rope_scaling": {**OLMO3["rope_scaling"], "type": "llama3"}}, "rope_scaling.type: is 'llama3', but"),
        (
            {**OLMO3, "rope_parameters": {"full_attention": {"rope_type": "llama3", "rope_theta": 5e5}}},
            "rope_scaling: is {",
        ),
        ({**OLMO3, "rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention: must be an object"),
        ({**OLMO3, "layer_types": ["full_attention"] * 3}, "layer_types: must be a list of 4"),
        (
            {**OLMO3, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
            "layer_types: only full_attention in every n-th layer, such as layers 3, 7, 11 and so on for n = 4, is "
            "supported, got full_attention in the layers 0 of 4",
        ),
        ({**OLMO3, "sliding_window": None}, "sliding_window: must be a number, because layer_types has sliding_att"),
        ({**OLMO3, "attention_bias": True}, "attention_bias: only False is supported"),
        ({**OLMO3, "hidden_act": "gelu"}, "hidden_act: only 'silu' is supported"),
        ({**OLMO3, "partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
        (json.loads(OLMO2_13B) | {"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
    ],
)
def test_an_unsupported_config_is_refused(config, said):
    """The message names the key of config.json, the value, and what is supported."""
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(config, "config.json")

    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"heads": 3}, "model.heads: must divide model.width = 64 if model.head_width is not set, got 3"),
        ({"kv_heads": 4}, "model.kv_heads: must divide model.heads = 2, got 4"),
        ({"head_width": 31}, "model.head_width: must be even"),
        ({"global_interval": 2}, "model.global_interval: needs model.sliding_window"),
        ({"global_interval": 1, "sliding_window": 8}, "model.global_interval: must be 2 or more"),
        ({"qk_norm": True}, "model.qk_norm: the family 'olmo' has no such"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "model.rope_scaling.factor: must be 1 or more, got 0.5"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(overrides, expected):
    """The message names the key of [model], what was found and what is allowed."""
    with pytest.raises(ConfigError) as refusal:
        built(**overrides)

    assert expected in str(refusal.value)
