"""Inference with a checkpoint: load it in one process or on all ranks, and compute log-likelihoods of continuations.

Every rank holds the whole model and takes a share of the batches. With `sharded`, FSDP2 also shards the weights, for
models that do not fit on one device. The parallelism degrees of training do not matter.

Shape letters: B sequences, L positions, T scored positions of all sequences, W scored tokens, D width, V vocabulary.
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
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.provenance import find_base_model, find_tokenizer, max_sequence_length, precision_of_run
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.storage import without_dist_warning
from titan_cpt.common.weights.named_weights import NamedWeights, named_weights
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import DataError
from titan_cpt.models import build
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.ops import linear
from titan_cpt.models.spec import ModelSpec

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LOGIT_ROWS = 1024
"""Number of positions whose log-probabilities are computed at a time, in float32."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model and tokenizer, ready for inference, the same on every rank.

    Attributes:
        folder: the checkpoint.
        record: its manifest.
        precision: dtype of weights and matrix products, a key of `PRECISIONS`.
        max_length: longest input in tokens.
        average: these weights are the average in the checkpoint.
        sharded: weights are sharded, so every forward pass is collective and each rank runs the same number of them.
        batch_tokens: tokens of one forward pass, padding included.
    """

    folder: Path
    record: Mapping[str, Any]
    model: LanguageModel
    tokenizer: Tokenizer
    process: ProcessInfo
    precision: str
    max_length: int
    sharded: bool
    batch_tokens: int
    average: bool = False

    @property
    def weights(self) -> NamedWeights:
        """The checkpoint, and which of its weights these are."""
        return NamedWeights(self.folder, self.average)


def open_checkpoint(
    checkpoint: Path | NamedWeights,
    process: ProcessInfo,
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
        checkpoint: its folder; `FOLDER@average` for the average in it.
        precision: a key of `PRECISIONS`, the dtype of weights and matrix products; None for the run's compute dtype,
            or float32 outside of runs. Log-probabilities are always float32.
        tokenizer: "bytes", a tokenizer.json or a folder that holds one; None for the run's.
        max_length: longest input in tokens; None for the longest sequence that trained the weights, or the base model's
            max_position_embeddings if that is longer.
        sharded: shard the weights over all ranks (FSDP2).
        batch_tokens: tokens of one forward pass, padding included.
        verify_checksums: compare every file with its checksum first.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, or lacks the average.
        DataError: its tokenizer is unknown, or is not the one that is given.
    """
    weights = named_weights(checkpoint)
    folder = weights.folder
    record = manifest.verify(folder) if verify_checksums and process.rank == 0 else manifest.read(folder)
    require_weights(weights, record)
    spec = spec_of_checkpoint(record, folder)
    base_model = find_base_model(record)
    loaded_tokenizer = find_tokenizer(record, folder, tokenizer, base_model)
    if loaded_tokenizer is None:
        raise DataError(f"{folder}: no tokenizer is known for these weights; give --tokenizer PATH")
    precision = precision or precision_of_run(folder)
    sharded = sharded and process.world_size > 1
    return LoadedModel(
        folder=folder,
        record=record,
        model=_load_model(weights, spec, process, PRECISIONS[precision], sharded=sharded),
        tokenizer=loaded_tokenizer,
        process=process,
        precision=precision,
        max_length=max_length or max_sequence_length(record, base_model),
        sharded=sharded,
        batch_tokens=batch_tokens,
        average=weights.average,
    )


