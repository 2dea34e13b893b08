"""Scales chosen without a label: by agreement with the experts on unlabeled inputs, beside validation labels.

    python bench/choose.py --data TEXT_TASKS --to OUT --out docs/results/text-choose.json [--steps 100] [--seeds 1]

The text suite's experts; each merger without and with `ri`, the same adapted experts both times. One line a sentence: its
score on the test splits at the scale as written, at the one that validation labels chose, at the one that was chosen without,
and what the last is over the labels' [95 % interval, paired]. OUT/labels and OUT/experts may hold runs already.
"""

import json
import time
from pathlib import Path
from typing import Any

from options import options

from merganser.evaluate.run import gained
from merganser.evaluate.table import Row, rows_in
from merganser.progress import bars
from merganser.run import run
from merganser.suites import text
from merganser.suites.studies import SUM, _as, gain_text
from merganser.suites.suite import recipe_for

MERGERS = (SUM, "ties", "tsv", "iso_c")


def by_sentence(folder: Path, tuned: bool) -> dict[str, Row]:
    """Return the rows of a run by adapt words and merger."""
    rows = rows_in(folder)
    return {f"{row.adapt} | {row.merging}" if row.adapt else row.merging: row for row in rows if row.tuned == tuned}


def main() -> None:
    parser = options(__doc__, seeds=1)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    sentences = [how + merger for merger in MERGERS for how in ("", f"ri(steps={asked.steps}) | ")]
    recipe = recipe_for(text.SUITE, asked.data, sentences, progress=bars)
    found: dict[str, list[dict[str, Row]]] = {"labels": [], "experts": [], "written": []}
    for seed in range(asked.seeds):
        for choose in ("labels", "experts"):
            place = asked.to / choose / f"seed-{seed}"
            if choose == "experts" and not (place / "adapted").exists():  # the same experts for both
                place.mkdir(parents=True, exist_ok=True)
                (place / "adapted").symlink_to((asked.to / "labels" / f"seed-{seed}" / "adapted").resolve())
            run(_as(recipe.model_copy(update={"choose": choose}), sentences, seed), place, progress=bars)
            found[choose].append(by_sentence(place, True))
        found["written"].append(by_sentence(asked.to / "labels" / f"seed-{seed}", False))
    lines, points = [], []
    order = sorted(found["labels"][0], key=lambda name: name.rpartition(" | ")[::-1])  # by merger, without ri first
    for name in order:
        rows = {way: [seed[name] for seed in seeds] for way, seeds in found.items()}
        gain = gained([(a.scores, b.scores) for a, b in zip(rows["labels"], rows["experts"], strict=True)])
        mean = {way: sum(row.scores.mean for row in of) / len(of) for way, of in rows.items()}
        told = {w: f"{100 * mean[w]:.1f} ({', '.join(f'{row.scale:g}' for row in of)})" for w, of in rows.items()}
        lines.append([f"`{name}`", told["written"], told["labels"], told["experts"], gain_text(gain)])
        points.append({"label": name, "y": gain["score"], "low": gain["low"], "high": gain["high"]})
        print(lines[-1], flush=True)
    head = ["sentence", "as written (scale)", "by labels (scale)", "without labels (scale)", "without over by labels"]
    result: dict[str, Any] = {"head": head, "rows": lines, "seeds": asked.seeds, "date": time.strftime("%Y-%m-%d")}
    result |= {"points": points, "y": "scale chosen without labels over by labels, points"}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
