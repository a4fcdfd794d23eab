"""The training loop, top to bottom: run -> Trainer.steps -> stage_steps -> train_step.

Learning rate, data order and mixture are pure functions of the step, computed by the plan. The only state is the
weights, the optimizer's moments and the number of steps done.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch

from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.common.console import Verbosity
from titan_cpt.common.exit_status import STOPPED_EARLY, SUCCESS
from titan_cpt.common.process_settings import configure_process
from titan_cpt.common.run_folder import INTERVAL, PRE_ANNEAL, TENSORBOARD_FOLDER, locked
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.run_config import require_own_run
from titan_cpt.config.schema import Config
from titan_cpt.data.loader import StageLoader
from titan_cpt.data.prepare.prepare_missing import prepare_missing_data_unless_stopped
from titan_cpt.distributed.process_group import (
    ProcessInfo,
    any_rank_stops,
    destroy_process_group,
    init_process_group,
    rank_0_first,
    set_timeouts,
)
from titan_cpt.planning.plan import StagePlan
from titan_cpt.reporting.summary import print_summary, summarize, write_summary
from titan_cpt.tracking.follower_process import require_clients, trackers_following
from titan_cpt.training.bad_steps import first_held_back, handle_bad_step
from titan_cpt.training.benchmarks import require_benchmarks, run_benchmarks
from titan_cpt.training.build import build_unless_stopped
from titan_cpt.training.changed_validation import renew_baselines
from titan_cpt.training.due import actions_due, benchmarks_due
from titan_cpt.training.forgetting import validate
from titan_cpt.training.forward_backward import StepResult
from titan_cpt.training.optimization.update import set_lr
from titan_cpt.training.optimization.warm_up import warm_up
from titan_cpt.training.resume import first_unfinished_stage, log_start
from titan_cpt.training.saving import save_checkpoint
from titan_cpt.training.screen.startup import print_start, run_console
from titan_cpt.training.stage_start import begin_stage, resume_stage
from titan_cpt.training.state import TrainerState
from titan_cpt.training.step_log import record_step
from titan_cpt.training.uploads import close_uploads, finish_uploads, poll_saves

Returned = TypeVar("Returned")
Steps: TypeAlias = Generator[tuple[StagePlan, int, StepResult], None, Returned]


def run(config: Config, *, verbosity: Verbosity = Verbosity.NORMAL) -> int:
    """Train every stage that is not trained yet.

    Returns:
        The exit status: 0 when all stages are trained, 75 when a signal stopped the run and everything is saved.

    Raises:
        TitanError: the config, the data or the machine does not permit the run, or a loss or gradient is not finite.
            The newest checkpoint stays valid.
    """
    configure_process(deterministic=config.job.deterministic)
    process = init_process_group(config.comm.init_timeout_seconds)
    try:
        return run_with_process_group(process, config, verbosity=verbosity)
    finally:
        destroy_process_group()


def run_with_process_group(process: ProcessInfo, config: Config, *, verbosity: Verbosity = Verbosity.NORMAL) -> int:
    """`run` within an initialized process group, which the caller destroys."""
    with opened_trainer(process, config, StopRequest(), verbosity=verbosity) as (trainer, checkpoint):
        return STOPPED_EARLY if trainer is None else trainer.train(checkpoint)


@contextmanager
def opened_trainer(
    process: ProcessInfo, config: Config, stop_request: StopRequest, *, verbosity: Verbosity
) -> Iterator[tuple[Trainer, FoundCheckpoint | None] | tuple[None, None]]:
    """A run's trainer and the checkpoint to resume from, with its folder locked; two None if a signal came before."""
    folder = Path(config.job.output_dir) / config.job.name
    with ExitStack() as stack:
        with rank_0_first():
            if process.rank == 0:
                require_own_run(folder, config)
                require_clients(config)
            stack.enter_context(locked(folder, rank=process.rank))
            stop = stack.enter_context(stop_request)
            if process.rank == 0:
                console = stack.enter_context(run_console(folder, process, verbosity))
                print_start(console, config, process, folder)
                prepare_missing_data_unless_stopped(config, stop, log=console.print_line, quiet=not verbosity)
        if process.rank != 0:  # only now: a run that rank 0 refuses writes no log
            console = stack.enter_context(run_console(folder, process, verbosity))
        stopped = any_rank_stops(stop)
        built = None if stopped else build_unless_stopped(Trainer, config, process, folder, stop, console)
        if built is None:
            yield None, None
            return
        trainer, checkpoint = built
        say, warn = trainer.display.say, trainer.display.warn
        stack.enter_context(trackers_following(config, folder, rank=process.rank, stop=stop, say=say, warn=warn))
        try:
            yield trainer, checkpoint
        finally:
            close_uploads(trainer)
            trainer.display.close()
            trainer.profiler.close()
            trainer.log.close()


