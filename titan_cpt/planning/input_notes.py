"""Doubts about a config and its files that a user should read before training begins: notes, never a refusal."""

from __future__ import annotations

from collections.abc import Iterator

from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec


def input_notes(config: Config, inventory: DataInventory, spec: ModelSpec) -> Iterator[str]:
    """A sentence for each."""
    yield from _of_files(config, inventory)
    if config.sweep:
        yield "this file is a sweep: what is planned here is the run that its arms differ from; titan-cpt sweep --plan"
    yield from _unmeasured(config)
    yield from _padding(config, inventory, spec)


def _of_files(config: Config, inventory: DataInventory) -> Iterator[str]:
    absent = [name for name, tokens in inventory.tokens.items() if tokens is None]
    if absent:
        yield f"data not there yet: {', '.join(absent)}; epochs and replay limits are unknown until it is"
    if inventory.vocab_size is None:
        yield (
            f"tokenizer not there yet: {config.tokenizer.path}; the vocabulary size is unknown until then, and the "
            "parameter count assumes the smallest"
        )
    absent_validation = [
        name
        for name, tokens in inventory.validation_tokens.items()
        if tokens is None and name not in absent and config.datasets[name.partition(".")[0]].source is None
    ]
    if absent_validation:
        yield f"validation data not there yet: {', '.join(absent_validation)}; training does not begin without it"
    yield from inventory.notes
    if inventory.unrecorded:
        yield (
            f"{', '.join(inventory.unrecorded)}: nothing says which tokenizer made these tokens (`prepare` writes it "
            f"into PREFIX.json); they are taken to be of {config.tokenizer.path}"
        )


def _unmeasured(config: Config) -> Iterator[str]:
    used = {name for stage in config.stages for name in stage.dataset}
    for name in sorted(used):
        dataset = config.datasets[name]
        if not dataset.validation and not any(domain.validation for domain in dataset.domains.values()):
            yield f"datasets.{name}: has no validation tokens, so what is learnt and forgotten of it is not measured"


def _padding(config: Config, inventory: DataInventory, spec: ModelSpec) -> Iterator[str]:
    """Another tensor-parallel degree would make another model, which a resume refuses; better known at the start."""
    degree = config.parallelism.tensor_parallel_degree
    chosen = config.model.model_dump(exclude={"family", "size"}, exclude_none=True)
    unsplit = named_size(config.model.family, config.model.size, inventory.vocab_size or 1, 1, chosen).vocab_size
    if spec.vocab_size != unsplit:
        yield (
            f"model.vocab_size: {spec.vocab_size:,} rows, padded to 128 x tensor-parallel degree {degree} (one rank "
            f"would have {unsplit:,}): to resume under another degree later, write it into the config now"
        )
