"""Build the objects of a run, in this order: data and plan, model and optimizer, checkpoints, logs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.optim import AdamW

from titan_cpt.checkpoint.known.length import length_notes
from titan_cpt.checkpoint.known.optimizer import check_known_optimizers
from titan_cpt.checkpoint.known.release import known_release_notes
from titan_cpt.checkpoint.manager import CheckpointManager, FoundCheckpoint
from titan_cpt.checkpoint.tokenizer_check import check_init_tokenizers
from titan_cpt.common.console import RunConsole, Verbosity
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import CONFIG_FILE, PLAN_FILE, TENSORBOARD_FOLDER, TOKENS_FOLDER
from titan_cpt.common.signals import StoppedError, StopRequest
from titan_cpt.config.run_config import changed_settings, last_setting, write_run_config
from titan_cpt.config.schema import Config, document_keys
from titan_cpt.data.documents import document_settings
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.data.inventory import open_sources, take_inventory, validation_files
from titan_cpt.data.loader import SequenceReader
from titan_cpt.data.mixture import leaves
from titan_cpt.data.tokenizer.of_config import require_extension
from titan_cpt.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from titan_cpt.data.training_sources import TrainingSource, open_training_sources
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.compile import require_compiler
from titan_cpt.distributed.device_mesh import Mesh, build_mesh
from titan_cpt.distributed.float8 import refresh_scales, require_float8
from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.distributed.options import Float8Options, ParallelOptions
from titan_cpt.distributed.process_group import ProcessInfo, raise_on_all_ranks, set_timeouts
from titan_cpt.evaluation.registered_metrics import load_metrics
from titan_cpt.models.build import require_documents
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.ops import use_onednn
from titan_cpt.planning.device_rules import check_device
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.plan_text import print_notes, print_plan
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.cuda.attention import choose_attention
from titan_cpt.training.cuda.graphs import CapturedStep, CudaGraphs
from titan_cpt.training.forward_backward import EagerStep, make_runner
from titan_cpt.training.metrics import MetricsLog, ScalarWriter, peak_flops
from titan_cpt.training.optimization.build import build_optimizer
from titan_cpt.training.optimization.trained_weights import TrainedWeights
from titan_cpt.training.optimization.update import UpdateGuard
from titan_cpt.training.profiler import Profiler
from titan_cpt.training.resume import check_same_machine, find_checkpoint
from titan_cpt.training.saving import log_save_failed, log_saved
from titan_cpt.training.screen.display import Display
from titan_cpt.training.screen.startup import device_notes, rank_lines
from titan_cpt.training.skipped_batches import SkippedBatches
from titan_cpt.training.stage_start import require_saved_averages
from titan_cpt.training.state import TrainerState
from titan_cpt.training.uploads import restore_from_storage, start_uploader
from titan_cpt.training.validation import ValidationWindows, Validator
from titan_cpt.training.weights.copies import WeightCopies

State = TypeVar("State", bound=TrainerState)


@dataclass(frozen=True)
class _Data:
    """The tokenizer, the opened token files by dataset, and the fingerprints of both by dotted key."""

    tokenizer: Tokenizer
    training: Mapping[str, TrainingSource]
    validation: Mapping[str, TokenSource]
    identities: dict[str, str]


def build_unless_stopped(
    kind: type[State], config: Config, process: ProcessInfo, folder: Path, stop: StopRequest, console: RunConsole
) -> tuple[State, FoundCheckpoint | None] | None:
    """Return `build`'s result, or None if a signal came to any rank while documents were packed."""
    try:
        return build(kind, config, process, folder, stop, console)
    except StoppedError as stopped:
        console.print_line(str(stopped))
        return None


