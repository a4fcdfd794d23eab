"""Every combination of layout, model and batch that is refused, with the reason and the nearest valid choice.

`make_plan` calls `parallel_problems`; docs/parallelism.md is generated from the same `RULES`. Each rule excludes what
torch cannot do, or what it computes wrongly without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from titan_cpt.common.text import did_you_mean
from titan_cpt.config.schema import Config
from titan_cpt.distributed.float8_filter import in_float8
from titan_cpt.distributed.parallel_dims import SCHEDULES, ParallelDims
from titan_cpt.errors import PlanError
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.parallel import parallel_dims_of

_PARALLELISM = "parallelism."


@dataclass(frozen=True)
class RuleInput:
    """What the rules look at."""

    config: Config
    spec: ModelSpec
    world_size: int

    @property
    def layout(self) -> ParallelDims:
        """The layout asked for, possible or not."""
        return parallel_dims_of(self.config, self.world_size)


@dataclass(frozen=True)
class CPURule:
    """What is refused on a CPU; see `Rule`."""

    refused: str
    because: str
    fault: Callable[[Config], str | None]


@dataclass(frozen=True)
class Rule:
    """One kind of combination that is refused.

    Attributes:
        refused: the combination, in a few words for the documentation.
        because: the reason.
        fault: the message for what was asked, or None where the rule has nothing against it.
    """

    refused: str
    because: str
    fault: Callable[[RuleInput], str | None]


def check_device(config: Config, device: str) -> None:
    """Refuse what this kind of device cannot do; the plan, which may be made on another machine, says nothing of it.

    Raises:
        PlanError: names every such key.
    """
    faults = [rule.fault(config) for rule in CPU_RULES] if device == "cpu" else []
    found = [fault for fault in faults if fault]
    if found:
        raise PlanError("\n".join(["not on a CPU:", *(f"  - {fault}" for fault in found)]))


def parallel_problems(config: Config, spec: ModelSpec, world_size: int) -> Iterator[str]:
    """A message for every rule that the config breaks on so many ranks."""
    asked = RuleInput(config, spec, world_size)
    if config.parallelism.pipeline_parallel_degree > 1:
        unknown = _unknown_schedule(asked)
        if unknown:
            yield unknown
            return  # nothing else can be said of a schedule that does not exist
    for rule in RULES:
        if rule.fault is not _unknown_schedule and (fault := rule.fault(asked)):
            yield fault


def _unknown_schedule(asked: RuleInput) -> str | None:
    name = asked.config.parallelism.pipeline_parallel_schedule
    if name in SCHEDULES:
        return None
    hint = did_you_mean(name, SCHEDULES) or "."
    return f"{_PARALLELISM}pipeline_parallel_schedule: unknown {name!r}{hint} Allowed: {', '.join(SCHEDULES)}"


def _ranks_do_not_divide(asked: RuleInput) -> str | None:
    layout = asked.layout
    degree = layout.tp * layout.pp * layout.cp * layout.dp_replicate
    if asked.world_size % degree == 0:
        return None
    near = max(degree, asked.world_size // degree * degree)
    return (
        f"parallelism: {asked.world_size} ranks do not divide into groups of {degree} (tensor {layout.tp} x pipeline "
        f"{layout.pp} x context {layout.cp} x replicate {layout.dp_replicate}): use {near} ranks or change a degree"
    )


def _shard_degree(asked: RuleInput) -> str | None:
    layout, degree = asked.layout, asked.config.parallelism.data_parallel_shard_degree
    rest, left_over = divmod(asked.world_size, layout.tp * layout.pp * layout.cp * layout.dp_replicate)
    if degree is None or left_over or degree == rest:
        return None
    return (
        f"{_PARALLELISM}data_parallel_shard_degree: must be {rest} on {asked.world_size} ranks, or left out, "
        f"got {degree}"
    )


def _heads(asked: RuleInput) -> str | None:
    heads, tp = asked.spec.heads, asked.layout.tp
    return None if heads % tp == 0 else _not_a_divisor("tensor_parallel_degree", tp, heads, "attention heads")


def _kv_heads(asked: RuleInput) -> str | None:
    spec, tp = asked.spec, asked.layout.tp
    if spec.key_value_heads % tp == 0 or spec.heads % tp:
        return None
    return _not_a_divisor("tensor_parallel_degree", tp, spec.key_value_heads, "key/value heads")


def _tied(asked: RuleInput) -> str | None:
    if not asked.spec.tied or asked.layout.pp == 1:
        return None
    return (
        "model.tie_embeddings: a head that is the embedding cannot be cut off from it into another pipeline stage: "
        f"set {_PARALLELISM}pipeline_parallel_degree to 1, or tie_embeddings to false"
    )


def _mlp_width(asked: RuleInput) -> str | None:
    width, tp = asked.spec.mlp_width, asked.layout.tp
    return None if width % tp == 0 else _not_a_divisor("tensor_parallel_degree", tp, width, "features of the MLP")


def _sequence(asked: RuleInput) -> str | None:
    layout, length = asked.layout, asked.config.training.seq_len
    parts = 2 * layout.tp * layout.cp
    if layout.cp == 1 or length % parts == 0:
        return None
    lower, upper = length // parts * parts, -(-length // parts) * parts
    near = f"{lower} or {upper}" if lower else str(upper)
    return (
        f"training.seq_len: {length} does not divide into {parts} equal parts, which context parallelism needs "
        f"(2 x context {layout.cp} x tensor {layout.tp}): use {near}"
    )


def _ring_window(asked: RuleInput) -> str | None:
    ring = asked.config.parallelism.context_parallel_method == "ring" and asked.layout.cp > 1
    if not ring or asked.spec.sliding_window is None:
        return None
    return (
        f"{_PARALLELISM}context_parallel_method: torch's ring attention knows no sliding window "
        f'({asked.spec.sliding_window} positions here): use "gather"'
    )


def _layers(asked: RuleInput) -> str | None:
    layout, layers = asked.layout, asked.spec.layers
    if layout.pp == 1 or layers % layout.pipeline_stages == 0:
        return None
    each = layout.schedule_kind.stages_per_rank
    valid = [degree for degree in _divisors(layers) if layers % (degree * each) == 0]
    return (
        f"{_PARALLELISM}pipeline_parallel_degree: {layers} layers do not divide into {layout.pipeline_stages} stages "
        f"({layout.pp} ranks x {each} of {layout.schedule}): {_nearest(layout.pp, valid)}"
    )


def _microbatch_size(asked: RuleInput) -> str | None:
    size, local = asked.config.parallelism.pipeline_parallel_microbatch_size, asked.config.training.local_batch_size
    if asked.layout.pp == 1 or local % size == 0:
        return None
    return (
        f"{_PARALLELISM}pipeline_parallel_microbatch_size: must divide training.local_batch_size = {local}, got "
        f"{size}: {_nearest(size, _divisors(local))}"
    )


def _microbatches(asked: RuleInput) -> str | None:
    layout, config = asked.layout, asked.config
    if layout.pp == 1 or config.training.local_batch_size % config.parallelism.pipeline_parallel_microbatch_size:
        return None
    fewest = {"1F1B": layout.pp, "DualPipeV": layout.pipeline_stages}.get(layout.schedule, 1)
    rounds = max(1, layout.microbatches // layout.pp)
    uneven = layout.schedule.startswith("Interleaved") and layout.microbatches % rounds != 0
    if layout.microbatches >= fewest and not uneven:
        return None
    need = f"a multiple of {rounds}" if uneven else f"at least {fewest}"
    local = layout.microbatches // layout.pp * layout.pp if uneven else fewest
    return (
        f"training.local_batch_size: gives {layout.microbatches} pipeline micro-batches of "
        f"{config.parallelism.pipeline_parallel_microbatch_size}; {layout.schedule} on {layout.pp} ranks needs {need}: "
        f"use {local * config.parallelism.pipeline_parallel_microbatch_size} sequences"
    )


def _split_backward_resharding(asked: RuleInput) -> str | None:
    reshard = asked.config.parallelism.fsdp_reshard_after_forward
    if not asked.layout.schedule_kind.splits_backward or reshard != "always":
        return None
    return (
        f'{_PARALLELISM}fsdp_reshard_after_forward: "always" gives wrong gradients without an error under '
        f'{asked.layout.schedule}, which splits the backward pass: use "never", or leave it out'
    )


def _split_backward_compiled(asked: RuleInput) -> str | None:
    if not asked.layout.schedule_kind.splits_backward or not asked.config.compile.enable:
        return None
    return (
        f"compile.enable: torch.compile cannot split a backward pass as {asked.layout.schedule} does: set it to false, "
        f"or use Interleaved1F1B"
    )


def _compiled_tensor_parallel(asked: RuleInput) -> str | None:
    asynchronous = asked.config.parallelism.enable_async_tensor_parallel  # on CUDA alone, which the device's rule holds
    if asked.layout.tp == 1 or not asked.config.compile.enable or asynchronous:
        return None
    return (
        "compile.enable: gives wrong gradients without an error under tensor parallelism (torch 2.13 on gloo, up to "
        f"12 % of their norm; not proven elsewhere): set it to false, or {_PARALLELISM}tensor_parallel_degree to 1"
    )


def _float8_gather(asked: RuleInput) -> str | None:
    float8 = asked.config.float8
    if not float8.enable_fsdp_float8_all_gather or float8.recipe_name == "tensorwise":
        return None
    found = f'"{float8.recipe_name}" scales each row by itself' if float8.recipe_name else "there is no recipe"
    return (
        f"float8.enable_fsdp_float8_all_gather: {found}, and FSDP2 gathers weights with one scale each: set "
        'float8.recipe_name = "tensorwise", or leave it out'
    )


def _float8_nothing(asked: RuleInput) -> str | None:
    float8, spec = asked.config.float8, asked.spec
    if float8.recipe_name is None or asked.spec.heads % asked.layout.tp:
        return None
    matrices = [(f"blocks.0.{name}", size) for name, size, _ in spec.block_parameters() if len(size) == 2]
    if any(in_float8(name, size, tp=asked.layout.tp, filter_fqns=float8.filter_fqns) for name, size in matrices):
        return None
    return (
        f"float8.recipe_name: no layer of a block is left to convert: both sides of a weight must divide by "
        f"{16 * asked.layout.tp} (16 x tensor {asked.layout.tp}) and its name hold none of float8.filter_fqns = "
        f"{list(float8.filter_fqns)}: leave float8 out, or choose model.width and model.mlp_width so"
    )


def _offload_of_one(asked: RuleInput) -> str | None:
    if not asked.config.training.enable_cpu_offload or asked.world_size > 1:
        return None
    return (
        "training.enable_cpu_offload: FSDP2 moves what it shards, and a single process shards nothing: use 2 ranks or "
        "more, or leave it out"
    )


def _asynchronous(asked: RuleInput) -> str | None:
    wanted = asked.config.parallelism.enable_async_tensor_parallel
    if not wanted or (asked.layout.tp > 1 and asked.config.compile.enable):
        return None
    return (
        f"{_PARALLELISM}enable_async_tensor_parallel: torch.compile overlaps the traffic of tensor-parallel ranks: set "
        f"{_PARALLELISM}tensor_parallel_degree to 2 or more and compile.enable = true, or leave it out"
    )


def _split_backward_selective(asked: RuleInput) -> str | None:
    kept = asked.config.activation_checkpoint
    if not asked.layout.schedule_kind.splits_backward or kept.mode != "selective" or kept.selective_ac_option != "op":
        return None
    return (
        f'activation_checkpoint.selective_ac_option: what "op" keeps is used up once, and {asked.layout.schedule} '
        f'goes backward twice: use a number n (every n-th block), or mode = "full"'
    )


def _budget_without_compile(asked: RuleInput) -> str | None:
    if asked.config.activation_checkpoint.mode != "memory_budget" or asked.config.compile.enable:
        return None
    return 'activation_checkpoint.mode: "memory_budget" is torch.compile\'s: set compile.enable = true, or use "full"'


def _selection(asked: RuleInput) -> str | None:
    option = asked.config.activation_checkpoint.selective_ac_option
    if option == "op" or (option.isdecimal() and int(option) > 0):
        return None
    return (
        f'activation_checkpoint.selective_ac_option: must be "op" or a whole number n (every n-th block), '
        f'got {option!r}; did you mean "op"?'
    )


def _not_a_divisor(key: str, degree: int, count: int, of_what: str) -> str:
    nearest = _nearest(degree, _divisors(count))
    return f"{_PARALLELISM}{key}: {count} {of_what} cannot be split evenly over {degree} ranks: {nearest}"


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def _nearest(wanted: int, valid: Iterable[int]) -> str:
    """The valid numbers on both sides of the wanted one, as advice."""
    lower = max((number for number in valid if number < wanted), default=None)
    upper = min((number for number in valid if number > wanted), default=None)
    near = [str(number) for number in (lower, upper) if number is not None]
    return f"use {' or '.join(near)}" if near else "there is no valid choice"


RULES: tuple[Rule, ...] = (
    Rule("ranks that do not divide by the degrees", "every degree is a dimension of one mesh", _ranks_do_not_divide),
    Rule("a shard degree that leaves ranks over", "every rank has a place in the mesh", _shard_degree),
    Rule("heads that cannot be split evenly over TP", "a rank computes whole heads", _heads),
    Rule("key/value heads that cannot be split evenly over TP", "no head of them is held twice", _kv_heads),
    Rule("tied embeddings over a pipeline", "the last stage would need the first one's weight", _tied),
    Rule("MLP width that does not divide by TP", "a rank computes an equal share of the features", _mlp_width),
    Rule("CP with a seq_len that does not divide by 2 x CP x TP", "a rank holds two equal pieces", _sequence),
    Rule("ring attention with a sliding window", "torch's ring knows none", _ring_window),
    Rule("an unknown pipeline schedule", "torch has no such schedule", _unknown_schedule),
    Rule("layers that do not divide into the stages", "stages are equal shares of the layers", _layers),
    Rule("local batch that does not divide into micro-batches", "a schedule's shapes are fixed", _microbatch_size),
    Rule("too few or uneven micro-batches", "1F1B needs pp, DualPipeV 2 pp, Interleaved* whole rounds", _microbatches),
    Rule(
        'split-backward schedules with resharding "always"',
        "wrong gradients without an error in torch 2.13",
        _split_backward_resharding,
    ),
    Rule(
        "split-backward schedules with torch.compile",
        "torch raises when the schedule is made",
        _split_backward_compiled,
    ),
    Rule("TP with torch.compile", "wrong gradients without an error in torch 2.13 on gloo", _compiled_tensor_parallel),
    Rule(
        "split-backward schedules with selective checkpointing per operator",
        "torch raises in the second half of the backward pass",
        _split_backward_selective,
    ),
    Rule('"memory_budget" without torch.compile', "the budget is spent by its partitioner", _budget_without_compile),
    Rule("float8 all-gather without the tensorwise recipe", "a gathered weight has one scale", _float8_gather),
    Rule("float8 that converts no layer", "its products take sides that divide by 16", _float8_nothing),
    Rule("CPU offload in a single process", "FSDP2 moves what it shards", _offload_of_one),
    Rule("async TP without TP or torch.compile", "the compiler overlaps traffic and products", _asynchronous),
    Rule("a selection that is neither op nor a number", "nothing else is defined", _selection),
)


def _asynchronous_on_cpu(config: Config) -> str | None:
    if not config.parallelism.enable_async_tensor_parallel:
        return None
    return (
        f"{_PARALLELISM}enable_async_tensor_parallel: goes through symmetric memory, which only CUDA has: set it and "
        "compile.enable to false here"
    )


def _ring_on_cpu(config: Config) -> str | None:
    asked = config.parallelism
    if asked.context_parallel_degree == 1 or asked.context_parallel_method != "ring":
        return None
    return f'{_PARALLELISM}context_parallel_method: torch 2.13 has no ring for the CPU\'s attention: use "gather"'


def _compiled_float8_on_cpu(config: Config) -> str | None:
    bf16 = config.training.mixed_precision_param == "bfloat16"
    if not config.compile.enable or config.float8.recipe_name is None or not bf16:
        return None
    return (
        "compile.enable: torch 2.13 cannot compile emulated float8 in bfloat16: set it to false, or "
        'training.mixed_precision_param to "float32"'
    )


CPU_RULES: tuple[CPURule, ...] = (
    CPURule("ring attention", "torch 2.13 has no ring for the CPU's kernel", _ring_on_cpu),
    CPURule("async TP", "it goes through symmetric memory, which only CUDA has", _asynchronous_on_cpu),
    CPURule(
        "float8 with torch.compile in bfloat16", "torch 2.13 cannot compile the emulation", _compiled_float8_on_cpu
    ),
)
