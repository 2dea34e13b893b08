"""From what a run folder says to what the page shows: plain dicts, every number already in words.

Nothing here is HTML. Colours are levels from 0 to 100, positions are percentages of a track.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from . import charts, words
from .folder import Curve, Drift, Gain, Joint, Matrix, Ranked, Row, Run, Score, Scores, Xi
from .words import interval, nats, percent, signed

View = dict[str, Any]
FINE_RANGE = 1000  # a heatmap's colours span at most this factor


def run_view(run: Run, prefix: str) -> View:
    """Everything the page says about one run; ``prefix`` keeps ids apart."""
    scores = run.scores
    titles = {task.name: task.title or task.name for task in scores.tasks}
    return {
        "prefix": prefix, "name": run.name, "title": scores.title, "date": scores.date, "seed": scores.seed,
        "command": scores.command, "metric": metric(run), "n_tasks": len(scores.tasks),
        "chosen": scores.chosen, "judged": judged(run),
        "headline": headline(run), "tiles": tiles(run),
        "tables": tables(scores, titles), "domains": domains_view(run, titles),
        "drift": drift_view(run, titles), "xi": xi_view(run, titles, prefix),
        "training": training_view(run, titles, prefix), "scales": scales_view(run, prefix),
        "recipe": run.recipe, "ran": ran_view(run),
    }  # fmt: skip


def judged(run: Run) -> str:
    """What scales were chosen by, by itself: "validation data", "agreement with the experts"."""
    return run.scores.chosen.partition(" ")[2]


def metric(run: Run) -> str:
    """What the scores are, if all tasks agree."""
    names = {task.metric for task in run.scores.tasks}
    return names.pop() if len(names) == 1 else "score"


def chosen_gains(run: Run, tuned: bool | None = None) -> list[Gain]:
    """The gains the page talks about: with tuned scales, or as written where a run tuned none."""
    gains = run.scores.gains
    tuned = any(gain.tuned for gain in gains) if tuned is None else tuned
    return [gain for gain in gains if gain.tuned == tuned]


def best_row(run: Run, adapted: bool) -> Row | None:
    """The merged model one would pick without looking at the test scores: the best on validation."""
    rows = [row for row in run.scores.rows if (row.adapt is not None) == adapted]
    rows = [row for row in rows if row.tuned] or rows
    known = all(math.isfinite(row.val) for row in rows)
    return max(rows, key=lambda row: row.val if known else row.mean.score, default=None)


def headline(run: Run) -> View:
    """What adapting gained: a first line, and a line with a track for each merger."""
    rows, gains = run.scores.rows, chosen_gains(run)
    written = {(g.merge, rows[g.with_].adapt): g for g in run.scores.gains if not g.tuned}
    adapts = [rows[gain.with_].adapt for gain in gains]
    who = words.subject(adapts)
    what = "mergers" if len(set(adapts)) == 1 else "comparisons"
    lines = []
    track = _Track(run, gains)
    for gain in gains:
        without, with_ = rows[gain.without], rows[gain.with_]
        before, after = words.finding(gain)
        also = written.get((gain.merge, with_.adapt)) if gain.tuned else None
        lines.append({
            "before": before, "merge": gain.merge, "after": after, "numbers": words.numbers(gain, without, with_),
            "adapt": with_.adapt if len(set(adapts)) > 1 else None, "verdict": words.verdict(gain.gain),
            "gain": signed(gain.gain.score), "track": track.of(gain),
            "also": also and f"{signed(also.gain.score)} ({interval(also.gain) or 'no interval'})",
        })  # fmt: skip
    best = best_row(run, adapted=False) or best_row(run, adapted=True)
    return {
        "who": who, "lines": lines, "lead": words.lead(gains, who, what) if len(gains) > 1 else None,
        "tuned": any(gain.tuned for gain in gains),
        "overall": words.overall(run.scores.overall) if len(gains) > 1 else "",
        "axis": track.axis(), "nothing": None if gains or best is None else {
            "merge": best.merge, "score": percent(best.mean.score), "interval": interval(best.mean),
            "experts": percent(run.scores.experts.mean.score), "base": percent(run.scores.base.mean.score),
        },
    }  # fmt: skip


class _Track:
    """Places on a line from the base model's mean to the experts' (further, where a merge lies outside)."""

    def __init__(self, run: Run, gains: Sequence[Gain]):
        self.rows = run.scores.rows
        self.base, self.experts = run.scores.base.mean.score, run.scores.experts.mean.score
        values = [self.base, self.experts]
        for gain in gains:
            without = self.rows[gain.without].mean.score
            values += [without, self.rows[gain.with_].mean.score, without + gain.gain.low, without + gain.gain.high]
        values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        self.low, self.width = min(values), (max(values) - min(values)) or 1.0

    def at(self, value: float) -> float:
        return round(min(max((value - self.low) / self.width, 0.0), 1.0) * 100, 2) if math.isfinite(value) else 0.0

    def axis(self) -> View:
        return {"base": self.at(self.base), "experts": self.at(self.experts), "base_text": percent(self.base),
                "experts_text": percent(self.experts)}  # fmt: skip

    def of(self, gain: Gain) -> View:
        without, with_ = self.rows[gain.without].mean.score, self.rows[gain.with_].mean.score
        start, end = sorted((self.at(without), self.at(with_)))
        bounded = math.isfinite(gain.gain.low + gain.gain.high)
        low, high = self.at(without + gain.gain.low), self.at(without + gain.gain.high)
        return {"without": self.at(without), "with": self.at(with_), "start": start, "length": round(end - start, 2),
                "low": low if bounded else None, "span": round(high - low, 2), "without_text": percent(without),
                "with_text": percent(with_)}  # fmt: skip


def tiles(run: Run) -> list[View]:
    """The few numbers to take away."""
    scores = run.scores
    found: list[View] = [
        {"name": "Base model", "value": percent(scores.base.mean.score), "note": "before any fine-tuning"},
        {"name": "Experts", "value": percent(scores.experts.mean.score), "note": "each on its own task: the ceiling"},
    ]
    plain, adapted = best_row(run, adapted=False), best_row(run, adapted=True)
    for name, row, kind in (("Best merge as it is", plain, "without"), ("Best merge, adapted", adapted, "with")):
        if row:
            ahead = plain is None or row.mean.score > plain.mean.score
            found.append({
                "name": name, "value": percent(row.mean.score), "sentence": row.sentence, "kind": kind, "ahead": ahead,
            })  # fmt: skip
    if adapted:
        pair = _row(run, adapted.merge, None, adapted.tuned)
        before, after = _xi_of(run, pair), _xi_of(run, adapted)
        if pair and math.isfinite(before) and math.isfinite(after):
            value = {"was": nats(before), "value": nats(after), "change": words.change(before, after)}
            found.append({"name": "Interference ξ", **value, "note": "nats, same merge before and after adapting"})
    drifts = _others(run.diagnosis.drift) if run.diagnosis else []
    if len(drifts) > 1:
        value = {"was": nats(drifts[0]), "value": nats(drifts[1]), "change": words.change(drifts[0], drifts[1])}
        found.append({"name": "Drift on others’ heads", **value, "note": "nats, mean over experts and heads"})
    return found


def _row(run: Run, merge: str, adapt: str | None, tuned: bool) -> Row | None:
    return next((r for r in run.scores.rows if (r.merge, r.adapt, r.tuned) == (merge, adapt, tuned)), None)


def _xi_of(run: Run, row: Row | None) -> float:
    if row is None:
        return math.nan
    diagnosed = {item.sentence: item.sum for item in run.diagnosis.xi} if run.diagnosis else {}
    return diagnosed.get(row.sentence, row.xi)


def tables(scores: Scores, titles: dict[str, str]) -> list[View]:
    """The scores with tuned scales and as written."""
    return [table for tuned in (True, False) if (table := score_table(scores, tuned, titles))]


def domains_view(run: Run, titles: dict[str, str]) -> View | None:
    """The same tasks in other domains, in the tables of the tasks themselves, and what adapting gained there."""
    there = run.scores.domains
    if there is None:
        return None
    of = {task.name: titles.get(task.of or "", task.of or "") for task in there.tasks}
    names = {task.name: task.title or task.name for task in there.tasks}
    overall = there.overall.get("tuned") or there.overall.get("default")
    return {
        "tables": tables(there, names), "of": sorted(set(of.values())), "count": len(names),
        "overall": words.overall(there.overall) if overall else "",
    }  # fmt: skip


def score_table(scores: Scores, tuned: bool, titles: dict[str, str]) -> View | None:
    """One row a sentence, the one with adapted experts under the one without, best of each column marked."""
    rows = [(index, row) for index, row in enumerate(scores.rows) if row.tuned == tuned]
    if not rows:
        return None
    gains = {gain.with_: gain for gain in scores.gains if gain.tuned == tuned}
    merges = list(dict.fromkeys(row.merge for _, row in rows))
    groups: list[list[View]] = []
    for merge in merges:
        same = sorted((item for item in rows if item[1].merge == merge), key=lambda item: item[1].adapt is not None)
        groups.append([
            {"sentence": row.sentence, "adapted": row.adapt is not None, "cells": _cells(row, titles, gains.get(index))}
            for index, row in same
        ])  # fmt: skip
    _mark_best([line["cells"] for group in groups for line in group])
    columns = [{"title": "mean"}, {"title": "gain", "note": "by adapting"}]
    columns += [
        {"title": titles[task.name],
         "note": f"of {task.of}" if task.of else f"{task.classes} classes" if task.classes else "",
         "tip": f"{titles[task.name]}: {task.test} test examples" if task.test else ""}
        for task in scores.tasks
    ]  # fmt: skip
    columns += [
        {"title": "normalised", "note": "% of expert"}, {"title": "worst task"},
        {"title": "joint", "note": "all classes"}, {"title": "ξ", "note": "nats"}, {"title": "ECE", "note": "%"},
    ]  # fmt: skip
    kept = [i for i in range(len(columns)) if any(line["cells"][i]["text"] for group in groups for line in group)]
    for group in groups:
        for line in group:
            line["cells"] = [line["cells"][i] for i in kept]
    ends = []
    for name, model in (("base model", scores.base), ("experts, each on its own task", scores.experts)):
        cells = [_score_cell(model.mean, "mean"), _empty()]
        cells += [_score_cell(model.tasks.get(task), titles[task]) for task in titles]
        both = _hits_cell(scores.joint.base) if scores.joint and model is scores.base else _empty()
        cells += [_empty(), _empty(), both, _empty(), _empty()]
        ends.append({"name": name, "cells": [cells[i] for i in kept]})
    at = len(titles) + 4  # the joint column, which merges of unknown hits do without
    for name, ranked in _side_by_side(scores.joint) if at in kept else []:
        cells = [_empty()] * at + [_hits_cell(ranked), _empty(), _empty()]
        ends.append({"name": name, "cells": [cells[i] for i in kept]})
    return {"tuned": tuned, "columns": [columns[i] for i in kept], "groups": groups, "ends": ends, "count": len(rows)}


def _cells(row: Row, titles: dict[str, str], gain: Gain | None) -> list[View]:
    cells = [_score_cell(row.mean, "mean"), _gain_cell(gain)]
    for task, title in titles.items():
        cell = _score_cell(row.tasks.get(task), title)
        score = row.tasks.get(task)
        if score and math.isfinite(score.normalised):
            cell["tip"] += f"; {words.share(score.normalised)} of the expert"
        cells.append(cell)
    normal = row.normalised
    cells.append(_score_cell(normal, "normalised") if normal else _empty())
    worst = row.worst
    cells.append(
        {"text": percent(worst.score), "sub": titles.get(worst.task, worst.task), "tip": "", "value": worst.score}
        if worst else _empty()
    )  # fmt: skip
    cells.append(_hits_cell(row))
    cells.append({"text": nats(row.xi), "value": -row.xi, "tip": ""} if math.isfinite(row.xi) else _empty())
    cells.append({"text": percent(row.ece), "value": -row.ece, "tip": ""} if math.isfinite(row.ece) else _empty())
    return cells


def _side_by_side(joint: Joint | None) -> list[tuple[str, Ranked]]:
    if joint is None:
        return []
    told = {
        "experts side by side, own heads": joint.ensemble_own,
        "experts side by side, all heads": joint.ensemble_all,
    }
    return [(name, ranked) for name, ranked in told.items() if ranked.hits]


def _hits_cell(row: Ranked) -> View:
    if not row.hits:
        return _empty()
    each = ", ".join(f"hits@{k} {percent(both['macro'])}" for k, both in row.hits.items())
    first = row.hits["1"]["macro"]
    tip = f"{each}; over all inputs {percent(row.hits['1']['micro'])}"
    if row.hits_published:
        tip += f"; all heads' rows apart and over all inputs {percent(row.hits_published['1']['micro'])}"
    return {"text": percent(first), "value": first, "tip": tip}


def _empty() -> View:
    return {"text": "", "tip": ""}


def _score_cell(score: Score | None, what: str) -> View:
    if score is None:
        return _empty()
    between = interval(score)
    tip = f"{what}: {percent(score.score)}" + (f", 95 % interval {between}" if between else "")
    return {"text": percent(score.score), "sub": between.replace(" to ", "–"), "tip": tip, "value": score.score}


def _gain_cell(gain: Gain | None) -> View:
    if gain is None:
        return _empty()
    said = words.verdict(gain.gain)
    meaning = {"better": "better", "worse": "worse", "unclear": "the interval includes zero"}[said]
    between = interval(gain.gain)
    tip = f"gain {signed(gain.gain.score)}" + (f", 95 % interval {between}: {meaning}" if between else "")
    return {"text": signed(gain.gain.score), "sub": between, "tip": tip, "kind": said}


def _mark_best(rows: list[list[View]]) -> None:
    for column in zip(*rows, strict=True):
        values = [cell["value"] for cell in column if "value" in cell and math.isfinite(cell["value"])]
        for cell in column:
            cell["best"] = len(values) > 1 and cell.get("value") == max(values)


def drift_view(run: Run, titles: dict[str, str]) -> View | None:
    """Drift before and after adapting, on one colour scale."""
    said = run.diagnosis
    if said is None or not said.drift:
        return None
    low, high = _colour_range(item.matrix for item in said.drift)
    means = _others(said.drift)
    names = [titles.get(task, task) for task in said.tasks]
    return {
        "low": nats(low), "high": nats(high), "distance": said.distance,
        "matrices": [
            {"label": item.label, "heat": _heat(item.matrix, names, low, high),
             "mean": nats(mean), "change": words.change(means[0], mean) if index else ""}
            for index, (item, mean) in enumerate(zip(said.drift, means, strict=True))
        ],
    }  # fmt: skip


def _others(drift: Sequence[Drift]) -> list[float]:
    """The mean of each matrix off its diagonal."""
    found = []
    for item in drift:
        values = [v for i, line in enumerate(item.matrix) for j, v in enumerate(line) if i != j and math.isfinite(v)]
        found.append(sum(values) / len(values) if values else math.nan)
    return found


def _colour_range(matrices: Iterable[Matrix]) -> tuple[float, float]:
    values = [value for matrix in matrices for line in matrix for value in line if math.isfinite(value) and value > 0]
    if not values:
        return 0.001, 1.0
    return max(min(values), max(values) / FINE_RANGE), max(values)


def _heat(matrix: Matrix, names: Sequence[str], low: float, high: float) -> View:
    width = math.log(high / low) or 1.0

    def level(value: float) -> int:
        if math.isnan(value) or value <= low:
            return 0
        return 100 if math.isinf(value) else round(min(math.log(value / low) / width, 1.0) * 100)

    lines = [
        {"name": names[i], "cells": [{"text": nats(v), "level": level(v), "own": i == j} for j, v in enumerate(line)]}
        for i, line in enumerate(matrix)
    ]
    return {"names": list(names), "lines": lines, "large": len(names) > 10}


def xi_view(run: Run, titles: dict[str, str], prefix: str) -> View | None:
    """What interference is left in each merged model: sums, by task, and whole matrices."""
    said = run.diagnosis
    if said is None or not said.xi:
        return None
    names = [titles.get(task, task) for task in said.tasks]
    top = max((item.sum for item in said.xi if math.isfinite(item.sum)), default=0.0) or 1.0
    most = max((v for item in said.xi for v in item.per_task if math.isfinite(v)), default=0.0) or 1.0
    low, high = _colour_range(item.matrix for item in said.xi if item.matrix is not None)
    merges: dict[str, list[Xi]] = {}
    for item in sorted(said.xi, key=lambda item: item.adapt is not None):
        merges.setdefault(item.merge, []).append(item)
    order = list(dict.fromkeys(item.merge for item in said.xi))
    groups = []
    for index, merge in enumerate(order):
        items = merges[merge]
        groups.append({
            "merge": merge,
            "sums": [{"sentence": i.sentence, "kind": _kind(i.adapt), "text": nats(i.sum),
                      "change": words.change(items[0].sum, i.sum) if i.adapt and items[0].adapt is None else "",
                      "length": round(min(i.sum / top, 1.0) * 100, 1) if math.isfinite(i.sum) else 0} for i in items],
            "panel": charts.bars_panel(
                merge, names, [(_kind(i.adapt), _label(i.adapt), i.per_task) for i in items], most,
                f"{prefix}-xi{index}",
            ),
            "matrices": [{"sentence": i.sentence, "sum": nats(i.sum), "heat": _heat(i.matrix, names, low, high)}
                         for i in items if i.matrix is not None],
        })  # fmt: skip
    has_matrices = any(group["matrices"] for group in groups)
    return {"groups": groups, "low": nats(low), "high": nats(high), "has_matrices": has_matrices}


def _kind(adapt: str | None) -> str:
    return "without" if adapt is None else "with"


def _label(adapt: str | None) -> str:
    return "as it is" if adapt is None else adapt


def training_view(run: Run, titles: dict[str, str], prefix: str) -> list[View]:
    """The losses of each expert while it was adapted, a group a sentence."""
    groups = []
    for number, (slug, experts) in enumerate(run.logs.items()):
        order = {name: index for index, name in enumerate(titles)}
        names = sorted(experts, key=lambda name: (order.get(name, len(order)), name))
        panels = []
        for index, name in enumerate(names):
            lines = experts[name]
            curves = [
                (colour, held, [(float(line.step), v) for line in lines if math.isfinite(v := getattr(line, key))])
                for colour, held, key in (
                    ("own", False, "own"), ("others", False, "others"), ("own", True, "held_own"),
                    ("others", True, "held_others"),
                )
            ]  # fmt: skip
            title = titles.get(name, name)
            svg = charts.training_panel(title, [c for c in curves if c[2]], f"{prefix}-t{number}e{index}")
            panels.append({"title": title, "svg": svg})
        groups.append({"slug": slug, "panels": panels})
    return groups


def columns_for(n: int) -> int:
    """How many panels to put side by side on a wide screen, so that the last row is as full as can be."""
    return n if n <= 4 else min((4, 3), key=lambda columns: -n % columns)


def scales_view(run: Run, prefix: str) -> list[View]:
    """Score against the scaling coefficient, a panel a merger."""
    scores = run.scores
    merges: dict[str, list[Curve]] = {}
    for curve in scores.curves:
        if curve.points:
            merges.setdefault(curve.merge, []).append(curve)
    if not merges:
        return []
    levels = [("base", scores.base.mean.score), ("experts", scores.experts.mean.score)]
    if judged(run) != "validation data":  # agreement is no score, and cannot be compared with one
        levels = []
    levels = [level for level in levels if math.isfinite(level[1])]
    values = [value for curve in scores.curves for point in curve.points for value in (point.val, point.test)]
    values = [value for value in values if math.isfinite(value)] + [level for _, level in levels]
    span = (min(values), max(values)) if values else (0.0, 1.0)
    panels = []
    for index, (merge, curves) in enumerate(merges.items()):
        curves.sort(key=lambda curve: curve.adapt is not None)
        drawn = []
        for curve in curves:
            row = _row(run, merge, curve.adapt, tuned=True)
            points = [(point.scale, point.val, point.test) for point in sorted(curve.points, key=lambda p: p.scale)]
            drawn.append((_kind(curve.adapt), _label(curve.adapt), points, row.scale if row else None))
        svg = charts.scale_panel(merge, drawn, levels, span, f"{prefix}-s{index}", judged(run))
        tested = any(math.isfinite(point.test) for curve in curves for point in curve.points)
        panels.append({"title": merge, "svg": svg, "tested": tested})
    return panels


def ran_view(run: Run) -> View | None:
    """Versions, inputs and the time of each stage."""
    ran = run.ran
    if ran is None:
        return None
    longest = max((stage.seconds for stage in ran.stages if math.isfinite(stage.seconds)), default=0.0) or 1.0
    return {
        "seconds": words.seconds(ran.seconds), "versions": ran.versions,
        "inputs": {name: {"short": digest[:12], "long": digest} for name, digest in ran.inputs.items()},
        "stages": [
            {"name": stage.name, "text": words.seconds(stage.seconds), "reused": stage.reused,
             "length": round(stage.seconds / longest * 100, 1) if math.isfinite(stage.seconds) else 0}
            for stage in ran.stages
        ],
    }  # fmt: skip


def comparison(runs: Sequence[Run]) -> View:
    """The means of several runs side by side, a row for what was adapted and merged alike."""
    keys = dict.fromkeys((row.merge, row.adapt, row.tuned) for run in runs for row in run.scores.rows)
    merges = list(dict.fromkeys(merge for merge, _, _ in keys))
    order = sorted(keys, key=lambda key: (not key[2], merges.index(key[0]), key[1] is not None))
    rows: list[View] = []
    for merge, adapt, tuned in order:
        cells = []
        for run in runs:
            row = _row(run, merge, adapt, tuned)
            gain = next((g for g in run.scores.gains if run.scores.rows[g.with_] is row), None)
            cell = _score_cell(row.mean if row else None, "mean")
            cell["gain"] = _gain_cell(gain) if gain else None
            cells.append(cell)
        sentence = f"{adapt} | {merge}" if adapt else merge
        first = not rows or (rows[-1]["merge"], rows[-1]["tuned"]) != (merge, tuned)
        rows.append({"sentence": sentence, "merge": merge, "adapted": adapt is not None, "tuned": tuned, "first": first,
                     "cells": cells})  # fmt: skip
    for tuned in (True, False):
        _mark_best([row["cells"] for row in rows if row["tuned"] == tuned])
    ends = [
        {"name": "base model", "cells": [_score_cell(run.scores.base.mean, "mean") for run in runs]},
        {"name": "experts", "cells": [_score_cell(run.scores.experts.mean, "mean") for run in runs]},
    ]
    tasks = {tuple(task.name for task in run.scores.tasks) for run in runs}
    return {"rows": rows, "ends": ends, "same_tasks": len(tasks) == 1, "names": [run.scores.title for run in runs]}
