"""Time attention and whole models with and without a document mask on a CPU, forward and backward, one thread.

    python scripts/bench/documents.py

The contestants take turns; medians in milliseconds. In the first table "documents" is titan_cpt's operator, which calls
torch's kernel document by document, "matrix" one call with a boolean mask, "plain" causal attention across documents.
The second table has the forward and backward pass of a model over sequences of 16 equal documents.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_cpt.common.process_settings import keep_freed_memory
from titan_cpt.data.documents import document_starts
from titan_cpt.models.build import build_model
from titan_cpt.models.common.document_attention import Documents, document_attention
from titan_cpt.models.registry import named_size

TURNS = 7
HEADS, WIDTH = 8, 64
LENGTH = 2048
DOCUMENTS = {"one": LENGTH, "16 equal": LENGTH // 16, "128 of 16 tokens": 16, "1,024 of 2 tokens": 2}
MODELS = (("llama", "mini"), ("gpt_neox", "mini"))


def medians_ms(contestants: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each function in milliseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(TURNS + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def starts_of(length: int) -> Tensor:
    """First positions of documents of this length in one sequence, [1, L]."""
    tokens = torch.ones(1, LENGTH, dtype=torch.int64)
    tokens[:, length - 1 :: length] = 0
    return document_starts(tokens, 0)


def attention_ms(length: int, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of one layer's attention over documents of this length."""
    inputs = [torch.randn(1, HEADS, LENGTH, WIDTH).to(dtype).requires_grad_() for _ in range(3)]
    starts_BL = starts_of(length)
    places_L = torch.arange(LENGTH)
    seen = (places_L >= starts_BL[:, :, None]) & (places_L <= places_L[:, None])
    documents = Documents(starts_BL)

    def differentiated(attend: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            out = attend()
            return torch.autograd.grad(out, inputs, out)

        return run

    return medians_ms(
        {
            "documents": differentiated(lambda: document_attention(*inputs, documents=documents, window=None)),
            "matrix": differentiated(lambda: F.scaled_dot_product_attention(*inputs, attn_mask=seen[:, None])),
            "plain": differentiated(lambda: F.scaled_dot_product_attention(*inputs, is_causal=True)),
        }
    )


def model_ms(family: str, size: str, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of a model over a sequence of 16 equal documents."""
    model = build_model(named_size(family, size, 1024))
    model.init_weights(0)
    model.to(dtype)
    tokens_BL = torch.randint(1, 1024, (1, LENGTH))
    starts_BL = starts_of(DOCUMENTS["16 equal"])
    positions_BL = torch.arange(LENGTH, dtype=torch.int32) - starts_BL

    def run(**documents: Tensor) -> None:
        model.zero_grad()
        model(tokens_BL, **documents).float().square().mean().backward()

    return medians_ms(
        {
            "plain": run,
            "mask": lambda: run(starts_BL=starts_BL),
            "mask and positions": lambda: run(starts_BL=starts_BL, positions_BL=positions_BL),
        }
    )


def table(first: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table."""
    names = list(next(iter(rows.values())))
    print("\n" + first.ljust(34) + "".join(name.rjust(20) for name in names))
    for title, found in rows.items():
        print(title.ljust(34) + "".join(f"{found[name]:20.1f}" for name in names), flush=True)


def main() -> None:
    """Measure and print both tables."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    print(f"{LENGTH} positions; attention with {HEADS} heads of {WIDTH}; medians of {TURNS} in ms", file=sys.stderr)
    attended = [(word, name) for word in dtypes for name in DOCUMENTS]
    table(
        "attention over documents",
        {f"{name}, {word}": attention_ms(DOCUMENTS[name], dtypes[word]) for word, name in attended},
    )
    trained = [(word, model) for word in dtypes for model in MODELS]
    table(
        "model, 16 equal documents",
        {f"{' '.join(model)}, {word}": model_ms(*model, dtypes[word]) for word, model in trained},
    )


if __name__ == "__main__":
    main()
