"""Weights of a mixture by the sizes of its datasets: proportional to tokens^temperature, under a bound on epochs.

All numbers are integers, decimals and fractions, so that every machine computes the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal, localcontext
from fractions import Fraction

from titan_cpt.config.stages import StageConfig
from titan_cpt.config.types import TokenMixture
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.stages.own_batch import seq_len_of

UNITS = 10**9  # weights are whole billionths, so that the recipe can store them
_SCALE = 10**18  # powers are integers of this unit


def token_weights(
    draft: PlanDraft, stage: StageConfig, mixture: TokenMixture, sequences: Fraction
) -> dict[str, Fraction]:
    """The weights of the stage's new data; equal ones if they cannot be computed, after adding to the problems.

    Args:
        sequences: the new sequences of the stage.
    """
    where = f"stages.{stage.name}.dataset"
    equal = dict.fromkeys(mixture, Fraction(1, len(mixture.of)))
    sizes = {name: _tokens(draft, name) for name in mixture}
    for name, tokens in sizes.items():
        if not tokens:
            draft.problems.append(
                f"{where}: the weight of {name!r} depends on its number of tokens, and its files do not exist yet: "
                "run `titan-cpt prepare` first, or give weights"
            )
    if not all(sizes.values()):
        return equal
    powers = {name: scaled_power(tokens or 1, mixture.temperature) for name, tokens in sizes.items()}
    caps = {name: _highest_weight(draft, stage, mixture, name, sequences) for name in mixture}
    if sum(caps.values()) < 1:
        seq_len = seq_len_of(draft.config, stage)
        most = int(sum(caps.values()) * sequences) * seq_len
        draft.problems.append(
            f"{where}: max_epochs = {mixture.max_epochs:g} allows {most:,} tokens of these datasets, and the stage "
            f"needs {int(sequences) * seq_len:,} new ones: raise max_epochs or shorten the stage"
        )
        return equal
    weights = in_units(water_filled(powers, caps), caps)
    if smallest := [name for name, weight in weights.items() if weight == 0]:
        draft.problems.append(f"{where}: the weight of {smallest[0]!r} would be below a billionth: remove it from of")
        return equal
    return weights


def scaled_power(tokens: int, exponent: float) -> int:
    """tokens^exponent * 10^18 as an integer; the exponent counts as the decimal number that was written.

    Decimal rounds its logarithm and exponential correctly, so that every machine computes the same number; a float's
    power depends on the mathematics library.
    """
    if exponent in (0.0, 1.0):
        return (tokens if exponent else 1) * _SCALE
    with localcontext(Context(prec=60)):
        power: Decimal = (Decimal(tokens).ln() * Decimal(str(exponent))).exp()
        return int(power * _SCALE)


def water_filled(powers: Mapping[str, int], caps: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Weights with sum 1: min(cap, level * power), with the one level that makes them add up.

    Args:
        powers: relative weights without caps, above 0.
        caps: highest weights, whose sum is at least 1.
    """
    weights: dict[str, Fraction] = {}
    free = sorted(powers)
    while free:
        rest = 1 - sum(weights.values(), Fraction(0))
        total = sum(powers[name] for name in free)
        capped = [name for name in free if rest * Fraction(powers[name], total) > caps[name]]
        if not capped:
            weights |= {name: rest * Fraction(powers[name], total) for name in free}
            break
        weights |= {name: caps[name] for name in capped}
        free = [name for name in free if name not in capped]
    return {name: weights[name] for name in sorted(weights)}


def in_units(weights: Mapping[str, Fraction], caps: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """The weights in whole billionths with sum 1: rounded down, and the missing units by the largest remainder.

    Weights below their cap get these units first, so that none exceeds its cap, where that is possible.
    """
    units = {name: int(weight * UNITS) for name, weight in weights.items()}
    order = sorted(weights, key=lambda name: (weights[name] >= caps[name], units[name] - weights[name] * UNITS, name))
    for index in range(UNITS - sum(units.values())):
        units[order[index % len(order)]] += 1
    return {name: Fraction(count, UNITS) for name, count in units.items()}


def _tokens(draft: PlanDraft, name: str) -> int | None:
    """Training tokens of a dataset with its domains; None while a file of it does not exist."""
    counts = [draft.inventory.tokens.get(source) for source in _sources(draft, name)]
    return None if None in counts else sum(count or 0 for count in counts)


def _sources(draft: PlanDraft, name: str) -> dict[str, Fraction]:
    """The sources of a dataset with their shares in it."""
    domains = draft.config.datasets[name].domains
    weights = {f"{name}.{domain}": Fraction(str(table.weight)) for domain, table in domains.items()} or {
        name: Fraction(1)
    }
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()}


def _highest_weight(
    draft: PlanDraft, stage: StageConfig, mixture: TokenMixture, name: str, sequences: Fraction
) -> Fraction:
    """The weight at which the first of the dataset's sources has been repeated `max_epochs` times."""
    if mixture.max_epochs is None:
        return Fraction(1)
    seq_len = seq_len_of(draft.config, stage)
    highest = [
        Fraction(str(mixture.max_epochs)) * _stage_tokens(draft, source, seq_len) / (sequences * seq_len * share)
        for source, share in _sources(draft, name).items()
    ]
    return min(Fraction(1), *highest)


def _stage_tokens(draft: PlanDraft, source: str, seq_len: int) -> int:
    """Tokens of one epoch of a source, as the plan counts epochs: with padding where documents are packed."""
    packed = draft.inventory.packing.get((source, seq_len))
    return packed.sequences * seq_len if packed else draft.inventory.tokens.get(source) or 0
