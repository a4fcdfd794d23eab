"""training.attention_backend: the kernel that runs is the chosen one, compiled or not, and a resumed run keeps it."""

import re

import pytest
import torch
import training
from torch.profiler import ProfilerActivity, profile

from titan_cpt.checkpoint.manifest import read as read_manifest
from titan_cpt.distributed.attention_backend import (
    BACKENDS,
    choose_attention_backend,
    set_attention_backend,
)
from titan_cpt.distributed.attention_timing import AttentionShape
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import ConfigError
from titan_cpt.models.llama.model import Llama
from titan_cpt.models.registry import named_size

pytestmark = [
    *training.THEIR_WARNINGS_IGNORED,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # raised inside torch's compiler
]
SHAPE = AttentionShape(2, 64, 4, 2, 16, torch.float32)
ON_CPU = ProcessInfo(0, 1, torch.device("cpu"))
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def model():
    """A Llama with fewer key/value heads than heads."""
    return Llama(named_size("llama", "debug", 257, {"heads": 4, "kv_heads": 2}))


def ran_flash(attend):
    """Whether torch's flash kernel ran in a call."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, heads, 64, 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(size, generator=generator, requires_grad=True) for size in sizes)
    attend(q, k, v)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        attend(q, k, v).sum().backward()
    return any(event.key == FLASH for event in profiled.key_averages())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_that_runs_is_the_chosen_one(model, compiled):
    """Compiled for one kernel, then for the other: the compiler's cache of the first is not used for the second."""
    for backend, expected in (("flash", True), ("math", False), ("flash", True)):
        set_attention_backend([model], backend)
        torch._dynamo.reset()
        attend = model.attentions()[0].core.attend
        assert ran_flash(torch.compile(attend) if compiled else attend) == expected


def test_the_kernels_agree(model):
    """Output and gradients of flash and math are equal within float32's rounding."""
    found = {}
    q, k, v = (torch.randn(2, heads, 64, 16, requires_grad=True) for heads in (4, 2, 2))
    for backend in ("flash", "math"):
        set_attention_backend([model], backend)
        out = model.attentions()[0].core.attend(q, k, v)
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    torch.testing.assert_close(found["flash"], found["math"], rtol=1e-4, atol=1e-5)


def test_fastest_measures_what_this_device_has_and_does_not_change_the_model(model):
    """The choice has the smallest of the printed times; nothing is drawn from the global random generator."""
    state = torch.get_rng_state()
    choice = choose_attention_backend("fastest", None, model, SHAPE, ON_CPU)
    times = {name: float(ms) for name, ms in re.findall(r"^  (\w+) +([\d.]+) ms$", choice.note, flags=re.MULTILINE)}

    assert times.keys() == {"flash", "math"}
    assert times[choice.backend] == min(times.values())
    assert model.attentions()[0].core.backend is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("recorded", ["math", "flash"])
def test_a_recorded_choice_is_used_without_measuring(model, recorded):
    """Whichever would be faster now."""
    choice = choose_attention_backend("fastest", recorded, model, SHAPE, ON_CPU)

    assert (choice.backend, choice.note) == (recorded, "")


@pytest.mark.parametrize("recorded", ["cudnn", "no_kernel", ["flash"], 7])
def test_a_recorded_choice_that_this_device_lacks_is_measured_again(model, recorded):
    """As after moving a run to another kind of device, or from a damaged manifest."""
    choice = choose_attention_backend("fastest", recorded, model, SHAPE, ON_CPU)

    assert choice.backend in ("flash", "math")
    assert "forward and backward of one layer" in choice.note


def test_a_kernel_that_this_device_lacks_is_refused_with_those_that_it_has(model):
    """Before the first step; without the check torch would raise in it."""
    with pytest.raises(ConfigError, match=r'attention_backend: "cudnn" .*2 x 64 positions.*Available: flash, math; or'):
        choose_attention_backend("cudnn", None, model, SHAPE, ON_CPU)


def test_all_kernels_of_torch_have_a_name():
    """Those that one can choose."""
    assert {backend.name for backend in BACKENDS.values()} == {
        "CUDNN_ATTENTION",
        "FLASH_ATTENTION",
        "EFFICIENT_ATTENTION",
        "MATH",
    }


def test_a_run_with_the_fastest_kernel_resumes_with_it_to_the_last_bit(tmp_path):
    """Killed after a checkpoint, whose manifest has the kernel; the second session does not measure again."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw = training.changed(raw, training={"attention_backend": "fastest"}, stages=raw["stages"][:1])
    whole, killed = (
        training.write_config(training.changed(raw, job={"name": name}), tmp_path / f"{name}.toml")
        for name in ("whole", "killed")
    )
    saved = tmp_path / "killed/english/step-00000004"
    first = training.train(killed, fault=training.Fault("titan_cpt.train:Trainer.train_step", 7, saved))
    chosen = read_manifest(saved)["fastest_attention"]
    second = training.train(killed)
    uninterrupted = training.train(whole, f"--training.attention_backend={chosen}")

    assert [outcome.status for outcome in (first, second, uninterrupted)] == [-9, 0, 0]
    assert "forward and backward of one layer" in first.output
    assert "forward and backward of one layer" not in second.output
    assert [start["attention_backend"] for start in training.events_of(tmp_path / "killed", "start")] == [chosen] * 2
    assert training.numbers_of(tmp_path / "killed") == training.numbers_of(tmp_path / "whole")
    assert "fastest_attention" not in read_manifest(tmp_path / "whole/english/step-00000012")