def build(
    kind: type[State],
    config: Config,
    process: ProcessInfo,
    folder: Path,
    stop: StopRequest,
    console: RunConsole | None = None,
) -> tuple[State, FoundCheckpoint | None]:
    """Build a run's state, and find the checkpoint to resume from, if there is one.

    Args:
        kind: class of the result: TrainerState, or a subclass without further fields.
        folder: the run's folder, which this process has locked.
        console: prints the plan, notes and progress; by default one without a log file.

    Raises:
        StoppedError: a signal came to any rank while documents were packed; raised on every rank.
        TitanError: config, data, device and checkpoints do not fit together; raised on every rank.
    """
    torch.use_deterministic_algorithms(config.job.deterministic)
    use_onednn(config.training.enable_onednn)
    console = console or RunConsole(shown=process.rank == 0)
    owner = restore_from_storage(config, process, folder, console)
    with raise_on_all_ranks():  # before the first collective: files may be missing on some nodes only
        tokenizer = load_tokenizer(config.tokenizer.path)
        require_extension(config)
        with stop.raising():  # raw files are read, and may be packed
            inventory = take_inventory(config, log=console.print_line)
        plan = make_plan(config, inventory, process.world_size, gpu_bytes=_gpu_bytes(process.device))
        with stop.raising():
            data = _open_data(config, tokenizer, console)
        readers = {stage.name: _reader(plan, stage, data.training) for stage in plan.stages}
        _check_support(config, plan, process.device)
        metrics = load_metrics(config.validation.metrics)
    print_plan(plan, console, config.checkpoint.keep_latest_k)
    _print_notes(console, list(device_notes(config, process.device)))

    mesh = build_mesh(process, plan.parallel_dims)
    set_timeouts(config.comm.init_timeout_seconds)  # torch gives new process groups its default timeouts
    options = parallel_options(config)
    model, pipeline_stages, compute_copy = build_parallel_model(plan.spec, mesh, options)
    optimizer = build_optimizer(config, plan, mesh, model, pipeline_stages, compute_copy)
    set_timeouts(config.comm.init_timeout_seconds)
    checkpoints = CheckpointManager(
        folder,
        keep_latest=config.checkpoint.keep_latest_k,
        keep_every=config.checkpoint.keep_every,
        async_save=config.checkpoint.async_mode == "async",
    )
    with raise_on_all_ranks():
        checkpoint = find_checkpoint(plan, checkpoints, data.identities, console)
        if checkpoint is not None and config.job.deterministic:
            check_same_machine(checkpoint, process)
        notes = list(_weight_notes(config, plan, checkpoints, checkpoint, tokenizer.vocab_size))
    manifest = {} if checkpoint is None else checkpoint.manifest
    attention = choose_attention(config, plan, list(pipeline_stages.values()), mesh, manifest, group=checkpoints.group)
    validator = _build_validator(config, plan, data, mesh)
    notes += [f"{label} is not measured: {why}" for label, why in validator.lacking.items()]
    _print_notes(console, [*notes, *attention.notes])
    log = _start_log(config, plan, mesh, folder, console, resumed=checkpoint is not None)
    run_step = 0 if checkpoint is None else checkpoint.manifest["run_step"]
    display = Display(plan, console, steps_done=run_step)
    if console.verbosity == Verbosity.VERBOSE:
        for line in rank_lines(process):
            display.detail(line)
    checkpoints.before_save = log.fsync
    uploads = start_uploader(config, folder, process, owner)
    checkpoints.on_saved = partial(log_saved, log, display, uploads)
    checkpoints.on_failed = partial(log_save_failed, log, display)
    runner = make_runner(pipeline_stages, compute_copy, mesh, options)
    guard = _build_guard(config, optimizer)
    trained = TrainedWeights(model, optimizer, runner.models)
    eager = EagerStep(
        model=model,
        runner=runner,
        optimizer=optimizer,
        guard=guard,
        mesh=mesh,
        max_norm=config.training.max_norm,
        sources=max(len(stage.source_numbers) for stage in plan.stages),
        float8_gather=config.float8.enable_fsdp_float8_all_gather,
        trained=trained,
    )
    graphs = CudaGraphs(process.device) if config.training.cuda_graphs else None
    state = kind(
        config=config,
        plan=plan,
        process=process,
        mesh=mesh,
        folder=folder,
        model=model,
        runner=runner,
        stepper=eager if graphs is None else CapturedStep(eager, compute_copy, graphs),
        optimizer=optimizer,
        attention=attention,
        trained=trained,
        guard=guard,
        copies=WeightCopies(model, partial(_weights_exchanged, model, compute_copy, config)),
        skipped=SkippedBatches(folder, writing=process.rank == 0),
        readers=readers,
        validator=validator,
        metrics=metrics,
        checkpoints=checkpoints,
        uploads=uploads,
        end_of_document=data.tokenizer.eod_id,
        identities=data.identities,
        log=log,
        display=display,
        profiler=_build_profiler(config, process, folder, display),
        stop=stop,
    )
    return state, checkpoint