def run_to_end(steps: Steps[Returned]) -> Returned:
    """Take every step, and return what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(Returned, end.value)


class Trainer(TrainerState):
    """Trains the stages of a plan. The fields are those of `TrainerState`."""

    def train(self, checkpoint: FoundCheckpoint | None) -> int:
        """Train every stage that is not finished; returns the exit status. See `steps`."""
        return run_to_end(self.steps(checkpoint))

    def steps(self, checkpoint: FoundCheckpoint | None) -> Steps[int]:
        """Train every stage that is not finished, in order.

        Args:
            checkpoint: the checkpoint to resume from; None for a new run.

        Yields:
            Every step, see `stage_steps`.

        Returns:
            The exit status.
        """
        log_start(self, checkpoint)
        first, checkpoint = first_unfinished_stage(self.plan, checkpoint)
        require_benchmarks(self.config, fresh=first == 0 and checkpoint is None)
        for stage in self.plan.stages[:first]:
            self.log.event("skip", stage=stage.name)
            self.display.say(f"stage {stage.name}: already trained, skipped")
            if benchmarks_due(self.config, stage, stage.steps) and not run_benchmarks(self, stage, stage.steps):
                return self.stopped_early(stage, stage.steps)
        if first < len(self.plan.stages):
            renew_baselines(self, self.plan.stages[first], resumes=checkpoint is not None)
        for stage in self.plan.stages[first:]:
            if checkpoint is None:
                steps_done = begin_stage(self, stage)
                validate_first = True
            else:
                steps_done = resume_stage(self, checkpoint)
                validate_first = bool(checkpoint.manifest.get("validation_due"))
                checkpoint = None  # later stages begin at their step 0
            steps_done, complete = yield from self.stage_steps(stage, steps_done, validate_first=validate_first)
            if self.process.rank == 0:
                write_summary(self.folder)
            finished = complete and steps_done == stage.steps and stage is self.plan.stages[-1]
            if any_rank_stops(self.stop) and not finished:
                return self.stopped_early(stage, steps_done)
        return self.finish()

    def stage_steps(self, stage: StagePlan, steps_done: int, *, validate_first: bool = True) -> Steps[tuple[int, bool]]:
        """Train a stage from `steps_done` to its end, or until a stop is requested.

        Args:
            steps_done: negative if the optimizer state must be warmed up first, see `begin_stage`.
            validate_first: measure the validation loss before the first step.

        Yields:
            The stage, the steps done and the step's result, before what is due after the step: a stop that is requested
            here saves this step. After a rollback earlier steps come again.

        Returns:
            The steps done, and whether all validation and benchmarks due by then are complete: a signal can interrupt
            them.
        """
        self.stepper.restart()
        steps_done, is_warm = warm_up(self, stage, steps_done, self.train_step)
        self.display.begin_stage(stage, steps_done)
        if not is_warm or not self.measure_at_start(stage, steps_done, validate_first=validate_first):
            return steps_done, False
        loader = self.open_loader(stage, steps_done)
        first_step = step = steps_done
        interrupted = False
        gc.disable()  # ranks that collect garbage at different times wait for each other
        while step < stage.steps:
            skip = self.skipped.contains(stage.name, step)
            result = self.skip_batch(loader, stage, step) if skip else self.train_step(loader, stage, step)
            record_step(self, stage, step, result)
            step += 1
            yield stage, step, result
            due = actions_due(self.config, stage, step, stop=any_rank_stops(self.stop))
            if step == first_step + 1:  # by now every rank has compiled and taken its first step
                set_timeouts(self.config.comm.train_timeout_seconds)
            if due.log and (bad_step := self.flush_metrics(stage)):
                step = handle_bad_step(self, stage, bad_step)
                self.stepper.restart()
                step, is_warm = warm_up(self, stage, step, self.train_step)
                if not is_warm:
                    interrupted = True
                    break
                loader = self.open_loader(stage, step)
                continue
            if due.copies:
                self.copies.take(stage, step)
            if due.validation:
                interrupted = not validate(self, stage, step)
            if due.checkpoint or interrupted:
                save_checkpoint(self, stage, step, due.checkpoint or INTERVAL, validation_due=interrupted)
            if due.benchmarks and not interrupted:
                interrupted = due.stop or not run_benchmarks(self, stage, step)
            if due.garbage_collection:
                gc.collect(1)
            self.profiler.step(stage.name, step)
            if due.stop or interrupted:
                break
        self.display.end_stage(stage, step)
        return step, not interrupted

    def train_step(self, loader: StageLoader, stage: StagePlan, step: int, lr: float | None = None) -> StepResult:
        """The stage's 0-based step: accumulate gradients, clip, check, update; non-finite ones change nothing.

        Args:
            lr: learning rate; None for the schedule's.
        """
        reader = self.readers[stage.name]
        targets = reader.target_tokens(self.plan.batch(stage, step)) if reader.packs else stage.step_tokens(step)
        for microbatch in range(self.plan.accumulation(stage, step)):
            batch = loader.batch(step, microbatch)
            self.stepper.backward(batch, step_tokens=targets, first=microbatch == 0)
        set_lr(self.optimizer, stage.lr_at(step) if lr is None else lr)
        return self.stepper.update()

    def skip_batch(self, loader: StageLoader, stage: StagePlan, step: int) -> StepResult:
        """Read a step's batch and discard it: LR schedule and data advance, weights and moments do not change."""
        for microbatch in range(self.plan.accumulation(stage, step)):
            loader.batch(step, microbatch)
        set_lr(self.optimizer, stage.lr_at(step))
        nan = torch.full((), torch.nan, device=self.process.device)
        return StepResult(loss=nan, grad_norm=nan, health=None)

    def measure_at_start(self, stage: StagePlan, steps_done: int, *, validate_first: bool) -> bool:
        """Validate, benchmark and save as due before this session's first step; False if a signal interrupted that."""
        if validate_first and not validate(self, stage, steps_done):
            return False
        if benchmarks_due(self.config, stage, steps_done) and not run_benchmarks(self, stage, steps_done):
            return False
        if steps_done == stage.pre_anneal_step == 0:
            save_checkpoint(self, stage, 0, PRE_ANNEAL)
        return True

    def flush_metrics(self, stage: StagePlan) -> dict[str, Any] | None:
        """Write and print the metrics of the steps since the last call; returns those of the first bad step, if any."""
        lines = self.log.flush()
        held_back = first_held_back(self, stage, lines)
        if held_back is None and lines:
            self.display.step(stage, lines[-1])
        if self.log.trouble:
            self.display.warn(f"  {self.log.trouble}")
        poll_saves(self)
        return held_back

    def stopped_early(self, stage: StagePlan, steps_done: int) -> int:
        """Finish the last save and print how to resume; returns the exit status of a run that a signal stopped."""
        self.checkpoints.wait()
        self.log.event("stop", stage=stage.name, step=steps_done, signal=self.stop.name)
        self.display.result(f"stopped by {self.stop.name}; everything is saved, the same command resumes from here")
        self.print_newest_checkpoint()
        finish_uploads(self, after_signal=True)
        return STOPPED_EARLY

    def finish(self) -> int:
        """Finish the last save and print the table of losses; returns the exit status of a completed run."""
        self.checkpoints.wait()
        if self.process.rank == 0:
            self.display.results(partial(print_summary, summarize(self.folder)))
        self.print_newest_checkpoint()
        self.display.say(f"to print this table again: titan-cpt report {self.folder}")
        if self.config.metrics.enable_tensorboard:
            self.display.say(f"to see the curves: tensorboard --logdir {self.folder / TENSORBOARD_FOLDER}")
        return SUCCESS if finish_uploads(self) else STOPPED_EARLY

    def print_newest_checkpoint(self) -> None:
        """Print the folder of the newest checkpoint, if there is one."""
        if self.process.rank == 0 and (checkpoint := next(iter(self.checkpoints.listed()), None)):
            self.display.result(f"newest checkpoint: {checkpoint.folder}")
