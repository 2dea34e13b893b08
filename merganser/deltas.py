"""A merge in memory, as what it adds to the base: what is scaled and scored again and again."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .job import Ingredient, Job
from .loop import Piece, is_float, merge_each
from .progress import Progress, silent
from .sentence import Sentence
from .survey import survey
from .weights.header import shape_of
from .where import Where


def merged_deltas(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    sentence: Sentence,
    names: Sequence[str],
    *,
    seed: int = 0,
    ingredients: Mapping[str, Ingredient] | None = None,
    where: Where | None = None,
    progress: Progress = silent,
) -> dict[str, Float[Tensor, "*shape"]]:
    """Return the merged delta (fp32) of every tensor that an expert has moved."""
    floats = [name for name in names if is_float(base, name)]
    job = Job(base, experts, sentence, floats, seed, ingredients or {}, where or Where())
    merged: dict[str, Tensor] = {}

    def put(name: str, piece: Piece) -> None:
        if piece.value is not None:
            if name not in merged:
                merged[name] = torch.zeros(shape_of(base, name), dtype=piece.base.dtype)
            merged[name].reshape(-1)[piece.at : piece.at + piece.base.numel()] = piece.value.reshape(-1)

    merge_each(job, survey(job, progress=progress), put, progress=progress)
    return {name: merged[name] for name in names if name in merged}


def applied(base: Tensor, delta: Float[Tensor, "*shape"]) -> Tensor:
    """Return ``base + delta``, added in fp32 (float64 for a float64 base) and cast to the base's dtype."""
    return (base.to(delta.dtype) + delta).to(base.dtype)
