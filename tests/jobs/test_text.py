"""Numbers and durations as tables and messages show them."""

import pytest

from jobs.text import duration, number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3600, "1 h 00 min"),
        (11_520, "3 h 12 min"),
        (86_399, "23 h 59 min"),
        (90_000 * 100, "104 d 04 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_number_has_separators_and_a_dash_stands_for_none() -> None:
    assert (number(12345.6), number(0.25, 4), number(None)) == ("12,346", "0.2500", "–")
