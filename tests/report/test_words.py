"""Rounding is done once, and never says more than the number does."""

import math

import pytest

from merganser.report.words import change, nats, percent, seconds, share, signed


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (percent, 0.7124, "71.2"), (percent, 1.0, "100.0"), (percent, -0.016, "−1.6"), (percent, math.nan, "–"),
        (signed, 0.028, "+2.8"), (signed, -0.011, "−1.1"), (signed, -0.0004, "0.0"), (signed, 0.0, "0.0"),
        (share, 0.617, "62 %"), (share, math.inf, "–"),
        (nats, 0.0, "0"), (nats, 0.0004, "<0.001"), (nats, 0.0312, "0.031"), (nats, 1.234, "1.23"),
        (nats, 23.45, "23.4"), (nats, math.inf, "∞"), (nats, math.nan, "–"),
        (seconds, 0.42, "0.4 s"), (seconds, 75.2, "1 min 15 s"), (seconds, 3700.0, "1 h 1 min"),
    ],
)  # fmt: skip
def test_numbers_in_words(form, value: float, text: str) -> None:
    assert form(value) == text


def test_a_change_needs_something_to_change_from() -> None:
    assert (change(4.0, 1.0), change(1.0, 1.5), change(1.0, 1.001)) == ("−75 %", "+50 %", "no change")
    assert change(0.0, 1.0) == change(math.nan, 1.0) == ""
