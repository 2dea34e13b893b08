"""Many sentences, one table: merge each, choose its scale on the validation splits, score it on the test splits once.

The merged delta is computed once a sentence; every scale is ``base + by * delta``, the very bytes that the sentence
with ``| scale(by=...)`` gives.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .deltas import applied, merged_deltas
from .evaluate.run import Scores
from .evaluate.table import Row
from .examine import asked_by, open_ingredients
from .models.statistics import is_statistic
from .prepare import Prepared
from .progress import Progress, silent
from .sentence import Sentence, Step, find
from .where import Patterns, Where, for_sentence


@dataclass(frozen=True)
class Scaled:
    """A sentence with its last ``scale`` taken off: what is merged once, and the scale as it was written."""

    sentence: Sentence
    written: float

    def at(self, by: float) -> Sentence:
        """Return the whole sentence with ``scale(by=by)`` at its end; a scale of 1 is left out."""
        last = () if by == 1 else (Step("scale", *find("scale"), {"by": by}),)
        return Sentence((*self.sentence.steps, *last))


def split_scale(sentence: Sentence, where: Patterns | None = None) -> Scaled:
    """Take a last ``scale(by=x)`` off a sentence; one that differs from tensor to tensor stays."""
    last = sentence.steps[-1]
    varies = any("scale" in steps for steps in (where or {}).values())
    if last.name == "scale" and len(sentence.after) > 0 and not varies:
        return Scaled(Sentence(sentence.steps[:-1]), float(last.knobs.get("by", 1.0)))
    return Scaled(sentence, 1.0)


def is_tuned(sentence: Sentence) -> bool:
    """Tell whether a scale is tried out: all but plain averaging, whose point is to have no scale."""
    return sentence.combine.name != "average"


def score_sentence(
    ready: Prepared,
    sentence: Sentence,
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    progress: Progress = silent,
) -> list[Row]:
    """Return one row for the sentence as written and, where scales are tried, one with the scale chosen on validation."""
    started = time.monotonic()
    scaled = split_scale(sentence, ready.recipe.where)
    delta = delta_of(ready, scaled.sentence, experts, progress)
    scales = ready.recipe.scales if is_tuned(sentence) else []
    with progress(f"score {sentence}", len(scales) + 2) as tick:

        def on_val(by: float) -> float:
            val = ready.judged(merged_at(ready, delta, by))
            tick(1, scale=by, val=val)
            return val

        points = tried(on_val, scales, all_of_them=ready.recipe.all_scales)
        tick(len(scales) - len(points))
        best = max(points, key=lambda p: p["val"]) if points else None
        test = {scaled.written: ready.scored(merged_at(ready, delta, scaled.written))}
        tick(1)
        if best is not None and best["scale"] not in test:
            test[best["scale"]] = ready.scored(merged_at(ready, delta, best["scale"]))
    seconds = round(time.monotonic() - started, 3)
    merging = str(scaled.sentence.merging)
    adapted = " | ".join(map(str, sentence.adapt)) or None
    scores, domains = test[scaled.written]
    rows = [Row(str(sentence), scores, merging, adapted, scaled.written, False, None, [], seconds, domains)]
    if best is not None:
        by = best["scale"]
        scores, domains = test[by]
        tuned = Row(str(scaled.at(by)), scores, merging, adapted, by, True, best["val"], points, seconds, domains)
        rows.append(tuned)
    return rows


def delta_of(
    ready: Prepared, sentence: Sentence, experts: Mapping[str, Mapping[str, Tensor]], progress: Progress = silent
) -> dict[str, Tensor]:
    """Return the merged deltas of a sentence with the recipe's seed, patterns and ingredients."""
    merging, recipe = sentence.merging, ready.recipe
    return merged_deltas(
        ready.base, experts, merging, list(ready.base), seed=recipe.seed,
        where=Where(for_sentence(recipe.where, merging), ready.base),
        ingredients=open_ingredients(asked_by(merging, recipe.ingredients), merging, tuple(experts)), progress=progress,
    )  # fmt: skip


def tried(
    on_val: Callable[[float], float], scales: Sequence[float], *, all_of_them: bool = False
) -> list[dict[str, float]]:
    """Return what the scales score on validation, by rising scale: every other one, then the best one's neighbours.

    That finds the highest of all where the curve has one peak. It ends early when two in a row are more than two points
    below the best: the peak is behind. Up to five scales, or ``all_of_them``, are tried one by one.
    """
    scales = sorted(scales)
    if all_of_them or len(scales) <= 5:
        return [{"scale": by, "val": on_val(by)} for by in scales]
    found: dict[int, float] = {}
    for at in range(0, len(scales), 2):
        found[at] = on_val(scales[at])
        if len(found) > 2 and all(v < max(found.values()) - 0.02 for v in list(found.values())[-2:]):
            break
    best = max(found, key=lambda at: found[at])
    for at in (best - 1, best + 1):
        if at in range(len(scales)):
            found[at] = on_val(scales[at])
    return [{"scale": scales[at], "val": found[at]} for at in sorted(found)]


def merged_at(ready: Prepared, delta: Mapping[str, Tensor], by: float) -> Mapping[str, Tensor]:
    """Return ``base + by * delta``, as it is scored."""
    merged = {
        n: applied(t, delta[n] * (1 if is_statistic(n) else by)) if n in delta else t for n, t in ready.base.items()
    }
    return ready.finished(merged)


def score_experts(ready: Prepared, experts: Mapping[str, Mapping[str, Tensor]]) -> tuple[Scores, Scores | None]:
    """Return each expert's score on its own task, and in the other domains of that task."""
    scores, elsewhere = Scores(), Scores()
    for name, weights in experts.items():
        own, domains = ready.scored(weights, name)
        scores, elsewhere = scores | own, elsewhere | (domains or Scores())
    return scores, Scores({name: elsewhere[name] for name in ready.domains}) if ready.domains else None


def best_row(rows: Sequence[Row]) -> Row:
    """Return the row to keep: the best on validation, else the first."""
    tried = [row for row in rows if row.val is not None]
    return max(tried, key=lambda row: row.val or 0.0) if tried else rows[0]
