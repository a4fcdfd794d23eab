"""How tables write numbers, dates and durations."""

from titan_cpt.reporting.number_texts import count_text, date_text, duration_text, number_text, token_text


def test_numbers_have_a_fixed_number_of_digits_and_zero_counts_are_empty():
    """Losses with four decimals, tokens with four digits and a unit."""
    assert [number_text(None), number_text(2.5), number_text(2.5, sign=True)] == ["", "2.5000", "+2.5000"]
    assert [token_text(n) for n in (999, 1000, 2_949_120, 3 * 10**11)] == ["999", "1K", "2.949M", "300B"]
    assert [count_text(0), count_text(1234)] == ["", "1,234"]


def test_times_are_utc_and_durations_have_two_units():
    """1 Jan 2026, 00:00 UTC is 1767225600 seconds after the epoch."""
    assert [date_text(None), date_text(1767225600)] == ["", "2026-01-01 00:00"]
    assert [duration_text(s) for s in (None, 12.4, 90, 3 * 3600 + 20 * 60, 26 * 3600)] == [
        *("", "12 s", "2 min", "3 h 20 min", "1 d 2 h"),
    ]
