"""The Python API: what `import titan_cpt` offers. docs/library.md is its guide.

A mistake raises a subclass of `titan_cpt.TitanError` with the message that the command line prints. Nothing here exits
the process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_cpt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from titan_cpt.config.schema import Config
    from titan_cpt.distributed.process_group import ProcessInfo
    from titan_cpt.evaluation.inference import LoadedModel
    from titan_cpt.models.common.language_model import LanguageModel
    from titan_cpt.planning.plan import Plan
    from titan_cpt.train import Steps
    from titan_cpt.train import Trainer as Loop

_NOT_OPEN = "a Trainer is used in a `with` block: with titan_cpt.Trainer(config) as trainer: ..."


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read and validate a config.

    Args:
        source: a TOML file, or its tables as dictionaries: {"job": {"name": ...}, "stages": [{...}]}.
        overrides: dotted key -> value, such as {"stages.german.lr.max": 3e-4}.

    Raises:
        ConfigError: lists every problem.
    """
    from titan_cpt.config.load import config_from

    return config_from(source if isinstance(source, Mapping) else Path(source), overrides or {})


def make_plan(config: Config, *, world_size: int | None = None, gpu_bytes: int | None = None) -> Plan:
    """Compute the training plan: stages, steps, tokens, LR, memory. Reads the headers of the data files.

    Args:
        world_size: number of ranks; None for the fewest that the parallelism degrees allow.
        gpu_bytes: memory of each GPU; None for a CPU.

    Raises:
        ConfigError: the model cannot be built.
        DataError: a file is damaged or does not fit the config.
        PlanError: lists everything that contradicts the data or the number of ranks.
    """
    from dataclasses import replace

    from titan_cpt.checkpoint.tokenizer_check import check_planned_tokenizers
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan as plan_of

    inventory = take_inventory(config)
    inventory = replace(inventory, notes=(*inventory.notes, *check_planned_tokenizers(config)))
    return plan_of(config, inventory, world_size or min_world_size(config), gpu_bytes=gpu_bytes)


@dataclass(frozen=True)
class Step:
    """One training step, as `Trainer.steps` yields it.

    Attributes:
        stage: name of the stage.
        step: steps of the stage that are done.
        run_step: steps of the run that are done.
        tokens: tokens of the run that are done.
        lr: learning rate of the step.
        loss_tensor: mean loss in nats per token, on the device.
        grad_norm_tensor: gradient norm before clipping, on the device.
    """

    stage: str
    step: int
    run_step: int
    tokens: int
    lr: float
    loss_tensor: Tensor
    grad_norm_tensor: Tensor

    @property
    def loss(self) -> float:
        """Mean loss in nats per token. Waits for the device; NaN for a skipped batch."""
        return float(self.loss_tensor)

    @property
    def grad_norm(self) -> float:
        """Gradient norm before clipping. Waits for the device; NaN for a skipped batch."""
        return float(self.grad_norm_tensor)


