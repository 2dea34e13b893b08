"""What else can be done with the same unlabeled inputs: RI beside distillation, AdaMerging and DisTaC.

Every way is given the same experts, heads and unlabeled inputs, as many steps (but AdaMerging and `coadapt`), and no label
but those of the validation split, on which a scale is chosen where there is one. ``inputs`` counts how many went forward
and backward through a network; targets come on top.

    multi-task distillation   the base, taught what every expert says under its own head
    SENTENCE, then distil     the same, beginning at what a merger, or the last behind `ri | coadapt`, makes at its best scale
    adamerging                a coefficient an expert and tensor, least entropy under all heads

They give one model; the ways with adapt words give experts, which any merger can take.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...adapt import adapt, how_text, slug
from ...evaluate.run import Model, Scores, evaluate, gained
from ...evaluate.table import Row
from ...learn.coefficients import adamerging
from ...learn.distil import distil
from ...merge import merge
from ...prepare import prepare
from ...sentence import Sentence, knobs_of, parse
from ...steps.adapt.ri import ri
from ...sweep import delta_of, merged_at, score_sentence
from ...train import Checkpoint
from ..studies import Asked, gain_text, kept

STEPS = 1000  # of AdaMerging, 16 inputs each
ALONE, THEN = "multi-task distillation", ", then distil"
Weights = Mapping[str, Tensor]


class _Ways:
    """All ways with one seed."""

    def __init__(self, asked: Asked, seed: int):
        self.ready = prepare(asked.recipe.model_copy(update={"seed": seed}))
        self.place, self.asked = asked.folder / f"seed-{seed}", asked
        own = {k: v for k, v in knobs_of(ri).items() if k in ("steps", "lr", "batch")} | dict(asked.ri.own)
        self.steps, self.lr, self.batch = own["steps"], own["lr"], own["batch"]
        self.experts: dict[str, Mapping[str, Weights]] = {"": self.ready.experts}

    def all(self) -> dict[str, Callable[[], Scores]]:
        """Return every way by its name; the first is what the others are compared with."""
        first, *more = self.asked.mergers
        alone = self.asked.ri()
        both = f"{alone} | {self.asked.ri.coadapt()}"
        sentences = [first, *(f"{how} | {first}" for how in (self.asked.ri.distac(), alone, both))]
        sentences += [told for merger in more for told in (merger, f"{alone} | {merger}", f"{both} | {merger}")]
        return {
            **{told: partial(self._sentence, told) for told in sentences},
            ALONE: lambda: self._distilled(ALONE, lambda: self.ready.base),
            **{
                name: partial(self._distilled, name, partial(self._merged, merger))
                for merger in [*self.asked.mergers, f"{both} | {self.asked.mergers[-1]}"]
                for name in [f"{merger}{THEN}"]
            },
            "adamerging": self._adamerging,
        }

    def row(self, name: str, way: Callable[[], Scores]) -> Row:
        ready = self.ready
        key = [ready.scored_on, ready.digests, ready.recipe.scales, self.asked.key(ready.recipe.seed), name]
        return kept(self.place, name, key, way)

    def inputs(self, name: str) -> int:
        """Return how many inputs a way trains on, all experts together."""
        if name == "adamerging":
            return STEPS * 16
        told = name.removesuffix(THEN)
        times = (told != name) + len(parse(told).adapt) if told != ALONE else 1
        return times * self.steps * self.batch * len(self.ready.experts)

    def _sentence(self, told: str) -> Scores:
        return score_sentence(self.ready, *self._made(told), progress=self.asked.progress)[-1].scores

    def _made(self, told: str) -> tuple[Sentence, Mapping[str, Weights]]:
        """Return a sentence and the experts behind its adapt words."""
        sentence, ready, place = parse(told), self.ready, self.place / "adapted"
        words = how_text(sentence.adapt)
        if words not in self.experts:
            self.experts[words] = adapt(
                ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=words,
                into=place / slug(words), seed=ready.recipe.seed, kind=ready.kind, heads_key=ready.heads_key,
                progress=self.asked.progress, _place=lambda part: place / slug(part),
                _targets=place / ".targets",
            )  # fmt: skip
        return sentence, self.experts[words]

    def _one(self, weights: Weights) -> Scores:
        return evaluate(Model(self.ready.encoder, weights, self.ready.heads, self.ready.kind), self.ready.test)

    def _merged(self, told: str) -> Weights:
        """Return what a sentence makes at its best scale."""
        made = self._made(told)
        scored = score_sentence(self.ready, *made, progress=self.asked.progress)[-1]
        return merged_at(self.ready, delta_of(self.ready, *made), scored.scale or 1.0)

    def _adamerging(self) -> Scores:
        ready = self.ready
        found = adamerging(
            ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, steps=STEPS,
            kind=ready.kind, seed=ready.recipe.seed, checkpoint=self.place / "adamerging.safetensors",
            progress=self.asked.progress,
        )  # fmt: skip
        return self._one(merge(ready.base, ready.experts, "weighted", ingredients={"coefficients": found}))

    def _distilled(self, name: str, start: Callable[[], Weights]) -> Scores:
        """Train one student for as many steps as all experts together have in ``ri``."""
        ready, place = self.ready, self.place / "distilled" / slug(name)
        made = distil(
            start(), ready.experts, ready.base, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs,
            steps=self.steps * len(ready.experts), lr=self.lr, batch=self.batch, seed=ready.recipe.seed, kind=ready.kind,
            checkpoint=Checkpoint(place.with_suffix(".safetensors"), name), log=place.with_suffix(".jsonl"),
            progress=self.asked.progress,
        )  # fmt: skip
        return self._one(made)


def measure(asked: Asked) -> dict[str, Any]:
    """Return a line for each way: the mean over tasks and seeds, and what that is over the first merger, paired."""
    seeds = [_Ways(asked, seed) for seed in range(asked.seeds)]
    lines: list[list[str]] = []
    points: list[dict[str, Any]] = []
    reference: list[Scores] = []
    for name in seeds[0].all():
        rows = [one.row(name, one.all()[name]) for one in seeds]
        reference = reference or [row.scores for row in rows]
        gain = gained([(a, row.scores) for a, row in zip(reference, rows, strict=True)])
        mean = sum(row.scores.mean for row in rows) / len(rows)
        told = gain_text(gain) if points else "–"
        each = "–" if not points else ", ".join(f"{100 * one:+.1f}" for one in gain["each"])
        lines.append([name, f"{100 * mean:.1f}", told, each, f"{seeds[0].inputs(name):,}"])
        points.append(
            {"label": _short(name), "mean": mean, "y": gain["score"], "low": gain["low"], "high": gain["high"]}
        )
    head = ["way", "mean", f"over {asked.mergers[0]} [95 % interval]", "by seed", "inputs"]
    return {"head": head, "rows": lines, "points": points[1:], "y": f"over {asked.mergers[0]}, points"}


def _short(name: str) -> str:
    """Return a way's name without knobs."""
    told = name.removesuffix(THEN)
    return " | ".join(step.name for step in parse(told).steps) + name[len(told) :] if "|" in told else name
