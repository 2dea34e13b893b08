"""What else can be done with the same unlabeled inputs: RI beside distillation, AdaMerging and DisTaC.

Every way is given the same experts, heads and unlabeled inputs, as many steps (but AdaMerging and `coadapt`), and no label
but those of the validation split, on which a scale is chosen where there is one. ``inputs`` counts how many went forward
and backward through a network; targets come on top.

    multi-task distillation   the base, taught what every expert says under its own head
    MERGER, then distil       the same, beginning at the tuned merger
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
from ...merge import merge
from ...models.device import home
from ...models.encoder import features
from ...models.inputs import Subset
from ...prepare import prepare
from ...sentence import knobs_of, parse
from ...steps.adapt.ri import ri
from ...steps.moving import Moving
from ...steps.student import Split, Student, trainable
from ...steps.together import Everyone
from ...sweep import delta_of, merged_at, score_sentence
from ...train import Checkpoint, Plan
from ..studies import Asked, gain_text, kept

STEPS = 1000  # of AdaMerging, 16 inputs each
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
            "multi-task distillation": lambda: self._distilled("multi-task distillation", lambda: self.ready.base),
            **{
                name: partial(self._distilled, name, partial(self._merged, merger))
                for merger in self.asked.mergers
                for name in [f"{merger}, then distil"]
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
        times = 1 if "distil" in name else len(parse(name).adapt)
        return times * self.steps * self.batch * len(self.ready.experts)

    def _sentence(self, told: str) -> Scores:
        sentence, ready, place = parse(told), self.ready, self.place / "adapted"
        words = how_text(sentence.adapt)
        if words not in self.experts:
            self.experts[words] = adapt(
                ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=words,
                into=place / slug(words), seed=ready.recipe.seed, kind=ready.kind, heads_key=ready.heads_key,
                progress=self.asked.progress, _place=lambda part: place / slug(part),
                _targets=place / ".targets",
            )  # fmt: skip
        return score_sentence(ready, sentence, self.experts[words], progress=self.asked.progress)[-1].scores

    def _one(self, weights: Weights) -> Scores:
        return evaluate(Model(self.ready.encoder, weights, self.ready.heads, self.ready.kind), self.ready.test)

    def _merged(self, merger: str) -> Weights:
        """Return what a merger makes at its best scale."""
        scored = score_sentence(self.ready, parse(merger), self.ready.experts, progress=self.asked.progress)[-1]
        return merged_at(self.ready, delta_of(self.ready, parse(merger), self.ready.experts), scored.scale or 1.0)

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
        steps, begin = self.steps * len(self.ready.experts), start()
        split = Split(self.ready.inputs, steps, self.batch, 0.05, self.ready.recipe.seed)
        student, loss = self._student(begin, split)
        place = self.place / "distilled" / slug(name)
        with self.asked.progress(name, steps) as tick:
            best = student.train(
                loss, split, Plan(steps, self.lr, 1e-4, patience=3), log=place.with_suffix(".jsonl"), tick=tick,
                checkpoint=Checkpoint(place.with_suffix(".safetensors"), name),
            )  # fmt: skip
        return self._one({**begin, **home(best)})

    def _student(self, start: Weights, split: Split) -> tuple[Student, Callable[[Tensor], Any]]:
        """Return a student of all experts and its loss, KL under every head alike."""
        ready, count, at = self.ready, len(self.ready.experts), split.everything
        said = {
            n: features(ready.encoder, w, Subset(ready.inputs, at), kind=ready.kind) for n, w in ready.experts.items()
        }
        terms = Everyone(ready.heads, next(iter(ready.heads)), alpha=count - 1.0)
        terms.remember_all(at, len(ready.inputs), said)
        names = dict.fromkeys(n for w in ready.experts.values() for n in trainable(w, ready.base, ready.encoder))
        student = Student(start, ready.encoder, ready.inputs, Moving({n: start[n] for n in names}), ready.kind)

        def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, told = terms(at, student(at))
            return value / count, told

        return student, loss


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
    return " | ".join(step.name for step in parse(name).steps) if "|" in name else name
