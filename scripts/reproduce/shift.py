"""How strong a shift between prepared texts is, before any training: cross-entropy of a token bigram model.

    python scripts/reproduce/shift.py --from english=data/curve/a,data/curve/b --to linux=data/curve/linux

A bigram model of the tokens of `--from` reads the first tokens of PREFIX-heldout of every `--from` and `--to`; so do
bigram models of each of them, for as many tokens of training text as the smallest has. Printed is, for each pair, the
cross-entropy in nats per token and the excess over the target's own model: 0 is no shift.

    P(w | v) = (c(v, w) + T(v) P(w)) / (c(v) + T(v)),  T(v): number of different tokens seen after v

Source: Witten and Bell 1991, interpolated with unigram probabilities (add-one).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.indexed import IndexedTokens
from titan_cpt.errors import TitanError

Tokens = npt.NDArray[np.int64]
MOST_VALIDATION_TOKENS = 200_000


class Bigram:
    """Bigram probabilities of a stream of tokens, smoothed as the module's docstring says."""

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        """Count; memory is 8 bytes times the square of the vocabulary."""
        size = vocab_size
        pairs = np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).reshape(size, size)
        followers = (pairs > 0).sum(1)
        self.unigram = (np.bincount(tokens, minlength=size) + 1) / (len(tokens) + size)
        self.pairs = pairs
        self.followers = followers
        self.total = pairs.sum(1) + followers

    def cross_entropy(self, tokens: Tokens) -> float:
        """Mean nats per token over all tokens but the first."""
        before, after = tokens[:-1], tokens[1:]
        backed_off = self.followers[before] * self.unigram[after]
        total = self.total[before]
        seen = total > 0
        probability = np.where(
            seen, (self.pairs[before, after] + backed_off) / np.maximum(total, 1), self.unigram[after]
        )
        return float(-np.log(probability).mean())


def read(prefixes: Sequence[Path], most: int | None = None) -> Tokens:
    """The tokens of all pairs, at most `most` of them, of each pair in proportion to its length."""
    opened = [IndexedTokens(prefix) for prefix in prefixes]
    whole = sum(each.count for each in opened)
    share = 1.0 if most is None else min(1.0, most / max(1, whole))
    return np.concatenate([each.read(0, int(each.count * share)).astype(np.int64) for each in opened])


def heldout(prefixes: Sequence[Path]) -> list[Path]:
    """The prefixes of the validation tokens."""
    return [prefix.with_name(f"{prefix.name}-heldout") for prefix in prefixes]


def matrix(
    training: Mapping[str, Tokens], validation: Mapping[str, Tokens], vocab_size: int
) -> dict[tuple[str, str], float]:
    """Cross-entropy of every (trained on, tested on) in nats per token; each model sees an equal number of tokens."""
    most = min(len(tokens) for tokens in training.values())
    found = {}
    for source, tokens in training.items():
        model = Bigram(np.concatenate(_spread(tokens, most)), vocab_size)
        found |= {(source, target): model.cross_entropy(tested) for target, tested in validation.items()}
    return found


def _spread(tokens: Tokens, most: int, pieces: int = 50) -> list[Tokens]:
    """`most` tokens in evenly spaced pieces of the text."""
    length = most // pieces
    starts = np.linspace(0, len(tokens) - length, pieces).astype(int)
    return [tokens[start : start + length] for start in starts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="sources", action="append", required=True, metavar="NAME=PREFIX,...")
    parser.add_argument("--to", dest="targets", action="append", default=[], metavar="NAME=PREFIX,...")
    options = parser.parse_args(arguments)
    groups = {}
    for text in [*options.sources, *options.targets]:
        name, _, prefixes = text.partition("=")
        groups[name] = [Path(prefix) for prefix in prefixes.split(",")]
    try:
        training = {name: read(prefixes) for name, prefixes in groups.items()}
        tested = {name: read(heldout(prefixes), MOST_VALIDATION_TOKENS) for name, prefixes in groups.items()}
    except TitanError as error:
        print(f"shift: {error}", file=sys.stderr)
        return 2
    vocab_size = 1 + max(int(tokens.max()) for tokens in [*training.values(), *tested.values()])
    found = matrix(training, tested, vocab_size)
    sources = [text.partition("=")[0] for text in options.sources]
    print(table(found, sources, {name: len(tokens) for name, tokens in training.items()}))
    return 0


def table(found: Mapping[tuple[str, str], float], sources: Sequence[str], tokens: Mapping[str, int]) -> str:
    """Markdown: a row for every target and source, the smallest excess first."""
    rows = ["| trained on | tested on | its training tokens | nats/token | its own model | excess |", "|---" * 6 + "|"]
    pairs = sorted(
        ((source, target) for source in sources for target in tokens if source != target),
        key=lambda pair: found[pair] - found[pair[1], pair[1]],
    )
    for source, target in pairs:
        own = found[target, target]
        cells = f"{tokens[target]:,} | {found[source, target]:.3f} | {own:.3f} | {found[source, target] - own:+.3f}"
        rows.append(f"| {source} | {target} | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
