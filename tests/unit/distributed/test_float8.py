"""Which layers are converted to float8, and what is refused; tests/distributed has the parity tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys

import pytest
import torch

from titan_cpt.distributed.float8 import convert_layers, require_float8
from titan_cpt.distributed.float8_filter import AUTO_FILTER, in_float8
from titan_cpt.distributed.options import Float8Options
from titan_cpt.errors import ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from unit.planning.test_memory import LLAMAS, SPEC

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
TENSORWISE = Float8Options("tensorwise", fsdp_all_gather=False, filter_fqns=("head",))


def converted(spec, float8=TENSORWISE, *, tp=1):
    """Names of the layers that torchao replaced."""
    with torch.device("meta"):
        model = build_model(spec)
    convert_layers(model, float8, tp=tp, sharded=False, emulated=True)
    return {name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"}


@needs_torchao
@pytest.mark.parametrize("spec", [SPEC, LLAMAS["llama"], LLAMAS["tied"]], ids=["gpt_neox", "llama", "tied"])
def test_every_linear_layer_of_a_block_is_converted_and_no_other(spec) -> None:
    """Dimensions of 128 to 512: all of them; not the head, whose product is fused with the loss."""
    with torch.device("meta"):
        model = build_model(spec)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}

    assert converted(spec) == {name for name in linear if name.startswith("blocks.")}


@needs_torchao
def test_a_layer_whose_shard_does_not_divide_by_16_is_not_converted() -> None:
    """An MLP of 48 features divides by 16, and by 16 x 3, but not by 16 x 2."""
    spec = named_size("gpt_neox", "debug", 257, {"width": 96, "heads": 6, "mlp_width": 48})

    assert any(name.endswith("mlp.up") for name in converted(spec))
    assert any(name.endswith("mlp.up") for name in converted(spec, tp=3))
    assert not any("mlp" in name for name in converted(spec, tp=2))
    assert any(name.endswith("attention.qkv") for name in converted(spec, tp=2))


@needs_torchao
def test_layers_in_filter_fqns_are_not_converted() -> None:
    """A part of a name is enough; the head is never converted."""
    found = converted(SPEC, dataclasses.replace(TENSORWISE, filter_fqns=("mlp.down", "blocks.0")))

    assert "blocks.1.mlp.up" in found
    assert "head" not in found
    assert not any("mlp.down" in name or "blocks.0" in name for name in found)


@pytest.mark.parametrize(
    ("size", "tp", "expected"), [((48, 32), 1, True), ((48, 32), 2, False), ((64, 40), 1, False), ((64, 32), 2, True)]
)
def test_the_rule_by_hand(size: tuple[int, int], tp: int, expected: bool) -> None:
    """Both dimensions divide by 16 x TP."""
    assert in_float8("blocks.0.mlp.up.weight", size, tp=tp, filter_fqns=("head",), recipe="rowwise") == expected


def test_float8_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the install command, also if torchao is installed but cannot be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"pip install 'titan_cpt\[float8\]'"):
        require_float8(torch.device("cpu"))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_filter_of_small_layers_is_torchaos(recipe):
    """Every combination of sizes around torchao's thresholds."""
    utilities = pytest.importorskip("torchao.float8.float8_linear_utils")
    theirs = utilities._auto_filter_for_recipe(recipe, filter_fqns=[])
    sides = [side + more for side in (1024, 2048, 4096) for more in (-16, 0, 16)]
    for size in itertools.product(sides, sides):
        with torch.device("meta"):
            layer = torch.nn.Linear(size[1], size[0], bias=False)
        ours = in_float8("blocks.0.mlp.up.weight", size, tp=1, filter_fqns=(AUTO_FILTER,), recipe=recipe)

        assert ours == theirs(layer, "blocks.0.mlp.up"), size
