"""Check of an imported Hugging Face model against transformers, if installed: the settings in config.json, and logits.

Settings are compared for models of every size, since that needs no weights. Logits are computed by both in float32 on
the CPU, on sequences that are longer than any sliding window.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_cpt.checkpoint.hf_release import ReleasedModel
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.common.layers import rotary_tables
from titan_cpt.models.registry import family_module
from titan_cpt.models.spec import ModelSpec, Rope

_TOLERANCE = (
    1e-3  # relative to the largest logit, or to 1; another order of the fp32 sums changes logits by less than 1e-5
)
_FEW_TOKENS = 32  # length of a sequence in tokens; with a sliding window, number of tokens beyond it
_RUN_PARAMETERS = (
    1_000_000_000  # a training run compares logits only of models up to this size; `titan-cpt import` has no limit
)
_RUN_WORK = 10**12  # a training run compares logits only up to this number of parameters x tokens
_KEYS = {  # transformers' attribute -> ours
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tied",
}


def verify_against_transformers(
    released: ReleasedModel, spec: ModelSpec, load: Callable[[nn.Module], None], *, in_a_run: bool = False
) -> str:
    """Compare settings and logits of our model with those of transformers; returns the result as a message.

    Args:
        released: the Hugging Face model, which transformers loads.
        spec: architecture of our model. If the vocabularies differ in size, only the rows that both have are compared.
        load: loads the weights into our model, which is not sharded.
        in_a_run: do not compare logits if other ranks would wait long for that.

    Raises:
        CheckpointError: transformers reads other settings from config.json, or computes other logits.
    """
    with without_transformers_output():
        try:
            import transformers  # optional, and takes seconds to import
        except ImportError:
            return "not compared with transformers: it is not installed"
        name = f"transformers {transformers.__version__}"
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            reference_config = transformers.AutoConfig.from_pretrained(released.files.folder, local_files_only=True)
        except Exception as error:  # any exception that an unsupported config causes
            return f"not compared with {name}, which cannot read its config.json: {reason_of(error)}"
        _require_same_settings(released, reference_config.get_text_config(), transformers)
        settings = f"settings are those of {name}; logits are not compared: "
        length = _length(spec, released.spec)
        if in_a_run and spec.parameters > _RUN_PARAMETERS:
            return f"{settings}the model is large; `titan-cpt import` compares them"
        if in_a_run and spec.parameters * length > _RUN_WORK:
            return f"{settings}its sliding window is long; `titan-cpt import` compares them"
        if short := _short_of_memory(spec, length):
            return f"{settings}{short}"
        try:
            model: Any = _reference_model(released.files.folder, reference_config, transformers)
        except Exception as error:  # such as a backend that is not installed, or an unsupported value
            return f"{settings}it cannot load the model: {reason_of(error)}"
        return _same_logits(released, spec, load, model, length, name)


def _same_logits(
    released: ReleasedModel, spec: ModelSpec, load: Callable[[nn.Module], None], reference: Any, length: int, name: str
) -> str:
    with torch.device("meta"):
        model = build_model(spec)
    model.to_empty(device="cpu")
    load(model)
    rows = min(spec.vocab_size, released.spec.vocab_size)
    sequences = 2 if length == _FEW_TOKENS else 1
    tokens_BL = torch.randint(0, rows, (sequences, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            reference_BLV: Tensor = reference(tokens_BL).logits[..., :rows]
        except Exception as error:  # any exception of transformers' model code
            return f"logits are not compared with {name}, which cannot compute them: {reason_of(error)}"
        if not reference_BLV.isfinite().all():  # rows that the stage replaces by others
            return f"logits are not compared with {name}: its own are not finite"
        logits_BLV = model(tokens_BL)[..., :rows]
    difference = (logits_BLV - reference_BLV).abs().max().item()
    largest = reference_BLV.abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise CheckpointError(
            f"{released.name}: {name} computes other logits from it: they differ by up to {difference:.2g}, the "
            f"largest is {largest:.2g}. Do not train on it; please report its config.json"
        )
    return f"logits are those of {name} within {difference:.1e} (the largest is {largest:.3g}) on {length:,} positions"


def _reference_model(folder: Path, config: Any, transformers: Any) -> Any:
    """transformers' model in float32, whatever the dtype in the config, with SDPA, which needs no extra package."""
    for each in (config, config.get_text_config()):  # of a multimodal model two
        each.pad_token_id = None  # torch refuses an ID beyond the vocabulary, and logits do not depend on it
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype = {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, local_files_only=True, attn_implementation="sdpa", **dtype
    )
    return model.eval()


