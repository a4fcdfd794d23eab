"""Notes on a config and its files: data that does not exist yet, datasets without validation, vocabulary padding.

A note is a warning; the plan is valid.
"""

from __future__ import annotations

from collections.abc import Iterator

from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.distributed.float8_filter import AUTO_FILTER, in_float8, too_small
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.model_spec import unsplit_spec

_SMALL_SHARE = 0.1  # of the FLOPs that float8 converts; a smaller share of slow layers matters little


def input_notes(config: Config, inventory: DataInventory, spec: ModelSpec) -> Iterator[str]:
    """All notes, in the order in which they are printed."""
    yield from _missing_files(config, inventory)
    if config.sweep:
        yield "this is the plan of the base config of a sweep; `titan-cpt sweep FILE --dry-run` lists its runs"
    yield from _without_validation(config)
    yield from _packing_of_validation(config)
    yield from _other_extension(config, inventory)
    yield from _padding(config, inventory, spec)
    yield from _small_float8_layers(config, spec)
    if not spec.estimates_activations:
        yield (
            f"model.family: {spec.family!r} does not define activation_bytes_per_token, so the estimated memory does "
            "not include activations"
        )


def _missing_files(config: Config, inventory: DataInventory) -> Iterator[str]:
    absent = [name for name, tokens in inventory.tokens.items() if tokens is None]
    if absent:
        yield f"data does not exist yet: {', '.join(absent)}; until then, epochs and the limits of replay are unknown"
    if inventory.vocab_size is None:
        yield (
            f"tokenizer does not exist yet: {config.tokenizer.path}; until then, the vocabulary size is unknown, and "
            "the parameter count assumes the smallest possible one"
        )
    absent_validation = [
        name
        for name, tokens in inventory.validation_tokens.items()
        if tokens is None and name not in absent and config.datasets[name.partition(".")[0]].source is None
    ]
    if absent_validation:
        yield f"validation data does not exist yet: {', '.join(absent_validation)}; training needs it"
    yield from inventory.notes
    if inventory.unrecorded:
        yield (
            f"{', '.join(inventory.unrecorded)}: the tokenizer of these tokens is not recorded (`prepare` writes it "
            f"into PREFIX.json); {config.tokenizer.path} is assumed"
        )


def _other_extension(config: Config, inventory: DataInventory) -> Iterator[str]:
    """The extended tokenizer exists, with another number of further tokens than the config says."""
    tokenizer, base, ids = config.tokenizer, inventory.base_vocab_size, inventory.vocab_size
    add = tokenizer.extend.add if tokenizer.extend else None
    if add is not None and base is not None and ids is not None and ids - base != add:
        yield (
            f"tokenizer.extend.add: is {add:,}, and {tokenizer.path} has {ids - base:,} further ids: that file exists, "
            "so it is used as it is; name another path to make one"
        )


def _without_validation(config: Config) -> Iterator[str]:
    used = {name for stage in config.stages for name in stage.dataset}
    for name in sorted(used):
        dataset = config.datasets[name]
        if not dataset.validation and not any(domain.validation for domain in dataset.domains.values()):
            yield f"datasets.{name}: has no validation tokens, so its loss and forgetting are not measured"


def _packing_of_validation(config: Config) -> Iterator[str]:
    """Validation reads windows of the documents laid end to end, whatever the packing of training."""
    replayed = {name for stage in config.stages if stage.replay for name in stage.replay.from_ or ()}
    trained = replayed.union(*(stage.dataset for stage in config.stages))
    for name, dataset in sorted(config.datasets.items()):
        if dataset.packs and name not in trained:
            yield (
                f"datasets.{name}.packing: no stage trains on {name}, so it has no effect: validation reads documents "
                "laid end to end; remove it"
            )


def _padding(config: Config, inventory: DataInventory, spec: ModelSpec) -> Iterator[str]:
    """The padded vocabulary depends on the tensor-parallel degree, and resume refuses a model of another size."""
    degree = config.parallelism.tensor_parallel_degree
    unsplit = unsplit_spec(config, inventory.vocab_size or 1).vocab_size
    if spec.vocab_size != unsplit:
        yield (
            f"model.vocab_size: {spec.vocab_size:,} rows, padded to 128 x tensor-parallel degree {degree} ({unsplit:,} "
            "with degree 1): to resume with another degree later, set model.vocab_size now"
        )


def _small_float8_layers(config: Config, spec: ModelSpec) -> Iterator[str]:
    """Layers that are slower in float8 by torchao's thresholds; a layer's FLOPs are proportional to its elements."""
    recipe, filters = config.float8.recipe_name, config.float8.filter_fqns
    if recipe is None:
        return
    tp = config.parallelism.tensor_parallel_degree
    converted = [
        parameter
        for parameter in spec.block_parameters()
        if len(parameter.size) == 2
        and in_float8(f"blocks.0.{parameter.name}", parameter.size, tp=tp, filter_fqns=filters, recipe=recipe)
    ]
    small = [parameter for parameter in converted if too_small(parameter.size, recipe)]
    share = sum(p.elements for p in small) / max(1, sum(p.elements for p in converted))
    if share > _SMALL_SHARE:
        names = ", ".join(parameter.name.removesuffix(".weight") for parameter in small)
        yield (
            f"float8.recipe_name: may be slower than bfloat16: {names} ({share:.0%} of the FLOPs in float8) are below "
            "the sizes from which torchao measured a gain on H100s. On an H200 a 1.1B Llama of width 2,048 with all "
            "layers in rowwise took 1.12 times as long as in bfloat16. "
            f'float8.filter_fqns = ["{AUTO_FILTER}"] leaves them in bfloat16; or remove float8.recipe_name'
        )
