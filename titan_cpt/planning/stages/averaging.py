"""The average of a stage's weights: window and distance of the snapshots in steps."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from titan_cpt.common.numbers import parse_steps, parse_tokens
from titan_cpt.common.weights.averaging import Averaging
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import AveragingConfig, StageConfig
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.stages.lr_span import StageLength


def averaging_of(
    draft: PlanDraft, stage: StageConfig, length: StageLength, *, anneals_at: int | None
) -> Averaging | None:
    """The average of a stage's weights; None without, or if its table has a fault, which is added to the problems.

    Args:
        anneals_at: the stage's pre-anneal step. Snapshots are placed so that one is taken there, or else at the end.
    """
    table = _table(draft.config, stage)
    if table is None:
        return None
    where = "averaging" if stage.averaging is None else f"stages.{stage.name}.averaging"
    for key in ("last", "every"):
        written = getattr(table, key)
        if written is not None and _steps_before_end(written, length) == 0:
            problem = f"{where}.{key}: must be above 0, got {written!r}"
            if problem not in draft.problems:  # [averaging] has the same fault in every stage
                draft.problems.append(problem)
            return None
    # A table for all stages may be longer than one of them: then the window is the whole stage.
    window = min(_steps_before_end(table.last, length), Fraction(length.steps))
    every = window / 10 if table.every is None else min(_steps_before_end(table.every, length), window)
    distance = math.ceil(every)
    anchor = length.steps if anneals_at is None else anneals_at
    return Averaging(
        kind=table.kind,
        shape=table.shape or "sqrt",
        size=math.ceil(window / distance),
        every=distance,
        phase=anchor % distance,
        on_host=table.keep_on == "host",
    )


def _table(config: Config, stage: StageConfig) -> AveragingConfig | None:
    if stage.averaging == "off":
        return None
    return config.averaging if stage.averaging is None else stage.averaging


def _steps_before_end(written: float | int | str, length: StageLength) -> Fraction:
    """A length in steps; one in tokens is that of the stage's last tokens, whatever its batch-size ramp."""
    if isinstance(written, float):
        return Fraction(str(written)) * length.steps
    if isinstance(written, int):
        return Fraction(written)
    if written.endswith(" steps"):
        return parse_steps(written)
    sequences = Fraction(length.tokens - parse_tokens(written), length.seq_len)
    if sequences < 0:  # longer than the stage: as many steps as its last batch size gives
        return length.steps - sequences / length.batch_sizes.at(length.steps - 1)
    return length.steps - length.batch_sizes.step_at(sequences)


def average_recipe(draft: PlanDraft, init: StageCheckpoint | str) -> dict[str, Any]:
    """The recipe of the average that a stage starts from: only then does averaging change what is trained."""
    if isinstance(init, str) or not init.average:
        return {}
    averaging = draft.stages[init.stage].averaging
    return {} if averaging is None else {f"init.averaging.{key}": value for key, value in averaging.settings.items()}


def check_average(draft: PlanDraft, stage: StageConfig, init: StageCheckpoint | str) -> None:
    """Refuse a stage that starts from an average which the earlier stage does not have."""
    if isinstance(init, str) or not init.average:
        return
    averaging = draft.stages[init.stage].averaging
    where = f"stages.{stage.name}.init"
    if averaging is None:
        draft.problems.append(
            f"{where}: stage {init.stage!r} keeps no average of its weights: add a table [averaging], or write "
            f"stage:{init.stage} for its weights"
        )
    elif not any(averaging.due(step) for step in range(max(0, init.steps_done - averaging.every), init.steps_done + 1)):
        draft.problems.append(
            f"{where}: stage {init.stage!r} has no snapshot for an average by step {init.steps_done:,}; its first one "
            f"is after step {averaging.phase or averaging.every:,}: set averaging.every to a shorter distance"
        )
