"""Run on every rank: checkpoints written under some layouts, and read again under others, inside one process group."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from equal_gradients import take_steps, unequal_matrices
from parity_layouts import V_SCHEDULE
from torch.distributed.tensor import DTensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.common.run_folder import INTERVAL
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.load import load_config
from titan_cpt.distributed.process_group import ProcessInfo, destroy_process_group, init_process_group
from titan_cpt.train import Trainer, run_to_end
from titan_cpt.training.build import build
from titan_cpt.training.saving import save_checkpoint
from titan_cpt.training.stage_start import load_initial, resume_stage

LAYOUTS: dict[int, dict[str, dict[str, str]]] = {
    1: {"one": {}},
    2: {
        "fsdp": {"training.local_batch_size": "4"},
        "tp": {"parallelism.tensor_parallel_degree": "2", "averaging.keep_on": "device"},
        "pp": {"parallelism.pipeline_parallel_degree": "2"},
        "cp": {"parallelism.context_parallel_degree": "2"},
    },
    4: {
        "fsdp4": {"training.local_batch_size": "2"},
        "hsdp": {"parallelism.data_parallel_replicate_degree": "2", "training.local_batch_size": "2"},
        "fsdp-tp": {"parallelism.tensor_parallel_degree": "2", "training.local_batch_size": "4"},
        "pp-fsdp": {
            "parallelism.pipeline_parallel_degree": "2",
            "parallelism.pipeline_parallel_schedule": V_SCHEDULE,
            "training.local_batch_size": "4",
        },
        "pp-tp": {"parallelism.pipeline_parallel_degree": "2", "parallelism.tensor_parallel_degree": "2"},
    },
}
"""Layouts by their number of ranks, as overrides of a run of one process."""
MUON = {"optimizer.name": "Muon"}
STEP = "first/step-00000002"
PULLED = "first/step-00000001"
WEAK = "weak"
MENDED = "first/step-00000003"
END = "first/step-00000004"


def write(arguments: Sequence[str]) -> None:
    """Read the run `one`'s checkpoint under every layout of this number of ranks, and write it again.

    Then pull the weights, and write them as `PULLED`, and begin with the weak rows of `WEAK`. Also under every layout:
    steps of Muon with the gradients of one process.
    """
    folder, ranks = Path(arguments[0]), _join()
    for name, overrides in LAYOUTS[ranks.world_size].items():
        if name == "one":
            continue
        with _built(folder, ranks, name, overrides) as trainer:
            _resume(trainer, folder / "one" / STEP)
            save_checkpoint(trainer, trainer.plan.stages[0], 2, INTERVAL)
            trainer.checkpoints.wait()
            trainer.copies.take(trainer.plan.stages[0], 3)
            save_checkpoint(trainer, trainer.plan.stages[0], 1, INTERVAL)
            trainer.checkpoints.wait()
            _start_from_weak_rows(trainer, folder / WEAK)
        with _built(folder, ranks, f"muon-{name}", {**overrides, **MUON}) as trainer:
            take_steps(trainer)
            save_checkpoint(trainer, trainer.plan.stages[0], 2, INTERVAL)
            trainer.checkpoints.wait()
    (folder / f"unequal-{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(list(unequal_matrices())))
    destroy_process_group()


def read(arguments: Sequence[str]) -> None:
    """Read the checkpoints of all layouts under every layout of this number of ranks, and resume from the last."""
    folder, ranks = Path(arguments[0]), _join()
    for name, overrides in LAYOUTS[ranks.world_size].items():
        with _built(folder, ranks, f"to-{name}", overrides) as trainer:
            digests = {}
            for writer in (writer for of_ranks in LAYOUTS.values() for writer in of_ranks):
                _forget(trainer)
                _resume(trainer, folder / writer / STEP)
                digests[writer] = _digest(trainer)
            save_checkpoint(trainer, trainer.plan.stages[0], 2, INTERVAL)
            run_to_end(trainer.stage_steps(trainer.plan.stages[0], 2, validate_first=False))
            trainer.checkpoints.wait()
        told = folder / f"to-{name}" / f"digests-{ranks.rank}.json"
        told.write_text(json.dumps(digests))
    destroy_process_group()


def _join() -> ProcessInfo:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return init_process_group()


@contextmanager
def _built(folder: Path, ranks: ProcessInfo, name: str, overrides: dict[str, str]) -> Iterator[Trainer]:
    config = load_config(folder / "run.toml", [*overrides.items(), ("job.name", name)])
    run = folder / name
    run.mkdir(exist_ok=True)
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, ranks, run, stop)
        try:
            yield trainer
        finally:
            trainer.log.close()


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    resume_stage(trainer, FoundCheckpoint(checkpoint, manifest.read(checkpoint)))


def _tensors(trainer: Trainer) -> Iterator[torch.Tensor]:
    for parameter in trainer.model.parameters():
        for tensor in (parameter.data, *trainer.optimizer.state[parameter].values()):
            yield tensor.to_local() if isinstance(tensor, DTensor) else tensor
    yield from trainer.copies.to_save(INTERVAL, 2)[0].get("reptile", {}).values()


def _start_from_weak_rows(trainer: Trainer, checkpoint: Path) -> None:
    """Begin with the weights of a checkpoint, weak rows replaced, and save them as `MENDED`."""
    stage = trainer.plan.stages[0]
    first, *others = trainer.config.stages
    tables = (first.model_copy(update={"weak_rows": "mean"}), *others)
    mending = replace(trainer, config=trainer.config.model_copy(update={"stages": tables}))
    load_initial(mending, replace(stage, init=f"checkpoint:{checkpoint}"))
    save_checkpoint(trainer, stage, 3, INTERVAL)
    trainer.checkpoints.wait()


def _forget(trainer: Trainer) -> None:
    for tensor in _tensors(trainer):
        tensor.fill_(-1)


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(trainer):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