def _require_same_settings(released: ReleasedModel, reference: Any, transformers: Any) -> None:
    """Compare the settings, rotary frequencies included, that transformers and we read from config.json."""
    spec = released.spec
    pairs = {
        key: (getattr(spec, field), getattr(reference, key)) for key, field in _KEYS.items() if hasattr(reference, key)
    }
    pairs |= family_module(spec.family, "huggingface").settings_to_compare(spec, reference)
    faults = [f"{key}: {there!r} there, {here!r} here" for key, (here, there) in pairs.items() if here != there]
    for rope, frequencies_R, amplitude in _reference_ropes(spec, reference, transformers):
        faults += _rotary_faults(spec, rope, frequencies_R, amplitude)
    if faults:
        raise CheckpointError(
            f"{released.name}: transformers {transformers.__version__} reads config.json differently: "
            f"{'; '.join(faults)}. Do not train on it; please report its config.json"
        )


def _reference_ropes(spec: ModelSpec, config: Any, transformers: Any) -> list[tuple[Rope, Tensor, float]]:
    """Our RoPE, and frequencies and amplitude of transformers' rotary embedding module, of each kind of layers.

    Empty if this version of transformers has no such module.
    """
    model = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    kinds = [kind for name, kind in vars(sys.modules[model.__module__]).items() if name.endswith("RotaryEmbedding")]
    try:
        rotary = kinds[0](config=config)
        if hasattr(rotary, "inv_freq"):
            return [(spec.rope, rotary.inv_freq.float(), float(rotary.attention_scaling))]
        found = []
        for name in rotary.layer_types:
            number = spec.layer_rope(config.layer_types.index(name))
            assert number is not None, "transformers rotates queries and keys of this layer"
            frequencies_R, amplitude = (getattr(rotary, f"{name}_{what}") for what in ("inv_freq", "attention_scaling"))
            found.append((spec.ropes[number], frequencies_R.float(), float(amplitude)))
        return found
    except (AttributeError, IndexError, TypeError):
        return []


def _rotary_faults(spec: ModelSpec, rope: Rope, reference_R: Tensor, amplitude: float) -> Iterator[str]:
    cos_LR, sin_LR = rotary_tables(
        torch.tensor([0, 1]), rotary_width=spec.rotary_width, base=rope.base, scaling=rope.scaling
    )
    frequencies_R = torch.atan2(sin_LR[1], cos_LR[1])  # the angle at position 1 is the frequency
    if frequencies_R.shape != reference_R.shape:
        yield f"rotary frequencies: {len(reference_R)} there, {len(frequencies_R)} here"
    elif not torch.allclose(frequencies_R, reference_R, rtol=1e-4, atol=1e-9):
        worst = int((frequencies_R / reference_R - 1).abs().argmax())
        yield f"rotary frequency {worst}: {reference_R[worst]:.6g} there, {frequencies_R[worst]:.6g} here"
    if abs(float(cos_LR[0, 0]) - amplitude) > 1e-5:
        yield f"rotary amplitude: {amplitude:.6g} there, {float(cos_LR[0, 0]):.6g} here"


def _length(*specs: ModelSpec) -> int:
    """Length in tokens of the sequences for the comparison: longer than any sliding window."""
    windows = [window for spec in specs for window in spec.layer_windows if window is not None]
    return max(windows) + _FEW_TOKENS if windows else _FEW_TOKENS


def _short_of_memory(spec: ModelSpec, length: int) -> str | None:
    """A message if both models and their logits do not fit into the free memory; None if they do or it is unknown."""
    needed = 8 * spec.parameters + 16 * length * spec.vocab_size + 2 * length**2
    free = _free_bytes()
    if free is None or needed <= 0.8 * free:
        return None
    return f"that needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def reason_of(error: Exception) -> str:
    """The type of an error and the first two lines of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__


@contextmanager
def without_transformers_output() -> Iterator[None]:
    """Suppress warnings and log lines of transformers and of what it imports, such as torchao."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
