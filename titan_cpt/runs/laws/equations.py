"""Published laws of losses in continual pre-training, as equations to fit. Losses are in nats per token.

What each law omits, and what could not be verified, is in docs/guides/laws.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from titan_cpt.runs.laws.fitting import Array, Equation

FREE = -np.inf

CMR_SOURCE = "Gu et al. 2024, arXiv:2407.17467"
D_CPT_SOURCE = "Que et al. 2024, arXiv:2406.01375"
LOG_LINEAR_SOURCE = "Ye et al. 2024, arXiv:2403.16952; Olmix, arXiv:2602.12237"
LR_CURVE_SOURCE = "Wang et al. 2025, arXiv:2505.07796; Tissue et al. 2024, arXiv:2408.11029"


def power_of_share() -> Equation:
    """L(R) = beta + alpha R^s: the loss of one dataset against the share R of the domain, at one token budget.

    Source: Gu et al. 2024, arXiv:2407.17467, section 5.1 and table 2. x: R.
    """
    return Equation(
        text="L(R) = beta + alpha R^s",
        source=CMR_SOURCE,
        coefficients=(("beta", FREE), ("alpha", FREE)),
        shape=(("s", -8.0, 8.0),),
        terms=lambda shape, x: np.stack([np.ones(len(x)), x[:, 0] ** shape[0]], axis=1),
        starts=[(s,) for s in (-3.0, -1.0, -0.5, -0.1, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 4.0)],
    )


def critical_share() -> Equation:
    """R_CMR(T) = beta + alpha T^s: the critical mixture ratio against the token budget.

    Source: Gu et al. 2024, arXiv:2407.17467, equation 8. x: T, relative to the largest budget.
    """
    return Equation(
        text="R(T) = beta + alpha T^s",
        source=f"{CMR_SOURCE}, equation 8",
        coefficients=(("beta", FREE), ("alpha", FREE)),
        shape=(("s", -4.0, 4.0),),
        terms=lambda shape, x: np.stack([np.ones(len(x)), x[:, 0] ** shape[0]], axis=1),
        starts=[(s,) for s in (-2.0, -1.0, -0.5, -0.1, 0.1, 0.3, 0.5, 1.0, 2.0)],
    )


def d_cpt(*, several_sizes: bool) -> Equation:
    """The D-CPT law: the loss of one dataset against model size N, tokens D and the share r of its own corpus.

        L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + epsilon)^gamma

    Source: Que et al. 2024, arXiv:2406.01375, the parameterization that the paper selects. x: N, D, r; N and D relative
    to the largest ones. With one model size A / N^alpha is a constant like E, and is omitted.
    """
    of_size = (("A", 0.0),) if several_sizes else ()
    exponent = (("alpha", 1e-3, 5.0),) if several_sizes else ()

    def terms(shape: Array, x: Array) -> Array:
        size, tokens, share = x.T
        eta, beta, epsilon, gamma = shape[:4]
        columns = [np.ones(len(x)), share**eta / tokens**beta, (share + epsilon) ** -gamma]
        return np.stack([*columns, *([size ** -shape[4]] if several_sizes else [])], axis=1)

    grid = product((0.5, 1.5), (0.15, 0.6), (0.03, 0.3), (0.3, 1.0))
    sizes = ((0.1,), (0.5,)) if several_sizes else ((),)
    return Equation(
        text="L = E + A/N^alpha + B r^eta/D^beta + C/(r + epsilon)^gamma"
        if several_sizes
        else "L = E + B r^eta/D^beta + C/(r + epsilon)^gamma",
        source=D_CPT_SOURCE,
        coefficients=(("E", 0.0), ("B", 0.0), ("C", 0.0), *of_size),
        shape=(("eta", 1e-3, 10.0), ("beta", 1e-3, 5.0), ("epsilon", 1e-4, 10.0), ("gamma", 1e-3, 10.0), *exponent),
        terms=terms,
        starts=[(*each, *size) for each in grid for size in sizes],
    )


def log_linear(datasets: Sequence[str]) -> Equation:
    """L(p) = c + k exp(sum_j t_j p_j): the loss of one dataset against the shares p_j of all datasets but the last.

    As the shares add up to 1, this is c + exp(sum over all datasets): k is exp(t) of the last one, and each other t_j
    is relative to it.

    Source: Ye et al. 2024, arXiv:2403.16952 (data mixing laws); Olmix, arXiv:2602.12237 (log-linear).
    x: the shares of all datasets but the last.
    """
    names = tuple(datasets)[:-1]
    signs = list(product((-2.0, -0.3, 0.3, 2.0), repeat=len(names)))
    return Equation(
        text="L(p) = c + k exp(sum t_j p_j)",
        source=LOG_LINEAR_SOURCE,
        coefficients=(("c", 0.0), ("k", 0.0)),
        shape=tuple((f"t_{name}", -30.0, 30.0) for name in names),
        terms=lambda shape, x: np.stack([np.ones(len(x)), np.exp(np.clip(x @ shape, -60, 60))], axis=1),
        starts=signs if len(signs) <= 256 else _few_signs(len(names)),
    )


def _few_signs(count: int) -> list[tuple[float, ...]]:
    """Starting points of many datasets: one exponent at a time, on small ones of either sign."""
    return [
        tuple(value if index == at else base for index in range(count))
        for base in (-0.1, 0.1)
        for at in range(count)
        for value in (-2.0, 2.0)
    ]


def lr_curve() -> Equation:
    """The loss of one dataset at every step of continual pre-training, from the learning rates so far.

        L = L0 + A (S1_before + S1)^-alpha - C S2 + B (1 - (1 + E S1)^-beta)

    S1 is the sum of the LRs of the stage so far, S1_before that of all steps before the stage, S2 the annealing
    area (`annealing_areas`). The first three terms are the curve of pre-training, the last one is the shift of the
    distribution. The annealing area before the stage is the same for all runs and part of L0.

    Source: Wang et al. 2025, arXiv:2505.07796, section 3. x: S1_before, S1, S2, all relative to the largest S1.
    """

    def terms(shape: Array, x: Array) -> Array:
        before, area, annealed = x.T
        alpha, rate, beta = shape
        shifted = 1 - (1 + rate * area) ** -beta
        return np.stack([np.ones(len(x)), (before + area) ** -alpha, -annealed, shifted], axis=1)

    return Equation(
        text="L = L0 + A (S1_before + S1)^-alpha - C S2 + B (1 - (1 + E S1)^-beta)",
        source=LR_CURVE_SOURCE,
        coefficients=(("L0", 0.0), ("A", 0.0), ("C", 0.0), ("B", FREE)),
        shape=(("alpha", 1e-3, 5.0), ("E", 1e-3, 1e5), ("beta", 1e-3, 10.0)),
        terms=terms,
        starts=list(product((0.2, 0.5, 1.5), (1.0, 10.0, 100.0, 1000.0), (0.2, 0.6, 1.5))),
    )


def annealing_areas(lrs: Array, decay: float) -> Array:
    """S2 after each step: the sum of m_i, where m_i = decay m_(i-1) + (lr_(i-1) - lr_i) and m is 0 at the first step.

    Source: Tissue et al. 2024, arXiv:2408.11029, in which decay is 0.99 to 0.999. A warm-up counts with its negative
    area.
    """
    falls = np.concatenate([[0.0], lrs[:-1] - lrs[1:]])
    momentum = np.empty_like(falls)
    last = 0.0
    for index, fall in enumerate(falls):
        last = decay * last + fall
        momentum[index] = last
    return np.cumsum(momentum)
