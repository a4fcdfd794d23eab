"""Sequence length and batch of a stage: its own keys replace those of [training]."""

from __future__ import annotations

from collections.abc import Iterator

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.common.numbers import parse_tokens
from titan_cpt.common.readable import shortest_count
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.planning.plan import StagePlan

_OWN_KEYS = ("seq_len", "global_batch_size", "local_batch_size")  # of a stage, in place of those of [training]


def seq_len_of(config: Config, stage: StageConfig) -> int:
    """The sequence length of a stage in tokens."""
    return stage.seq_len or config.training.seq_len


def local_batch_size_of(config: Config, stage: StageConfig) -> int:
    """Sequences of a micro-batch of one data-parallel rank."""
    return stage.local_batch_size or config.training.local_batch_size


def batch_sizes_of(config: Config, stage: StageConfig) -> BatchSizes:
    """The global batch size of every step of a stage."""
    size = stage.global_batch_size or config.training.global_batch_size
    if isinstance(size, int):
        return BatchSizes.constant(size)
    return BatchSizes.ramp(_thresholds(size), seq_len=seq_len_of(config, stage))


def batch_recipe(config: Config, stage: StageConfig) -> dict[str, object]:
    """What the sequence length and the batch add to a stage's recipe: only values that differ from [training]."""
    seq_len = seq_len_of(config, stage)
    sizes = batch_sizes_of(config, stage)
    usual = config.training.seq_len, BatchSizes.constant(config.training.global_batch_size)
    return {
        **({"seq_len": seq_len} if seq_len != usual[0] else {}),
        **({"global_batch_size": _recipe_of(stage, sizes)} if sizes != usual[1] else {}),
    }


def with_own_batch(config: Config, stage: StageConfig) -> Config:
    """The config with the stage's sequence length and batch in [training]; of a ramp, its first size."""
    own = {key: value for key in _OWN_KEYS if (value := getattr(stage, key)) is not None}
    if not own:
        return config
    if "global_batch_size" in own:
        own["global_batch_size"] = batch_sizes_of(config, stage).at(0)
    return config.model_copy(update={"training": config.training.model_copy(update=own)})


def named_as_set(problem: str, stage: StageConfig) -> str:
    """A message about `with_own_batch` with the keys that the file has: those of the stage where it sets them."""
    for key in _OWN_KEYS:
        if getattr(stage, key) is not None:
            problem = problem.replace(f"training.{key}", f"stages.{stage.name}.{key}")
    return problem


def batch_problems(config: Config, dims: ParallelDims) -> Iterator[str]:
    """A message for every batch size of a stage that data-parallel ranks and local batches do not divide."""
    found = []
    for stage in config.stages:
        local = local_batch_size_of(config, stage)
        sizes = dict.fromkeys(phase.size for phase in batch_sizes_of(config, stage).phases)
        for size in sizes:
            if problem := _not_a_multiple(size, local, dims.data_parallel):
                found.append(named_as_set(problem, stage))
    yield from dict.fromkeys(found)


def _not_a_multiple(size: int, local_batch: int, data_parallel: int) -> str | None:
    per_pass = data_parallel * local_batch
    if size % per_pass == 0:
        return None
    sequences, remainder = divmod(size, data_parallel)
    fits = max((n for n in range(1, local_batch + 1) if sequences % n == 0), default=0)
    return (
        f"training.global_batch_size: {size} is not a multiple of data-parallel ranks "
        f"({data_parallel}) x training.local_batch_size ({local_batch}) = {per_pass}: "
        f"change one of the two{'' if remainder else f' (local_batch_size {fits} fits)'}, or the number of ranks"
    )


def ramp_notes(plan: StagePlan, stage: StageConfig) -> Iterator[str]:
    """A note if a stage ends before a batch size of its ramp begins."""
    sizes = stage.global_batch_size
    for tokens, size in _thresholds(sizes) if isinstance(sizes, dict) else ():
        if tokens >= plan.tokens:
            yield (
                f"stages.{plan.name}.global_batch_size: the stage ends after {shortest_count(plan.tokens)} tokens, "
                f"before its batch size {size} begins at {shortest_count(tokens)}"
            )
            return


def _thresholds(sizes: dict[str, int]) -> list[tuple[int, int]]:
    return sorted((parse_tokens(tokens), size) for tokens, size in sizes.items())


def _recipe_of(stage: StageConfig, sizes: BatchSizes) -> object:
    size = stage.global_batch_size
    if isinstance(size, dict) and len(sizes.phases) > 1:
        return {str(tokens): sequences for tokens, sequences in _thresholds(size)}
    return sizes.at(0)