class Trainer:
    """Trains a run as `titan-cpt train` does: it begins, or resumes from the newest checkpoint in the run's folder.

        with titan_cpt.Trainer(config) as trainer:
            finished = trainer.run()

    Opening it prepares missing data, locks the run's folder and builds the model. Leaving the block without an
    exception saves everything; after an exception the run resumes from its last checkpoint.

    Processes: under torchrun every process does this. A process group that the caller has initialized is used and left
    as it is, except for its timeouts (config.comm); otherwise one is made from torchrun's variables and destroyed.

    Signals: in the main thread SIGTERM, SIGUSR1 and the first Ctrl-C are requests to stop within the block, as for the
    command line; a second Ctrl-C raises KeyboardInterrupt.

    Args:
        quiet: print only errors, warnings and results of stages.

    Raises:
        TitanError: config, data, device or checkpoints do not permit the run; when it is opened.
    """

    def __init__(self, config: Config, *, quiet: bool = False) -> None:
        if config.sweep:
            raise ConfigError("sweep: this config describes several runs; a Trainer trains one: remove [sweep]")
        self.config = config
        self.quiet = quiet
        self.finished = False
        """Whether every stage is trained."""
        self._stack: ExitStack | None = None
        self._loop: Loop | None = None
        self._steps: Steps[int] | None = None
        self._under_way = False

    def __enter__(self) -> Trainer:
        """Open the run."""
        from titan_cpt.common.console import Verbosity
        from titan_cpt.common.process_settings import configure_process
        from titan_cpt.common.signals import StopRequest
        from titan_cpt.train import opened_trainer

        if self._stack is not None:
            raise ConfigError("this Trainer was opened before: make a new one, it resumes where this one ended")
        verbosity = Verbosity.of(quiet=self.quiet, verbose=False)
        with ExitStack() as stack:
            stack.enter_context(_restored_settings())
            configure_process(deterministic=self.config.job.deterministic)
            process = stack.enter_context(_process(self.config.comm.init_timeout_seconds))
            loop, checkpoint = stack.enter_context(
                opened_trainer(process, self.config, StopRequest(raises=True), verbosity=verbosity)
            )
            if loop is not None:
                self._loop, self._steps = loop, loop.steps(checkpoint)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        """Save everything, unless an exception leaves the block, and close the run."""
        try:
            if kind is None and self._under_way:
                self.stop()
                self.run()
        finally:
            self._steps = None
            if self._stack is not None:
                self._stack.__exit__(kind, error, traceback)

    def run(self) -> bool:
        """Train to the end, or until a stop is requested; returns whether every stage is trained.

        Raises:
            NumericsError: a loss or gradient is not finite; the newest checkpoint stays valid.
            TitanError: data or a checkpoint became unreadable.
        """
        for _ in self.steps():
            pass
        return self.finished

    def steps(self) -> Iterator[Step]:
        """Train step by step: yields each step after its update, and before the validation and saving due after it.

        Every rank takes the same number of steps. The iterator can be left and taken up again within the `with` block.

        Raises:
            TitanError: as `run`.
        """
        from titan_cpt.common.exit_status import SUCCESS

        if self._stack is None:
            raise ConfigError(_NOT_OPEN)
        if self._steps is None:
            return  # a signal stopped it while data was prepared, or it is closed
        plan = self.plan
        while True:
            self._under_way = False  # unless the next step is taken: an error ends the run
            try:
                stage, step, result = next(self._steps)
            except StopIteration as end:
                if end.value is not None:
                    self.finished = end.value == SUCCESS
                return
            self._under_way = True
            run_step = plan.steps_before(stage) + step
            tokens = plan.tokens_at(run_step)
            yield Step(stage.name, step, run_step, tokens, stage.lr_at(step - 1), result.loss, result.grad_norm)

    def stop(self) -> None:
        """Request a stop: the step that was taken last is saved, and the iterator ends. One rank is enough."""
        self._open().stop.name = "Trainer.stop()"

    @property
    def plan(self) -> Plan:
        """The training plan."""
        return self._open().plan

    @property
    def folder(self) -> Path:
        """The run's folder, with metrics.jsonl and checkpoints."""
        return Path(self.config.job.output_dir) / self.config.job.name

    @property
    def model(self) -> LanguageModel:
        """This rank's part of the model, with float32 weights. Its weights are those of the last step."""
        return self._open().model

    def summary(self) -> dict[str, Any]:
        """Losses, forgetting and adaptation of all stages so far, as in summary.json (docs/metrics.md)."""
        from titan_cpt.reporting.summary import summarize

        return summarize(self.folder)

    def _open(self) -> Loop:
        if self._loop is None:
            raise ConfigError(_NOT_OPEN)
        return self._loop


