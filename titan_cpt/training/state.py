"""Everything that training needs, built once by build.py and used by every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.optim import AdamW

from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.schema import Config
from titan_cpt.data.loader import SequenceReader
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.build import LanguageModel
from titan_cpt.planning.plan import Plan
from titan_cpt.training.forward_backward import ModelRunner
from titan_cpt.training.metrics import MetricsLog
from titan_cpt.training.optimizer import UpdateGuard
from titan_cpt.training.profiler import Profiler
from titan_cpt.training.progress import Display
from titan_cpt.training.skipped_batches import Skips
from titan_cpt.training.validation import Validator


@dataclass(frozen=True)
class Parts:
    """The cast of a run: what is built once and used by every stage."""

    config: Config
    plan: Plan
    ranks: ProcessInfo
    mesh: Mesh
    folder: Path
    model: LanguageModel
    engine: ModelRunner
    optimizer: AdamW
    guard: UpdateGuard
    skips: Skips
    reader: SequenceReader
    validator: Validator
    checkpoints: CheckpointManager
    identities: dict[str, str]
    log: MetricsLog
    display: Display
    profiler: Profiler
    stop: StopRequest
