"""A checkpoint as a model that answers: opened in one process or over all ranks, and asked for log-likelihoods.

Without peers, and where a rank holds the whole model, ranks share the work and not the weights; `sharded` spreads the
weights over them besides (FSDP2), for models that do not fit. The layout that a checkpoint was saved in means nothing.

Shape letters: B sequences, L positions, T positions of all sequences that are scored, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.provenance import find_base_model, find_tokenizer, max_sequence_length, precision_of_run
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.storage import without_dist_warning
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import CheckpointError, ConfigError, DataError
from titan_cpt.models import build
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.ops import linear
from titan_cpt.models.registry import spec_from_recipe

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LOGIT_ROWS = 1024
"""Positions whose log-probabilities are worked out at once, in float32."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that answers, the same on every rank.

    Attributes:
        folder: the checkpoint.
        record: its manifest.
        max_length: tokens that it is given at most.
        sharded: forward passes are collective: every rank makes as many as the others.
        batch_tokens: of one forward pass, filled-in ones included.
    """

    folder: Path
    record: Mapping[str, Any]
    model: LanguageModel
    tokenizer: Tokenizer
    ranks: ProcessInfo
    precision: str
    max_length: int
    sharded: bool
    batch_tokens: int


def open_checkpoint(
    folder: Path,
    ranks: ProcessInfo,
    *,
    precision: str | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    sharded: bool = False,
    batch_tokens: int = 8192,
    verify_checksums: bool = True,
) -> LoadedModel:
    """Build the checkpoint's model and load its weights; collective.

    Args:
        precision: a key of `PRECISIONS`: of weights and products; left out, what the run computes in, float32 outside
            of runs. Log-probabilities are float32 in any case.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; left out, the run's own.
        max_length: left out, what the run was trained on or the release promises, the longer one.
        sharded: spread the weights over all ranks.
        checked: read every file once more to compare its checksum.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        DataError: its tokenizer is not known, or not the one that is given.
    """
    record = manifest.verify(folder) if verify_checksums and ranks.rank == 0 else manifest.read(folder)
    try:
        spec = spec_from_recipe(record["recipe"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: {error}") from None
    base_model = find_base_model(record)
    words = find_tokenizer(record, folder, tokenizer, base_model)
    if words is None:
        raise DataError(f"{folder}: no tokenizer is known for these weights; give --tokenizer PATH")
    precision = precision or precision_of_run(folder)
    sharded = sharded and ranks.world_size > 1
    if sharded:
        mesh = build_mesh(ranks, ParallelDims(dp_shard=ranks.world_size))
        model, _, _ = build_parallel_model(spec, mesh, ParallelOptions(PRECISIONS[precision]))
    else:
        with torch.device("meta"):
            model = build.build_model(spec)
        model.to_empty(device=ranks.device)
    with without_dist_warning():
        load_state(folder, model, None)
    if not sharded:
        model.to(PRECISIONS[precision])
    model.requires_grad_(False)
    return LoadedModel(
        folder=folder,
        record=record,
        model=model.eval(),
        tokenizer=words,
        ranks=ranks,
        precision=precision,
        max_length=max_length or max_sequence_length(record, base_model),
        sharded=sharded,
        batch_tokens=batch_tokens,
    )


@torch.no_grad()
def score(opened: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """How likely each continuation is after its context, and whether the model itself would have written it.

    Pairs that put the same tokens into the model, such as the answers A to D after one question, cost one pass. A
    context that is too long loses its beginning. The same result on every rank, whatever their number.

    Args:
        pairs: (context, continuation) in tokens, neither of them empty.

    Returns:
        The continuation's summed log-probability in nats, and whether each of its tokens is the most likely one.

    Raises:
        DataError: a continuation is longer than what the model is given.
    """
    asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > opened.max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens; this model is given {opened.max_length} at most"
            )
        tokens = (context + continuation)[-(opened.max_length + 1) :]
        asked.setdefault(tuple(tokens[:-1]), []).append((number, continuation))
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for batch, counts in shard_batches(
        opened, batches(sorted(asked, key=lambda tokens: (-len(tokens), tokens)), opened)
    ):
        answers = _score_batch(opened, batch, [asked[tokens] for tokens in batch])
        if counts:
            for number, nats, greedy in answers:
                found[number, 0], found[number, 1] = nats, greedy
    return [(nats, bool(greedy)) for nats, greedy in summed(opened, found).tolist()]


def _score_batch(
    opened: LoadedModel, inputs: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, list[int]]]]
) -> list[tuple[int, float, bool]]:
    """(number, nats, greedy) of every continuation asked for after one of the inputs."""
    longest = [max(len(continuation) for _, continuation in continuations) for continuations in asked]
    places = [
        (row, position)
        for row, (tokens, scored) in enumerate(zip(inputs, longest, strict=True))
        for position in range(len(tokens) - scored, len(tokens))
    ]
    device = opened.ranks.device
    rows_T, positions_T = torch.tensor(places, device=device).T
    logits_TV = logits_at(opened.model, padded(inputs, device), rows_T, positions_T)
    ends = torch.tensor(longest).cumsum(0).tolist()
    wanted = [
        (number, token, end - len(continuation) + place)
        for end, continuations in zip(ends, asked, strict=True)
        for number, continuation in continuations
        for place, token in enumerate(continuation)
    ]
    at_W = torch.tensor([place for _, _, place in wanted], device=device)
    tokens_W = torch.tensor([token for _, token, _ in wanted], device=device)
    nats_W, best_W = [], []
    for at, tokens in zip(torch.split(at_W, _LOGIT_ROWS), torch.split(tokens_W, _LOGIT_ROWS), strict=True):
        logits_WV = logits_TV[at].float()
        nats_W.append(logits_WV.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        best_W.append(logits_WV.argmax(-1) == tokens)
    sums: dict[int, list[float]] = {}
    for (number, _, _), nats, best in zip(wanted, torch.cat(nats_W).tolist(), torch.cat(best_W).tolist(), strict=True):
        so_far = sums.setdefault(number, [0.0, 1.0])
        so_far[0] += nats
        so_far[1] *= best
    return [(number, nats, bool(greedy)) for number, (nats, greedy) in sums.items()]


def logits_at(model: LanguageModel, tokens_BL: Tensor, rows_T: Tensor, positions_T: Tensor) -> Tensor:
    """Logits at some positions of some sequences, logits_TV: the others never go through the head, the widest layer."""

    def project(x_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear(x_BLD[rows_T, positions_T], weight_VD)

    logits_TV: Tensor = model(tokens_BL, project=project)
    return logits_TV


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Sequences filled up at the end, where causal attention never looks at it, to one length, int64 [B, L]."""
    longest = max(len(tokens) for tokens in sequences)
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)


