"""Fisher merging: each entry is the experts' mean, weighted by how much their outputs depend on it."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..inner import mixed, weights_of

ELEMENTWISE = True


def fisher(
    deltas: Float[Tensor, "experts *shape"],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    minimal: float = 1e-6,
    fisher: Float[Tensor, "experts *shape"] | None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the mean of the deltas weighted by their Fisher information, entry by entry.

        tau = sum_t c_t (F_t + minimal) tau_t / sum_t c_t (F_t + minimal)
        c_t = w_t / (|F_t| + 1e-6)  with normalize, else w_t          |F_t|: L2 norm over all tensors that are merged

    Tensors of any shape alike. Where ``fisher`` has no such tensor the mean weighted by w_t is taken; an entry of which
    all F_t are zero gets the mean weighted by c_t, thanks to ``minimal``.

    weights     w_t, one an expert, not negative, alike by default; the paper tunes them for two experts
    normalize   make experts with larger gradients count no more than others
    minimal     is added to every F_t, 1e-6 in the published code
    fisher      F_t, shaped like the deltas, as `merganser.learn.measure.fisher` measures it
    survey      the squares of the norms |F_t|

    Raises ValueError for a minimal that is not positive, negative weights or ones of another number than the experts,
    or a fisher of another shape than the deltas.
    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832).
    """
    if isinstance(minimal, bool) or not (isinstance(minimal, (int, float)) and minimal > 0):
        raise ValueError(f"minimal must be positive, got {minimal!r}")
    w = torch.tensor(weights_of(weights, len(deltas), negative=False), dtype=torch.float64, device=deltas.device)
    if fisher is None:
        return mixed(deltas, w / w.sum())
    if fisher.numel() != deltas.numel():
        raise ValueError(f"fisher must have the deltas' shape {list(deltas.shape)}, has {list(fisher.shape)}")
    fisher = fisher.reshape(deltas.shape)  # either may be flat
    kind = torch.promote_types(deltas.dtype, torch.float32)
    if normalize:
        w = w / ((survey[0] if survey is not None else _squares(fisher)).sqrt() + 1e-6)
        w = w / w.sum()
    pull = [c * (one.to(kind) + minimal) for c, one in zip(w.to(kind), fisher, strict=True)]
    terms = [p * delta.to(kind) for p, delta in zip(pull, deltas, strict=True)]
    return (reduce(torch.add, terms) / reduce(torch.add, pull)).to(deltas.dtype)


def passes(*, normalize: bool = True, **_knobs: Any) -> list[Any]:
    """Return what ``normalize`` has to learn first from the whole model: each expert's sum of squares of F_t."""

    def look(deltas: Tensor, _learned: list[Tensor], fisher: Tensor | None = None) -> Tensor:
        return torch.zeros(len(deltas), dtype=torch.float64) if fisher is None else _squares(fisher)

    return [look] if normalize else []


def _squares(fisher: Tensor) -> Tensor:
    return torch.stack([one.detach().double().square().sum() for one in fisher])
