"""Which unlabeled inputs help? Scores of a source that need no label and no training, against what RI gains with it.

Sources, 2,000 inputs of each: the suite's own files, drawn ones, mixtures, and for pictures also those of tasks outside the
suite and of its own tasks, without labels. Of each, six scores by base, experts and heads, on at most 1,000 inputs:

    own      mean over experts t of KL(h_t(base) || h_t(expert t)): how much the source shows of what an expert has learned
    others   mean over t and j != t of KL(h_j(base) || h_j(expert t)): how much it shows of what RI is to remove
    spread   mean over t of H(mean p_t) - mean H(p_t), the expert's own predictions: confident, and of many classes
    rank     exp of the entropy of the normalised spectrum of the base's features: how many directions it excites
    near     mean over inputs of the largest cosine between the base's features and a class vector of any head
    cover    mean over all classes of the largest cosine between its vector and the base's features of any input

and the gain of ri with it over the same merger without, scale chosen on validation, the mean over mergers. ``rho`` is
Spearman's rank correlation of each score with the gain over all sources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapt import slug
from ...diagnose.interference import divergence
from ...diagnose.sources import coverage
from ...evaluate.run import Scores, gained
from ...models.encoder import features
from ...models.heads import Stacked
from ...models.inputs import Subset
from ...prepare import Prepared, prepare
from ...recipe import Recipe
from ..studies import Asked, gain_text, paired, stem, with_inputs

SCORES = ("own", "others", "spread", "rank", "near", "cover")
FEW, LIMIT = 1000, 2000
DRAWN = ("noise", "dead-leaves", "fractals", "textures")


def measure(asked: Asked) -> dict[str, Any]:
    """Return a line for each source, the best first, and the rank correlation of each score with the gain."""
    found: list[dict[str, Any]] = []
    places: list[Path] = []
    for name, files in sources(asked.recipe).items():
        mine = with_inputs(files=files, limit=LIMIT)(asked.recipe)
        rows = [paired(asked, mine, asked.folder / f"seed-{s}" / slug(name), places, s) for s in range(asked.seeds)]
        by_merger: dict[str, list[tuple[Scores, Scores]]] = {m: [one[m] for one in rows] for m in asked.mergers}
        found.append({
            "source": name, **scores(prepare(mine)), "gain": gained([pair for one in rows for pair in one.values()]),
            "each": {m: gained(pairs)["score"] for m, pairs in by_merger.items()},
            "by_seed": [gained(list(one.values()))["score"] for one in rows],
        })  # fmt: skip
    return table(found, asked.mergers)


def sources(recipe: Recipe) -> dict[str, list[Path]]:
    """Return the files of every source, by a name."""
    assert recipe.inputs is not None, "a suite has inputs"
    files, texts = list(recipe.inputs.files), recipe.model.encoder == "text"
    drawn = [Path(f"{kind}:{LIMIT}") for kind in (("tokens",) if texts else DRAWN)]
    found = {stem(file): [file] for file in [*files, *drawn]}
    found["all files"] = files
    found[f"all files, {stem(drawn[-1])}"] = [*files, drawn[-1]]
    if not texts:
        found["dead-leaves, fractals"] = drawn[1:3]
        data = next(iter(recipe.tasks.values())).parent
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

    of_base = features(ready.encoder, ready.base, some, kind=ready.kind)
    zero = said(of_base)
    own, others, spread = [], [], []
    for t, weights in ready.experts.items():
        mine = said(features(ready.encoder, weights, some, kind=ready.kind))
        own.append(divergence(zero[t], mine[t]))
        others += [divergence(zero[j], mine[j]) for j in names if j != t]
        p = mine[t].exp()
        spread.append(float(_entropy(p.mean(dim=0)) - _entropy(p).mean()))
    s = torch.linalg.svdvals(of_base.double() - of_base.double().mean(dim=0)).square()
    cover, near = coverage(of_base, ready.heads)
    told = (float(np.mean(own)), float(np.mean(others)), float(np.mean(spread)), float(_entropy(s / s.sum()).exp()))
    return dict(zip(SCORES, (*told, near, cover), strict=True))


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1)


def rho(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; no two values are equal here."""
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def table(found: Sequence[dict[str, Any]], mergers: Sequence[str]) -> dict[str, Any]:
    """Return head, rows and points of what was found."""
    found = sorted(found, key=lambda one: -one["gain"]["score"])
    gains = [one["gain"]["score"] for one in found]
    rows = [
        [
            one["source"], *(f"{one[s]:.3g}" for s in SCORES),
            gain_text(one["gain"]),
            *(f"{100 * one['each'][m]:+.1f}" for m in mergers),
        ]
        for one in found
    ]  # fmt: skip
    rhos = {s: rho([one[s] for one in found], gains) for s in SCORES}
    rows.append(["rho with the gain", *(f"{rhos[s]:+.2f}" for s in SCORES), *[""] * (1 + len(mergers))])
    points = [
        {
            "label": one["source"],
            "x": one["cover"],
            "y": one["gain"]["score"],
            **{k: one["gain"][k] for k in ("low", "high")},
        }
        for one in found
    ]
    head = ["source", *SCORES, "gain, mean of the mergers, points", *mergers]
    return {
        "head": head,
        "rows": rows,
        "points": points,
        "x": "cover",
        "y": "gain of ri, points",
        "rho": rhos,
        "found": found,
    }
