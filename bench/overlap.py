"""Two experts with literally the same head: what leaving out shared classes does.

    python bench/overlap.py --data TEXT_TASKS --to OUT --out docs/results/overlap.json

Tasks: sst2 (films), products (reviews of goods: the set of the shift `sst2_products`, split here into 1,200 rows to train on,
200 to choose on and 600 to test), agnews and trec6. The first two have the same two classes, so that `ri` of one is to keep
the expert's answers and the base's in the same logits. ``overlap=0.95``, the default, leaves the other head's rows out of the
other term; ``overlap=2`` is the paper's loss, which does not look.
"""

import gzip
import json
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from options import options

from merganser.evaluate.metrics import interval
from merganser.evaluate.run import Scores, means
from merganser.evaluate.table import Row, rows_in
from merganser.progress import bars
from merganser.run import run
from merganser.suites import text
from merganser.suites.studies import _adapt_of, _as, _chosen
from merganser.suites.suite import recipe_for

PAIR, REST = ("sst2", "products"), ("agnews", "trec6")
MERGERS = ("task_arithmetic", "ties", "tsv", "iso_c")
WAYS = {"left out": "ri(steps={steps})", "kept": "ri(overlap=2, steps={steps})"}
TRAIN, VAL = 1200, 200


def write_tasks(data: Path, to: Path) -> Path:
    """Return a folder with the four tasks."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("sst2", *REST, "aux"):
        if not (to / name).exists():
            (to / name).symlink_to((data / name).resolve(), target_is_directory=True)
    place, shift = to / "products", data / "shift" / "sst2_products"
    place.mkdir(exist_ok=True)
    told = tomllib.loads((shift / "task.toml").read_text())
    kept = {
        "name": "products",
        **{k: told[k] for k in ("kind", "metric", "num_classes", "template", "classes", "source", "licence")},
    }
    (place / "task.toml").write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in kept.items())
    )  # JSON's strings are TOML's
    with gzip.open(shift / "test.jsonl.gz", "rt") as file:
        rows = file.read().splitlines()
    order = np.random.default_rng(0).permutation(len(rows))
    for split, at in zip(("train", "val", "test"), np.split(order, (TRAIN, TRAIN + VAL)), strict=True):
        with gzip.open(place / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(rows[k] for k in at.tolist()) + "\n")
    return to


def some(row: Row, names: tuple[str, ...]) -> Scores:
    return Scores({name: row.scores[name] for name in names})


def gain(pairs: list[tuple[Row, Row]], names: tuple[str, ...]) -> dict[str, float]:
    """Return the gain of the second rows over the first in the mean of some tasks, over seeds, with its interval."""
    draws = means([some(row, names) for pair in pairs for row in pair])
    difference = (draws[:, 1::2] - draws[:, 0::2]).mean(axis=1)
    found = [some(b, names).mean - some(a, names).mean for a, b in pairs]
    return {"score": float(np.mean(found)), **interval(difference)}


def main() -> None:
    parser = options(__doc__, seeds=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    data = write_tasks(args.data, args.to / "tasks")
    recipe = recipe_for(text.SUITE, data, list(MERGERS), progress=bars)
    adapts = {label: how.format(steps=args.steps) for label, how in WAYS.items()}
    found: list[dict[Any, Row]] = []  # a seed
    for seed in range(args.seeds):
        place = args.to / f"seed-{seed}"
        sentences = [*MERGERS, *(f"{how} | {m}" for how in adapts.values() for m in MERGERS)]
        run(_as(recipe, sentences, seed), place, progress=bars)
        found.append(_chosen(rows_in(place)))
    rows, drawn = [], []
    for merger in MERGERS:
        for names, told in ((PAIR, "the pair"), (REST, "the others")):
            at = lambda seed, how: seed[how and _adapt_of(how), merger]  # noqa: B023, E731
            plain, out, kept = ([at(seed, how) for seed in found] for how in (None, adapts["left out"], adapts["kept"]))
            over = gain(list(zip(kept, out, strict=True)), names)
            mean = [100 * float(np.mean([some(r, names).mean for r in rows_of])) for rows_of in (plain, kept, out)]
            low, high = 100 * over["low"], 100 * over["high"]
            drawn.append({"label": f"{merger}, {told}", "y": over["score"], "low": over["low"], "high": over["high"]})
            rows.append(
                [
                    f"`{merger}`",
                    told,
                    *(f"{v:.1f}" for v in mean),
                    f"{100 * over['score']:+.1f} [{low:+.1f}, {high:+.1f}]",
                ]
            )
            print(rows[-1], flush=True)
    head = [
        "merger",
        "mean of",
        "without `ri`",
        "shared classes kept",
        "left out",
        "left out over kept [95 % interval]",
    ]
    result: dict[str, Any] = {"head": head, "rows": rows, "seeds": args.seeds, "date": time.strftime("%Y-%m-%d")}
    result["points"], result["y"] = drawn, "shared classes left out over kept, points"
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
