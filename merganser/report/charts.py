"""Charts with axes, drawn by matplotlib to SVG that lives inside the page.

Every chart is one small panel, so the page can lay panels out for a phone as for a desk. Text stays text, colours are
variables of the page's style sheet (hence light, dark and print from one drawing), ids are unique in the page, and
the same numbers give the same bytes. Words around a panel (its title, its legend) are the page's, not the chart's.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours matplotlib draws with and never otherwise uses -> the style sheet's variable.
VARIABLES = ("ink", "muted", "rule", "with", "without", "own", "others", "surface")
HEX = {name: f"#01020{index}" for index, name in enumerate(VARIABLES)}
WIDTH, HEIGHT = 300, 195  # px at which text has its own size
POINTS = 120  # a curve longer than this is thinned: more points than pixels only make the page heavy
DECADES = 4  # how far below its largest value a loss is shown


def training_panel(name: str, curves: Sequence[tuple[str, bool, Sequence[tuple[float, float]]]], prefix: str) -> Markup:
    """Draw the losses of one expert while it is adapted, log scale.

    ``curves``: (colour, held out?, [(step, nats)]); values that are not positive cannot be shown and are left out.
    """
    shown = [(colour, held, _thin([p for p in points if p[1] > 0])) for colour, held, points in curves]
    top = max((y for _, _, points in shown for _, y in points), default=1.0)
    low = max(min((y for _, _, points in shown for _, y in points), default=0.1), top / 10**DECADES)

    def draw(axes: "Axes", tips: dict[str, list[str]]) -> None:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, top * 1.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("step")
        for index, (colour, held, points) in enumerate(shown):
            xs, ys = [p[0] for p in points], [max(p[1], low) for p in points]
            axes.plot(xs, ys, color=HEX[colour], linewidth=1.6, dashes=(3.5, 2) if held else (None, None))
            if points and not held:
                gid = f"end{index}"
                axes.plot(xs[-1:], ys[-1:], "o", color=HEX[colour], markersize=4.5, gid=gid)
                tips[gid] = [f"{name}, step {xs[-1]:g}: {_short(points[-1][1])} nats"]

    ends = ", ".join(f"{colour} {_short(p[-1][1])}" for colour, held, p in shown if p and not held)
    return _panel(draw, f"Losses of {name} while it is adapted; at the end: {ends or 'nothing logged'}", prefix)


def scale_panel(
    name: str,
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float, float]], float | None]],
    levels: Sequence[tuple[str, float]],
    span: tuple[float, float],
    prefix: str,
    judged: str = "validation data",
) -> Markup:
    """Draw the score against the scaling coefficient, test solid and what chose dashed, the chosen scale ringed.

    ``judged``: what that is. Where the test splits were not scored along the curve, it is the solid one.
    ``curves``: (colour, label, [(scale, val, test)], chosen scale); ``levels``: (label, score) drawn across;
    ``span``: lowest and highest score of all panels, so that panels can be compared. Scores are fractions.
    """

    def draw(axes: "Axes", tips: dict[str, list[str]]) -> None:
        low, high = span[0] * 100, span[1] * 100
        room = max(high - low, 1)  # where all is alike there is no span
        axes.set_ylim(low - 0.05 * room, high + 0.12 * room)
        axes.set_xlabel("scale")
        axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", nbins=5)
        for label, level in levels:
            axes.axhline(level * 100, color=HEX["muted"], linewidth=0.9, dashes=(1, 2))
            axes.annotate(
                label, (0, level * 100), xycoords=("axes fraction", "data"), xytext=(2, 2.5),
                textcoords="offset points", color=HEX["muted"], fontsize=9.5,
            )  # fmt: skip
        for index, (colour, label, points, chosen) in enumerate(curves):
            tested = [(x, test * 100) for x, _, test in points if math.isfinite(test)]
            valued = [(x, val * 100) for x, val, _ in points if math.isfinite(val)]
            if tested:
                axes.plot(*_columns(valued), color=HEX[colour], linewidth=1.1, dashes=(3, 2), alpha=0.75)
            solid, where = (tested, "test") if tested else (valued, judged)
            gid = f"curve{index}"
            axes.plot(*_columns(solid), "o-", color=HEX[colour], linewidth=1.8, markersize=3.6, gid=gid)
            tips[gid] = [f"{label}, scale {x:g}: {y:.1f} on {where}" for x, y in solid]
            if chosen is not None and solid:
                nearest = min(solid, key=lambda point: abs(point[0] - chosen))
                axes.plot(
                    *_columns([nearest]), "o", markersize=10, markerfacecolor="none", markeredgewidth=1.8,
                    markeredgecolor=HEX[colour], gid=f"chosen{index}",
                )  # fmt: skip
                tips[f"chosen{index}"] = [f"{label}, chosen scale {chosen:g}: {nearest[1]:.1f} on {where}"]

    chosen = "; ".join(f"{label}: {value:g} chosen" for _, label, _, value in curves if value is not None)
    return _panel(draw, f"Score of {name} against the scaling coefficient. {chosen}", prefix)


def bars_panel(
    name: str, tasks: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], top: float, prefix: str
) -> Markup:
    """Draw one group of horizontal bars a task: (colour, label, a value a task). ``top`` is common to all panels."""
    height = 28 + len(tasks) * (9 * len(series) + 9)

    def draw(axes: "Axes", tips: dict[str, list[str]]) -> None:
        thick = 0.74 / max(len(series), 1)
        for index, (colour, label, values) in enumerate(series):
            finite = [value if math.isfinite(value) else 0.0 for value in values]
            at = [row - 0.37 + thick * (index + 0.5) for row in range(len(tasks))]
            bars = axes.barh(at, finite, height=thick * 0.9, color=HEX[colour], linewidth=0)
            for row, bar in enumerate(bars):
                bar.set_gid(f"bar{index}n{row}")
                tips[f"bar{index}n{row}"] = [f"{tasks[row]}, {label}: {_short(values[row])} nats"]
        axes.set_yticks(range(len(tasks)), [_clip(task) for task in tasks])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        axes.set_xlim(0, top * 1.04)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)

    sums = "; ".join(f"{label}: {_short(sum(values))} in all" for _, label, values in series)
    left = 12 + 5.6 * max((len(_clip(task)) for task in tasks), default=0)
    return _panel(draw, f"Interference of {name} by task. {sums}", prefix, height=height, left=left, bottom=20)


def _panel(
    draw: Callable[["Axes", dict[str, list[str]]], None], label: str, prefix: str,
    height: int = HEIGHT, left: float = 34, bottom: float = 35,
) -> Markup:  # fmt: skip
    """Draw on fresh axes; ``draw`` may name artists (gid) and say what to show when each of their marks is touched."""
    tips: dict[str, list[str]] = {}
    with _house_style():
        from matplotlib.figure import Figure

        # Margins are given, not fitted: the reader's font is not the one matplotlib measures with.
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + 8) / WIDTH, 1 - (bottom + 8) / height))
        draw(axes, tips)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # The reader's browser has the glyphs that the font used for measuring may lack.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label, prefix, tips)


@contextmanager
def _house_style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("the report", "report") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc must not change the page
        style: dict[str, Any] = {
            "svg.fonttype": "none", "svg.hashsalt": "merganser", "text.parse_math": False, "font.size": 10.5,
            "axes.edgecolor": HEX["rule"], "axes.labelcolor": HEX["muted"], "axes.linewidth": 1.0, "axes.grid": True,
            "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
            "axes.spines.left": False, "axes.labelsize": 10.5, "grid.color": HEX["rule"], "grid.linewidth": 0.8,
            "xtick.color": HEX["rule"], "ytick.color": HEX["rule"], "xtick.labelcolor": HEX["muted"],
            "ytick.labelcolor": HEX["muted"], "ytick.major.size": 0, "ytick.minor.size": 0, "xtick.minor.size": 0,
            "xtick.labelsize": 10, "ytick.labelsize": 10, "text.color": HEX["ink"], "lines.solid_capstyle": "round",
        }  # fmt: skip
        matplotlib.rcParams.update(style)  # type: ignore[arg-type]
        yield


def _inline(svg: bytes, label: str, prefix: str, tips: dict[str, list[str]]) -> Markup:
    """Turn matplotlib's SVG file into an element of the page: its own ids, the page's colours and font, no baggage."""
    root = ET.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            if "}" in key:
                element.set(key.rpartition("}")[2], element.attrib.pop(key))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style") or (child.tag == "defs" and not len(child)):
                parent.remove(child)
    for gid, texts in tips.items():
        _attach(root, gid, texts)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    for element in root.iter():
        if element.get("id") is not None and element.get("id") not in used:
            del element.attrib["id"]
        for key, value in element.attrib.items():
            element.set(key, _clean(key, value, prefix))
        if element.get("transform") == "":
            del element.attrib["transform"]
    _flatten(root)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": label}
    text = re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))
    return Markup(text)  # ElementTree escapes every text it serialises


def _flatten(parent: ET.Element) -> None:
    """Drop groups that say nothing, and their walls: most of a matplotlib drawing is those."""
    children = []
    for child in parent:
        _flatten(child)
        if child.tag in ("g", "defs") and not child.attrib:
            children += [child] if child.tag == "defs" and len(child) else list(child)
        elif child.get("style", "").strip() != "fill: none":
            children.append(child)
    parent[:] = children


def _attach(root: ET.Element, gid: str, texts: list[str]) -> None:
    group = next((element for element in root.iter() if element.get("id") == gid), None)
    if group is None:
        return
    marks = [element for element in group.iter() if element.tag == "use"]
    marks = marks or [element for element in group.iter() if element.tag == "path"]
    for mark, text in zip(marks, texts, strict=False):
        mark.set("data-tip", text)


def _references(value: str) -> list[str]:
    return re.findall(r"url\(#([^)]+)\)", value) + ([value[1:]] if value.startswith("#") else [])


def _clean(key: str, value: str, prefix: str) -> str:
    if key == "data-tip":
        return value
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return f"#{prefix}-{value[1:]}"
    if key in ("d", "x", "y", "width", "height", "transform", "points"):
        value = re.sub(r"rotate\(-?0 [^)]*\)", "", value)
        value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
        return re.sub(r"\s+", " ", value).strip()
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for name, colour in HEX.items():
            value = value.replace(colour, f"var(--{name})")
    return value


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = math.ceil(len(points) / POINTS) or 1
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _clip(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
