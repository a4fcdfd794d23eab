"""Text generation with a KV cache: greedy, or with temperature and nucleus (top-p) sampling.

Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_cpt.errors import DataError
from titan_cpt.evaluation.inference import LoadedModel, batches, logits_at, pad_sequences, shard_batches, sum_over_ranks
from titan_cpt.models.common.kv_cache import kv_cache


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_p: nucleus sampling: sample from the smallest set of most likely tokens with at least this probability.
            Source: Holtzman et al. 2020, arXiv:1904.09751.
        seed: of the random numbers. They depend only on the seed and the prompt, not on other prompts, their order or
            the number of ranks.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Callable[[list[int]], bool] = lambda continuation: False,
) -> list[list[int]]:
    """Continue every prompt to the end-of-document id, until `stop` is True, or by `max_new_tokens`; collective.

    A prompt that does not leave room for `max_new_tokens` is truncated at its beginning. Every rank returns the same.

    Args:
        prompts: token ids, at least one each.
        stop: called with the continuation so far after each of its tokens.

    Returns:
        The continuations as token ids, without the end-of-document id.

    Raises:
        DataError: `max_new_tokens` is not below the model's longest input.
    """
    room = loaded.max_length - max_new_tokens
    if room < 1:
        raise DataError(
            f"{max_new_tokens} new tokens leave no room for a prompt: the longest input of this model is "
            f"{loaded.max_length} tokens; generate fewer"
        )
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(tuple(prompt)[-room:], []).append(index)
    padded = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)  # id + 1; 0 after the end
    longest_first = sorted(indices, key=lambda tokens: (-len(tokens), tokens))
    for batch, counts in shard_batches(loaded, batches(longest_first, loaded, max_new_tokens)):
        continuations = _continue(loaded, batch, max_new_tokens, sampling or Sampling(), stop)
        if counts:
            for prompt, continuation in zip(batch, continuations, strict=True):
                for index in indices[prompt]:
                    padded[index, : len(continuation)] = torch.tensor(continuation, dtype=torch.int64) + 1
    return [[token - 1 for token in row if token] for row in sum_over_ranks(loaded, padded).tolist()]


@torch.no_grad()
def _continue(
    loaded: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Callable[[list[int]], bool],
) -> list[list[int]]:
    """The continuations of one batch of prompts."""
    device = loaded.process.device
    continuations: list[list[int]] = [[] for _ in prompts]
    generators = [_generator(sampling.seed, prompt) for prompt in prompts]
    active = list(range(len(prompts)))
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens_BL = pad_sequences(prompts, device)
    capacity = tokens_BL.shape[1] + max_new_tokens
    with kv_cache(loaded.model, sequences=len(prompts), capacity=capacity, device=device) as cache:
        for generated in range(max_new_tokens):
            rows_B = torch.arange(len(lengths_B), device=device)
            logits_BV = logits_at(loaded.model, tokens_BL, rows_B, lengths_B - 1).float()
            cache.advance(lengths_B)
            next_tokens = _choose(logits_BV, sampling, [generators[row] for row in active])
            remaining = []
            for index, (row, token) in enumerate(zip(active, next_tokens, strict=False)):
                if token == loaded.tokenizer.eod_id:
                    continue
                continuations[row].append(token)
                if not stop(continuations[row]):
                    remaining.append(index)
            last = generated + 1 == max_new_tokens
            if last or not _any_active(loaded, bool(remaining)):
                break
            # With sharded weights every forward pass is collective: a rank whose sequences have all ended takes part
            # with one of them, and ignores the result.
            kept_rows = torch.tensor(remaining or [0], device=device)
            cache.select_rows(kept_rows)
            active = [active[index] for index in remaining]
            tokens_BL = torch.tensor([[next_tokens[index]] for index in kept_rows.tolist()], device=device)
            lengths_B = torch.ones(len(kept_rows), dtype=torch.int64, device=device)
    return continuations


def _any_active(loaded: LoadedModel, active: bool) -> bool:
    """Whether another forward pass is needed; with sharded weights, by any rank."""
    if not loaded.sharded:
        return active
    needed = torch.tensor(int(active), device=loaded.process.device)
    dist.all_reduce(needed, op=dist.ReduceOp.MAX)
    return bool(needed.item())


def _choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of every sequence: greedy, or sampled from the nucleus."""
    if sampling.temperature == 0 or not generators:
        best: list[int] = logits_BV.argmax(-1).tolist()
        return best
    probabilities_BV = (logits_BV.double().cpu() / sampling.temperature).softmax(-1)
    sorted_BV, tokens_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    reached_BV = sorted_BV.cumsum(-1)
    # The nucleus: the fewest most likely tokens whose probability reaches top_p, at least one.
    nucleus_B = ((reached_BV < sampling.top_p).sum(-1) + 1).clamp(max=logits_BV.shape[-1])
    uniform_B = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    mass_B = reached_BV.gather(-1, nucleus_B[:, None] - 1)[:, 0]
    index_B = (reached_BV <= (uniform_B * mass_B)[:, None]).sum(-1).minimum(nucleus_B - 1)
    next_tokens: list[int] = tokens_BV.gather(-1, index_B[:, None])[:, 0].tolist()
    return next_tokens


def _generator(seed: int, prompt: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # the sign bit is not accepted
