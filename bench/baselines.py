"""What else can be done with the same unlabeled inputs: RI beside distillation, AdaMerging and DisTaC on the text suite.

    python bench/baselines.py --data TEXT_TASKS --to OUT --out docs/results/baselines.json
    python bench/baselines.py ... --rows 'ri*' adamerging        some rows; those measured before stay in the JSON

Every row is given the same experts, heads and unlabeled sentences, and no label but those of the validation split, on
which a scale is chosen where there is one. ``inputs`` counts how many went forward and backward through a network; targets
come on top.

    multi-task distillation   the base, taught what every expert says under its own head
    merge, then distil        the same, beginning at tuned task arithmetic
    adamerging                a coefficient an expert and tensor, least entropy under all heads

The three of them give one model; the rows with adapt words give experts, which any merger can take.
"""

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.adapt import adapt, how_text, slug
from merganser.evaluate.run import Model, Scores, evaluate
from merganser.learn.coefficients import adamerging
from merganser.merge import merge
from merganser.models.device import home
from merganser.models.encoder import features
from merganser.models.inputs import Subset
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.sentence import parse
from merganser.steps.moving import Moving
from merganser.steps.student import Split, Student, trainable
from merganser.steps.together import Everyone
from merganser.suites import text
from merganser.suites.suite import recipe_for
from merganser.sweep import delta_of, merged_at, score_sentence
from merganser.train import Checkpoint, Plan

SENTENCES = (
    "task_arithmetic",
    "distac | task_arithmetic",
    "ri | task_arithmetic",
    "ri | coadapt | task_arithmetic",
    "ri | coadapt | tsv",
)
LR, BATCH = 5e-5, 32  # as ri has them
INPUTS = {"ri": 300 * BATCH, "coadapt": 300 * BATCH, "distac": 500 * 128}  # trained on, an expert
Weights = Mapping[str, Tensor]


class Bench:
    """The suite's experts, and what was measured on them."""

    def __init__(self, ready: Prepared, to: Path, steps: int):
        self.ready, self.to, self.steps = ready, to, steps
        self.count = len(ready.experts)
        self.adapted: dict[str, Mapping[str, Weights]] = {"": ready.experts}

    def sentence(self, told: str) -> tuple[Scores, dict[str, Any]]:
        sentence, ready = parse(told), self.ready
        words = how_text(sentence.adapt)
        if words not in self.adapted:
            self.adapted[words] = adapt(
                ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=words,
                into=self.to / slug(words), seed=ready.recipe.seed, kind=ready.kind, heads_key=ready.heads_key,
                progress=bars, _place=lambda part: self.to / slug(part),
            )  # fmt: skip
        row = score_sentence(ready, sentence, self.adapted[words], progress=bars)[-1]
        inputs = self.count * sum(INPUTS[step.name] for step in sentence.adapt)
        return row.scores, {"scale": row.scale, "inputs": inputs}

    def one(self, weights: Weights, **told: Any) -> tuple[Scores, dict[str, Any]]:
        return evaluate(Model(self.ready.encoder, weights, self.ready.heads, self.ready.kind), self.ready.test), told

    def adamerging(self) -> tuple[Scores, dict[str, Any]]:
        ready, steps = self.ready, 1000
        found = adamerging(
            ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, steps=steps,
            kind=ready.kind, seed=ready.recipe.seed, checkpoint=self.to / "adamerging.safetensors", progress=bars,
        )  # fmt: skip
        merged = merge(ready.base, ready.experts, "weighted", ingredients={"coefficients": found})
        return self.one(merged, inputs=steps * 16)

    def distilled(self, name: str, start: Weights) -> tuple[Scores, dict[str, Any]]:
        """Train one student for as many steps as all experts together have in ``ri``."""
        ready, steps = self.ready, self.steps * self.count
        split = Split(ready.inputs, steps, BATCH, 0.05, ready.recipe.seed)
        at, first = split.everything, next(iter(ready.heads))
        said = {
            n: features(ready.encoder, w, Subset(ready.inputs, at), kind=ready.kind) for n, w in ready.experts.items()
        }
        terms = Everyone(ready.heads, first, alpha=self.count - 1.0)  # so that every head counts alike
        terms.remember_all(at, len(ready.inputs), said)
        names = dict.fromkeys(n for w in ready.experts.values() for n in trainable(w, ready.base, ready.encoder))
        moving = Moving({n: start[n] for n in names})
        student = Student(start, ready.encoder, ready.inputs, moving, ready.kind)

        def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, told = terms(at, student(at))
            return value / self.count, told

        kept = Checkpoint(self.to / f"{slug(name)}.safetensors", name)
        with bars(name, steps) as tick:
            plan, log = Plan(steps, LR, 1e-4, patience=3), self.to / f"{slug(name)}.jsonl"
            best = student.train(loss, split, plan, checkpoint=kept, log=log, tick=tick)
        return self.one({**start, **home(best)}, inputs=steps * BATCH)

    def merged(self) -> Weights:
        """Return task arithmetic at its best scale."""
        scored = score_sentence(self.ready, parse("task_arithmetic"), self.ready.experts, progress=bars)[-1]
        delta = delta_of(self.ready, parse("task_arithmetic"), self.ready.experts)
        return merged_at(self.ready, delta, scored.scale)

    def rows(self) -> dict[str, Callable[[], tuple[Scores, dict[str, Any]]]]:
        return {
            **{told: (lambda told=told: self.sentence(told)) for told in SENTENCES},
            "multi-task distillation": lambda: self.distilled("multi-task distillation", dict(self.ready.base)),
            "merge, then distil": lambda: self.distilled("merge, then distil", self.merged()),
            "adamerging": self.adamerging,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="an expert")
    parser.add_argument("--rows", nargs="+", default=["*"])
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    ready = prepare(recipe_for(text.SUITE, args.data, [s for s in SENTENCES if "|" not in s], progress=bars))
    bench = Bench(ready, args.to, args.steps)
    told = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    reference = bench.sentence("task_arithmetic")[0]
    for name, run in bench.rows().items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.rows):
            continue
        started = time.monotonic()
        scores, more = run()
        gain, low, high = scores.gain(reference)
        told["rows"][name] = {
            "score": scores.mean, "tasks": {n: scores[n].score for n in scores},
            "gain": {"score": gain, "low": low, "high": high}, "seconds": round(time.monotonic() - started, 1), **more,
        }  # fmt: skip
        told |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
        print(f"{name:32} {100 * scores.mean:.1f}  {100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True)


if __name__ == "__main__":
    main()
