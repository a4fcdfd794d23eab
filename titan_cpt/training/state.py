"""The objects that a run consists of. build.py creates them; Trainer in train.py adds the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.optim import AdamW

from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.checkpoint.remote.uploader import Uploader
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.schema import Config
from titan_cpt.data.documents import DocumentSettings, document_settings
from titan_cpt.data.loader import SequenceReader, StageLoader
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.evaluation.registered_metrics import Metric
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.training.cuda.attention import AttentionKernels
from titan_cpt.training.cuda.graphs import CapturedStep
from titan_cpt.training.forward_backward import EagerStep, ModelRunner
from titan_cpt.training.metrics import MetricsLog
from titan_cpt.training.optimization.trained_weights import TrainedWeights
from titan_cpt.training.optimization.update import UpdateGuard
from titan_cpt.training.profiler import Profiler
from titan_cpt.training.screen.display import Display
from titan_cpt.training.skipped_batches import SkippedBatches
from titan_cpt.training.validation import Validator
from titan_cpt.training.weights.copies import WeightCopies


@dataclass(frozen=True)
class TrainerState:
    """Config, plan, model, optimizer and the services of a run.

    Attributes:
        process: this process's rank and device.
        folder: the run's folder.
        model: this rank's part of the model, with float32 master weights.
        runner: forward and backward of a batch.
        stepper: gradients of micro-batches and the update; launched one by one, or as CUDA graphs.
        attention: the kernels of attention.
        trained: which of the weights the optimizer updates.
        guard: prevents optimizer updates from the first bad step on.
        copies: copies of the weights, such as snapshots for an average.
        skipped: batches that training skips because their loss or gradient was bad.
        readers: reads the sequences of a stage, by its name.
        metrics: metrics of other packages, by name.
        uploads: uploads checkpoints to object storage, on rank 0; None without `checkpoint.upload`.
        end_of_document: the tokenizer's id.
        identities: fingerprints of the tokenizer and of the data files, by dotted key.
        stop: whether a signal requested a stop.
    """

    config: Config
    plan: Plan
    process: ProcessInfo
    mesh: Mesh
    folder: Path
    model: LanguageModel
    runner: ModelRunner
    stepper: EagerStep | CapturedStep
    attention: AttentionKernels
    optimizer: AdamW
    trained: TrainedWeights
    guard: UpdateGuard
    copies: WeightCopies
    skipped: SkippedBatches
    readers: Mapping[str, SequenceReader]
    validator: Validator
    metrics: Mapping[str, Metric]
    checkpoints: CheckpointManager
    uploads: Uploader | None
    end_of_document: int
    identities: dict[str, str]
    log: MetricsLog
    display: Display
    profiler: Profiler
    stop: StopRequest

    def documents(self, stage: StagePlan) -> DocumentSettings | None:
        """Document mask and positions of a stage; None without."""
        return document_settings(self.end_of_document, mask=stage.document_mask, positions=stage.document_positions)

    def open_loader(self, stage: StagePlan, first_step: int) -> StageLoader:
        """A loader of this rank's micro-batches, from `first_step` to the end of the stage."""
        return StageLoader(
            self.readers[stage.name],
            partial(self.plan.batch, stage),  # picklable, unlike a lambda: spawned data-loader workers receive it
            steps=stage.steps,
            first_step=first_step,
            batch_sizes=stage.batch_sizes,
            local_batch=stage.local_batch_size,
            rank=self.mesh.data_rank,
            ranks=self.plan.data_parallel,
            workers=self.config.training.num_workers,
            source_numbers=stage.source_numbers,
            documents=self.documents(stage),
        )
