"""Continuing prompts: the most likely token, or one drawn at random, until a sequence is to stop.

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
from titan_cpt.evaluation.inference import LoadedModel, batches, logits_at, padded, shard_batches, summed
from titan_cpt.models.common.kv_cache import kv_cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the draw is among the most likely tokens that together have this probability. Source: Holtzman et al.
            2020, arXiv:1904.09751.
        seed: with the prompt it decides every draw, whatever other prompts there are, their order, and the ranks.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    opened: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Callable[[list[int]], bool] = lambda continuation: False,
) -> list[list[int]]:
    """Continue every prompt up to the end of the document, to where `stop` says so, or by `max_new_tokens`.

    A prompt that leaves no room for them loses its beginning. The same result on every rank.

    Args:
        prompts: in tokens, none of them empty.
        stop: is given a continuation after each token of it.

    Returns:
        The continuations in tokens, without the end-of-document id.

    Raises:
        DataError: the model is given fewer tokens than are to be generated.
    """
    room = opened.max_length - max_new_tokens
    if room < 1:
        raise DataError(
            f"{max_new_tokens} new tokens leave no room for a prompt: this model is given {opened.max_length} tokens "
            "at most; generate fewer"
        )
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        numbers.setdefault(tuple(prompt)[-room:], []).append(number)
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
    longest_first = sorted(numbers, key=lambda tokens: (-len(tokens), tokens))
    for batch, counts in shard_batches(opened, batches(longest_first, opened, max_new_tokens)):
        continuations = _continue(opened, batch, max_new_tokens, sampling or Sampling(), stop)
        if counts:
            for prompt, continuation in zip(batch, continuations, strict=True):
                for number in numbers[prompt]:
                    found[number, : len(continuation)] = torch.tensor(continuation, dtype=torch.int64) + 1
    return [[token - 1 for token in row if token] for row in summed(opened, found).tolist()]


@torch.no_grad()
def _continue(
    opened: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Callable[[list[int]], bool],
) -> list[list[int]]:
    """The continuations of one batch."""
    device, end = opened.ranks.device, opened.tokenizer.eod_id
    continuations: list[list[int]] = [[] for _ in prompts]
    draws = [_draws(sampling.seed, prompt) for prompt in prompts]
    going = list(range(len(prompts)))
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens_BL = padded(prompts, device)
    capacity = tokens_BL.shape[1] + max_new_tokens
    with kv_cache(opened.model, sequences=len(prompts), capacity=capacity, device=device) as cache:
        for taken in range(max_new_tokens):
            rows_B = torch.arange(len(lengths_B), device=device)
            logits_BV = logits_at(opened.model, tokens_BL, rows_B, lengths_B - 1).float()
            cache.advance(lengths_B)
            chosen = _choose(logits_BV, sampling, [draws[row] for row in going])
            still = []
            for place, (row, token) in enumerate(zip(going, chosen, strict=False)):
                if token == end:
                    continue
                continuations[row].append(token)
                if not stop(continuations[row]):
                    still.append(place)
            last = taken + 1 == max_new_tokens
            if last or not _any_going(opened, bool(still)):
                break
            # Where passes are collective, a rank whose sequences have all ended runs one of them on, for nothing.
            places = torch.tensor(still or [0], device=device)
            cache.keep(places)
            going = [going[place] for place in still]
            tokens_BL = torch.tensor([[chosen[place]] for place in places.tolist()], device=device)
            lengths_B = torch.ones(len(places), dtype=torch.int64, device=device)
    return continuations


def _any_going(opened: LoadedModel, going: bool) -> bool:
    """Whether a further pass is to be made; where passes are collective, by any rank."""
    if not opened.sharded:
        return going
    asked = torch.tensor(int(going), device=opened.ranks.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked.item())


def _choose(logits_BV: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """The next token of every sequence."""
    if sampling.temperature == 0 or not draws:
        best: list[int] = logits_BV.argmax(-1).tolist()
        return best
    probabilities_BV = (logits_BV.double().cpu() / sampling.temperature).softmax(-1)
    sorted_BV, tokens_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    reached_BV = sorted_BV.cumsum(-1)
    # Kept: the shortest run of most likely tokens that reaches top_p, at least one.
    kept_B = ((reached_BV < sampling.top_p).sum(-1) + 1).clamp(max=logits_BV.shape[-1])
    drawn_B = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
    mass_B = reached_BV.gather(-1, kept_B[:, None] - 1)[:, 0]
    place_B = (reached_BV <= (drawn_B * mass_B)[:, None]).sum(-1).minimum(kept_B - 1)
    chosen: list[int] = tokens_BV.gather(-1, place_B[:, None])[:, 0].tolist()
    return chosen


def _draws(seed: int, prompt: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # the sign bit is not accepted
