"""Named sizes: published parameter counts, the built model's counts, the rule for the vocabulary, refusals."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_cpt.errors import ConfigError
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.registry import SIZES, as_config_table, named_size
from titan_cpt.planning.model_spec import padded_vocab

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEOX_TOKENS = 50_277  # GPT-NeoX-20B's tokenizer, special tokens included

PYTHIA = {  # size: (parameters, without embeddings, layers, width, heads), from the model cards of EleutherAI/pythia-*
    "14m": (14_067_712, 1_189_888, 6, 128, 4),
    "31m": (30_494_720, 4_739_072, 6, 256, 8),
    "70m": (70_426_624, 18_915_328, 6, 512, 8),
    "160m": (162_322_944, 85_056_000, 12, 768, 12),
    "410m": (405_334_016, 302_311_424, 24, 1024, 16),
    "1b": (1_011_781_632, 805_736_448, 16, 2048, 8),
    "1.4b": (1_414_647_808, 1_208_602_624, 24, 2048, 16),
    "2.8b": (2_775_208_960, 2_517_652_480, 32, 2560, 32),
    "6.9b": (6_857_302_016, 6_444_163_072, 32, 4096, 32),
    "12b": (11_846_072_320, 11_327_027_200, 36, 5120, 40),
}


@pytest.mark.parametrize(("size", "expected"), PYTHIA.items())
def test_pythia_has_the_published_parameter_counts(size, expected):
    """Counts are those of the model cards, and heads too: a wrong number of them would change no count."""
    spec = named_size("gpt_neox", size, NEOX_TOKENS)
    counts = (spec.parameters, spec.parameters_without_embeddings)

    assert (*counts, spec.layers, spec.width, spec.heads) == expected
    assert (spec.rotary_fraction, spec.rope_base, spec.norm_eps) == (0.25, 10_000.0, 1e-5)
    assert spec.parallel_residual


def test_the_papers_models_have_the_papers_parameter_counts():
    """405M, and 10B with its tensor-parallel degree of 6 (Ibrahim et al. 2024)."""
    small = named_size("gpt_neox", "405m", NEOX_TOKENS)
    large = padded_vocab(named_size("gpt_neox", "10b", NEOX_TOKENS), 6)

    assert (small.parameters, small.vocab_size) == (405_334_016, 50_304)
    assert (large.parameters, large.vocab_size) == (9_642_249_216, 50_688)
    assert (small.head_width, small.rotary_width, small.mlp_width) == (64, 16, 4096)
    assert (large.head_width, large.rotary_width, large.mlp_width) == (128, 32, 18_432)


@pytest.mark.parametrize("size", SIZES["gpt_neox"])
def test_a_built_model_has_the_parameter_count_of_its_spec(size):
    """Counted from the spec and from the modules."""
    spec = named_size("gpt_neox", size, 257)
    with torch.device("meta"):
        model = GPTNeoX(spec)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embeddings = counts["embedding.weight"] + counts["head.weight"]

    assert sum(counts.values()) == spec.parameters
    assert sum(counts.values()) - embeddings == spec.parameters_without_embeddings


def test_single_fields_can_be_overridden():
    """The rest stays the size's, but the MLP width follows the width unless it is set."""
    spec = named_size("gpt_neox", "debug", 257, overrides={"width": 96, "heads": 3, "parallel_residual": False})
    narrow = named_size("gpt_neox", "debug", 257, overrides={"width": 96, "heads": 3, "mlp_width": 100})

    assert (spec.layers, spec.width, spec.heads, spec.mlp_width) == (2, 96, 3, 384)
    assert not spec.parallel_residual
    assert narrow.mlp_width == 100


def test_training_flops_by_hand():
    """debug, 384 tokens, length 16: head 24,576 + blocks 99,968 + last norm 128 = 124,672 parameters that multiply."""
    spec = named_size("gpt_neox", "debug", 257)

    assert spec.flops_per_token(16) == 6 * 124_672 + 12 * 2 * 64 * 16


def test_training_flops_agree_with_torchs_counter():
    """Within 1 %: the formula counts biases and norms as products, torch counts neither."""
    spec = named_size("gpt_neox", "mini", 257)
    model = GPTNeoX(spec)
    tokens_BL = torch.zeros(1, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens_BL).sum().backward()

    assert spec.flops_per_token(128) * 128 == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("family", "size", "overrides", "expected"),
    [
        ("gpt_nex", "debug", {}, "model.family: unknown family 'gpt_nex'; did you mean 'gpt_neox'?"),
        ("gpt_neox", "405", {}, "model.size: unknown size '405'; did you mean '405m'?"),
        ("gpt_neox", "debug", {"layer": 3}, "has no such hyperparameter; did you mean 'layers'? It has: layers, width"),
        ("olmo", "debug", {"qkv_bias": True}, "model.qkv_bias: the family 'olmo' has no such hyperparameter: leave it"),
        ("gpt_neox", "debug", {"layers": 0}, "model.layers: must be above 0, got 0"),
        ("gpt_neox", "debug", {"layers": 2.0}, "model.layers: must be int, got 2.0"),
        ("gpt_neox", "debug", {"layers": True}, "model.layers: must be int, got True"),
        ("gpt_neox", "debug", {"heads": 3}, "model.heads: must divide model.width = 64, got 3"),
        ("gpt_neox", "debug", {"rotary_fraction": 0.1}, "model.rotary_fraction: must be in (0, 1] and rotate an even"),
        ("gpt_neox", "debug", {"rotary_fraction": 1.25}, "model.rotary_fraction: must be in (0, 1]"),
        ("gpt_neox", "debug", {"vocab_size": 256}, "model.vocab_size: must be at least 257, the number of tokens"),
        ("gpt_neox", "debug", {"vocab_size": 256}, "got 256; remove it to get 384"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(family, size, overrides, expected):
    """The message names the key of [model], what was found and what is allowed."""
    with pytest.raises(ConfigError) as refusal:
        named_size(family, size, 257, overrides=overrides)

    assert expected in str(refusal.value)


def test_all_problems_of_a_spec_are_reported_at_once():
    """Two wrong numbers, two lines."""
    with pytest.raises(ConfigError) as refusal:
        named_size("gpt_neox", "debug", 257, overrides={"layers": -1, "norm_eps": 0.0})

    assert len(str(refusal.value).splitlines()) == 2


def test_the_registry_does_not_import_torch():
    """The plan must not wait for torch's import."""
    code = "import sys, titan_cpt.models.registry; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert answer.strip() == "False"


def test_a_spec_is_written_as_the_table_of_a_config():
    """The nearest size and the fields that differ from it, each as TOML: words, numbers, flags, a table."""
    scaling = {"kind": "yarn", "factor": 4.0, "original_seq_len": 64, "attention_factor": 1.5}
    spec = named_size("llama", "tiny", 257, overrides={"vocab_size": 384, "qkv_bias": True, "rope_scaling": scaling})
    table = tomllib.loads(as_config_table(spec))["model"]
    written = table.pop("rope_scaling")

    assert table == {"family": "llama", "size": "tiny", "vocab_size": 384, "qkv_bias": True}
    assert written == {**scaling, "beta_fast": 32.0, "beta_slow": 1.0}
