"""Weak rows of made-up embeddings: every kind by hand, what must not be mistaken for one, and laws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_cpt.checkpoint.vocabulary import vocabulary_rows
from titan_cpt.checkpoint.vocabulary.vocabulary_rows import VocabularyRows
from titan_cpt.checkpoint.vocabulary.weak_row_report import counts_by_kind, used_rows, weak_row_lines
from titan_cpt.checkpoint.vocabulary.weak_rows import find_weak_rows
from titan_cpt.data.token_uses import TokenUses
from titan_cpt.data.tokenizer.token_texts import TokenTexts
from titan_cpt.models.registry import named_size

TOKENS, ROWS, WIDTH = 200, 256, 64
SPEC = replace(named_size("llama", "debug", 257), vocab_size=ROWS, width=WIDTH)


def rows_of(embedding, head=None):
    """As if these were the rows in files; an embedding without a head is tied."""
    weights = {"embedding.weight": embedding, "head.weight": head}
    spec = replace(SPEC, vocab_size=len(embedding), tie_embeddings=head is None)
    return VocabularyRows(spec, lambda name, rows: weights[name][rows], len(embedding))


def weak(embedding, tokens=TOKENS):
    """Kind -> ids of one weight."""
    found = find_weak_rows(rows_of(embedding), None if tokens is None else range(tokens))["embedding.weight"]
    return {kind: ids.tolist() for kind, ids in found.by_kind.items()}


def random_rows(seed=0, rows=ROWS):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.02


def trained_rows(seed=0, untrained=()):
    """Rows as those of Pythia: tokens have grown to over twice their initial norm, with a mean in common.

    Ids without a token, and the untrained ones, are as initialized.
    """
    initial = random_rows(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    common = 0.02 * torch.randn(WIDTH, generator=generator)
    grown = initial + common + 0.04 * torch.randn(ROWS, WIDTH, generator=generator)
    grown[TOKENS:] = initial[TOKENS:]
    grown[list(untrained)] = initial[list(untrained)]
    return grown


def collapsed_rows(seed=0, untrained=()):
    """Rows as those of a head: all ids that never were a target have moved far, and in one direction."""
    rows = random_rows(seed)
    away = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 1)) * 0.2
    for ids in (range(TOKENS, ROWS), untrained):
        rows[list(ids)] += away
    return rows


def test_healthy_rows_are_not_weak():
    """Neither those of a trained model, nor those of a random one, with or without ids that no token has."""
    for rows in (random_rows(), trained_rows(), collapsed_rows()):
        assert weak(rows) == weak(rows, ROWS) == weak(rows, None) == {}


def test_rows_that_are_nan_or_infinite_are_named_also_where_no_token_has_the_id():
    """A single value of a row is enough; the other rows are examined as without them."""
    rows = trained_rows(untrained=(7,))
    rows[3, 5], rows[9, 0], rows[TOKENS + 4, 63] = float("nan"), float("-inf"), float("inf")

    assert weak(rows) == {"non-finite": [3, 9, TOKENS + 4], "never trained": [7]}


def test_rows_near_zero_have_less_than_a_hundredth_of_the_median_norm():
    """All zeros, the 1e-21 of Llama 3, and 0.9 %; not 1.1 %; ids without a token may be anything."""
    rows = random_rows()
    rows[1] = 0
    rows[2] *= 1e-20
    norms = rows.norm(dim=1)
    for number, share in ((3, 0.009), (4, 0.011)):
        rows[number] *= share * norms[10:TOKENS].median() / norms[number]
    rows[TOKENS:] = 0

    assert weak(rows, TOKENS) == {"near zero": [1, 2, 3]}
    assert weak(torch.zeros(ROWS, WIDTH), ROWS) == {"equal": [*range(ROWS)]}  # a head that begins at zero


def test_a_row_of_negative_values_is_a_row_like_any_other():
    """unsloth's check takes the maximum of a row, which is below zero here."""
    for rows in (random_rows(), trained_rows()):
        rows[5] = -rows[5].abs()
        rows[6] = -rows[:TOKENS].norm(dim=1).mean() / WIDTH**0.5
        assert rows[5:7].amax() < 1e-16
        assert weak(rows) == {}


def test_a_common_mean_hides_nothing_and_makes_nothing_weak():
    """All rows moved by ten times their norm: the trained ones are not near each other, zeros are not near zero."""
    moved = 3.0 * torch.ones(WIDTH)

    assert weak(trained_rows() + moved) == weak(random_rows() + moved) == {}
    assert weak(trained_rows(untrained=(4, 9)) + moved) == {"never trained": [4, 9]}


