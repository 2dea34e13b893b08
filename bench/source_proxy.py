"""Which unlabeled inputs help? Scores of a source that need no label and no training, against what RI gains with it.

    python bench/source_proxy.py --suite conv --data VISION_TASKS --to OUT --out docs/results/conv-sources.json

Sources, 2,000 inputs of each: the suite's own files, drawn ones, mixtures, inputs of tasks outside the suite, and those of
its tasks (without labels). Of each, six scores by base, experts and heads alone, on at most 1,000 inputs:

    own      mean over experts t of KL(h_t(base) || h_t(expert t)): how much the source shows of what an expert has learned
    others   mean over t and j != t of KL(h_j(base) || h_j(expert t)): how much it shows of what RI is to remove
    spread   mean over t of H(mean p_t) - mean H(p_t), the expert's own predictions: confident, and of many classes
    rank     exp of the entropy of the normalised spectrum of the base's features: how many directions it excites
    near     mean over inputs of the largest cosine between the base's features and a class vector of any head
    cover    mean over all classes of the largest cosine between its vector and the base's features of any input

and the gain of ri with it over the same merger without, scale chosen on validation, the mean over mergers. ``rho`` is
Spearman's rank correlation of each score with the gain over all sources.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.adapt import slug
from merganser.diagnose.interference import divergence
from merganser.diagnose.sources import coverage
from merganser.evaluate.table import rows_in
from merganser.models.encoder import features
from merganser.models.heads import Stacked
from merganser.models.inputs import Subset
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.recipe import Recipe
from merganser.run import run
from merganser.suites import text, vision
from merganser.suites.studies import MERGERS, _adapt_of, _as, _chosen, _Found, _share, _stem, _with_inputs, words_of
from merganser.suites.suite import recipe_for

SUITES = {"text": text.SUITE, "conv": vision.CONV}
SCORES = ("own", "others", "spread", "rank", "near", "cover")
FEW, LIMIT = 1000, 2000


def sources(recipe: Recipe, data: Path) -> dict[str, list[Path]]:
    """Return the files of every source, by a name."""
    assert recipe.inputs is not None, "a suite has inputs"
    files, kind = list(recipe.inputs.files), recipe.model.encoder
    drawn = (
        ["tokens:2000"] if kind == "text" else [f"{k}:2000" for k in ("noise", "dead-leaves", "fractals", "textures")]
    )
    found = {_stem(f): [f] for f in [*files, *map(Path, drawn)]}
    found["all files"] = files
    found[f"all files, {_stem(Path(drawn[-1]))}"] = [*files, Path(drawn[-1])]
    if kind != "text":
        found["dead-leaves, fractals"] = [Path(drawn[1]), Path(drawn[2])]
        apart = [p.parent for p in sorted(data.glob("*/train.npz")) if p.parent.name not in recipe.tasks]
        found |= {f"{folder.name} (another task)": [folder / "train.npz"] for folder in apart[:2]}
        found["the tasks' own"] = [data / name / "train.npz" for name in recipe.tasks]
    return found


def scores(ready: Prepared) -> dict[str, float]:
    """Return the scores of the inputs of ``ready``."""
    stacked, names = Stacked(ready.heads), list(ready.heads)
    at = torch.randperm(len(ready.inputs), generator=torch.Generator().manual_seed(0))[:FEW]
    some = Subset(ready.inputs, at)

    def said(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, stacked.log_softmax(stacked(x)).split(stacked.sizes, dim=1), strict=True))

    features_0 = features(ready.encoder, ready.base, some, kind=ready.kind)
    zero = said(features_0)
    own, others, spread = [], [], []
    for t, weights in ready.experts.items():
        mine = said(features(ready.encoder, weights, some, kind=ready.kind))
        own.append(divergence(zero[t], mine[t]))
        others += [divergence(zero[j], mine[j]) for j in names if j != t]
        p = mine[t].exp()
        spread.append(float(entropy(p.mean(dim=0)) - entropy(p).mean()))
    s = torch.linalg.svdvals(features_0.double() - features_0.double().mean(dim=0)).square()
    rank = float(entropy(s / s.sum()).exp())
    cover, near = coverage(features_0, ready.heads)
    return {
        "own": float(np.mean(own)),
        "others": float(np.mean(others)),
        "spread": float(np.mean(spread)),
        "rank": rank,
        "near": near,
        "cover": cover,
    }


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def rho(a: list[float], b: list[float]) -> float:
    """Return Spearman's rank correlation; no two values are equal here."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="conv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ri", help="knobs of the suite's own ri to change, such as 'ri(steps=100)'")
    args = parser.parse_args()
    suite, mergers = SUITES[args.suite], list(MERGERS)
    recipe, how = recipe_for(suite, args.data, mergers, progress=bars), words_of(suite, args.ri)()
    found: list[dict[str, Any]] = []
    places: list[Path] = []
    for name, files in sources(recipe, args.data.resolve()).items():
        mine = _with_inputs(files=files, limit=LIMIT)(recipe)
        sentences = [*mergers, *(f"{how} | {m}" for m in mergers)]
        pairs = []
        for seed in range(args.seeds):
            place = args.to / f"seed-{seed}" / slug(name)
            for earlier in places:
                _share(earlier / "rows", place / "rows")
            places.append(place)
            run(_as(mine, sentences, seed), place, progress=bars)
            rows = _chosen(rows_in(place))
            pairs.append([(rows[None, m], rows[_adapt_of(how), m]) for m in mergers])
        top = json.loads((place / "scores.json").read_text())["experts"]["mean"]["score"]
        told = scores(prepare(_as(mine, mergers, 0)))
        gain = _Found([pair for one in pairs for pair in one]).told([top])["gain"]
        each = [float(np.mean([b.scores.mean - a.scores.mean for a, b in some])) for some in zip(*pairs, strict=True)]
        by_seed = [float(np.mean([b.scores.mean - a.scores.mean for a, b in one])) for one in pairs]
        found.append({"source": name, **told, "gain": gain, "each": each, "by_seed": by_seed})
        print(json.dumps(found[-1]), flush=True)
        write(found, mergers, args.out)


def write(found: list[dict[str, Any]], mergers: list[str], out: Path) -> None:
    head = ["source", *SCORES, "gain, mean of the mergers, points", *(f"`{m}`" for m in mergers)]
    rows = [
        [
            one["source"], *(f"{one[s]:.3g}" for s in SCORES),
            f"{100 * one['gain']['score']:+.1f} [{100 * one['gain']['low']:+.1f}, {100 * one['gain']['high']:+.1f}]",
            *(f"{100 * gain:+.1f}" for gain in one["each"]),
        ]
        for one in sorted(found, key=lambda one: -one["gain"]["score"])
    ]  # fmt: skip
    gains = [one["gain"]["score"] for one in found]
    if len(found) > 2:
        like = [f"{rho([one[s] for one in found], gains):+.2f}" for s in SCORES]
        rows.append(["rho with the gain", *like, "", *("" for _ in mergers)])
    out.write_text(
        json.dumps({"head": head, "rows": rows, "date": time.strftime("%Y-%m-%d"), "found": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