def _load_model(
    weights: NamedWeights, spec: ModelSpec, process: ProcessInfo, dtype: torch.dtype, *, sharded: bool
) -> LanguageModel:
    """The model in evaluation mode with the checkpoint's weights, whole or sharded over all ranks; collective."""
    if sharded:
        mesh = build_mesh(process, ParallelDims(dp_shard=process.world_size))
        model, _, _ = build_parallel_model(spec, mesh, ParallelOptions(dtype))
    else:
        with torch.device("meta"):
            model = build.build_model(spec)
        model.to_empty(device=process.device)
    with without_dist_warning():
        load_state(weights.folder, model, None, average=weights.average)
    if not sharded:
        model.to(dtype)
    model.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def loglikelihoods(loaded: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether it is the greedy continuation; collective.

    Pairs with the same input tokens, such as the answers A to D after one question, share a forward pass. A context
    that is too long is truncated at its beginning. The result is the same on every rank, for any number of ranks.

    Args:
        pairs: (context, continuation) as token ids, at least one each.

    Returns:
        The continuation's summed log-probability in nats, and whether each of its tokens is the most likely one.

    Raises:
        DataError: a continuation is longer than the model's longest input.
    """
    scored: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > loaded.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens; the longest input of this model is {loaded.max_length}"
            )
        tokens = (context + continuation)[-(loaded.max_length + 1) :]
        scored.setdefault(tuple(tokens[:-1]), []).append((number, continuation))
    totals = torch.zeros(len(pairs), 2, dtype=torch.float64)
    longest_first = sorted(scored, key=lambda tokens: (-len(tokens), tokens))
    for batch, counts in shard_batches(loaded, batches(longest_first, loaded)):
        results = _batch_loglikelihoods(loaded, batch, [scored[tokens] for tokens in batch])
        if counts:
            for number, nats, greedy in results:
                totals[number, 0] = nats
                totals[number, 1] = greedy
    return [(nats, bool(greedy)) for nats, greedy in sum_over_ranks(loaded, totals).tolist()]


def _batch_loglikelihoods(
    loaded: LoadedModel, inputs: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[tuple[int, list[int]]]]
) -> list[tuple[int, float, bool]]:
    """(pair index, nats, greedy) of every continuation of a batch of inputs.

    Args:
        inputs: token ids, [B][L].
        continuations: for each input, its (pair index, continuation) pairs.
    """
    longest = [max(len(continuation) for _, continuation in pairs) for pairs in continuations]
    positions = [
        (row, position)
        for row, (tokens, count) in enumerate(zip(inputs, longest, strict=True))
        for position in range(len(tokens) - count, len(tokens))
    ]
    device = loaded.process.device
    rows_T, positions_T = torch.tensor(positions, device=device).T
    logits_TV = logits_at(loaded.model, pad_sequences(inputs, device), rows_T, positions_T)
    ends = torch.tensor(longest).cumsum(0).tolist()
    scored = [
        (number, token, end - len(continuation) + index)
        for end, pairs in zip(ends, continuations, strict=True)
        for number, continuation in pairs
        for index, token in enumerate(continuation)
    ]
    at_W = torch.tensor([row for _, _, row in scored], device=device)
    tokens_W = torch.tensor([token for _, token, _ in scored], device=device)
    nats_W, best_W = [], []
    for at, tokens in zip(torch.split(at_W, _LOGIT_ROWS), torch.split(tokens_W, _LOGIT_ROWS), strict=True):
        logits_WV = logits_TV[at].float()
        nats_W.append(logits_WV.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        best_W.append(logits_WV.argmax(-1) == tokens)
    sums: dict[int, list[float]] = {}
    for (number, _, _), nats, best in zip(scored, torch.cat(nats_W).tolist(), torch.cat(best_W).tolist(), strict=True):
        pair_sums = sums.setdefault(number, [0.0, 1.0])
        pair_sums[0] += nats
        pair_sums[1] *= best
    return [(number, nats, bool(greedy)) for number, (nats, greedy) in sums.items()]


def logits_at(model: LanguageModel, tokens_BL: Tensor, rows_T: Tensor, positions_T: Tensor) -> Tensor:
    """logits_TV at the given positions only: the output layer, the widest one, skips the other positions."""

    def project(x_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear(x_BLD[rows_T, positions_T], weight_VD)

    logits_TV: Tensor = model(tokens_BL, project=project)
    return logits_TV


def pad_sequences(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Sequences padded at the end to one length, int64 [B, L]. Causal attention never attends to the padding."""
    longest = max(len(tokens) for tokens in sequences)
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=device)


def batches(
    longest_first: Sequence[tuple[int, ...]], loaded: LoadedModel, room: int = 0
) -> list[Sequence[tuple[int, ...]]]:
    """Batches of sequences of similar length, with at most `batch_tokens` tokens each.

    Args:
        longest_first: sequences, sorted by decreasing length.
        room: tokens by which each sequence may grow.
    """
    groups: list[Sequence[tuple[int, ...]]] = []
    start = 0
    while start < len(longest_first):
        rows = max(1, loaded.batch_tokens // (len(longest_first[start]) + room))
        groups.append(longest_first[start : start + rows])
        start += rows
    return groups


def shard_batches(
    loaded: LoadedModel, all_batches: Sequence[Sequence[tuple[int, ...]]]
) -> Iterator[tuple[Sequence[tuple[int, ...]], bool]]:
    """This rank's share of the batches, and whether each one counts.

    With sharded weights every rank must run the same number of forward passes: a rank without a batch left gets another
    rank's, whose result does not count.
    """
    rank = loaded.process.rank
    for first in range(0, len(all_batches), loaded.process.world_size):
        if first + rank < len(all_batches):
            yield all_batches[first + rank], True
        elif loaded.sharded:
            yield all_batches[-1][:1], False


def sum_over_ranks(loaded: LoadedModel, results: Tensor) -> Tensor:
    """Gather results by an all-reduce: one rank has computed each of them, the other ranks have 0 there."""
    if loaded.process.world_size > 1:
        dist.all_reduce(results)
    return results
