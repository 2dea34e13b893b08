"""Figures for papers and pages: what adapting changed, merger by merger, in a run or over the variations of a study."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from ..errors import DataError, MissingExtra

NAMED = 20  # points at most that have their names beside them
MANY = 14  # names along an axis; more are written one under the other
SHARE = "recovered, % of what merging loses"
STYLE = {"svg.hashsalt": "merganser", "svg.fonttype": "none", "font.size": 9}


def gains_figure(scores: Mapping[str, Any]) -> str:
    """Return an SVG of a run's scores.json: each merger from without to with adapting, between base and experts.

    Tuned rows where there are any. Raises DataError for a run without a pair, MissingExtra without matplotlib.
    """
    mpl, figure = _matplotlib()
    if not scores["gains"]:
        raise DataError("no sentence was run both with and without adapting: there is no gain to draw")
    tuned = any(gain["tuned"] for gain in scores["gains"])
    gains = [gain for gain in scores["gains"] if gain["tuned"] == tuned][::-1]
    with mpl.rc_context(STYLE):
        picture = figure(figsize=(6.4, 0.9 + 0.38 * len(gains)), layout="constrained")
        axes = picture.subplots()
        for height, gain in enumerate(gains):
            a, b = (100 * scores["rows"][gain[k]]["mean"]["score"] for k in ("without", "with"))
            low, high = (a + 100 * gain["gain"][k] for k in ("low", "high"))
            axes.plot([low, high], [height, height], color="#9db8d9", linewidth=7, solid_capstyle="butt")
            axes.annotate(
                "",
                (b, height),
                (a, height),
                arrowprops={"arrowstyle": "->", "color": "#1f4e8c", "shrinkA": 0, "shrinkB": 0},
            )
            axes.plot([a], [height], "o", color="#8a8a8a", markersize=5)
        for name in ("base", "experts"):
            at = 100 * scores[name]["mean"]["score"]
            axes.axvline(at, color="#444444", linewidth=0.8, linestyle=":")
            axes.annotate(name, (at, len(gains) - 0.4), ha="center", fontsize=8, color="#444444")
        axes.set_yticks(range(len(gains)), [gain["merge"] for gain in gains])
        axes.set_ylim(-0.6, len(gains))
        axes.set_xlabel(
            f"mean over {len(scores['tasks'])} tasks, points\nfrom without to with adapting; band: 95 % interval"
        )
        axes.spines[["top", "right"]].set_visible(False)
        return _svg(picture)


def study_figure(told: Mapping[str, Any]) -> str:
    """Return an SVG of a study.json: the share of the loss that adapting recovers, by variation, a line a merger
    (points where variations have names instead of numbers).

    Bars behind them are 95 % intervals of the gain, paired, as shares of the same loss. Of a study that has points,
    those: a place each, or against what each has as ``x``.
    """
    if "points" in told:
        return _points_figure(told)
    ticks, lines = _by_merger(told) if len(told["variations"]) > 1 else _of_one(told)
    if len(lines) == 1 and len(ticks) > MANY:
        return _points_figure({"y": SHARE, "points": _listed(ticks, *lines.values())})
    mpl, figure = _matplotlib()
    with mpl.rc_context(STYLE):
        picture = figure(figsize=(6.4, 3.2), layout="constrained")
        axes = picture.subplots()
        for k, (name, cells) in enumerate(lines.items()):
            at = [x + 0.08 * (k - (len(lines) - 1) / 2) for x in range(len(ticks))]
            low, middle, high = ([cell[part] for cell in cells] for part in ("low", "score", "high"))
            axes.vlines(at, low, high, color=f"C{k % 10}", linewidth=4, alpha=0.3)
            style = "o-" if len(lines) > 1 and _ordered(ticks) else "o"
            axes.plot(at, middle, style, color=f"C{k % 10}", markersize=4, linewidth=1, label=name)
        axes.axhline(0, color="#444444", linewidth=0.8, linestyle=":")
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(ticks) > 8 else {}
        axes.set_xticks(range(len(ticks)), ticks, **slanted)
        axes.set_xlabel(told["axis"])
        axes.set_ylabel(SHARE)
        if len(lines) > 1:
            picture.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=4)
        axes.spines[["top", "right"]].set_visible(False)
        return _svg(picture)


def _ordered(ticks: Sequence[str]) -> bool:
    """Tell whether variations are numbers: a line from one name to the next would say that there is something between."""
    return all(tick.replace(".", "", 1).isdigit() for tick in ticks)


def _listed(ticks: Sequence[str], cells: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return one line's cells as points, which lie one under the other."""
    parts = (("low", "low"), ("y", "score"), ("high", "high"))
    return [
        {"label": tick, **{to: cell[part] / 100 for to, part in parts}} for tick, cell in zip(ticks, cells, strict=True)
    ]


