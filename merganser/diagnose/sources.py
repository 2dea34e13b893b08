"""Which unlabeled inputs to adapt on: how well each source covers the heads' classes, told by base and heads alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError, HeadError
from ..evaluate.unlabeled import read_unlabeled
from ..models.encoder import features
from ..models.heads import AnyHead, Head
from ..models.inputs import Subset
from ..progress import Progress, silent
from ..synthetic import split_sources


@dataclass(frozen=True)
class Coverage:
    """A source, how many of its inputs were looked at, and the two means of largest cosines that `coverage` tells."""

    source: str
    inputs: int
    cover: float
    near: float


def coverage(x: Float[Tensor, "inputs width"], heads: Mapping[str, AnyHead]) -> tuple[float, float]:
    """Return how well inputs cover the classes of all heads, from the base's features ``x`` of them.

        cover = mean_c max_x cos(x, w_c)        near = mean_x max_c cos(x, w_c)

    over the class vectors w_c of all heads. ``cover`` is high where every class has an input like it; ``near`` where
    every input is like some class, which noise is too. Both grow with the number of inputs: compare as many.
    Raises HeadError where a head has no class vectors of the features' width.
    """
    for name, head in heads.items():
        if not isinstance(head, Head) or head.weight.shape[1] != x.shape[1]:
            raise HeadError(f"the head of '{name}' has no class vectors to compare inputs with")
    vectors = torch.cat([head.weight.float() for head in heads.values() if isinstance(head, Head)])
    cosine = F.normalize(x.float(), dim=1) @ F.normalize(vectors, dim=1).mT
    return float(cosine.max(dim=0).values.mean()), float(cosine.max(dim=1).values.mean())


def covered(
    encoder: nn.Module,
    base: Mapping[str, Tensor],
    heads: Mapping[str, AnyHead],
    sources: Mapping[str, Any],
    *,
    few: int = 1000,
    kind: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> list[Coverage]:
    """Return the `coverage` of every source (prepared inputs by name), the best first, on ``few`` random inputs of each.

    Raises DataError where a source has no inputs, HeadError as `coverage` does.
    """
    found = []
    with progress("look at sources", len(sources)) as tick:
        for name, inputs in sources.items():
            if len(inputs) == 0:
                raise DataError(f"source '{name}' has no inputs")
            at = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:few]
            x = features(encoder, base, Subset(inputs, at), kind=kind)
            found.append(Coverage(name, len(at), *coverage(x, heads)))
            tick(1)
    return sorted(found, key=lambda one: -one.cover)


def sources_of(
    recipe: Any, more: Sequence[str | Path] = (), *, few: int = 1000, progress: Progress = silent
) -> list[Coverage]:
    """Return the `coverage` of a recipe's files of unlabeled inputs, of all of them together, and of ``more`` files.

    Raises DataError where there are none; and the errors of `prepare`.
    """
    from ..prepare import prepare, random_texts

    own = list(recipe.inputs.files) if recipe.inputs else []
    if not own and not more:
        raise DataError("no unlabeled inputs: name files, or give the recipe [inputs] files = [...]")
    groups = {str(file): [Path(file)] for file in (*own, *more)}
    if len(own) > 1:
        groups["the recipe's, together"] = [Path(file) for file in own]
    parts = {name: split_sources(files) for name, files in groups.items()}
    lying = {name: read_unlabeled(files, few) if files else [] for name, (files, _) in parts.items()}
    ready = prepare(
        recipe.model_copy(update={"inputs": None, "sentences": ["average"], "where": {}}), progress=progress
    )
    sources = {}
    for name, (_, tokens) in parts.items():
        raw = [*lying[name], *random_texts(ready.encoder, tokens)] if tokens else lying[name]
        sources[name] = ready.encoder.prepare(raw)
    return covered(
        ready.encoder, ready.base, ready.heads, sources, few=few, kind=ready.kind, seed=recipe.seed, progress=progress
    )
