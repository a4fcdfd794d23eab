"""Claims about an extended vocabulary, with the rules that decide them. Written before any of the runs.

Measured are bits per byte of the whole validation text after the last step: tokens of two vocabularies hold other
amounts of text, so that losses per token do not compare. All differences are paired by seed. The rules are those of
averages_claims.py: a difference counts if it is beyond its limit by Student's t (two-sided 95 %, by the number of
seeds: 4.30 for three) times the standard error.

    old        the old vocabulary, 150 steps of German
    text       the same in 254 steps, which have as many bytes of German as 150 steps of the extended vocabulary
    extended   1,024 new tokens: 15 steps that train only the new rows, then 135 that train everything
    at once    the same tokens without the stage for the new rows: 150 steps that train everything

All continue the same English model (of the same seed), with the same peak LR, 5 % replay and as many tokens a step.
"""

from __future__ import annotations

from averages_claims import errors_that_count
from verdicts import Claim, Part

OLD, TEXT = "vocabulary_old/steps-150", "vocabulary_old/steps-254"
EXTENDED, FROM_MEAN, FROM_NORMAL = (f"vocabulary_extended/new_rows-{kind}" for kind in ("pieces", "mean", "normal"))
AT_ONCE = "vocabulary_at_once/vocabulary_at_once"


def vocabulary_claims() -> list[Claim]:
    """V1 to V6."""
    return [
        Claim("V1", "at equal tokens the extended vocabulary learns German better", [_lower("german", OLD, EXTENDED)]),
        Claim("V2", "at equal tokens it forgets no more English", [_within("english", EXTENDED, OLD)]),
        Claim(
            "V3",
            "at equal text, in 150 steps instead of 254, it learns German as well",
            [_within("german", EXTENDED, TEXT)],
        ),
        Claim("V4", "the stage for the new rows improves German", [_lower("german", AT_ONCE, EXTENDED)]),
        Claim("V5", "the stage for the new rows keeps more English", [_lower("english", AT_ONCE, EXTENDED)]),
        Claim(
            "V6",
            "new rows from their pieces are a better start than the mean of all rows, and than random rows",
            [_lower("german", other, EXTENDED) for other in (FROM_MEAN, FROM_NORMAL)],
        ),
    ]


def _lower(dataset: str, worse: str, better: str) -> Part:
    return Part(
        f"{dataset.capitalize()}, {worse.rpartition('/')[2]} minus {better.rpartition('/')[2]}",
        [worse, better],
        lambda e: e[worse].losses[dataset] - e[better].losses[dataset],
        errors=errors_that_count,
    )


def _within(dataset: str, run: str, reference: str) -> Part:
    return Part(
        f"{dataset.capitalize()}, {run.rpartition('/')[2]} minus {reference.rpartition('/')[2]}",
        [run, reference],
        lambda e: e[run].losses[dataset] - e[reference].losses[dataset],
        "within",
        lambda e: e[reference].losses[dataset],
        errors=errors_that_count,
    )