def parallel_options(config: Config) -> ParallelOptions:
    """The config's settings for distributed/: precision, activation checkpointing, compile, offload, float8."""
    activation = config.activation_checkpoint
    recipe = config.float8.recipe_name
    return ParallelOptions(
        precision=getattr(torch, config.training.mixed_precision_param),
        recompute=activation.mode,
        selection=activation.selective_ac_option,
        memory_budget=activation.memory_budget,
        compiled=config.compile.enable,
        compile_scope=config.compile.scope,
        compile_mode=config.compile.mode,
        # Training, and two kinds of validation, with other RoPE. k patterns cut the blocks into 2k + 1 ranges that
        # train other weights; each is compiled by itself, and the one with the lowest trained weight twice.
        compiled_versions=8 + sum(4 + 6 * len(stage.trainable or ()) for stage in config.stages),
        ring_attention=config.parallelism.context_parallel_method == "ring"
        and config.parallelism.context_parallel_degree > 1,
        async_tp=config.parallelism.enable_async_tensor_parallel,
        offloaded=config.training.enable_cpu_offload,
        float8=None
        if recipe is None
        else Float8Options(recipe, config.float8.enable_fsdp_float8_all_gather, config.float8.filter_fqns),
    )


def _gpu_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _open_data(config: Config, tokenizer: Tokenizer, console: RunConsole) -> _Data:
    training = open_training_sources(
        config, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, log=console.print_line
    )
    validation = open_sources(validation_files(config), tokenizer.vocab_size)
    identities = {
        "tokenizer": tokenizer.fingerprint,
        **{f"datasets.{name}.train": stream.fingerprint() for name, stream in training.items()},
        **{f"datasets.{name}.validation": stream.fingerprint() for name, stream in validation.items()},
    }
    return _Data(tokenizer, training, validation, identities)


def _reader(plan: Plan, stage: StagePlan, sources: Mapping[str, TrainingSource]) -> SequenceReader:
    """Reads the sequences of a stage, at its length."""
    own = {leaf.source: sources[leaf.source] for leaf in leaves(stage.tree)}
    return SequenceReader(own, seq_len=stage.seq_len, seed=plan.seed)


def _check_support(config: Config, plan: Plan, device: torch.device) -> None:
    """Refuse settings that this device or these packages do not support."""
    check_device(config, device.type)
    if config.float8.recipe_name is not None:
        require_float8(device)
    if config.compile.enable:
        require_compiler(device)
    if config.optimizer.implementation == "triton":
        require_compiler(device, 'optimizer.implementation = "triton"')
    for key in document_keys(config, "document_mask", "document_positions"):
        require_documents(plan.spec, key)


def _weight_notes(
    config: Config, plan: Plan, checkpoints: CheckpointManager, checkpoint: FoundCheckpoint | None, token_ids: int
) -> Iterator[str]:
    """Notes on tokenizer and optimizer of the initial weights of stages that have not begun, and on misplaced ones."""
    next_stage = 0 if checkpoint is None else checkpoint.manifest["stage_index"] + 1
    require_saved_averages(checkpoints.run, plan.stages[next_stage:])
    yield from check_init_tokenizers(config, [stage.name for stage in plan.stages[next_stage:]])
    yield from check_known_optimizers(plan.stages[next_stage:])
    if checkpoint is None:
        yield from length_notes(plan.stages)
        yield from known_release_notes(config, plan.stages, token_ids)
    if checkpoints.misplaced:
        where = ", ".join(sorted({str(path) for path in checkpoints.misplaced}))
        yield f"{where}: was copied, renamed or moved here, so training neither uses nor removes it"


def _print_notes(console: RunConsole, notes: Sequence[str]) -> None:
    with console.level(Verbosity.QUIET):
        print_notes(notes, console)


