"""Which layers multiply in float8, what is refused, and what the plan says of it; parity is tests/distributed'."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import pytest
import torch

from titan_cpt.distributed.float8 import convert_layers, require_float8
from titan_cpt.distributed.float8_filter import in_float8
from titan_cpt.distributed.options import Float8Options
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.errors import ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.planning.memory import footprint
from unit.planning.test_memory import LLAMAS, SPEC, WORK

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
    """Sides of 128 to 512: all of them; the head stays in higher precision, as its product is one with the loss."""
    with torch.device("meta"):
        model = build_model(spec)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}

    assert converted(spec) == {name for name in linear if name.startswith("blocks.")}


@needs_torchao
def test_a_layer_stays_where_a_ranks_share_would_not_divide_by_16() -> None:
    """An MLP of 48 features divides by 16, and by 16 x 3, but not by 16 x 2."""
    spec = named_size("gpt_neox", "debug", 257, {"width": 96, "heads": 6, "mlp_width": 48})

    assert any(name.endswith("mlp.up") for name in converted(spec))
    assert any(name.endswith("mlp.up") for name in converted(spec, tp=3))
    assert not any("mlp" in name for name in converted(spec, tp=2))
    assert any(name.endswith("attention.qkv") for name in converted(spec, tp=2))


@needs_torchao
def test_names_can_be_kept_out() -> None:
    """A part of a name is enough; the head stays whatever is named."""
    found = converted(SPEC, dataclasses.replace(TENSORWISE, filter_fqns=("mlp.down", "blocks.0")))

    assert "blocks.1.mlp.up" in found
    assert "head" not in found
    assert not any("mlp.down" in name or "blocks.0" in name for name in found)


@pytest.mark.parametrize(
    ("size", "tp", "expected"), [((48, 32), 1, True), ((48, 32), 2, False), ((64, 40), 1, False), ((64, 32), 2, True)]
)
def test_the_rule_by_hand(size: tuple[int, int], tp: int, expected: bool) -> None:
    """Both sides divide by 16 x TP."""
    assert in_float8("blocks.0.mlp.up.weight", size, tp=tp, filter_fqns=("head",)) == expected


def test_float8_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the commands that install it, and so where it is there and does not import."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"pip install 'titan_cpt\[float8\]'"):
        require_float8(torch.device("cpu"))


def test_weights_gathered_in_float8_are_a_byte_a_number() -> None:
    """Four ranks in bfloat16, resharding: the blocks' matrices go twice at 1 byte for 2, all else is sent as before."""
    layout, work = ParallelDims(dp_shard=4), dataclasses.replace(WORK, bytes_per_number=2)
    plain = footprint(SPEC, layout, work)
    cast = footprint(SPEC, layout, dataclasses.replace(work, float8_filter_fqns=("head",)))
    matrices = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512)

    assert plain.traffic.fsdp - cast.traffic.fsdp == pytest.approx(2 * 0.75 * matrices, abs=1)
    assert plain.gathered - cast.gathered == 2 * matrices // 4  # two blocks of four are whole at a time


def test_what_is_offloaded_lies_in_the_hosts_memory() -> None:
    """16 bytes a parameter leave the device, where a gather of the blocks stays."""
    kept = footprint(SPEC, ParallelDims(dp_shard=2), WORK)
    moved = footprint(SPEC, ParallelDims(dp_shard=2), dataclasses.replace(WORK, offloaded=True))

    assert moved.host == kept.parameters + kept.gradients + kept.optimizer
    assert moved.parameters == moved.gradients == moved.optimizer == kept.host == 0
    assert moved.gathered == kept.gathered
