"""The model card (README.md) of an exported model: its training history, from the manifest and the run's folder.

It holds only what the run recorded; anything else is "unknown".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.averages import describe_average
from titan_cpt.checkpoint.provenance import (
    BaseModelInfo,
    TrainedStage,
    extended_base,
    find_merge,
    new_rows_by_stage,
    tokenizer_mismatch,
)
from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.weights.named_weights import NamedWeights, suffix_of
from titan_cpt.common.weights.partition import LR_SCALE, TRAINABLE
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.errors import DataError
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.stages.optimizers import OPTIMIZER_NAME


def model_card(
    record: Mapping[str, Any],
    weights: NamedWeights,
    history: Sequence[TrainedStage],
    base_model: BaseModelInfo | None,
    spec: ModelSpec,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    warning: str | None,
) -> str:
    """The text of the model card, in Markdown.

    Args:
        record: the checkpoint's manifest.
        weights: the exported weights in its folder, which is inside or outside a run's folder.
        history: the stages that trained the weights.
        base_model: the pretrained model that they started from, or None.
        spec: architecture of the model.
        dtype: name of the exported weights' dtype.
        tokenizer: the exported tokenizer, or None.
        warning: a warning about the tokenizer, or None.
    """
    checkpoint = weights.folder
    merge = find_merge(record)
    trained = f"{record['stage']}{suffix_of(weights.average)}, step {record['steps_done']:,}"
    title = f"merge ({merge['method']})" if merge and "merge" in record else trained
    run = checkpoint.resolve().parent.parent.name if history else ""
    mismatch = tokenizer_mismatch(record, checkpoint)
    facts = [
        f"- Model: {spec.family}, {spec.parameters:,} parameters, {spec.vocab_size:,} vocabulary rows, in {dtype}",
        f"- RoPE: {spec.rope}",
        *([f"- Weights: {describe_average(record)}"] if weights.average else []),
        f"- Base model: {_describe_base(base_model)}",
        f"- Tokenizer: {_describe_tokenizer(tokenizer, warning)}",
        *_new_token_facts(record, checkpoint),
        *([f"- **Trained on tokens of another tokenizer**: {mismatch}"] if mismatch else []),
        f"- Plan fingerprint: `{record['fingerprint']}`; torch {record.get('torch', 'unknown')}",
    ]
    parts = [_front_matter(base_model), f"# {run + ': ' if run else ''}{title}", "\n".join(facts)]
    if merge:
        parts += ["## Merge" if "merge" in record else "## Merge that training began with", _describe_merge(merge)]
    if history:
        parts += ["## Stages", _stages(record["recipe"], history), _losses(checkpoint.parent.parent, history)]
    evaluated = " beyond the losses above" if history else ""
    parts.append(f"Exported by titan_cpt; the weights were read back bit by bit. Not evaluated{evaluated}.")
    return "\n\n".join(parts) + "\n"


def _new_token_facts(record: Mapping[str, Any], checkpoint: Path) -> list[str]:
    """Lines about the tokens that the run's tokenizer adds to another one, and their rows."""
    base = extended_base(checkpoint)
    made = "; ".join(f"{stage}: {text}" for stage, text in new_rows_by_stage(record, checkpoint).items())
    facts = [] if base is None else [f"- Tokenizer extends: `{base}`, whose ids it keeps"]
    return [*facts, *([f"- New rows, stage {made}"] if made else [])]


def _describe_base(base_model: BaseModelInfo | None) -> str:
    if base_model is None:
        return "none (random initialization)"
    return ", ".join(f"`{name}`" for name in (base_model.name, *base_model.others))