def _points_figure(told: Mapping[str, Any]) -> str:
    """Return an SVG of points with their intervals, by name one under the other, or over their ``x``."""
    mpl, figure = _matplotlib()
    points = told["points"]
    across = "x" in told
    with mpl.rc_context(STYLE):
        picture = figure(figsize=(6.4, 3.6 if across else 0.9 + 0.3 * len(points)), layout="constrained")
        axes = picture.subplots()
        for k, one in enumerate(points):
            low, middle, high = (100 * one[part] for part in ("low", "y", "high"))
            at = one["x"] if across else len(points) - 1 - k
            line, ends = (axes.vlines, ([at], [low], [high])) if across else (axes.hlines, ([at], [low], [high]))
            line(*ends, color="#9db8d9", linewidth=4, alpha=0.8)
            axes.plot(*((at, middle) if across else (middle, at)), "o", color="#1f4e8c", markersize=4)
        (axes.axhline if across else axes.axvline)(0, color="#444444", linewidth=0.8, linestyle=":")
        if across:
            axes.set_xlabel(told["x"])
            axes.set_ylabel(told["y"])
        else:
            axes.set_yticks(range(len(points)), [one["label"] for one in reversed(points)])
            axes.set_xlabel(told["y"])
        axes.spines[["top", "right"]].set_visible(False)
        if across and len(points) <= NAMED:
            _name(picture, axes, points)
        return _svg(picture)


def _name(picture: Any, axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Write each point's name beside it, further up, down or to the left until it lies on no other and in the picture."""
    axes.margins(x=0.08)
    picture.draw_without_rendering()
    taken: list[Any] = []
    edge = axes.get_window_extent().x1
    places = [(side, 3 + 8 * up) for up in sorted(range(-5, 6), key=abs) for side in (5, -5)]
    for one in sorted(points, key=lambda one: -one["y"]):
        for x, y in places:
            text = axes.annotate(
                one["label"], (one["x"], 100 * one["y"]), (x, y), textcoords="offset points", fontsize=7,
                ha="left" if x > 0 else "right", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#888888"},
            )  # fmt: skip
            box = text.get_window_extent()
            if box.x1 < edge and not any(box.overlaps(other) for other in taken):
                break
            if (x, y) != places[-1]:
                text.remove()
        taken.append(box)


def _by_merger(told: Mapping[str, Any]) -> tuple[list[str], dict[str, list[dict[str, float]]]]:
    """Return the variations' labels and a line for each merger over them."""
    lines = {m: [_share(one, m) for one in told["variations"]] for m in told["mergers"]}
    return [one["label"] for one in told["variations"]], lines


def _of_one(told: Mapping[str, Any]) -> tuple[list[str], dict[str, list[dict[str, float]]]]:
    """Return the mergers and one line over them: there is but one variation."""
    one = told["variations"][0]
    return list(told["mergers"]), {one["label"]: [_share(one, m) for m in told["mergers"]]}


def _share(one: Mapping[str, Any], merger: str) -> dict[str, float]:
    """Return the gain and its interval in percent of what the merger loses."""
    cell = one["mergers"][merger]
    lost = one["experts"] - cell["without"]
    return {part: 100 * cell["gain"][part] / lost if lost > 0 else float("nan") for part in ("low", "score", "high")}


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("a figure", "report") from None
    return mpl, Figure


def _svg(picture: Any) -> str:
    out = StringIO()
    picture.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