def evaluate(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run benchmarks on checkpoints or runs, as `titan-cpt eval --json` does; needs titan_cpt[eval].

    Args:
        checkpoints: paths; `PATH@average` names the average in a checkpoint, or those at a run's stage ends.

    Returns:
        Scores by checkpoint, their changes, and in `lacking` the tasks without a score.

    Raises:
        ConfigError: a task or suite is unknown, or lm-evaluation-harness is not installed.
        CheckpointError: a folder is neither a checkpoint nor a run.
    """
    from titan_cpt.config.suites import chosen_tasks, require_folder

    folder = None if tasks_dir is None else Path(tasks_dir)
    chosen = chosen_tasks(suite, tasks)
    require_folder(chosen, folder)
    from titan_cpt.evaluation.evaluate import EvalRequest, evaluate_all
    from titan_cpt.evaluation.score_table import scores_as_json

    if isinstance(checkpoints, str | os.PathLike):
        checkpoints = [checkpoints]
    request = EvalRequest(chosen, suite=None if tasks else suite, folder=folder, limit=limit)
    with _process(None) as process:
        columns, lacking = evaluate_all([Path(each) for each in checkpoints], process, request, log=lambda line: None)
    return {**scores_as_json(columns), "lacking": lacking}


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    tokenizer: str | None = None,
) -> Path:
    """Convert a checkpoint into a Hugging Face folder, as `titan-cpt export` does; returns the folder.

    Args:
        checkpoint: a checkpoint, or `PATH@average` for the average in it.
        dtype: "bfloat16" or "float32", which is exact.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; None for the run's.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks the average, or the output exists.
    """
    from titan_cpt.checkpoint.hf_export import DTYPES
    from titan_cpt.checkpoint.hf_export import export as write

    if dtype not in DTYPES:
        raise ConfigError(f"dtype: must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    write(Path(checkpoint), Path(output), dtype=dtype, tokenizer=tokenizer, log=lambda line: None)
    return Path(output)


def merge(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    base: str | os.PathLike[str] | None = None,
    density: float | None = None,
    scale: float | None = None,
) -> Path:
    """Merge checkpoints and Hugging Face models into a checkpoint, as `titan-cpt merge` does; returns its folder.

    Args:
        inputs: checkpoints, folders of Hugging Face models, or hub names.
        method: "mean", "linear", "slerp", "ties" or "task-arithmetic"; None for "linear" if there are weights, else
            "mean".
        weights: one for each input.
        base: the model that all inputs were trained from, for "ties" and "task-arithmetic".
        density: share of each task vector that "ties" keeps; None for 0.2.
        scale: factor of the merged task vector; None for 1.

    Raises:
        ConfigError: the method and its numbers do not fit; lists every problem.
        CheckpointError: an input is damaged, the inputs are of different models or tokenizers, or the output exists.
    """
    from titan_cpt.checkpoint.merge.settings import merge_settings

    settings = merge_settings(
        len(inputs), method=method, weights=weights, has_base=base is not None, density=density, scale=scale
    )
    from titan_cpt.checkpoint.merge.merge import merge as write

    base_name = None if base is None else os.fspath(base)
    names = [os.fspath(each) for each in inputs]
    write(names, Path(output), settings, base=base_name, log=lambda line: None)
    return Path(output)


def open_checkpoint(
    folder: str | os.PathLike[str], *, precision: str | None = None, tokenizer: str | None = None
) -> LoadedModel:
    """Load a checkpoint's model, in evaluation mode, and its tokenizer; `.model` and `.tokenizer` of the result.

    Args:
        folder: a checkpoint, or `PATH@average` for the average in it.
        precision: "bfloat16" or "float32"; None for the compute dtype of the run.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; None for the run's.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, or lacks the average.
        DataError: its tokenizer is unknown.
    """
    from titan_cpt.distributed.process_group import single_process
    from titan_cpt.evaluation.inference import PRECISIONS
    from titan_cpt.evaluation.inference import open_checkpoint as load

    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    return load(Path(folder), single_process(), precision=precision, tokenizer=tokenizer)


@contextmanager
def _process(timeout_s: int | None) -> Iterator[ProcessInfo]:
    """The caller's process group if there is one; otherwise one from torchrun's variables, destroyed at the end."""
    import torch.distributed as dist

    from titan_cpt.distributed.process_group import (
        destroy_process_group,
        existing_process_group,
        init_process_group,
    )

    if dist.is_initialized():
        yield existing_process_group()
        return
    try:
        yield init_process_group(timeout_s)
    finally:
        destroy_process_group()


@contextmanager
def _restored_settings() -> Iterator[None]:
    """Restore what training sets for the whole process: garbage collection, deterministic algorithms."""
    import torch

    collects, deterministic = gc.isenabled(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if collects:
            gc.enable()