def _build_guard(config: Config, optimizer: AdamW) -> UpdateGuard:
    training = config.training
    return UpdateGuard(
        optimizer,
        spike_window=training.loss_spike_window,
        spike_z_score=math.inf if training.on_loss_spike == "log" else training.loss_spike_z_score,
    )


def _weights_exchanged(model: LanguageModel, compute_copy: ComputeCopy | None, config: Config) -> None:
    """Update what is computed from the weights after an exchange of the weights: CUDA graphs replay no Python."""
    if config.float8.enable_fsdp_float8_all_gather:
        refresh_scales(model)
    if compute_copy is not None:
        compute_copy.refresh()


def _build_validator(config: Config, plan: Plan, data: _Data, mesh: Mesh) -> Validator:
    end, training, rows = data.tokenizer.eod_id, config.training, config.validation.local_batch_size
    usual = document_settings(end, mask=training.document_mask, positions=training.document_positions)
    windows = ValidationWindows(plan.seq_len, rows or plan.local_batch_size, usual)
    by_stage = {}
    for stage in plan.stages:
        # As many tokens in a pass as with the run's windows, or as in training.
        own_rows = stage.local_batch_size if rows is None else max(1, rows * plan.seq_len // stage.seq_len)
        documents = document_settings(end, mask=stage.document_mask, positions=stage.document_positions)
        by_stage[stage.name] = ValidationWindows(stage.seq_len, own_rows, documents)
    return Validator(
        data.validation,
        data.tokenizer.token_byte_lengths(),
        sequences=config.validation.sequences,
        windows=windows,
        by_stage=by_stage,
        mesh=mesh,
    )


def _build_profiler(config: Config, process: ProcessInfo, folder: Path, display: Display) -> Profiler:
    return Profiler(
        folder,
        every_steps=config.profiling.profile_freq if config.profiling.enable_profiling else None,
        rank=process.rank,
        on_failed=display.warn,
    )


def _start_log(
    config: Config, plan: Plan, mesh: Mesh, folder: Path, console: RunConsole, *, resumed: bool
) -> MetricsLog:
    """Open the metrics log, log the settings that changed since the last session, write config.toml and plan.json."""
    log = _open_log(config, plan, mesh, folder)
    _print_notes(console, log.problems)
    if mesh.process.rank == 0:
        if resumed:
            _log_changed_settings(log, console, changed_settings(folder / CONFIG_FILE, config))
        if write_run_config(folder / CONFIG_FILE, config) or log.is_new:
            log.show_config((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        write_text_atomically(folder / PLAN_FILE, json.dumps(plan_as_json(plan), indent=1))
    return log


def _open_log(config: Config, plan: Plan, mesh: Mesh, folder: Path) -> MetricsLog:
    over_steps: Callable[[int | None], ScalarWriter] | None = None
    over_tokens: Callable[[int | None], ScalarWriter] | None = None
    if mesh.process.rank == 0 and config.metrics.enable_tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # its import takes half a second

        no_comment = ""  # the second parameter; MetricsLog passes the third, purge_step
        curves = folder / TENSORBOARD_FOLDER
        over_steps = partial(SummaryWriter, str(curves), no_comment)
        over_tokens = partial(SummaryWriter, str(curves / TOKENS_FOLDER), no_comment)
    log = MetricsLog(
        folder,
        writing=mesh.process.rank == 0,
        tensorboard=over_steps,
        over_tokens=over_tokens,
        tokens_at=plan.tokens_at,
        peak_flops=peak_flops(mesh.process.device) * mesh.process.world_size,
        stages=[stage.name for stage in plan.stages],
        sum_over_ranks=mesh.sum_loss,
    )
    if log.last_start and "validation" not in log.last_start:  # by an older version: its config has the windows
        log.last_start["validation_sequences"] = last_setting(folder / CONFIG_FILE, "validation", "sequences")
    return log


def _log_changed_settings(log: MetricsLog, console: RunConsole, changed: Sequence[str]) -> None:
    """Print and log settings that changed since the last session, before config.toml is overwritten."""
    if changed:
        log.event("settings_changed", settings=list(changed))
        _print_notes(console, ["\n  ".join(["settings that have changed since the run was last started:", *changed])])
