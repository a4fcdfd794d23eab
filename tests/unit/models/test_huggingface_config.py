"""config.json as transformers reads it: every default, every spelling of rotary positions, every bad value."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from titan_cpt.errors import CheckpointError
from titan_cpt.models.common.layers import rotary_tables
from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec
from titan_cpt.models.huggingface_config import DEFAULTS, config_from_spec, spec_from_config
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec, Rope, RopeScaling

REQUIRED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 64,
}
SMALL = {  # of model types whose other defaults do not fit these widths
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "olmo2": {"pad_token_id": None},
    "olmo3": {"pad_token_id": None, "rope_theta": 500_000.0, "num_hidden_layers": 4},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2, "pad_token_id": None},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window_pattern": 2},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def config_of(kind, **changes):
    return {**REQUIRED, **SMALL.get(kind, {}), "model_type": kind, "max_position_embeddings": 64, **changes}


def theirs_of(config):
    return AutoConfig.for_model(**copy.deepcopy(config))


def rotary_of(theirs):
    """Frequencies and amplitude that transformers computes with in each layer, also where it does not rotate."""
    model = AutoModelForCausalLM.from_config(theirs)
    rotary = model.base_model.rotary_emb
    kinds = theirs.layer_types if hasattr(rotary, "layer_types") else [""] * theirs.num_hidden_layers
    names = [f"{kind}_" if kind else "" for kind in kinds]
    return [(getattr(rotary, f"{name}inv_freq"), getattr(rotary, f"{name}attention_scaling")) for name in names]


def ours_of(spec):
    """Frequencies and amplitude of our model in each layer: the tables at position 1, where the angle is one."""
    found = []
    for layer in range(spec.layers):
        rope = spec.ropes[spec.layer_rope(layer) or 0]
        cos_LR, sin_LR = rotary_tables(
            torch.tensor([0, 1]), rotary_width=spec.rotary_width, base=rope.base, scaling=rope.scaling
        )
        found.append((torch.atan2(sin_LR[1], cos_LR[1]), float(cos_LR[0, 0])))
    return found


def assert_same_rotary(config):
    spec = spec_from_config(config, "config.json")
    for (mine, amplitude), (yours, their_amplitude) in zip(ours_of(spec), rotary_of(theirs_of(config)), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-9)
        assert amplitude == pytest.approx(their_amplitude, rel=1e-6)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_default_is_that_of_transformers_own_config_class(kind):
    """Of each optional key, as in an empty config of that model_type."""
    theirs = type(theirs_of({"model_type": kind}))()
    parameters = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    rope = {
        "rope_theta": parameters["rope_theta"],
        "rope_local_base_freq": theirs.rope_parameters.get("sliding_attention", {}).get("rope_theta"),
        "rotary_emb_base": parameters["rope_theta"],
        "rotary_pct": parameters.get("partial_rotary_factor"),
        "partial_rotary_factor": parameters.get("partial_rotary_factor", 1.0),
        "sliding_window_pattern": theirs.layer_types.index("full_attention") + 1 if kind == "gemma3_text" else None,
    }
    resolved = {"num_key_value_heads": theirs.num_attention_heads}
    resolved["layer_types"] = ["full_attention"] * theirs.num_hidden_layers
    resolved |= {"no_rope_layers": [1, 1, 1, 0] * 9, "sliding_window": None}
    if kind == "olmo3":
        resolved["layer_types"] = [*["sliding_attention"] * 3, "full_attention"] * 8
    if kind == "gemma3_text":
        resolved |= {"layer_types": theirs.layer_types, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    resolved["head_dim"] = theirs.hidden_size // theirs.num_attention_heads
    if kind.startswith("qwen"):  # the class drops its default of sliding_window while the switch is off
        resolved["sliding_window"] = type(theirs)(use_sliding_window=True).sliding_window
    for key, default in DEFAULTS[kind].items():
        found = rope[key] if key in rope else getattr(theirs, key)
        if default is None or (key == "sliding_window" and found is None):
            assert found == resolved[key] or resolved[key] == default, key
        else:
            assert found == default, key


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in DEFAULTS for key in DEFAULTS[kind]])
def test_a_missing_key_has_the_meaning_that_it_has_in_transformers(kind, key):
    """All other keys are there; the spec has the values of transformers' config, with 32 heads of 8 features."""
    full = {**config_of(kind), **DEFAULTS[kind], "use_sliding_window": True, "max_window_layers": 0}
    full |= {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 8}
    full |= {"sliding_window": 9} if "sliding_window" in DEFAULTS[kind] else {}
    full |= {"num_hidden_layers": 6} if kind == "gemma3_text" else {}  # the last of which is global
    config = {one: value for one, value in full.items() if one != key}
    theirs, spec = theirs_of(config), spec_from_config(config, "config.json")
    window = getattr(theirs, "sliding_window", None)
    if kind.startswith(("qwen", "smollm3")) and set(theirs.layer_types) == {"full_attention"}:
        window = None
    epsilons = {getattr(theirs, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")}
    assert {spec.norm_eps} == epsilons - {None}
    if isinstance(spec, GPTNeoXSpec):
        assert spec.parallel_residual == theirs.use_parallel_residual
    else:
        head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (spec.kv_heads, spec.head_width) == (theirs.num_key_value_heads, head)
        assert (spec.sliding_window, spec.tie_embeddings) == (window, theirs.tie_word_embeddings)
    assert_same_rotary(config)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_width_is_refused(key):
    """transformers has a default, of a 7B model."""
    config = config_of("llama")
    del config[key]
    with pytest.raises(CheckpointError, match=f"{key}: is missing"):
        spec_from_config(config, "config.json")


def test_a_mistral_without_sliding_window_has_one_of_4096():
    """And none where the key is null; for Qwen2 layers from 28 on slide, unless max_window_layers says otherwise."""
    qwen = config_of("qwen2", use_sliding_window=True)

    assert spec_from_config(config_of("mistral"), "").sliding_window == 4096
    assert spec_from_config(config_of("mistral", sliding_window=None), "").sliding_window is None
    assert spec_from_config(qwen, "").sliding_window is None
    assert spec_from_config({**qwen, "max_window_layers": 0}, "").sliding_window == 4096
    with pytest.raises(CheckpointError, match="layer_types: a sliding window in only some of the layers"):
        spec_from_config({**qwen, "num_hidden_layers": 30}, "")


ROPES = {
    "scaling of 4": {"rope_scaling": YARN, "rope_theta": 700.0},
    "scaling of 5": {"rope_parameters": {**YARN, "rope_theta": 700.0}},
    "5 without a base": {"rope_parameters": YARN},
    "base in rope_scaling": {"rope_scaling": {**YARN, "rope_theta": 700.0}},
    "the same base twice": {"rope_parameters": {"rope_theta": 700.0}, "rope_theta": 700.0},
    "both tables, equal": {"rope_scaling": {**YARN, "rope_theta": 5e2}, "rope_parameters": {**YARN, "rope_theta": 500}},
    "empty table": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 700.0}},
    "length at the top level": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "length at both levels": {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    "length at the top level beside rope_parameters": {
        "rope_parameters": {"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if "original" not in k}},
        "original_max_position_embeddings": 32,
    },
    "length left out": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 700.0},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 700.0},
    "llama3 with numbers of yarn": {"rope_scaling": {**LLAMA3, "attention_factor": 2.0, "beta_fast": 9.0}},
    "old name of the type": {"rope_scaling": {**{k: v for k, v in YARN.items() if k != "rope_type"}, "type": "yarn"}},
    "length at the top level of a model without scaling": {"original_max_position_embeddings": 32},
    "yarn with nulls": {"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": None, "mscale": None}},
    "yarn with a whole attention factor": {"rope_scaling": {**YARN, "attention_factor": 1}},
    "default with a base": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 700.0},
}


