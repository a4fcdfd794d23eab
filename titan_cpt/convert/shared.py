"""What the converters share: batch arithmetic, the model table, learning-rate schedules, datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from titan_cpt.config.toml_files import parse_toml
from titan_cpt.convert.conversion import Conversion
from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import SPECS, as_config_table
from titan_cpt.models.spec import RopeScaling

END_OF_DOCUMENT_LOSS = (  # of keys that take the target after an end-of-document token out of the loss
    "the token after an end-of-document token is a target like any other, except with datasets.*.packing = "
    '"best_fit": there the last token of a document has no target'
)
_TYPICAL_VOCABULARY = {"gpt_neox": 50_304, "llama": 32_000}


def set_model(
    out: Conversion,
    family: str,
    fields: Mapping[str, Any],
    *,
    of: Sequence[str],
    text: str = "",
    tensor_parallel: bool = False,
) -> None:
    """[model]: the named size with the fewest differences, and the differences.

    Hyperparameters that are not possible here are listed as without counterpart; [model] is a placeholder then.

    Args:
        fields: hyperparameters of the family's spec; without vocab_size it stays that of the size or the tokenizer.
        tensor_parallel: a vocabulary that is not written would be padded for tensor parallelism, so it is written.
    """
    known = {"family": family, "vocab_size": _TYPICAL_VOCABULARY[family], **fields}
    if isinstance(known.get("rope_scaling"), Mapping):
        known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
    try:
        table = parse_toml(as_config_table(SPECS[family](**known)))["model"]
    except ConfigError as error:
        set_placeholder_model(out, of, " ".join(str(error).split()))
        return
    if "vocab_size" not in fields:
        table.pop("vocab_size", None)
    elif tensor_parallel:
        table["vocab_size"] = fields["vocab_size"]
    out.set({f"model.{key}": value for key, value in table.items()}, of=of, text=text)


def set_placeholder_model(out: Conversion, of: Sequence[str], why: str) -> None:
    """A [model] table that plans, for a model that is not available here."""
    out.set({"model.family": "llama", "model.size": "llama3.1-8b"}, text="a placeholder: write [model] by hand")
    out.other_architecture(of, f"{why}. [model] is a placeholder")


def cosine_lr(*, peak: float, low: float, warmup: Fraction, decay_end: Fraction, steps: int) -> dict[str, Any] | None:
    """Warm-up, half a cosine to `low` at decay_end, then `low`; None if our schedules cannot do that exactly."""
    if decay_end == steps:
        return {"schedule": "cosine", "max": peak, "min": low, "warmup_until": end_point(warmup)}
    if decay_end < steps and low > 0:
        return {
            "schedule": "infinite_cosine",
            "max": peak,
            "constant": low,
            "min": low,
            "warmup_until": end_point(warmup),
            "cooldown_until": end_point(decay_end),
            "constant_until": 1.0,
        }
    return None


def linear_lr(*, peak: float, low: float, warmup: Fraction, decay_end: Fraction, steps: int) -> dict[str, Any] | None:
    """Warm-up, then a straight line to `low` at decay_end; None unless decay_end is the stage's last step.

    A line that the last step cuts off ends at a higher LR, and is exact too.
    """
    if decay_end < steps:
        return None
    low += (peak - low) * float((decay_end - steps) / max(decay_end - warmup, Fraction(1)))
    return {"schedule": "linear", "max": peak, "min": low, "warmup_until": end_point(warmup)}


def constant_lr(*, peak: float, warmup: Fraction) -> dict[str, Any]:
    """Warm-up, then constant."""
    return {"schedule": "constant", "max": peak, "warmup_until": end_point(warmup)}


def end_point(steps: Fraction) -> int | str:
    """An end point in steps, as the config writes it: a whole number, or "12.5 steps"."""
    return int(steps) if steps.denominator == 1 else f"{float(steps)} steps"


def exactly(number: float) -> Fraction:
    """A number of a config file as the fraction that its decimal digits say: 0.01 is 1/100."""
    return Fraction(str(number))


def set_missing_data(out: Conversion, name: str = "data") -> None:
    """A dataset of placeholder paths, if the file names none: the result must plan."""
    if not any(key.startswith("datasets.") for key in out.values):
        out.values |= {f"datasets.{name}.train": f"data/{name}/train", "stage.dataset": name}
        out.remark(
            f"The file names no data that can be converted. datasets.{name}.train is a placeholder: give the prefix of "
            "a .bin/.idx pair, or prepare text with `titan-cpt prepare`."
        )
    if not any(key.startswith("datasets.") and key.endswith("validation") for key in out.values):
        out.remark(
            "No validation data: set datasets.*.validation, without which neither loss nor forgetting is measured."
        )


def set_weighted_data(out: Conversion, paths: list[str], weights: list[float], *, of: list[str], text: str) -> None:
    """[datasets.data] from prefixes and their weights; one prefix needs no weight."""
    if len(paths) == 1:
        ours: dict[str, Any] = {"datasets.data.train": paths[0]}
    else:
        ours = {}
        for number, (path, weight) in enumerate(zip(paths, weights, strict=True), 1):
            ours |= {f"datasets.data.domains.part{number}.train": path}
            ours |= {f"datasets.data.domains.part{number}.weight": float(weight)}
    out.decide(text, ours | {"stage.dataset": "data"}, of=of)


def set_batch(out: Conversion, *, sequences: int, micro: int, ranks: int, of: list[str], how: str) -> None:
    """[training] global and local batch size; always a decision, because it depends on the number of ranks there.

    Args:
        sequences: sequences of an optimizer step over all ranks.
        micro: sequences of a micro-batch.
        ranks: data-parallel ranks that were assumed.
        how: the formula, with its numbers.
    """
    out.decide(
        f"{how}. global_batch_size does not change with the number of GPUs here; gradient accumulation does.",
        {"training.global_batch_size": sequences, "training.local_batch_size": micro},
        of=of,
    )
    if sequences % max(micro * ranks, 1):
        out.remark(
            f"{sequences} sequences are not a multiple of {ranks} ranks x {micro} sequences: change one of them."
        )


def pipelined(out: Conversion, degree: int, micro: int, sequences: int) -> int:
    """training.local_batch_size: with pipeline parallelism all sequences of a rank's step, in micro-batches of `micro`.

    DeepSpeed and Megatron-LM send the micro-batches of gradient accumulation through the pipeline. Here a local batch
    is cut into the micro-batches of the pipeline.
    """
    if degree <= 1:
        return micro
    out.set("parallelism.pipeline_parallel_microbatch_size", micro, text="a local batch is cut into these")
    return sequences
