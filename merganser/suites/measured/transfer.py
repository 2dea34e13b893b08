"""Does making experts orthogonal cost positive transfer? Where one helps another's task, what does RI do to that?

Every expert is scored on every other task, as it is and adapted, over the base; and every pair of experts is merged, with
and without adapting, scale chosen on validation on their two tasks. Pairs are told apart by whether the expert helps the
other task, hurts it, or neither (95 % interval over test examples).
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from ...adapt import adapt, slug
from ...errors import DataError
from ...evaluate.run import Model, Scores, evaluate, gained
from ...prepare import Prepared, prepare
from ...sentence import parse
from ...sweep import score_sentence
from ..studies import Asked, kept

KINDS = ("helps", "neither", "hurts")
Experts = Mapping[str, Mapping[str, Tensor]]
Pair = tuple[str, str]  # a task, and the expert of another


def measure(asked: Asked) -> dict[str, Any]:
    """Return a line for pairs of each kind, and of each pair what the expert does to the other task and RI to the pair.

    Raises DataError unless it is asked of one merger.
    """
    if len(asked.mergers) != 1:
        raise DataError(f"study 'transfer' merges pairs by one merger, got {len(asked.mergers)}")
    seeds = [_Seed(asked, seed) for seed in range(asked.seeds)]
    order = [(i, j) for i in seeds[0].ready.experts for j in seeds[0].ready.experts if i != j]
    before = {pair: gained([one.alone("", pair) for one in seeds]) for pair in order}
    after = {pair: gained([one.alone(asked.ri(), pair) for one in seeds]) for pair in order}
    gains = {pair: gained([one.merged(pair) for one in seeds]) for pair in order}
    rows = []
    for word in KINDS:
        pairs = [pair for pair in order if kind(before[pair]) == word]
        loses = sum(kind(gains[pair]) == "hurts" for pair in pairs)
        rows.append([word, str(len(pairs)), *(_mean(told, pairs) for told in (before, after, gains)), str(loses)])
    head = [
        "an expert on another task",
        "pairs",
        "over the base",
        "adapted",
        "RI's gain on that task, both merged",
        "where it loses",
    ]
    x, y = ([told[pair]["score"] for pair in order] for told in (before, gains))
    varies = min(float(np.std(x)), float(np.std(y))) > 0
    return {
        "head": head, "rows": rows, "correlation": float(np.corrcoef(x, y)[0, 1]) if varies else None,
        "points": [
            {"label": f"{j} on {i}", "x": 100 * before[i, j]["score"], "after": 100 * after[i, j]["score"],
             "y": gains[i, j]["score"], **{part: gains[i, j][part] for part in ("low", "high")}} for i, j in order
        ],
        "x": "what the other expert alone does to the task, points over the base",
        "y": "gain of ri on that task, both merged, points",
    }  # fmt: skip


def kind(told: Mapping[str, Any]) -> str:
    """Tell whether a difference helps, hurts, or cannot be told from chance."""
    return "helps" if told["low"] > 0 else "hurts" if told["high"] < 0 else "neither"


def _mean(told: Mapping[Pair, Mapping[str, float]], pairs: list[Pair]) -> str:
    return "–" if not pairs else f"{100 * float(np.mean([told[pair]['score'] for pair in pairs])):+.1f}"


class _Seed:
    """What is scored with one seed; every score is kept."""

    def __init__(self, asked: Asked, seed: int):
        self.asked, self.place = asked, asked.folder / f"seed-{seed}"
        self.recipe = asked.recipe.model_copy(update={"seed": seed})
        self.ready = prepare(self.recipe)
        how, ready = asked.ri(), self.ready
        adapted = adapt(
            ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=how,
            into=self.place / "adapted" / slug(how), seed=seed, kind=ready.kind, heads_key=ready.heads_key,
            progress=asked.progress,
        )  # fmt: skip
        self.models: dict[str, Experts] = {"": ready.experts, how: adapted}
        self.base = self._on_all("base", ready.base)
        self.scores = {how: {n: self._on_all(f"{how} {n}", w) for n, w in m.items()} for how, m in self.models.items()}
        self.pairs = {two: self._pair(two) for two in combinations(ready.experts, 2)}

    def alone(self, how: str, pair: Pair) -> tuple[Scores, Scores]:
        """Return what the base and another expert score on a task."""
        task, expert = pair
        return _only(self.base, task), _only(self.scores[how][expert], task)

    def merged(self, pair: Pair) -> tuple[Scores, Scores]:
        """Return what two merged experts score on one's task, without and with adapting."""
        two = next(two for two in self.pairs if set(two) == set(pair))
        return _only(self.pairs[two][0], pair[0]), _only(self.pairs[two][1], pair[0])

    def _on_all(self, name: str, weights: Mapping[str, Tensor]) -> Scores:
        def score() -> Scores:
            return evaluate(Model(self.ready.encoder, weights, self.ready.heads, self.ready.kind), self.ready.test)

        return self._kept(self.ready, name, score)

    def _pair(self, two: tuple[str, str]) -> tuple[Scores, Scores]:
        mine = self.ready.only(two)

        def score(how: str) -> Scores:
            some = {n: self.models[how][n] for n in two}
            return score_sentence(mine, parse(self.asked.mergers[0]), some, progress=self.asked.progress)[-1].scores

        without, with_ = (
            self._kept(mine, f"{how} {'-'.join(two)} {self.asked.mergers[0]}", partial(score, how))
            for how in self.models
        )
        return without, with_

    def _kept(self, ready: Prepared, name: str, work: Any) -> Scores:
        key = [ready.scored_on, ready.digests, ready.recipe.scales, self.asked.key(self.recipe.seed), name]
        return kept(self.place, name, key, work).scores


def _only(scores: Scores, task: str) -> Scores:
    return Scores({task: scores[task]})
