"""The results file: what base, experts and every sentence scored, with intervals and paired gains (``scores.json``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..card import read_json, write_json
from .joint import Union
from .metrics import bootstrap, interval
from .run import Outcome, Scores, gained


@dataclass(frozen=True)
class Row:
    """One model's scores on the test splits and how it was chosen."""

    sentence: str
    scores: Scores
    merging: str = ""
    adapt: str | None = None
    scale: float | None = None
    tuned: bool = False
    val: float | None = None
    points: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    domains: Scores | None = None

    def in_domains(self) -> "Row":
        """Return the row with what it scored in other domains in place of its scores."""
        return replace(self, scores=self.domains or Scores(), domains=None)


def write_rows(path: Path, key: str, rows: Sequence[Row]) -> None:
    """Write rows with every prediction, so that any later comparison can be paired."""
    told = [
        {**row.__dict__, "scores": _dump(row.scores), "domains": row.domains and _dump(row.domains)} for row in rows
    ]
    write_json(path, {"key": key, "rows": told})


def read_rows(path: Path, key: str) -> list[Row] | None:
    """Return the rows at ``path``, or None where there are none with this key."""
    told = read_json(path)
    return None if told is None or told.get("key") != key else _rows_of(told)


def rows_in(run: Path) -> list[Row]:
    """Return all sentences' rows of a finished run, with every prediction."""
    sentences = {row["sentence"] for row in (read_json(run / "scores.json") or {"rows": []})["rows"]}
    found = [row for path in sorted((run / "rows").glob("*.json")) for row in _rows_of(read_json(path) or {"rows": []})]
    return [row for row in found if row.sentence in sentences]


def _rows_of(told: Mapping[str, Any]) -> list[Row]:
    return [
        Row(**{**row, "scores": _load(row["scores"]), "domains": _load(row["domains"]) if row.get("domains") else None})
        for row in told["rows"]
    ]


def _dump(scores: Scores) -> dict[str, Any]:
    return {
        task: {
            "metric": o.metric,
            "labels": o.labels.tolist(),
            "predictions": o.predictions.tolist(),
            "confidences": [round(c, 4) for c in o.confidences.tolist()],
            **({} if o.ranks is None else {"ranks": o.ranks.tolist()}),
            **({} if o.published is None else {"published": o.published.tolist()}),
        }
        for task, o in scores.items()
    }


def _load(told: Mapping[str, Any]) -> Scores:
    found = {}
    for task, o in told.items():
        labels, predictions, confidences = (np.array(o[name]) for name in ("labels", "predictions", "confidences"))
        ranks, published = (np.array(o[name]) if name in o else None for name in ("ranks", "published"))
        found[task] = Outcome(labels, predictions, confidences, o["metric"], ranks, published)
    return Scores(found)


def table(base: Scores, experts: Scores, rows: Sequence[Row], xi: Mapping[str, float]) -> dict[str, Any]:
    """Return the results as JSON values: base, experts, rows, gains and curves. ``xi`` by sentence, where measured."""
    return {
        "base": summary(base),
        "experts": summary(experts),
        "rows": [_row(row, experts, xi) for row in rows],
        "gains": gains(rows, experts),
        "curves": [
            {"merge": r.merging, "adapt": r.adapt, "points": r.points} for r in rows if r.tuned and len(r.points) > 1
        ],
    }


def summary(scores: Scores) -> dict[str, Any]:
    """Return every task's score and the mean, each with its interval."""
    tasks = {
        name: {"score": o.score, **interval(bootstrap(o.metric, o.labels, [o.predictions])[:, 0])}
        for name, o in scores.items()
    }
    low, high = scores.interval()
    return {"tasks": tasks, "mean": {"score": scores.mean, "low": low, "high": high}}


def joint(union: Union, base: Scores, ensembles: Mapping[str, Scores]) -> dict[str, Any]:
    """Return what there is in the union of all tasks' classes beside merged models: its size, base and ensembles."""
    sizes = {"classes": union.size(), "classes_published": union.size("published")}
    told = {"base": base, **{f"ensemble_{form}": scores for form, scores in ensembles.items()}}
    both = {name: {"hits": s.hits(), "hits_published": s.hits("published")} for name, s in told.items()}
    return {**sizes, **both}


def _row(row: Row, experts: Scores, xi: Mapping[str, float]) -> dict[str, Any]:
    told = summary(row.scores)
    for task, ratio in row.scores.normalised(experts).items():
        told["tasks"][task]["normalised"] = ratio
    worst = min(row.scores, key=lambda task: row.scores[task].score)
    return {
        "sentence": row.sentence,
        "adapt": row.adapt,
        "merge": row.merging,
        "scale": row.scale,
        "tuned": row.tuned,
        "val": row.val,
        **told,
        "normalised": _normalised(row.scores, experts),
        "worst": {"task": worst, "score": row.scores[worst].score},
        "ece": row.scores.calibration_error,
        "hits": row.scores.hits(),
        "hits_published": row.scores.hits("published"),
        "xi": xi.get(row.sentence),
        "seconds": row.seconds,
    }


def _normalised(scores: Scores, experts: Scores) -> dict[str, float]:
    draws: Any = 0
    for k, (name, o) in enumerate(sorted(scores.items())):
        both = bootstrap(o.metric, o.labels, [o.predictions, experts[name].predictions], seed=k)
        draws = draws + np.divide(both[:, 0], both[:, 1], out=np.ones(len(both)), where=both[:, 1] > 0)
    ratios = scores.normalised(experts)
    return {"score": float(np.mean(list(ratios.values()))), **interval(draws / len(scores))}


def gains(rows: Sequence[Row], experts: Scores) -> list[dict[str, Any]]:
    """Return what adapting gained: rows that differ in their adapt words alone, paired example by example."""
    found = []
    for b, with_ in enumerate(rows):
        for a, without in enumerate(rows):
            if with_.adapt and not without.adapt and (with_.merging, with_.tuned) == (without.merging, without.tuned):
                gain = with_.scores.compared(without.scores)
                lost = experts.mean - without.scores.mean
                found.append(
                    {
                        "merge": with_.merging,
                        "adapt": with_.adapt,
                        "tuned": with_.tuned,
                        "without": a,
                        "with": b,
                        "gain": gain,
                        "recovered": gain["score"] / lost if lost > 0 else None,
                    }
                )
    return found


def overall_gain(rows: Sequence[Row], tuned: bool = True) -> dict[str, float] | None:
    """Return the mean gain over all mergers that were run with and without adapting, with its paired interval."""
    pairs = [
        (a, b)
        for b in rows
        for a in rows
        if b.adapt and not a.adapt and (a.merging, a.tuned) == (b.merging, b.tuned) and a.tuned == tuned
    ]
    if not pairs:
        return None
    told = gained([(a.scores, b.scores) for a, b in pairs])
    return {part: told[part] for part in ("score", "low", "high")}
