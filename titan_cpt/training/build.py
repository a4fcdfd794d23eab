"""The cast of a run: plan, data, model, optimizer, checkpoints and records, built once and in this order."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from titan_cpt.checkpoint.manager import CheckpointManager, FoundCheckpoint
from titan_cpt.checkpoint.manifest import digest_of_files
from titan_cpt.checkpoint.manifest import read as read_manifest
from titan_cpt.checkpoint.tokenizer_check import check_init_tokenizers
from titan_cpt.common.console import make_console
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.recipe import differences, fingerprint
from titan_cpt.common.run_folder import CONFIG_FILE, PLAN_FILE, TENSORBOARD_FOLDER
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.run_config import changed_settings, last_setting, write_run_config
from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import open_sources, take_inventory, training_files, validation_files
from titan_cpt.data.loader import SequenceReader
from titan_cpt.data.mixture import leaves
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.float8 import require_float8
from titan_cpt.distributed.options import Float8Options, ParallelOptions
from titan_cpt.distributed.process_group import ProcessInfo, agreed, set_timeouts
from titan_cpt.errors import CheckpointError
from titan_cpt.models.common.ops import CPU_HAS_BFLOAT16, multiplied_in_float32
from titan_cpt.planning.parallel_rules import check_device
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.plan_text import print_plan
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.forward_backward import make_runner, require_compiler
from titan_cpt.training.metrics import MetricsLog, ScalarWriter, peak_flops
from titan_cpt.training.optimizer import UpdateGuard, build_adamw
from titan_cpt.training.profiler import Profiler
from titan_cpt.training.progress import Display
from titan_cpt.training.skipped_batches import Skips
from titan_cpt.training.state import Parts
from titan_cpt.training.validation import Validator

_FILTER = "float8.filter_fqns"


def build(config: Config, ranks: ProcessInfo, folder: Path, stop: StopRequest) -> tuple[Parts, FoundCheckpoint | None]:
    """Plan, data, model, optimizer, in this order; and the checkpoint to go on from, if there is one."""
    torch.use_deterministic_algorithms(config.job.deterministic)
    console = make_console()
    with agreed():  # before anything collective: files may be missing on some nodes only
        tokenizer = load_tokenizer(config.tokenizer.path)
        plan = make_plan(config, take_inventory(config), ranks.world_size)
        streams = open_sources(training_files(config), tokenizer.vocab_size)
        held_out = open_sources(validation_files(config), tokenizer.vocab_size)
        identities = {
            "tokenizer": tokenizer.fingerprint,
            **{f"datasets.{name}.train": stream.fingerprint() for name, stream in streams.items()},
            **{f"datasets.{name}.validation": stream.fingerprint() for name, stream in held_out.items()},
        }
        check_device(config, ranks.device.type)
        if config.float8.recipe_name is not None:
            require_float8(ranks.device)
        if config.compile.enable:
            require_compiler(ranks.device)
    precision = getattr(torch, config.training.mixed_precision_param)
    if ranks.rank == 0:
        print_plan(plan, console, config.checkpoint.keep_latest_k)
        if config.float8.recipe_name is not None and ranks.device.type == "cpu":
            console.print("[yellow]note[/] float8 is emulated on a CPU: its numbers, without its speed")
        if multiplied_in_float32(precision, ranks.device):
            console.print(
                "[yellow]note[/] this CPU has no products in bfloat16: they are made in float32 and rounded; "
                'training.mixed_precision_param = "float32" is faster here and more exact'
            )

    mesh = build_mesh(ranks, plan.parallel_dims)
    set_timeouts(config.comm.init_timeout_seconds)  # its process groups begin with torch's own
    options = parallel_options(config)
    model, pipeline_stages, compute_copy = build_parallel_model(plan.spec, mesh, options)
    engine = make_runner(pipeline_stages, compute_copy, mesh, options)
    numbers = plan.stages[0].optimizer
    optimizer = build_adamw(model, lr=0.0, betas=numbers.betas, eps=numbers.eps, weight_decay=numbers.weight_decay)

    checkpoints = CheckpointManager(
        folder,
        keep_latest=config.checkpoint.keep_latest_k,
        async_save=config.checkpoint.async_mode == "async",
        keep_every=config.checkpoint.keep_every,
        before_save=lambda: log.secure(),
        on_saved=lambda path: note_saved(log, display, path),
        on_failed=lambda error: tell_failure(log, display, error),
    )
    with agreed():
        found = find_checkpoint(plan, checkpoints, identities, console if ranks.rank == 0 else Console(quiet=True))
        if found is not None and config.job.deterministic:
            check_same_machine(found, ranks)
        begun = 0 if found is None else found.manifest["stage_index"] + 1
        notes = list(check_init_tokenizers(config, [stage.name for stage in plan.stages[begun:]]))
    if checkpoints.misplaced and ranks.rank == 0:
        where = ", ".join(sorted({str(path) for path in checkpoints.misplaced}))
        notes.append(f"{where}: was copied, renamed or moved here, so training neither uses nor removes it")
    for note in notes if ranks.rank == 0 else ():
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False, soft_wrap=True)
    log = _open_log(config, plan, ranks, folder)
    for problem in log.problems:
        console.print(f"[yellow]note[/] {escape(problem)}", highlight=False)
    if log.last_start and "validation" not in log.last_start:  # an older version's: only its config tells the windows
        log.last_start["validation_sequences"] = last_setting(folder / CONFIG_FILE, "validation", "sequences")
    if found is not None and ranks.rank == 0:
        note_changed_settings(log, console, changed_settings(folder / CONFIG_FILE, config))
    _write_record(config, plan, ranks, folder)
    validator = Validator(
        held_out,
        tokenizer.token_byte_lengths(),
        sequences=config.validation.sequences,
        seq_len=plan.seq_len,
        local_batch=config.validation.local_batch_size or plan.local_batch_size,
        mesh=mesh,
    )
    done = 0 if found is None else found.manifest["run_step"]
    display = Display(plan, console, steps_done=done, shown=ranks.rank == 0)
    parts = Parts(
        config=config,
        plan=plan,
        ranks=ranks,
        mesh=mesh,
        folder=folder,
        model=model,
        engine=engine,
        optimizer=optimizer,
        guard=UpdateGuard(
            optimizer,
            spike_window=config.training.loss_spike_window,
            spike_z_score=math.inf if config.training.on_loss_spike == "log" else config.training.loss_spike_z_score,
        ),
        skips=Skips(folder, writing=ranks.rank == 0),
        reader=SequenceReader(streams, seq_len=plan.seq_len, seed=plan.seed),
        validator=validator,
        checkpoints=checkpoints,
        identities=identities,
        log=log,
        display=display,
        profiler=Profiler(
            folder,
            every_steps=config.profiling.profile_freq if config.profiling.enable_profiling else None,
            rank=ranks.rank,
            on_failed=display.say,
        ),
        stop=stop,
    )
    return parts, found


def parallel_options(config: Config) -> ParallelOptions:
    """What the config asks to be done to every block."""
    kept, recipe = config.activation_checkpoint, config.float8.recipe_name
    return ParallelOptions(
        precision=getattr(torch, config.training.mixed_precision_param),
        recompute=kept.mode,
        selection=kept.selective_ac_option,
        memory_budget=kept.memory_budget,
        compiled=config.compile.enable,
        ring_attention=config.parallelism.context_parallel_method == "ring"
        and config.parallelism.context_parallel_degree > 1,
        async_tp=config.parallelism.enable_async_tensor_parallel,
        offloaded=config.training.enable_cpu_offload,
        float8=None
        if recipe is None
        else Float8Options(recipe, config.float8.enable_fsdp_float8_all_gather, config.float8.filter_fqns),
    )


def find_checkpoint(
    plan: Plan, checkpoints: CheckpointManager, identities: dict[str, str], console: Console
) -> FoundCheckpoint | None:
    """The newest good checkpoint, if its past is the config's past.

    Raises:
        CheckpointError: the config or the data of what is already trained changed, each difference is named; or there
            are checkpoints and every one of them is damaged.
    """
    damaged: list[str] = []
    found = checkpoints.newest_valid(damaged.append)
    for message in damaged:
        console.print(f"skipping damaged checkpoint: {message}", highlight=False, markup=False)
    if found is None and damaged:
        raise CheckpointError(
            f"{checkpoints.run}: none of its checkpoints is whole. The first: {damaged[0]}. "
            "Restore one; to train again from the beginning, remove that folder or choose another job.name"
        )
    if found is None:
        return None
    index = min(found.manifest["stage_index"], len(plan.stages) - 1)
    planned, recorded = plan.recipe_until(index), found.manifest["recipe"]
    if _FILTER not in recorded and "float8.recipe_name" in recorded:  # it had none, or an older version wrote it
        before = last_setting(checkpoints.run / CONFIG_FILE, *_FILTER.split("."))
        recorded = {**recorded, **({_FILTER: sorted({*before})} if before else {})}
    begun = {f"datasets.{leaf.source}.train" for stage in plan.stages[: index + 1] for leaf in leaves(stage.tree)}
    # Validation data changes no weight: forgetting.py deals with another one.
    data = {key: value for key, value in found.manifest["data"].items() if key in begun or key == "tokenizer"}
    changed = differences(recorded, planned) + differences(data, {key: identities.get(key) for key in data})
    if changed:
        raise CheckpointError("\n  ".join([_what_differs(found, planned), *changed, _remedy(found, plan, changed)]))
    return found


def _what_differs(found: FoundCheckpoint, planned: dict[str, Any]) -> str:
    old, new = found.manifest["fingerprint"], fingerprint(planned)
    if old == new:
        return f"{found.folder}: was trained with other data than the config names now:"
    return f"{found.folder}: written under plan {old}, this config makes plan {new}:"


def _remedy(found: FoundCheckpoint, plan: Plan, changed: Sequence[str]) -> str:
    name = str(found.manifest["stage"])
    remedy = "Restore these, or begin a new run under another name (--job.name NAME)."
    if plan.stages[-1].name != name and found.manifest["stage_index"] < len(plan.stages) - 1:
        remedy += f" Stages after {name!r} may be changed freely."
    if all(line.startswith(f"stages.{name}.") for line in changed):
        remedy += f" To train {name!r} again, remove {found.folder.parent}."
    if any(line.startswith("model.vocab_size:") for line in changed):
        remedy += (
            " The vocabulary is padded to 128 x parallelism.tensor_parallel_degree: model.vocab_size = "
            f"{found.manifest['recipe']['model.vocab_size']} keeps it under any degree that divides it."
        )
    return remedy


def manifest_record(parts: Parts, stage: StagePlan, done: int, kind: str) -> dict[str, Any]:
    """What a checkpoint of this moment tells of itself, beside its files: where it stands, what it went through."""
    plan, index = parts.plan, parts.plan.stages.index(stage)
    recipe = plan.recipe_until(index)
    return {
        "stage_index": index,
        "kind": kind,
        "run_step": plan.steps_before(stage) + done,
        "recipe": recipe,
        "fingerprint": fingerprint(recipe),
        "data": parts.identities,
        "skipped": parts.skips.past([earlier.name for earlier in plan.stages[: index + 1]], done),
        "recent_losses": parts.guard.recent_losses(),
        "python": platform.python_version(),
        **_machine(parts.ranks),
    }


def _machine(ranks: ProcessInfo) -> dict[str, Any]:
    """What may change the last bits of a sum; of a CPU the instructions that torch uses."""
    if ranks.device.type == "cuda":
        processor = torch.cuda.get_device_name(ranks.device)
    else:
        processor = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if CPU_HAS_BFLOAT16 else "")
    return {
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "device": ranks.device.type,
        "processor": processor,
    }


def check_same_machine(found: FoundCheckpoint, ranks: ProcessInfo) -> None:
    """Refuse to go on where `job.deterministic` promises bits that another layout, torch or machine would not give.

    Raises:
        CheckpointError: names each difference.
    """
    here = {**_machine(ranks), "torch": torch.__version__}
    changed = differences({key: found.manifest.get(key) for key in here}, here)
    if changed:
        remedy = (
            "Restore these, or go on with --job.deterministic false: the batches stay the same, sums are rounded anew."
        )
        raise CheckpointError("\n  ".join([f"{found.folder}: job.deterministic cannot be kept:", *changed, remedy]))


def note_changed_settings(log: MetricsLog, console: Console, changed: Sequence[str]) -> None:
    """Settings that may change under a run are printed and recorded: config.toml holds the new ones alone."""
    if changed:
        log.event("settings_changed", settings=list(changed))
        text = "\n  ".join(["settings that have changed since the run was last started:", *changed])
        console.print(f"[yellow]note[/] {escape(text)}", highlight=False, soft_wrap=True)


def note_saved(log: MetricsLog, display: Display, folder: Path) -> None:
    """A checkpoint now exists: printed, and recorded with the digest of its files, by which scores know it again."""
    saved = read_manifest(folder)
    log.event(
        "checkpoint",
        folder=str(folder),
        stage=saved["stage"],
        step=saved["steps_done"],
        files=digest_of_files(saved),
    )
    display.say(f"  checkpoint: {folder}")


def tell_failure(log: MetricsLog, display: Display, error: CheckpointError) -> None:
    """A checkpoint that could not be written: told, and noted in the record."""
    display.say(f"  {error}")
    log.event("save_failed", why=str(error))


def _open_log(config: Config, plan: Plan, ranks: ProcessInfo, folder: Path) -> MetricsLog:
    writer: Callable[[int | None], ScalarWriter] | None = None
    if ranks.rank == 0 and config.metrics.enable_tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # half a second that runs without it need not pay

        events = str(folder / TENSORBOARD_FOLDER)
        writer = partial(SummaryWriter, events, "")  # the second is a comment; purge_step follows
    return MetricsLog(
        folder,
        writing=ranks.rank == 0,
        tensorboard=writer,
        flops_per_token=plan.spec.flops_per_token(plan.seq_len),
        peak_flops=peak_flops(ranks.device) * ranks.world_size,
        stages=[stage.name for stage in plan.stages],
    )


def _write_record(config: Config, plan: Plan, ranks: ProcessInfo, folder: Path) -> None:
    if ranks.rank == 0:
        write_run_config(folder / CONFIG_FILE, config)
        write_text_atomically(folder / PLAN_FILE, json.dumps(plan_as_json(plan), indent=1))
