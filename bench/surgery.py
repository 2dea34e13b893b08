"""Does correcting a merged model's features (Surgery) help, and does `ri` help under it?

    python bench/surgery.py --data TEXT_TASKS --to OUT --out docs/results/text-surgery.json --seeds 3

On the text suite's experts, without adapting, with `ri(steps=100)`, and with `coadapt(steps=100)` behind it; scales are
chosen on 200 rows a task for validation, scores are those of 800 for the test. Corrections are learned as
`merganser learn surgery` does (rank 16, 1,000 steps), from the merged model and the experts as they were before adapting,
without labels:

    tasks     on 200 rows of each task's validation split
    inputs    on 4,000 of the suite's unlabeled sentences, the same for all tasks

OUT keeps adapted experts and scores; what is there is not made again.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from options import options

from merganser.adapt import adapt, slug
from merganser.card import key_of
from merganser.evaluate.run import Scores, gained, outcome
from merganser.evaluate.table import Row, read_rows, write_rows
from merganser.learn.surgery import Correction, corrected, surgery
from merganser.models.encoder import features
from merganser.models.inputs import Subset
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.recipe import LimitPart
from merganser.sentence import Sentence, parse
from merganser.suites import text
from merganser.suites.suite import recipe_for, shortened
from merganser.sweep import delta_of, merged_at, score_experts, score_sentence

ADAPTS = ("", "ri(steps=100)", "ri(steps=100) | coadapt(steps=100)")
MERGERS = ("tsv", "task_arithmetic")
WAYS = ("", "tasks", "inputs")
HEAD = ["sentence", "corrected on", "mean", "over no correction", "over the plain merger", "over it, corrected alike"]
SOME = 4000


def learned_on(ready: Prepared) -> dict[str, dict[str, Any]]:
    """Return the inputs of each way by task."""
    some = Subset(ready.inputs, torch.arange(min(SOME, len(ready.inputs))))
    return {"tasks": {n: ready.val[n].inputs for n in ready.tasks}, "inputs": dict.fromkeys(ready.tasks, some)}


def seen(ready: Prepared, weights: Any, inputs: Any) -> torch.Tensor:
    return features(ready.encoder, weights, inputs, kind=ready.kind)


def scores_of(ready: Prepared, sentence: Sentence, experts: Any, asked: Any, own: Any) -> list[Row]:
    """Return what a merger scores at its best scale: as it is, and corrected in either way."""
    by = score_sentence(ready, sentence, experts, progress=bars)[-1].scale
    weights = merged_at(ready, delta_of(ready, sentence, experts), by)
    test = {n: seen(ready, weights, t.inputs) for n, t in ready.test.items()}
    mine: dict[int, torch.Tensor] = {}
    found = []
    for way in WAYS:
        corrections: dict[str, Correction] = {}
        for n in ready.tasks if way else ():
            given = asked[way][n]
            if id(given) not in mine:
                mine[id(given)] = seen(ready, weights, given)
            corrections[n] = surgery(mine[id(given)], own[way][n], seed=ready.recipe.seed)
        heads = corrected(ready.heads, corrections) if way else ready.heads
        scores = Scores({n: outcome(heads[n](test[n]), ready.test[n]) for n in ready.tasks})
        found.append(Row(way, scores, scale=by))
    return found


def main() -> None:
    parser = options(__doc__, seeds=1)
    args = parser.parse_args()
    suite = shortened(text.SUITE, limits=LimitPart(val=200, test=800, diagnose=0))
    recipe = recipe_for(suite, args.data, ["tsv"], progress=bars)
    readies = [prepare(recipe.model_copy(update={"seed": seed})) for seed in range(args.seeds)]
    asked = [learned_on(ready) for ready in readies]
    first = readies[0]
    top = score_experts(first, first.experts)[0].mean
    own = {way: {n: seen(first, w, asked[0][way][n]) for n, w in first.experts.items()} for way in WAYS[1:]}
    found: dict[tuple[str, str, str], list[Scores]] = {}
    for merger in MERGERS:
        for adapting in ADAPTS:
            for seed, ready in enumerate(readies):
                place = args.to / f"seed-{seed}"
                path, key = (
                    place / "rows" / f"{slug(f'{adapting} {merger}')}.json",
                    key_of([adapting, merger, seed, SOME]),
                )
                if read_rows(path, key) is None:
                    experts = adapted(ready, adapting, place / "adapted")
                    write_rows(path, key, scores_of(ready, parse(merger), experts, asked[seed], own))
                for row in read_rows(path, key) or ():
                    found.setdefault((adapting, merger, row.sentence), []).append(row.scores)
                    print(seed, adapting, merger, row.scale, row.sentence, f"{100 * row.scores.mean:.2f}", flush=True)
            told = {
                "date": time.strftime("%Y-%m-%d"), "seeds": args.seeds, "experts": top, "threads": torch.get_num_threads(),
                "head": HEAD, "rows": [line(found, *key, top) for key in found],
            }  # fmt: skip
            args.out.write_text(json.dumps(told, indent=1) + "\n")


def adapted(ready: Prepared, how: str, place: Path) -> Any:
    """Return the experts, adapted if ``how`` says so."""
    if not how:
        return ready.experts
    return adapt(
        ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=how,
        seed=ready.recipe.seed, into=place / slug(how), kind=ready.kind, heads_key=ready.heads_key, progress=bars,
        _place=lambda part: place / slug(part),
    )  # fmt: skip


def line(
    found: dict[tuple[str, str, str], list[Scores]], adapting: str, merger: str, way: str, top: float
) -> list[str]:
    """Return a line of the table: mean, gains over no correction, over the merger alone, and over that corrected alike."""
    these = found[adapting, merger, way]
    mean = sum(s.mean for s in these) / len(these)

    def over(key: tuple[str, str, str]) -> str:
        gain = gained(list(zip(found[key], these, strict=True)))
        lost = top - sum(s.mean for s in found[key]) / len(these)
        told = f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        return (
            f"{told}, {100 * gain['score'] / lost:.0f} %" + f" ({', '.join(f'{100 * g:+.1f}' for g in gain['each'])})"
        )

    return [
        f"`{adapting} | {merger}`" if adapting else f"`{merger}`",
        way or "–",
        f"{100 * mean:.1f}",
        over((adapting, merger, "")) if way else "–",
        over(("", merger, "")) if adapting or way else "–",
        over(("", merger, way)) if adapting and way else "–",
    ]


if __name__ == "__main__":
    main()
