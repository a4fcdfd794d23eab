"""A plan in the making: the config, the stages planned so far, and the problems and notes found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.plan import StagePlan
from titan_cpt.planning.stages.lr_span import LRSpan


@dataclass
class PlanDraft:
    """State of `make_plan` while it goes through the stages in order.

    Attributes:
        inventory: token counts of the files.
        spec: the model that [model] describes.
        sequences: number of sequences by source and sequence length; None if its files do not exist yet.
        spans: the stages that each stage's LR schedule spans, by the stage's name.
        stages: the stages planned so far, by name.
        problems: error messages; all of them are raised together at the end.
        notes: warnings for the user.
    """

    config: Config
    inventory: DataInventory
    spec: ModelSpec
    sequences: Mapping[tuple[str, int], int | None] = field(default_factory=dict)
    spans: Mapping[str, LRSpan] = field(default_factory=dict)
    stages: dict[str, StagePlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
