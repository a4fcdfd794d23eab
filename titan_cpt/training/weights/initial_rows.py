"""Examine the vocabulary rows of initial weights from outside of the run, and replace weak ones where a stage says so.

Rank 0 reads the files and counts the data; the other ranks wait for what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.hf_release import ReleasedModel
from titan_cpt.checkpoint.tokenizer_check import (
    TrainingTokenizer,
    has_base_tokenizer,
    tokenizer_of_manifest,
    tokenizer_of_release,
)
from titan_cpt.checkpoint.vocabulary.model_rows import NewValues
from titan_cpt.checkpoint.vocabulary.vocabulary_rows import VocabularyRows, released_rows, stored_rows
from titan_cpt.checkpoint.vocabulary.weak_row_report import (
    counts_by_kind,
    only_non_finite,
    used_rows,
    weak_row_lines,
)
from titan_cpt.checkpoint.vocabulary.weak_rows import WeakRows, find_weak_rows
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.data.mixture import leaves
from titan_cpt.data.token_uses import TokenUses, count_token_uses
from titan_cpt.data.tokenizer.token_texts import TokenTexts
from titan_cpt.errors import CheckpointError, TitanError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import TrainerState


class RowFindings(NamedTuple):
    """What was found in the rows of a stage's initial weights.

    Attributes:
        lines: for the screen and the log; none if no row is weak.
        counts: the entry of the transition event: `weak_rows`, weight -> kind -> number of rows, and
            `weak_rows_replaced`; empty if no row is weak.
        changes: rows to replace.
    """

    lines: tuple[str, ...] = ()
    counts: Mapping[str, Any] = {}
    changes: Mapping[str, NewValues] = {}


class InitialRows:
    """The rows of a stage's initial weights.

    Args:
        quiet: examine them only if weak ones are replaced, for weights that are loaded a second time.
    """

    def __init__(self, state: TrainerState, stage: StagePlan, *, quiet: bool = False) -> None:
        self.findings = RowFindings()
        self._state = state
        self._stage = stage
        self._policy = next(each.weak_rows for each in state.config.stages if each.name == stage.name)
        self._skipped = not isinstance(stage.init, str) or (quiet and self._policy != "mean")

    def of_release(self, released: ReleasedModel) -> Mapping[str, NewValues]:
        """Examine a Hugging Face model; see `of_checkpoint`."""
        return self._examined(
            lambda: (
                released_rows(released, self._stage.spec.vocab_size),
                tokenizer_of_release(released.files.folder),
            )
        )

    def of_checkpoint(self, weights: NamedWeights) -> Mapping[str, NewValues]:
        """Examine a verified checkpoint; collective.

        Returns:
            The rows to replace after loading, the same on every rank.

        Raises:
            CheckpointError: rows are not finite, or weak rows are used and the stage refuses them; on every rank.
        """

        def opened() -> tuple[VocabularyRows, TrainingTokenizer | None]:
            record = manifest.read(weights.folder)
            rows = stored_rows(weights.folder, spec_of_checkpoint(record, weights.folder), average=weights.average)
            return rows, tokenizer_of_manifest(record, weights.folder)

        return self._examined(opened)

    def _examined(
        self, opened: Callable[[], tuple[VocabularyRows, TrainingTokenizer | None]]
    ) -> Mapping[str, NewValues]:
        if self._skipped:
            return {}
        outcome: list[RowFindings | TitanError | None] = [None]
        if self._state.process.rank == 0:
            try:
                outcome = [self._examine(*opened())]
            except TitanError as error:
                outcome = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0, group=self._state.checkpoints.group)
        found = outcome[0]
        if isinstance(found, TitanError):
            found.on_every_rank = True
            raise found
        assert found is not None, "rank 0 sent what it found"
        self.findings = found
        return found.changes

    def _examine(self, rows: VocabularyRows, tokenizer: TrainingTokenizer | None) -> RowFindings:
        own = self._state.config.tokenizer
        has_base = has_base_tokenizer(tokenizer, self._state.config)
        texts = TokenTexts(own.extend.base if own.extend and has_base else own.path)
        found = find_weak_rows(rows, texts.ids)
        if not any(weak.by_kind for weak in found.values()):
            return RowFindings()
        uses = self._uses(rows.count)
        if self._policy != "mean":
            self._require_acceptable(found, texts, uses)
        changes = self._means(rows, found) if self._policy == "mean" else {}
        replaced = ["they are replaced by the mean of the other tokens' rows"] if changes else []
        return RowFindings(
            (*weak_row_lines(found, texts, uses), *replaced, f"uses are counted in {uses}"),
            {"weak_rows": counts_by_kind(found), "weak_rows_replaced": bool(changes)},
            changes,
        )

    def _uses(self, ids: int) -> TokenUses:
        """How often the data of the stage uses each id."""
        sources = self._state.readers[self._stage.name].sources
        lengths = {
            leaf.source: leaf.text.legs[0].seq_len if leaf.text else self._stage.seq_len
            for leaf in leaves(self._stage.tree)
        }
        tokens = max(ids, self._state.plan.spec.vocab_size)
        return count_token_uses({name: (sources[name], lengths[name]) for name in sorted(lengths)}, tokens)

    def _require_acceptable(self, found: Mapping[str, WeakRows], texts: TokenTexts, uses: TokenUses) -> None:
        where = f"stages.{self._stage.name}"
        remedy = f'set {where}.weak_rows = "mean" to replace them by the mean of the other tokens\' rows'
        broken = only_non_finite(found)
        if broken:
            lines = "\n  ".join(weak_row_lines(broken, texts, uses))
            raise CheckpointError(
                f"{where}.init: {self._stage.init} has rows that are NaN or infinite:\n  {lines}\n"
                f"Download the files again, or {remedy}"
            )
        used = used_rows(found, uses)
        if self._policy == "error" and any(weak.by_kind for weak in used.values()):
            lines = "\n  ".join([*weak_row_lines(used, texts, uses), f"uses are counted in {uses}"])
            raise CheckpointError(
                f"{where}.weak_rows: {self._stage.init} has weak rows of tokens that the data uses:\n  {lines}\n"
                f'Train with them (weak_rows = "keep"), or {remedy}'
            )

    def _means(self, rows: VocabularyRows, found: Mapping[str, WeakRows]) -> dict[str, NewValues]:
        """For each weight with weak rows the mean of the healthy ones, for these and for rows that the files lack."""
        changes = {}
        for name, weak in found.items():
            if not weak.by_kind:
                continue
            if not weak.healthy.any():
                raise CheckpointError(f"{self._stage.init}: {name} has no row that is not weak")
            added = np.arange(rows.count, self._stage.spec.vocab_size)
            ids = torch.from_numpy(np.concatenate((weak.ids, added)))
            changes[name] = NewValues(ids, rows.mean(name, weak.healthy))
        return changes