@pytest.mark.parametrize("make", [trained_rows, collapsed_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_like_those_that_no_token_has_were_never_trained(make, dtype):
    """As initialized while others grew, and pushed away together while others stayed; ten random models each."""
    found = [weak(make(seed, untrained=(11, 50, 51)).to(dtype)) for seed in range(10)]

    assert found == [{"never trained": [11, 50, 51]}] * 10


def test_most_tokens_may_be_untrained_if_a_tenth_is_clearly_trained():
    """A large vocabulary and little text: 170 of 200 tokens are like the others' references."""
    untrained = [*range(170)]

    assert weak(collapsed_rows(untrained=untrained)) == {"never trained": untrained}


def test_few_reference_rows_are_no_reference_but_their_equals_are():
    """Seven ids without a token say nothing on spreads; a token with exactly such a row was never trained."""
    rows = trained_rows(untrained=(11,))
    rows[12] = rows[TOKENS + 2]
    kept = rows[: TOKENS + 7]

    assert weak(kept) == {"never trained": [12]}
    assert weak(rows) == {"never trained": [11, 12]}


def test_references_that_are_all_the_mean_find_their_equals_only():
    """As after an import that adds rows: a token near the mean is not one of them."""
    rows = trained_rows()
    rows[TOKENS:] = rows[:TOKENS].mean(0)
    rows[8] = rows[TOKENS]
    rows[9] = rows[TOKENS] + 1e-3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))

    assert weak(rows) == {"never trained": [8]}


def test_groups_of_equal_rows_are_named_bit_for_bit():
    """Two groups; a row that differs in the last bit of one value is in neither."""
    rows = trained_rows()
    rows[20] = rows[30] = rows[40]
    rows[60] = rows[61]
    rows[62] = rows[61]
    rows[62, 0] = torch.nextafter(rows[62, 0], torch.tensor(1.0))

    assert weak(rows) == weak(rows, None) == {"equal": [20, 30, 40, 60, 61]}


@settings(deadline=None, max_examples=25)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 99), kind=st.sampled_from([trained_rows, collapsed_rows]))
def test_scale_and_order_of_the_rows_change_nothing(exponent, seed, kind):
    """All rows times a power of two, and tokens in another order, which the ids follow."""
    rows = kind(seed, untrained=(1, 2))
    rows[5], rows[6] = 0, rows[7]
    expected = {"near zero": [5], "never trained": [1, 2], "equal": [6, 7]}
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = rows[[*order, *range(TOKENS, ROWS)]]

    assert weak(rows * 2.0**exponent) == expected
    assert weak(shuffled) == {kind: sorted(map(order.index, ids)) for kind, ids in expected.items()}


def test_an_untied_head_is_examined_by_itself():
    """Each weight with its own ids."""
    head = collapsed_rows(untrained=(9,))
    embedding = random_rows(3)
    embedding[4] = 0
    found = find_weak_rows(rows_of(embedding, head), range(TOKENS))

    assert counts_by_kind(found) == {"embedding.weight": {"near zero": 1}, "head.weight": {"never trained": 1}}


def test_blocks_change_nothing(monkeypatch):
    """Three rows at a time; the mean has the same bits, which are those of exact arithmetic."""
    rows = trained_rows(untrained=(3,))
    rows[7] = 0
    whole = rows_of(rows)
    healthy = find_weak_rows(whole, range(TOKENS))["embedding.weight"].healthy
    mean = whole.mean("embedding.weight", healthy)
    monkeypatch.setattr(vocabulary_rows, "_BLOCK_VALUES", 3 * WIDTH)

    assert weak(rows) == {"near zero": [7], "never trained": [3]}
    assert torch.equal(whole.mean("embedding.weight", healthy), mean)
    assert np.flatnonzero(~healthy).tolist() == [3, 7, *range(TOKENS, ROWS)]
    assert torch.equal(mean, rows[healthy].double().mean(0).float())


def test_the_report_names_the_most_used_rows_and_counts_the_rest():
    """Twelve rows near zero: ten by name, most uses first; the text is quoted and on one line."""
    rows = random_rows(rows=ROWS)
    rows[8:20] = 0  # among them the bytes of a tabulator, a line feed and a carriage return
    counts = np.zeros(ROWS, np.int64)
    counts[[10, 13]] = 5, 70
    uses = TokenUses(counts, counted=1000, tokens=1000)
    found = find_weak_rows(rows_of(rows), range(ROWS))
    (line,) = weak_row_lines(found, TokenTexts("bytes"), uses)
    (first,) = weak_row_lines(found, None)

    assert line == (
        "embedding: 12 rows are near zero, used 75 times: 13 '\\r' (70), 10 '\\n' (5), 8 '\\x08' (0), 9 '\\t' (0), "
        "11 '\\x0b' (0), 12 '\\x0c' (0), 14 '\\x0e' (0), 15 '\\x0f' (0), 16 '\\x10' (0), 17 '\\x11' (0) and 2 more"
    )
    assert first == "embedding: 12 rows are near zero: 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 and 2 more"
    assert {k: v.tolist() for k, v in used_rows(found, uses)["embedding.weight"].by_kind.items()} == {
        "near zero": [10, 13]
    }
    assert used_rows(found, uses._replace(remote=("en",)))["embedding.weight"].ids.tolist() == [*range(8, 20)]
