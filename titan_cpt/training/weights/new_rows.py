"""The rows of new tokens that a stage initializes, once the tokenizer of its initial weights is known."""

from __future__ import annotations

from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer, has_base_tokenizer, require_reset_with_new_rows
from titan_cpt.checkpoint.vocabulary.new_rows import NewRows
from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import TrainerState


def new_rows_at_start(state: TrainerState, stage: StagePlan, weights: TrainingTokenizer | None) -> NewRows | None:
    """How a stage computes the rows of new tokens; None if rows stay as they are in its initial weights.

    Args:
        weights: the tokenizer that the initial weights were trained with; None if unknown.

    Raises:
        CheckpointError: the optimizer state is to be kept, which belongs to other rows.
        DataError: tokenizer.path does not extend tokenizer.extend.base.
    """
    extend = state.config.tokenizer.extend
    planned = stage.new_rows
    always = planned is not None and not planned.if_of_base
    if extend is None or not (always or has_base_tokenizer(weights, state.config)):
        return None
    require_reset_with_new_rows(stage.name, keeps=stage.keep_optimizer)
    extension = extension_of(extend.base, state.config.tokenizer.path)
    kind = planned.kind if planned is not None else "pieces"
    return NewRows(
        kind,
        first=extension.base_vocab_size,
        end=extension.vocab_size,
        seed=state.plan.seed,
        pieces=extension.pieces if kind == "pieces" else {},
    )
