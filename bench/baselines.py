"""What else can be done with the same unlabeled inputs: RI beside distillation, AdaMerging and DisTaC.

    python bench/baselines.py --data TEXT_TASKS --to OUT --out docs/results/text-baselines.json
    python bench/baselines.py --suite conv --data VISION_TASKS --seeds 3 ...
    python bench/baselines.py ... --rows 'ri*' adamerging        some rows; those measured before stay in the JSON

Every row is given the same experts, heads and unlabeled sentences, and no label but those of the validation split, on
which a scale is chosen where there is one. ``inputs`` counts how many went forward and backward through a network; targets
come on top.

    multi-task distillation   the base, taught what every expert says under its own head
    merge, then distil        the same, beginning at tuned task arithmetic
    tsv, then distil          the same, beginning at tuned TSV-M
    adamerging                a coefficient an expert and tensor, least entropy under all heads

The four of them give one model; the rows with adapt words give experts, which any merger can take.
"""

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.adapt import adapt, how_text, slug
from merganser.evaluate.metrics import interval
from merganser.evaluate.run import Model, Scores, evaluate, means
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
from merganser.suites import text, vision
from merganser.suites.studies import Words, words_of
from merganser.suites.suite import recipe_for
from merganser.sweep import delta_of, merged_at, score_sentence
from merganser.train import Checkpoint, Plan

SUITES = {"text": text.SUITE, "conv": vision.CONV}
DISTAC = 500 * 128  # inputs that it trains on, an expert
Weights = Mapping[str, Tensor]


class Bench:
    """The suite's experts with one seed, and what was measured on them."""

    def __init__(self, ready: Prepared, to: Path, ri: Words):
        self.ready, self.to, self.ri = ready, to, ri
        self.steps, self.lr, self.batch = (ri.own.get(k, v) for k, v in (("steps", 300), ("lr", 5e-5), ("batch", 32)))
        self.count = len(ready.experts)
        self.adapted: dict[str, Mapping[str, Weights]] = {"": ready.experts}
        to.mkdir(parents=True, exist_ok=True)

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
        trained = {"distac": DISTAC}
        inputs = self.count * sum(trained.get(step.name, self.steps * self.batch) for step in sentence.adapt)
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
        split = Split(ready.inputs, steps, self.batch, 0.05, ready.recipe.seed)
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
            plan, log = Plan(steps, self.lr, 1e-4, patience=3), self.to / f"{slug(name)}.jsonl"
            best = student.train(loss, split, plan, checkpoint=kept, log=log, tick=tick)
        return self.one({**start, **home(best)}, inputs=steps * self.batch)

    def merged(self, merger: str) -> Weights:
        """Return what a merger makes at its best scale."""
        scored = score_sentence(self.ready, parse(merger), self.ready.experts, progress=bars)[-1]
        delta = delta_of(self.ready, parse(merger), self.ready.experts)
        return merged_at(self.ready, delta, scored.scale or 1.0)

    def rows(self) -> dict[str, Callable[[], tuple[Scores, dict[str, Any]]]]:
        both = f"{self.ri()} | {self.ri.coadapt()}"
        distac = f"distac(lr={self.lr})"  # its own default is for CLIP
        sentences = [f"{how} | task_arithmetic" for how in (distac, self.ri(), both)] + [f"{both} | tsv"]
        return {
            **{told: (lambda told=told: self.sentence(told)) for told in ["task_arithmetic", *sentences]},
            "multi-task distillation": lambda: self.distilled("multi-task distillation", dict(self.ready.base)),
            "merge, then distil": lambda: self.distilled("merge, then distil", self.merged("task_arithmetic")),
            "tsv, then distil": lambda: self.distilled("tsv, then distil", self.merged("tsv")),
            "adamerging": self.adamerging,
        }


def line(name: str, pairs: list[tuple[Scores, Scores]], inputs: int, seconds: float) -> list[str]:
    """Return a row of the table: means over seeds, the interval over test examples, paired, seeds averaged first."""
    draws = means([one for pair in pairs for one in pair])
    low, high = (100 * value for value in interval((draws[:, 1::2] - draws[:, 0::2]).mean(axis=1)).values())
    gains = [100 * (b.mean - a.mean) for a, b in pairs]
    score = 100 * float(np.mean([b.mean for _, b in pairs]))
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    gain = f"{np.mean(gains):+.1f} [{low:+.1f}, {high:+.1f}]"
    told = f"`{name}`" if "task_arithmetic" in name or " | " in name else name
    return [told, f"{score:.1f}", gain, each, f"{inputs:,}", f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suite", choices=list(SUITES), default="text")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=["*"])
    parser.add_argument("--ri", help="knobs of the suite's own ri to change, such as 'ri(steps=100)'")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    recipe, ri = recipe_for(suite, args.data, ["task_arithmetic"], progress=bars), words_of(suite, args.ri)
    benches = [
        Bench(prepare(recipe.model_copy(update={"seed": seed})), args.to / f"seed-{seed}", ri)
        for seed in range(args.seeds)
    ]
    told = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    references = [bench.sentence("task_arithmetic")[0] for bench in benches]
    for name in benches[0].rows():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.rows):
            continue
        started = time.monotonic()
        found = [bench.rows()[name]() for bench in benches]
        seconds = (time.monotonic() - started) / len(benches)
        pairs = [(reference, scores) for reference, (scores, _) in zip(references, found, strict=True)]
        made = line(name, pairs, found[0][1].get("inputs", 0), seconds)
        told["rows"] = [row for row in told["rows"] if row[0] != made[0]] + [made]
        told |= {"head": ["way", "mean", "over task_arithmetic [95 % interval]", "by seed", "inputs", "seconds"]}
        told |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "seeds": args.seeds}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
        print(made, flush=True)


if __name__ == "__main__":
    main()