def _describe_merge(merge: Mapping[str, Any]) -> str:
    """The method of a merge and its inputs, from the manifest, in Markdown."""
    numbers = ", ".join(f"{name} {merge[name]:g}" for name in ("density", "scale") if name in merge)
    rows = [
        f"{merge['method']}{f' ({numbers})' if numbers else ''} of the weights below, computed in float64.",
        "",
        "| input | weight | checkpoint | trained in | digest of files |",
        "|---" * 5 + "|",
    ]
    inputs = [*zip(merge["parents"], merge["weights"], strict=True)]
    for parent, weight in [*inputs, *([(merge["base"], "base")] if "base" in merge else [])]:
        stages = ", ".join(f"{stage['name']} ({stage['steps']:,} steps)" for stage in parent["history"])
        made = f"{parent['stage']}, step {parent['steps_done']:,}" if parent["history"] else parent["kind"]
        shown = weight if isinstance(weight, str) else f"{weight:g}"
        cells = [f"`{parent['path']}`", shown, made, stages or "unknown", f"`{parent['digest'][:12]}`"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _describe_tokenizer(tokenizer: Tokenizer | None, warning: str | None) -> str:
    if tokenizer is None:
        return "not exported"
    text = f"`{tokenizer.name}`, fingerprint `{tokenizer.fingerprint[:12]}`, {tokenizer.vocab_size:,} ids"
    text += f"; {describe_bos(tokenizer)}"
    return text if warning is None else f"{text}. **{warning[0].upper()}{warning[1:]}.**"


def describe_bos(tokenizer: Tokenizer) -> str:
    """Whether training documents began with a begin-of-document token, and how to get the same from transformers."""
    name = tokenizer.bos.name if tokenizer.bos is not None else ""
    if tokenizer.add_bos and tokenizer.adds_bos_itself:
        return f"documents in training began with {name}, which the tokenizer puts before each text"
    if tokenizer.add_bos:
        return f"documents in training began with {name}, which the tokenizer does not add: put it before each text"
    if tokenizer.adds_bos_itself:
        return (
            f"documents in training did not begin with {name}, which the tokenizer puts before each text: call it with "
            "add_special_tokens=False"
        )
    return "documents in training had no begin-of-document token"


def _front_matter(base_model: BaseModelInfo | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    names = (base_model.name, *base_model.others) if base_model else ()
    on_hub = sorted({name.partition("@")[0] for name in names if name.count("/") == 1 and not Path(name).exists()})
    if len(on_hub) == 1:
        lines.append(f"base_model: {on_hub[0]}")
    elif on_hub:
        lines += ["base_model:", *(f"- {name}" for name in on_hub)]
    return "\n".join([*lines, "tags:", "- continual-pretraining", "- titan_cpt", "---"])


def _stages(recipe: Mapping[str, Any], history: Sequence[TrainedStage]) -> str:
    rows = ["| stage | data | steps | tokens | replay | learning rate | optimizer | begins with |", "|---" * 8 + "|"]
    batches: dict[str, list[str]] = {}  # names of stages by their batch
    for stage in history:
        settings = {key.removeprefix(f"stages.{stage.name}."): value for key, value in recipe.items()}
        planned_steps = settings["steps"]
        steps = f"{stage.steps:,}" if stage.steps == planned_steps else f"{stage.steps:,} of {planned_steps:,}"
        sizes, seq_len = _batch(recipe, settings)
        tokens = f"{sizes.sequences_before(stage.steps) * seq_len:,}"
        sequences = " to ".join(f"{phase.size:,}" for phase in sizes.within(stage.steps))
        batches.setdefault(f"{sequences} sequences x {seq_len:,} tokens", []).append(stage.name)
        data = ", ".join(f"{name} {_percent(float(Fraction(share)))}" for name, share in settings["dataset"].items())
        optimizer = ", ".join([*filter(None, [settings.get(OPTIMIZER_NAME)]), settings["optimizer_state"]])
        cells = [stage.name, data, steps, tokens, _replay(settings), _lr(settings), optimizer, f"`{stage.init}`"]
        rows.append("| " + " | ".join(cells) + " |")
    batch = ", ".join(f"{text} ({', '.join(names)})" if len(batches) > 1 else text for text, names in batches.items())
    optimizers = dict.fromkeys(recipe.get(f"stages.{stage.name}.{OPTIMIZER_NAME}", "AdamW") for stage in history)
    clipping = f"gradients clipped at {recipe['training.max_norm']:g}, {' and '.join(optimizers)}."
    return "\n".join([*rows, "", f"Batches of {batch}, {clipping}", *_trained_parts(recipe, history)])


def _trained_parts(recipe: Mapping[str, Any], history: Sequence[TrainedStage]) -> list[str]:
    """A list of the stages that did not train all weights alike; nothing without one."""
    found = []
    for stage in history:
        trained, scales = (recipe.get(f"stages.{stage.name}.{key}") for key in (TRAINABLE, LR_SCALE))
        if trained is not None:
            found.append(f"- {stage.name} trained only {', '.join(f'`{pattern}`' for pattern in trained)}")
        if scales is not None:
            factors = ", ".join(f"{factor:g} x the learning rate for `{name}`" for name, factor in scales.items())
            found.append(f"- {stage.name}: {factors}")
    return ["", *found] if found else []


def _batch(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[BatchSizes, int]:
    """The global batch sizes and the sequence length of a stage, whose own settings replace those of the run."""
    seq_len = settings.get("seq_len", recipe["training.seq_len"])
    sizes = settings.get("global_batch_size", recipe["training.global_batch_size"])
    if isinstance(sizes, int):
        return BatchSizes.constant(sizes), seq_len
    return BatchSizes.ramp([(int(tokens), size) for tokens, size in sizes.items()], seq_len=seq_len), seq_len


def _replay(settings: Mapping[str, Any]) -> str:
    if not settings["replay.fraction"]:
        return "none"
    sources = f" of {', '.join(settings['replay.from'])}" if settings["replay.from"] else " of all earlier datasets"
    return f"{_percent(settings['replay.fraction'])}{sources}, {settings['replay.order'].replace('_', ' ')}"


def _lr(settings: Mapping[str, Any]) -> str:
    """The LR schedule with its highest LR, constant LR if it has one, and lowest LR."""
    if settings["lr.schedule"] == "continue":
        return "continues that of the stage before"
    lowest = settings["lr.min"] if settings["lr.schedule"] != "constant" else None
    rates = [settings.get("lr.max"), settings.get("lr.constant"), lowest]
    return f"{settings['lr.schedule']}, " + " to ".join(f"{rate:g}" for rate in rates if rate is not None)


def _losses(run: Path, history: Sequence[TrainedStage]) -> str:
    """Validation losses at the start of each stage and at the step that these weights reached, from metrics.jsonl."""
    steps_trained = {stage.name: stage.steps for stage in history}
    measured: dict[tuple[str, str], dict[int, float]] = {}
    rates: dict[str, float] = {}
    try:
        metrics = read_metrics(run, [stage.name for stage in history])
    except DataError:
        return "## Losses\n\nUnknown: the run's metrics.jsonl is not beside the checkpoint, or cannot be read."
    identities: dict[tuple[str, str], dict[int, str | None]] = {}
    for entry in metrics.validations:
        key = entry["stage"], entry["dataset"]
        step = entry["step"]
        if step <= steps_trained.get(entry["stage"], -1) and entry["loss_nats_per_token"] is not None:
            measured.setdefault(key, {})[step] = entry["loss_nats_per_token"]
            identities.setdefault(key, {})[step] = entry.get("validation_id")
    for entry in metrics.renewed:  # the stage's initial weights, measured on the later validation data
        key = entry["stage"], entry["dataset"]
        ids = identities.get(key, {})
        loss = entry["loss_nats_per_token"]
        if ids and loss is not None and entry.get("validation_id") == ids[max(ids)] != ids.get(0):
            measured[key][0] = loss
            ids[0] = ids[max(ids)]
    for entry in metrics.trains:
        if entry["step"] == steps_trained.get(entry["stage"]) and "lr" in entry:
            rates[entry["stage"]] = entry["lr"]
    rows = ["## Losses", "", "| stage | dataset | before | last measured | at step |", "|---" * 5 + "|"]
    for (stage, dataset), losses in measured.items():
        before = losses.get(0)
        last = max(losses)
        same = identities[stage, dataset].get(0) in (None, identities[stage, dataset][last])
        shown = "" if before is None else f"{before:.4f}" if same else f"{before:.4f} (other validation data)"
        rows.append(f"| {stage} | {dataset} | {shown} | {losses[last]:.4f} | {last:,} |")
    last_rates = "; ".join(f"{stage} {rate:.3g}" for stage, rate in rates.items())
    note = f"Validation losses in nats per token. Learning rate of the last step: {last_rates or 'not recorded'}."
    return "\n".join([*rows, "", note if measured else "No dataset was measured."])


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
