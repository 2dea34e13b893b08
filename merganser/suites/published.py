"""What papers report on the benchmarks that suites repeat, beside what a run found."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..sentence import parse

FILE = Path(__file__).with_name("published.json")
COUNTS = (8, 14, 20)


@cache
def tables() -> dict[str, Any]:
    """Return the tables of published.json: by family of checkpoints, then kind of row, sentence, network, tasks."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def key(adapt: str | None, merge: str) -> str:
    """Return what a row is called in papers: its steps without their knobs and the scale."""
    steps = parse(f"{adapt} | {merge}" if adapt else merge)
    names = [step.name for step in (*steps.adapt, *steps.merging.steps)]
    return " | ".join(name for name in names if name != "scale")


def compare(scores: Mapping[str, Any], family: str, network: str, count: int) -> dict[str, Any]:
    """Return ours, published and difference (percent, points) for base, experts and every row of ``scores``.

    ``published`` is None where no number is known: never one of another family, network or number of tasks.
    """
    known = tables()[family]
    at = COUNTS.index(count)

    def line(name: str, kind: str, ours: float, published: Any) -> dict[str, Any]:
        value = None if published is None or network not in published else published[network][at]
        found = {"row": name, "scale": kind, "ours": 100 * ours, "published": value}
        return {**found, "difference": None if value is None else 100 * ours - value}

    lines = [line(row, "", scores[row]["mean"]["score"], known[row]) for row in ("base", "experts")]
    for row in scores["rows"]:
        name, kind = key(row["adapt"], row["merge"]), "tuned" if row["tuned"] else "written"
        lines.append(line(name, kind, row["mean"]["score"], known[kind].get(name)))
    return {"family": family, "network": network, "tasks": count, "source": known["source"], "rows": lines}


def compare_domains(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return our best merged model of each other domain beside the best published cell, in percent."""
    known = tables()["domainnet"]
    lines = []
    for task in (one["name"] for one in scores["domains"]["tasks"]):
        best = max(scores["domains"]["rows"], key=lambda row: row["tasks"][task]["score"])
        ours, value = 100 * best["tasks"][task]["score"], known["domains"].get(task)
        difference = None if value is None else ours - value
        name = f"{task}: {key(best['adapt'], best['merge'])}"
        kind = "tuned" if best["tuned"] else "written"
        lines.append({"row": name, "scale": kind, "ours": ours, "published": value, "difference": difference})
    return {"family": "domainnet", "network": "ViT-B/32", "tasks": 2, "source": known["source"], "rows": lines}


def write(report: Path, told: Mapping[str, Any]) -> None:
    """Write ``published.json`` beside a run's scores."""
    (report.parent / "published.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