def batches(
    longest_first: Sequence[tuple[int, ...]], opened: LoadedModel, room: int = 0
) -> list[Sequence[tuple[int, ...]]]:
    """Neighbours in the order of length together, as many as `batch_tokens` holds.

    Args:
        room: tokens that each sequence may grow by.
    """
    found: list[Sequence[tuple[int, ...]]] = []
    start = 0
    while start < len(longest_first):
        rows = max(1, opened.batch_tokens // (len(longest_first[start]) + room))
        found.append(longest_first[start : start + rows])
        start += rows
    return found


def shard_batches(
    opened: LoadedModel, all_batches: Sequence[Sequence[tuple[int, ...]]]
) -> Iterator[tuple[Sequence[tuple[int, ...]], bool]]:
    """This rank's batches; where passes are collective, one that stands in for a missing one and does not count."""
    rank, ranks = opened.ranks.rank, opened.ranks.world_size
    for first in range(0, len(all_batches), ranks):
        if first + rank < len(all_batches):
            yield all_batches[first + rank], True
        elif opened.sharded:
            yield all_batches[-1][:1], False


def summed(opened: LoadedModel, found: Tensor) -> Tensor:
    """What all ranks found together: each number is 0 on all of them but one."""
    if opened.ranks.world_size > 1:
        dist.all_reduce(found)
    return found
