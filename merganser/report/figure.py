"""One figure of a run for papers and pages: what adapting changed, merger by merger."""

from collections.abc import Mapping
from io import StringIO
from typing import Any

from ..errors import DataError, MissingExtra


def gains_figure(scores: Mapping[str, Any]) -> str:
    """Return an SVG of a run's scores.json: each merger from without to with adapting, between base and experts.

    Tuned rows where there are any. Raises DataError for a run without a pair, MissingExtra without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("a figure", "report") from None
    if not scores["gains"]:
        raise DataError("no sentence was run both with and without adapting: there is no gain to draw")
    tuned = any(gain["tuned"] for gain in scores["gains"])
    gains = [gain for gain in scores["gains"] if gain["tuned"] == tuned][::-1]
    with mpl.rc_context({"svg.hashsalt": "merganser", "svg.fonttype": "none", "font.size": 9}):
        picture = Figure(figsize=(6.4, 0.9 + 0.38 * len(gains)), layout="constrained")
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
            f"mean over {len(scores['tasks'])} tasks, points; from without to with adapting, band: 95 % interval"
        )
        axes.spines[["top", "right"]].set_visible(False)
        out = StringIO()
        picture.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
