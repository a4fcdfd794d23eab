"""Combinations of parallelism, model and batch that are refused, each with its reason and the nearest valid choice.

`make_plan` calls `parallel_problems`; docs/parallelism.md is generated from the same `RULES`. Each rule excludes what
torch cannot do, or what it computes wrongly without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from titan_cpt.common.text import did_you_mean
from titan_cpt.config.schema import CompileConfig, Config, document_keys
from titan_cpt.distributed.float8_filter import AUTO_FILTER, in_float8
from titan_cpt.distributed.parallel_dims import SCHEDULES, ParallelDims
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.parallel import parallel_dims_of
from titan_cpt.planning.stages.optimizers import muon_with_other_kernels, triton_with_offload
from titan_cpt.planning.stages.own_batch import named_as_set, with_own_batch

_PARALLELISM = "parallelism."
_RAISES_LATE = "torch raises in the second half of the backward pass"


@dataclass(frozen=True)
class RuleInput:
    """The inputs of every rule."""

    config: Config
    spec: ModelSpec
    world_size: int

    @property
    def dims(self) -> ParallelDims:
        """The configured parallelism degrees, valid or not."""
        return parallel_dims_of(self.config, self.world_size)


@dataclass(frozen=True)
class Rule:
    """One kind of combination that is refused.

    Attributes:
        refused: the combination, in a few words for the documentation.
        because: the reason.
        problem: returns the error message for a config that breaks the rule, None for others.
    """

    refused: str
    because: str
    problem: Callable[[RuleInput], str | None]


def parallel_problems(config: Config, spec: ModelSpec, world_size: int) -> Iterator[str]:
    """An error message for every rule that the config breaks on `world_size` ranks."""
    inputs = RuleInput(config, spec, world_size)
    if config.parallelism.pipeline_parallel_degree > 1:
        unknown = _unknown_schedule(inputs)
        if unknown:
            yield unknown
            return  # the other rules need a schedule that exists
    stages = [(RuleInput(with_own_batch(config, stage), spec, world_size), stage) for stage in config.stages]
    for rule in RULES:
        if rule.problem is not _unknown_schedule:
            usual = rule.problem(inputs)  # validation has the batch of [training]
            own = (named_as_set(problem, stage) for each, stage in stages if (problem := rule.problem(each)))
            yield from dict.fromkeys([*([usual] if usual else []), *own])


def _unknown_schedule(inputs: RuleInput) -> str | None:
    name = inputs.config.parallelism.pipeline_parallel_schedule
    if name in SCHEDULES:
        return None
    hint = did_you_mean(name, SCHEDULES) or "."
    return f"{_PARALLELISM}pipeline_parallel_schedule: unknown {name!r}{hint} Allowed: {', '.join(SCHEDULES)}"


def _ranks_do_not_divide(inputs: RuleInput) -> str | None:
    dims = inputs.dims
    degree = dims.tp * dims.pp * dims.cp * dims.dp_replicate
    if inputs.world_size % degree == 0:
        return None
    near = max(degree, inputs.world_size // degree * degree)
    return (
        f"parallelism: {inputs.world_size} ranks do not divide into groups of {degree} (tensor {dims.tp} x pipeline "
        f"{dims.pp} x context {dims.cp} x replicate {dims.dp_replicate}): use {near} ranks or change a degree"
    )


def _shard_degree(inputs: RuleInput) -> str | None:
    dims = inputs.dims
    degree = inputs.config.parallelism.data_parallel_shard_degree
    needed, remainder = divmod(inputs.world_size, dims.tp * dims.pp * dims.cp * dims.dp_replicate)
    if degree is None or remainder or degree == needed:
        return None
    return (
        f"{_PARALLELISM}data_parallel_shard_degree: must be {needed} on {inputs.world_size} ranks, or "
        f"omitted, got {degree}"
    )


def _heads(inputs: RuleInput) -> str | None:
    heads = inputs.spec.heads
    tp = inputs.dims.tp
    return None if heads % tp == 0 else _not_a_divisor("tensor_parallel_degree", tp, heads, "attention heads")


def _kv_heads(inputs: RuleInput) -> str | None:
    spec = inputs.spec
    tp = inputs.dims.tp
    if spec.key_value_heads % tp == 0 or spec.heads % tp:
        return None
    return _not_a_divisor("tensor_parallel_degree", tp, spec.key_value_heads, "key/value heads")


def _tied(inputs: RuleInput) -> str | None:
    if not inputs.spec.tied or inputs.dims.pp == 1:
        return None
    return (
        "model.tie_embeddings: tied weights cannot be on two pipeline stages, the embedding on the first and the head "
        f"on the last: set {_PARALLELISM}pipeline_parallel_degree to 1, or tie_embeddings to false"
    )


def _mlp_width(inputs: RuleInput) -> str | None:
    width = inputs.spec.mlp_width
    tp = inputs.dims.tp
    return None if width % tp == 0 else _not_a_divisor("tensor_parallel_degree", tp, width, "MLP features")


def _sequence(inputs: RuleInput) -> str | None:
    dims = inputs.dims
    length = inputs.config.training.seq_len
    parts = 2 * dims.tp * dims.cp
    if dims.cp == 1 or length % parts == 0:
        return None
    lower = length // parts * parts
    upper = -(-length // parts) * parts
    near = f"{lower} or {upper}" if lower else str(upper)
    return (
        f"training.seq_len: {length} does not divide into {parts} equal parts, which context parallelism needs "
        f"(2 x context {dims.cp} x tensor {dims.tp}): use {near}"
    )


def _ring_mask(inputs: RuleInput) -> str | None:
    masks = document_keys(inputs.config, "document_mask")
    if windows := {*inputs.spec.layer_windows} - {None}:
        masks.append(f"model.sliding_window = {min(window for window in windows if window is not None)}")
    if inputs.config.parallelism.context_parallel_method != "ring" or inputs.dims.cp == 1 or not masks:
        return None
    what = "sliding window" if "model" in masks[-1] else "document mask"
    return f'{_PARALLELISM}context_parallel_method: torch\'s ring attention has no {what} ({masks[-1]}): use "gather"'


def _layers(inputs: RuleInput) -> str | None:
    dims = inputs.dims
    layers = inputs.spec.layers
    if dims.pp == 1 or layers % dims.pipeline_stages == 0:
        return None
    each = dims.schedule_kind.stages_per_rank
    valid = [degree for degree in _divisors(layers) if layers % (degree * each) == 0]
    return (
        f"{_PARALLELISM}pipeline_parallel_degree: {layers} layers do not divide into {dims.pipeline_stages} pipeline "
        f"stages ({dims.pp} ranks x {each} of {dims.schedule}): {_nearest(dims.pp, valid)}"
    )


def _microbatch_size(inputs: RuleInput) -> str | None:
    size = inputs.config.parallelism.pipeline_parallel_microbatch_size
    local = inputs.config.training.local_batch_size
    if inputs.dims.pp == 1 or local % size == 0:
        return None
    return (
        f"{_PARALLELISM}pipeline_parallel_microbatch_size: must divide training.local_batch_size = {local}, got "
        f"{size}: {_nearest(size, _divisors(local))}"
    )


def _microbatches(inputs: RuleInput) -> str | None:
    dims = inputs.dims
    size = inputs.config.parallelism.pipeline_parallel_microbatch_size
    if dims.pp == 1 or inputs.config.training.local_batch_size % size:
        return None
    fewest = {"1F1B": dims.pp, "DualPipeV": dims.pipeline_stages}.get(dims.schedule, 1)
    rounds = max(1, dims.microbatches // dims.pp)
    uneven = dims.schedule.startswith("Interleaved") and dims.microbatches % rounds != 0
    if dims.microbatches >= fewest and not uneven:
        return None
    need = f"a multiple of {rounds}" if uneven else f"at least {fewest}"
    local = dims.microbatches // dims.pp * dims.pp if uneven else fewest
    return (
        f"training.local_batch_size: gives {dims.microbatches} pipeline micro-batches of {size}; {dims.schedule} on "
        f"{dims.pp} ranks needs {need}: use {local * size} sequences"
    )


def _split_backward_resharding(inputs: RuleInput) -> str | None:
    reshard = inputs.config.parallelism.fsdp_reshard_after_forward
    if not inputs.dims.schedule_kind.splits_backward or reshard != "always":
        return None
    return (
        f'{_PARALLELISM}fsdp_reshard_after_forward: "always" gives wrong gradients without an error under '
        f'{inputs.dims.schedule}, which splits the backward pass: use "never" or "default"'
    )


def _split_backward_compiled(inputs: RuleInput) -> str | None:
    if not inputs.dims.schedule_kind.splits_backward or not inputs.config.compile.enable:
        return None
    return (
        f"compile.enable: torch.compile cannot split the backward pass, which {inputs.dims.schedule} needs: set it to "
        "false, or use Interleaved1F1B"
    )


def _compiled_tensor_parallel(inputs: RuleInput) -> str | None:
    async_tp = inputs.config.parallelism.enable_async_tensor_parallel  # needs CUDA (device_rules.py), and torch.compile
    if inputs.dims.tp == 1 or not inputs.config.compile.enable or async_tp:
        return None
    return (
        "compile.enable: gives wrong gradients without an error under tensor parallelism (torch 2.13 on gloo, up to "
        f"12 % of their norm; untested elsewhere): set it to false, or {_PARALLELISM}tensor_parallel_degree to 1"
    )


def _float8_gather(inputs: RuleInput) -> str | None:
    float8 = inputs.config.float8
    if not float8.enable_fsdp_float8_all_gather or float8.recipe_name == "tensorwise":
        return None
    found = f'"{float8.recipe_name}" has a scale for each row' if float8.recipe_name else "no float8 recipe is set"
    return (
        f"float8.enable_fsdp_float8_all_gather: {found}, and FSDP2 gathers weights with one scale per tensor: set "
        'float8.recipe_name = "tensorwise", or enable_fsdp_float8_all_gather = false'
    )


def _float8_no_layer(inputs: RuleInput) -> str | None:
    float8 = inputs.config.float8
    if float8.recipe_name is None or inputs.spec.heads % inputs.dims.tp:
        return None
    matrices = [(f"blocks.0.{name}", size) for name, size, _ in inputs.spec.block_parameters() if len(size) == 2]
    filters, recipe, tp = float8.filter_fqns, float8.recipe_name, inputs.dims.tp
    if any(in_float8(name, size, tp=tp, filter_fqns=filters, recipe=recipe) for name, size in matrices):
        return None
    small = " and be large enough" if AUTO_FILTER in float8.filter_fqns else ""
    return (
        f"float8.recipe_name: no layer can be converted: both dimensions of a weight must be multiples of "
        f"{16 * inputs.dims.tp} (16 x tensor {inputs.dims.tp}){small}, and its name must contain none of "
        f"float8.filter_fqns = {list(float8.filter_fqns)}: remove float8.recipe_name, or change model.width and "
        "model.mlp_width"
    )


def _offload_on_one_rank(inputs: RuleInput) -> str | None:
    if not inputs.config.training.enable_cpu_offload or inputs.world_size > 1:
        return None
    return (
        "training.enable_cpu_offload: FSDP2 offloads sharded parameters, and a single rank has none: use 2 ranks or "
        "more, or set it to false"
    )


def _async_tp(inputs: RuleInput) -> str | None:
    async_tp = inputs.config.parallelism.enable_async_tensor_parallel
    if not async_tp or (inputs.dims.tp > 1 and inputs.config.compile.enable):
        return None
    return (
        f"{_PARALLELISM}enable_async_tensor_parallel: needs torch.compile, and tensor parallelism: set "
        f"{_PARALLELISM}tensor_parallel_degree to 2 or more and compile.enable = true, or set it to false"
    )


def _split_backward_selective(inputs: RuleInput) -> str | None:
    checkpointing = inputs.config.activation_checkpoint
    is_per_operator = checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op"
    if not inputs.dims.schedule_kind.splits_backward or not is_per_operator:
        return None
    return (
        'activation_checkpoint.selective_ac_option: "op" allows one backward pass through each activation, and '
        f'{inputs.dims.schedule} makes two: use a number n (every n-th block), or mode = "full"'
    )


def _budget_without_compile(inputs: RuleInput) -> str | None:
    if inputs.config.activation_checkpoint.mode != "memory_budget" or inputs.config.compile.enable:
        return None
    return 'activation_checkpoint.mode: "memory_budget" needs torch.compile: set compile.enable = true, or use "full"'


def _selective_option(inputs: RuleInput) -> str | None:
    option = inputs.config.activation_checkpoint.selective_ac_option
    if option == "op" or (option.isdecimal() and int(option) > 0):
        return None
    return (
        f'activation_checkpoint.selective_ac_option: must be "op" or a whole number n (every n-th block), '
        f'got {option!r}; did you mean "op"?'
    )


def _flex_without_mask(inputs: RuleInput) -> str | None:
    if inputs.config.training.attention_backend != "flex" or document_keys(inputs.config, "document_mask"):
        return None
    return 'training.attention_backend: "flex" is for training.document_mask: set it to true, or remove the key'


def _cuda_graphs_on_ranks(inputs: RuleInput) -> str | None:
    if not inputs.config.training.cuda_graphs or inputs.world_size == 1:
        return None
    return (
        f"training.cuda_graphs: graphs are captured in a single process only, and the run has {inputs.world_size} "
        "processes: set it to false"
    )


def _cuda_graphs_with(inputs: RuleInput) -> str | None:
    config = inputs.config
    found = ["float8.recipe_name"] if config.float8.recipe_name is not None else []
    found += ["profiling.enable_profiling"] if config.profiling.enable_profiling else []
    found += ['packing = "best_fit"'] if any(table.packs for table in config.datasets.values()) else []
    if not config.training.cuda_graphs or not found:
        return None
    return (
        f"training.cuda_graphs: not supported together with {' and '.join(found)}: set it to false, or remove "
        f"{'them' if len(found) > 1 else found[0]}"
    )


def _compiled_model(inputs: RuleInput) -> str | None:
    config = inputs.config
    if config.compile.scope == "block" or not config.compile.enable:
        return None
    if inputs.world_size > 1:
        return (
            f'compile.scope: "model" compiles one graph in a single process, and the run has {inputs.world_size} '
            'processes, which communicate between blocks: use "block"'
        )
    if config.activation_checkpoint.mode in ("full", "selective"):
        return (
            f'compile.scope: "model" has no blocks to recompute, and activation_checkpoint.mode is '
            f'"{config.activation_checkpoint.mode}": use scope "block", or mode "memory_budget"'
        )
    return None


def _compile_options_without_compile(inputs: RuleInput) -> str | None:
    options = inputs.config.compile
    changed = [
        f"compile.{name}" for name in ("scope", "mode") if getattr(options, name) != getattr(CompileConfig(), name)
    ]
    if options.enable or not changed:
        return None
    return (
        f"{' and '.join(changed)}: without effect while compile.enable is false: set compile.enable to true, or remove "
        f"{'the keys' if len(changed) > 1 else 'the key'}"
    )


def _autotuned_and_deterministic(inputs: RuleInput) -> str | None:
    if inputs.config.compile.mode == "default" or not inputs.config.job.deterministic:
        return None
    return (
        "compile.mode: autotuning chooses kernels by measuring them in every session, which job.deterministic excludes"
        ': use "default", or set job.deterministic to false'
    )


def _attention_backend_with_cp(inputs: RuleInput) -> str | None:
    if inputs.config.training.attention_backend == "default" or inputs.dims.cp == 1:
        return None
    return (
        "training.attention_backend: context parallelism chooses the attention kernel itself: remove the key, or set "
        f"{_PARALLELISM}context_parallel_degree to 1"
    )


def _muon(inputs: RuleInput) -> str | None:
    return muon_with_other_kernels(inputs.config)


def _offload_with_triton(inputs: RuleInput) -> str | None:
    return triton_with_offload(inputs.config)


def _not_a_divisor(key: str, degree: int, count: int, unit: str) -> str:
    nearest = _nearest(degree, _divisors(count))
    return f"{_PARALLELISM}{key}: {count} {unit} cannot be split evenly over {degree} ranks: {nearest}"


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def _nearest(wanted: int, valid: Iterable[int]) -> str:
    """ "use A or B", the valid numbers next below and next above the wanted one."""
    lower = max((number for number in valid if number < wanted), default=None)
    upper = min((number for number in valid if number > wanted), default=None)
    near = [str(number) for number in (lower, upper) if number is not None]
    return f"use {' or '.join(near)}" if near else "there is no valid choice"


RULES: tuple[Rule, ...] = (
    Rule("a number of ranks that the degrees do not divide", "every degree is a mesh dimension", _ranks_do_not_divide),
    Rule("a shard degree that does not use all ranks", "every rank is in the mesh", _shard_degree),
    Rule("heads that cannot be split evenly over TP", "a rank computes whole heads", _heads),
    Rule("key/value heads that cannot be split evenly over TP", "key/value heads are not replicated", _kv_heads),
    Rule("tied embeddings with pipeline parallelism", "the last stage would need the weight of the first", _tied),
    Rule("an MLP width that TP does not divide", "every rank has the same number of features", _mlp_width),
    Rule("CP with a seq_len that 2 x CP x TP does not divide", "a rank holds two pieces of equal length", _sequence),
    Rule("ring attention with a sliding window or document mask", "torch's ring attention has none", _ring_mask),
    Rule("an unknown pipeline schedule", "torch has no such schedule", _unknown_schedule),
    Rule("layers that do not divide into pipeline stages", "stages have equal numbers of layers", _layers),
    Rule("a local batch that does not divide into micro-batches", "micro-batches have one shape", _microbatch_size),
    Rule("too few or uneven micro-batches", "1F1B needs pp, DualPipeV 2 pp, Interleaved* whole rounds", _microbatches),
    Rule(
        'split-backward schedules with resharding "always"',
        "wrong gradients without an error in torch 2.13",
        _split_backward_resharding,
    ),
    Rule(
        "split-backward schedules with torch.compile",
        "torch raises when the schedule is built",
        _split_backward_compiled,
    ),
    Rule("TP with torch.compile", "wrong gradients without an error in torch 2.13 on gloo", _compiled_tensor_parallel),
    Rule("split-backward schedules with selective checkpointing per operator", _RAISES_LATE, _split_backward_selective),
    Rule('"memory_budget" without torch.compile', "the compiler chooses what to keep", _budget_without_compile),
    Rule("float8 all-gather without the tensorwise recipe", "a gathered weight has one scale", _float8_gather),
    Rule("float8 that converts no layer", "dimensions must be multiples of 16", _float8_no_layer),
    Rule("CPU offload on a single rank", "FSDP2 offloads sharded parameters only", _offload_on_one_rank),
    Rule('CPU offload with optimizer.implementation = "triton"', "the kernel runs on the GPU", _offload_with_triton),
    Rule('optimizer.name = "Muon" with "triton", CUDA graphs or CPU offload', "written for AdamW", _muon),
    Rule("async TP without TP or torch.compile", "the compiler overlaps communication and matmuls", _async_tp),
    Rule("a selective option other than op or a number", "there is no other", _selective_option),
    Rule("CUDA graphs in several processes", "collectives are not captured", _cuda_graphs_on_ranks),
    Rule("CUDA graphs with float8, the profiler or packing", "never tried on a GPU", _cuda_graphs_with),
    Rule('attention_backend = "flex" without a document mask', "it has no other use yet", _flex_without_mask),
    Rule(
        'compile scope "model" with several processes or recomputed blocks',
        "both need the blocks as separate modules",
        _compiled_model,
    ),
    Rule("compile options without torch.compile", "they would have no effect", _compile_options_without_compile),
    Rule("autotuning with job.deterministic", "a resumed run may choose other kernels", _autotuned_and_deterministic),
    Rule("an attention kernel with CP", "context parallelism chooses its own", _attention_backend_with_cp),
)