@pytest.mark.parametrize("keys", ROPES.values(), ids=ROPES)
def test_rotary_positions_are_read_as_transformers_reads_them(keys):
    """Every frequency and the amplitude are those of the module that transformers builds from the same file."""
    assert_same_rotary(config_of("llama", **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 500.0}, "rotary_pct": 1.0},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
        {"rope_scaling": YARN, "rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_scaling": LLAMA3, "rotary_pct": 1.0, "rotary_emb_base": 500},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ],
)
def test_rotary_positions_of_a_gpt_neox_are_read_as_transformers_reads_them(keys):
    """The rotated fraction too; keys of Llama are ignored, as in transformers."""
    assert_same_rotary(config_of("gpt_neox", **keys))


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (
            "llama",
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "ignores rope_parameters, including its rope_theta",
        ),
        (
            "llama",
            {"rope_theta": 700.0, "rope_parameters": {"rope_theta": 500.0}},
            "rope_theta: is 700.0, but rope_par",
        ),
        (
            "llama",
            {"rope_theta": 700.0, "rope_scaling": {**YARN, "rope_theta": 5.0}},
            "rope_theta: is 700.0, but rope_sc",
        ),
        (
            "llama",
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            "original_max_position_embeddings: is 32",
        ),
        ("llama", {"rope_scaling": {**YARN, "type": "default"}}, "rope_scaling.type: is 'default', but"),
        ("llama", {"rope_scaling": {"factor": 4.0}}, "got no rope_type"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "with full_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported, got 0.5"),
        ("gpt_neox", {"rotary_pct": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_pct: is 1.0, but"),
        ("gpt_neox", {"rotary_pct": None}, "rotary_pct: must be a number, got None"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types: are sliding_attention, but use_sliding_win",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: must be a list of 2"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: must be at most 10,000"),
    ],
)
def test_keys_that_transformers_versions_read_differently_are_refused(kind, keys, said):
    """The message has both values and what to do."""
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(config_of(kind, **keys), "config.json")

    assert said in str(refusal.value)


ROPE_KEYS = (
    "rope_theta",
    "partial_rotary_factor",
    "rope_type",
    "type",
    *YARN,
    *LLAMA3,
    "beta_fast",
    "attention_factor",
)
WRONG = [None, "x", "", True, [1], [[]], {"a": 1}, {}, -1, 0, 0.3, math.nan, math.inf, 10**400, 1e300]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_any_key_with_any_value_is_read_or_refused(kind):
    """No traceback: null and every wrong type under every key, and under every key of the two rotary tables."""
    tops = {*DEFAULTS[kind], *REQUIRED, "rope_scaling", "rope_parameters", "quantization_config", "model_type"}
    tops |= {"original_max_position_embeddings", "partial_rotary_factor", "layer_types", "head_dim"}
    configs = [config_of(kind, **{key: value}) for key, value in itertools.product(sorted(tops), WRONG)]
    for table, scaling, key, value in itertools.product(
        ("rope_scaling", "rope_parameters"), (YARN, LLAMA3), ROPE_KEYS, WRONG
    ):
        configs.append(config_of(kind, **{table: {**scaling, key: value}}))
    refused = 0
    for config in configs:
        try:
            assert isinstance(spec_from_config(config, "config.json"), ModelSpec)
        except CheckpointError as refusal:
            refused += str(refusal).startswith("config.json: ")

    assert len(configs) / 2 < refused < len(configs)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_null_is_refused_or_has_the_meaning_that_it_has_in_transformers(kind):
    """Wherever both read a null, they read the same; transformers refuses most of them with a traceback."""
    same = []
    for key in sorted({*DEFAULTS[kind]} - {"max_position_embeddings"}):
        config = config_of(kind, **{key: None})
        try:
            spec = spec_from_config(config, "config.json")
            theirs = theirs_of(config)
        except Exception:  # theirs raise whatever they meet
            continue
        same.append(key)
        head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (spec.kv_heads, spec.head_width) == (theirs.num_key_value_heads, head)
        if spec.sliding_window is not None:
            assert spec.sliding_window == theirs.sliding_window
        assert_same_rotary(config)

    known = {"head_dim", "num_key_value_heads", "sliding_window", "layer_types", "no_rope_layers"}
    assert set(same) <= known | {"attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"}
    assert "num_key_value_heads" in same or kind not in ("llama", "qwen2", "qwen3", "olmo2", "olmo3")


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 300,
}
NEOX = {**LLAMA, "model_type": "gpt_neox", "intermediate_size": 256}


