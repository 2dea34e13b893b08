"""Does it cost positive transfer that RI makes experts orthogonal? Every expert on every other task, and every pair merged.

    python bench/transfer.py --suite conv --data VISION_TASKS --to OUT --out docs/results/conv-transfer.json

What expert j gives task i is its score under head i over the base's, with its 95 % interval (paired, input by input): the
pairs are parted by whether it helps, hurts, or neither can be told. Then, for every pair of tasks, both experts are merged by
task_arithmetic at the scale that is best on validation, as they are and adapted (against all heads, once), and scored on
both tasks. If RI cost positive transfer, it would gain least, or lose, where experts help each other.
"""

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from merganser.adapt import adapt, slug
from merganser.evaluate.run import Model, Scores, evaluate
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.recipe import Recipe
from merganser.sentence import parse
from merganser.suites import text, vision
from merganser.suites.studies import words_of
from merganser.suites.suite import recipe_for
from merganser.sweep import score_sentence

SUITES = {"text": text.SUITE, "conv": vision.CONV}
KINDS = ("helps", "neither", "hurts")


def on_all(ready: Prepared, models: Any) -> dict[str, Scores]:
    """Return what each model scores on every task."""
    found = {}
    with bars("every model on every task", len(models)) as tick:
        for name, weights in models.items():
            found[name] = evaluate(Model(ready.encoder, weights, ready.heads, ready.kind), ready.test)
            tick(1)
    return found


def only(scores: Scores, task: str) -> Scores:
    return Scores({task: scores[task]})


def transfer(scores: dict[str, Scores], base: Scores) -> dict[tuple[str, str], dict[str, float]]:
    """Return what each expert gives each other task, ``[task, expert]``, over the base."""
    return {(i, j): only(scores[j], i).compared(only(base, i)) for i in base for j in scores if i != j}


def kind(told: dict[str, float]) -> str:
    return "helps" if told["low"] > 0 else "hurts" if told["high"] < 0 else "neither"


def pair_of(recipe: Recipe, two: tuple[str, str]) -> Recipe:
    kept = {part: {k: getattr(recipe, part)[k] for k in two} for part in ("tasks", "experts")}
    return recipe.model_copy(update=kept)


def mean(values: list[float]) -> str:
    return "–" if not values else f"{100 * float(np.mean(values)):+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="conv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ri", help="knobs of the suite's own ri to change, such as 'ri(steps=100)'")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    recipe, how = recipe_for(suite, args.data, ["task_arithmetic"], progress=bars), words_of(suite, args.ri)()
    ready = prepare(recipe)
    adapted = adapt(
        ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=how,
        into=args.to / slug(how), seed=recipe.seed, kind=ready.kind, heads_key=ready.heads_key, progress=bars,
    )  # fmt: skip
    base = on_all(ready, {"base": ready.base})["base"]
    before, after = (transfer(on_all(ready, models), base) for models in (ready.experts, adapted))
    gains: dict[tuple[str, str], dict[str, float]] = {}
    merged = parse("task_arithmetic")
    for two in combinations(ready.experts, 2):
        mine = prepare(pair_of(recipe, two))
        rows = [
            score_sentence(mine, merged, {n: w[n] for n in two}, progress=bars)[-1] for w in (ready.experts, adapted)
        ]
        for task in two:
            other = next(n for n in two if n != task)
            gains[task, other] = only(rows[1].scores, task).compared(only(rows[0].scores, task))
    lines = []
    for word in KINDS:
        pairs = [pair for pair, told in before.items() if kind(told) == word]
        lines.append([
            word, str(len(pairs)), *(mean([told[p]["score"] for p in pairs]) for told in (before, after)),
            mean([gains[p]["score"] for p in pairs]), f"{sum(kind(gains[p]) == 'hurts' for p in pairs)}",
        ])  # fmt: skip
    order = list(before)
    like = float(np.corrcoef([before[p]["score"] for p in order], [gains[p]["score"] for p in order])[0, 1])
    head = [
        "an expert on another task",
        "pairs",
        "over the base",
        "adapted",
        "RI's gain on that task, both merged",
        "where it loses",
    ]
    each = [
        {"task": i, "expert": j, "before": before[i, j], "after": after[i, j], "gain": gains[i, j]} for i, j in order
    ]
    told = {"head": head, "rows": lines, "correlation": like, "date": time.strftime("%Y-%m-%d"), "each": each}
    args.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(lines), f"correlation {like:+.2f}")


if __name__ == "__main__":
    main()
