"""A checkpoint as a model of lm-evaluation-harness: log-likelihoods of continuations and generated texts.

It differs from the harness's own `hf` model on an export of the same weights in four ways: log-probabilities are
float32 whatever the dtype of the weights; the name of a special token inside a text is encoded as text; contexts begin
with the begin-of-document token if and only if training documents did; and with a `max_length` below 512, generated
texts are by default at most half of it long.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from titan_cpt.errors import DataError
from titan_cpt.evaluation.generate import Sampling, generate
from titan_cpt.evaluation.inference import LoadedModel, loglikelihoods

MAX_GENERATED_TOKENS = 256
"""Tokens generated for a task that does not set max_gen_toks; the harness's own default."""


class CheckpointLM(TemplateLM):
    """The model interface of lm-evaluation-harness. Every rank gets all requests and returns all results.

    The ranks share the work.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.loaded = loaded
        self._tokenizer = loaded.tokenizer
        lengths = self._tokenizer.token_byte_lengths()
        self._text_ids = frozenset(number for number in range(self._tokenizer.vocab_size) if lengths[number])
        self._encoded: tuple[str, list[int]] = ("", [])

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id."""
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: the begin-of-document id if there is one, else the end-of-document id."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.loaded.max_length

    @property
    def max_gen_toks(self) -> int:
        """Number of tokens to generate for a task that does not set it."""
        return min(MAX_GENERATED_TOKENS, max(1, self.max_length // 2))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after the begin-of-document id if training documents began with it.

        The last result is cached, since the choices of one question share their context.

        Args:
            add_special_tokens: False omits the begin-of-document id.
        """
        if self._encoded[0] != string:
            self._encoded = (string, self._tokenizer.encode(string))
        bos = None if add_special_tokens is False else self._tokenizer.bos_id
        return [*([] if bos is None else [bos]), *self._encoded[1]]

    def tok_decode(self, tokens: list[int]) -> str:
        """The text of ids, without special tokens and padding ids of the vocabulary."""
        return self._tokenizer.decode([token for token in tokens if token in self._text_ids])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is greedy) of each request's continuation after its context."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return loglikelihoods(self.loaded, [(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts in nats: each token once, after as much context as fits."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        nats = [0.0] * len(requests)
        for owner, (part, _greedy) in zip(owners, loglikelihoods(self.loaded, pairs), strict=True):
            nats[owner] += part
        return nats

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generated texts, up to and without the first of a request's stop strings.

        Raises:
            DataError: a task requests more tokens than the model's longest input, or unsupported sampling options.
        """
        texts = [""] * len(requests)
        numbered = sorted(enumerate(requests), key=lambda pair: repr(pair[1].args[1]))
        for _, group in groupby(numbered, key=lambda pair: repr(pair[1].args[1])):
            same = list(group)
            options = dict(normalize_gen_kwargs(same[0][1].args[1], self.max_gen_toks))
            stops = [text for text in options.pop("until") if text]
            continuations = generate(
                self.loaded,
                [self.tok_encode(request.args[0]) or [self.prefix_token_id] for _, request in same],
                max_new_tokens=options.pop("max_gen_toks"),
                sampling=_sampling(options),
                stop=lambda tokens, stops=stops: any(text in self.tok_decode(tokens) for text in stops),  # type: ignore[misc]
            )
            for (number, _), tokens in zip(same, continuations, strict=True):
                texts[number] = _cut(self.tok_decode(tokens), stops)
        return texts


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """The task's sampling options."""
    drawn = bool(options.get("do_sample"))
    foreign = {key: value for key, value in options.items() if key not in ("do_sample", "temperature", "top_p")}
    if foreign:
        raise DataError(f"a task requests generation with {foreign}; supported are do_sample, temperature and top_p")
    return Sampling(float(options.get("temperature") or 0.0), float(options.get("top_p", 1.0))) if drawn else Sampling()


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