def refusal_of(config):
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(config, "there/config.json")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (
            LLAMA,
            {"model_type": "mixtral"},
            "model_type: must be one of gpt_neox, llama, mistral, qwen2, qwen3, ",
        ),
        (LLAMA, {"hidden_size": None}, "hidden_size: is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size: must be a number, got '64'"),
        (LLAMA, {"num_attention_heads": 2.5}, "num_attention_heads: must be a number, got 2.5"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported, got 'gelu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias: only False is supported, got True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias: only False is supported, got True"),
        (LLAMA, {"num_key_value_heads": 3}, "model.kv_heads: must divide model.heads = 4, got 3"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "type linear, llama3, yarn is supported, got 'dyn",
        ),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "got 'yarn' with mscale"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            "type linear, llama3, yarn is supported",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: only 1",
        ),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantized weights cannot be trained"),
        (
            LLAMA,
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "layer_types: a sliding window in only some of the layers is not supported",
        ),
        (NEOX, {"hidden_act": "gelu_fast"}, "hidden_act: only 'gelu' is supported, got 'gelu_fast'"),
        (NEOX, {"tie_word_embeddings": True}, "tie_word_embeddings: only False is supported"),
        (
            NEOX,
            {"rope_scaling": {"type": "ntk", "factor": 2.0, "original_max_position_embeddings": 8}},
            "only RoPE scaling of type linear, llama3, yarn is supported",
        ),
    ],
)
def test_an_unsupported_config_is_refused(base, changes, expected):
    """The message names the key of config.json, the value, and what is supported."""
    message = refusal_of({**base, **changes})

    assert message.startswith("there/config.json: ")
    assert expected in message


