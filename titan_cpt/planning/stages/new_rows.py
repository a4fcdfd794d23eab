"""Rows of new tokens, which a stage initializes: `new_rows`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.common.weights.new_rows import NewRowsPlan, describe_new_rows
from titan_cpt.config.stages import StageConfig
from titan_cpt.planning.plan import StageCheckpoint, StagePlan
from titan_cpt.planning.plan_draft import PlanDraft


def new_rows_of(draft: PlanDraft, stage: StageConfig, init: StageCheckpoint | str) -> NewRowsPlan | None:
    """The rows of new tokens that a stage initializes at its start; None if it has none."""
    first, end = draft.inventory.base_vocab_size, draft.inventory.vocab_size
    if stage.new_rows is not None and (problem := _problem(stage, init, extends=first is not None)):
        draft.problems.append(f"stages.{stage.name}.new_rows: {problem}")
    if first is None or end is None or init == "random":
        return None
    if stage.new_rows is not None:
        return NewRowsPlan(stage.new_rows, first, end)
    comes_from_outside = isinstance(init, str)
    return NewRowsPlan("pieces", first, end, if_of_base=True) if comes_from_outside else None


def _problem(stage: StageConfig, init: StageCheckpoint | str, *, extends: bool) -> str | None:
    if not extends:
        return "the tokenizer has no new tokens, because [tokenizer] has no table extend: add it, or remove new_rows"
    if init == "random":
        return 'init = "random" draws all rows: remove new_rows'
    if stage.optimizer_state == "keep":
        return (
            'optimizer_state = "keep" would continue with moments of the rows that are replaced: set it to "reset" '
            "or remove new_rows"
        )
    return None


def new_rows_recipe(stage: StageConfig) -> dict[str, Any]:
    """The part of the stage's recipe about new rows. Unset, they follow from the initial weights, which it names."""
    return {} if stage.new_rows is None else {"new_rows": stage.new_rows}


def new_rows_lines(stages: Sequence[StagePlan]) -> Iterator[str]:
    """A line for every stage that initializes rows of new tokens."""
    for stage in stages:
        if new := stage.new_rows:
            number, padding = new.end - new.first, stage.spec.vocab_size - new.end
            condition = ", if the initial weights were trained with the base tokenizer" if new.if_of_base else ""
            described = describe_new_rows(new.kind, number, padding=padding, tied=stage.spec.tied)
            yield f"stage {stage.name} starts with {described}{condition}"
