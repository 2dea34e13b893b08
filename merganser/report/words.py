"""Numbers and findings in words: the one place that rounds, and the one that says what a gain means."""

import math
from collections.abc import Mapping, Sequence

from .folder import Gain, Row, Score

NOTHING = "–"


def percent(value: float) -> str:
    """A fraction as points of 100, one decimal: 0.712 -> ``71.2``."""
    return f"{value * 100 + 0.0:.1f}".replace("-", "−") if math.isfinite(value) else NOTHING


def signed(value: float) -> str:
    """A difference of fractions with its sign: 0.028 -> ``+2.8``."""
    if not math.isfinite(value):
        return NOTHING
    text = f"{value * 100:.1f}"
    return "0.0" if float(text) == 0 else f"{float(text):+.1f}".replace("-", "−")


def share(value: float) -> str:
    """A fraction as a whole percentage: 0.62 -> ``62 %``."""
    return f"{value * 100:.0f} %".replace("-", "−") if math.isfinite(value) else NOTHING


def nats(value: float) -> str:
    """A divergence with as many digits as a person can use: 0.0312 -> ``0.031``."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return "<0.001"
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def seconds(value: float) -> str:
    """A duration: 0.42 -> ``0.4 s``, 75 -> ``1 min 15 s``."""
    if not math.isfinite(value):
        return NOTHING
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def interval(score: Score) -> str:
    """``69.0 to 73.1``, or an empty string where there is no interval."""
    return f"{percent(score.low)} to {percent(score.high)}" if math.isfinite(score.low + score.high) else ""


def change(before: float, after: float) -> str:
    """A relative change: 4.0, 1.0 -> ``−75 %``; nothing where there is no base to compare with."""
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return ""
    part = round((after / before - 1) * 100)
    return "no change" if part == 0 else f"{part:+d} %".replace("-", "−")


def verdict(gain: Score) -> str:
    """``better`` or ``worse`` where the 95 % interval, as the page prints it, leaves zero out; else ``unclear``."""
    return "better" if round(gain.low, 3) > 0 else "worse" if round(gain.high, 3) < 0 else "unclear"


def subject(adapts: Sequence[str | None]) -> str:
    """Who did it, as the first words of a sentence."""
    names = {str(adapt).split("(")[0].strip() for adapt in adapts}
    return "Resolving interference" if names == {"ri"} else "Adapting the experts"


def finding(gain: Gain) -> tuple[str, str]:
    """What a gain means, as the words before and after the merger's name."""
    said = verdict(gain.gain)
    if said == "worse":
        return "made", "worse"
    if said == "unclear":
        return "made no difference to", "that can be told from chance"
    if 0 < gain.recovered <= 1:
        return f"recovered {share(gain.recovered)} of what", "loses"
    return "raised", ""


def numbers(gain: Gain, without: Row, with_: Row) -> str:
    """``71.2 → 74.0 (+2.8, 95 % interval 1.9 to 3.7)``."""
    between = interval(gain.gain)
    known = f"95 % interval {between}" if between else "no interval known"
    return f"{percent(without.mean.score)} → {percent(with_.mean.score)} ({signed(gain.gain.score)}, {known})"


def overall(gains: Mapping[str, Score | None]) -> str:
    """What adapting gained over all mergers: ``+1.0 points (95 % interval 0.4 to 1.6) with tuned scales, ...``."""
    where = {"tuned": "with tuned scales", "default": "with the scales as written"}
    said = [
        f"{signed(gain.score)} (95 % interval {interval(gain)}) {words}"
        for key, words in where.items()
        if (gain := gains.get(key)) is not None
    ]
    return f"Over all mergers, in points: {', '.join(said)}." if said else ""


def lead(gains: Sequence[Gain], who: str, what: str) -> str:
    """The first line of the page for several mergers (``what``): how often it helped, hurt, or cannot be told."""
    said = [verdict(gain.gain) for gain in gains]
    n, better, worse, unclear = len(said), said.count("better"), said.count("worse"), said.count("unclear")
    every = f"both {what}" if n == 2 else f"all {n} {what}"
    if better == n:
        return f"{who} helped {every}."
    if worse == n:
        return f"{who} made {every} worse."
    if unclear == n:
        return f"{who} made no difference that can be told from chance, in {every}."
    clear = f"helped {better} of {n} {what}" if better else f"made {worse} of {n} {what} worse"
    clear += f" and made {worse} worse" if better and worse else ""
    return f"{who} {clear}" + (f"; for {unclear} the difference could be chance." if unclear else ".")