def test_all_problems_of_a_config_are_reported_at_once():
    """Three wrong keys, three lines below the first."""
    assert (
        len(refusal_of({**LLAMA, "hidden_act": "relu", "mlp_bias": True, "intermediate_size": None}).splitlines()) == 4
    )


@pytest.mark.parametrize(
    ("base", "old", "new", "field", "value"),
    [
        (
            LLAMA,
            {"rope_theta": 5e5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_base",
            5e5,
        ),
        (NEOX, {"rotary_emb_base": 500}, {"rope_parameters": {"rope_theta": 500}}, "rope_base", 500.0),
        (NEOX, {"rotary_pct": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_fraction", 0.5),
    ],
)
def test_the_spellings_of_transformers_4_and_5_mean_the_same(base, old, new, field, value):
    """The same number as a separate key, as in the releases, and in rope_parameters."""
    shapes = [spec_from_config({**base, **keys}, "config.json") for keys in (old, new)]

    assert [getattr(spec, field) for spec in shapes] == [value, value]
    assert shapes[0] == shapes[1]


def test_defaults_are_those_of_transformers():
    """For a config without the optional keys, as Pythia's."""
    llama, neox = spec_from_config(LLAMA, ""), spec_from_config(NEOX, "")

    assert (llama.kv_heads, llama.head_width, llama.rope_base, llama.norm_eps) == (4, 16, 10_000.0, 1e-6)
    assert (neox.rotary_fraction, neox.rope_base, neox.norm_eps, neox.parallel_residual) == (0.25, 10_000.0, 1e-5, True)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("gpt_neox", "410m"),
        ("llama", "mistral-7b"),
        ("llama", "qwen2.5-0.5b"),
        ("llama", "qwen3-8b"),
        ("olmo", "olmo2-1b"),
        ("olmo", "olmo3-7b"),
    ],
)
@pytest.mark.parametrize("kind", [None, "yarn", "llama3"])
def test_a_written_config_is_read_back_as_the_same_model(family, size, kind):
    """Under transformers' keys for the widths; with the RoPE that a stage gave it too."""
    scaling = None if kind is None else RopeScaling(kind=kind, factor=3.5, original_seq_len=2048)
    spec = named_size(family, size, 257).with_rope(Rope(123_456.0, scaling))
    config = config_from_spec(spec, max_positions=2048, dtype="bfloat16")

    assert spec_from_config(config, "config.json") == spec
    assert (config["hidden_size"], config["intermediate_size"]) == (spec.width, spec.mlp_width)
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (2048, "bfloat16")
