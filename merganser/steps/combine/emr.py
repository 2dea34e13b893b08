"""EMR: elect one delta for all, mask and rescale it for each."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ELEMENTWISE = True


def emr(
    deltas: Float[Tensor, "experts *shape"],
    *,
    expert: str | int | None = None,
    experts: Sequence[str] | None = None,
    numel: int | None = None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the unified delta, or with ``expert`` the model of that expert's task made from it.

        s   = +1 where mean_t tau_t > 0, else -1;    M_t = [s tau_t > 0]
        u   = s max_t M_t |tau_t|
        tau = u,   or   c_t M_t u  with  c_t = sum mean|tau_t| / sum mean|M_t u|

    c_t is one number for the whole model: both sums go over tensors, each of which counts by its mean, however large
    it is. The paper keeps u, the masks (one bit an entry) and the c_t, and picks the task's at test time; a merge
    writes one model, so ask for one expert's at a time. Tensors of any shape alike.

    expert    name or number (from 0) of an expert; None: the unified delta
    experts   the experts' names
    numel     size of the whole tensor, where deltas are a part of it
    survey    the two sums of each expert, over all tensors

    Raises ValueError for an unknown expert.
    Source: Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging (arXiv 2405.17461).
    """
    unified = _unified(deltas)
    if expert is None:
        return unified
    at = _place(expert, experts, len(deltas))
    lengths, masked = survey[0] if survey is not None else _means(deltas, numel)
    c = (lengths[at] / masked[at] if masked[at] > 0 else masked[at]).to(deltas.dtype)
    return c * unified * _agrees(deltas[at], unified)


def passes(*, expert: str | int | None = None) -> list[Any]:
    """Return what a task's model has to learn first from the whole model: the sums of means that make up c_t."""

    def look(deltas: Tensor, _learned: list[Tensor], numel: int | None = None) -> Tensor:
        return _means(deltas, numel)

    return [] if expert is None else [look]


def _unified(deltas: Tensor) -> Tensor:
    plus = reduce(torch.add, deltas.detach()).sign().clamp(min=0)
    top = reduce(torch.maximum, deltas).clamp(min=0)
    bottom = reduce(torch.minimum, deltas).clamp(max=0)
    return top * plus + bottom * (1 - plus)


def _agrees(delta: Tensor, unified: Tensor) -> Tensor:
    """Return M_t: 1 where the delta has the elected sign, else 0; in numbers, since torch.where is slow."""
    return (delta.detach().sign() * unified.detach().sign()).clamp(min=0)


def _means(deltas: Tensor, numel: int | None) -> Float[Tensor, "2 experts"]:
    """Return the mean of |tau_t| and of |M_t u|, or this part's share of it."""
    deltas = deltas.detach()
    unified = _unified(deltas)
    size = unified.abs()
    lengths = [delta.abs().sum(dtype=torch.float64) for delta in deltas]
    masked = [(_agrees(delta, unified) * size).sum(dtype=torch.float64) for delta in deltas]
    return torch.stack([torch.stack(lengths), torch.stack(masked)]) / max(1, numel or deltas[0].numel())


def _place(expert: str | int, experts: Sequence[str] | None, count: int) -> int:
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < count:
        return expert
    if experts is not None and expert in experts:
        return list(experts).index(str(expert))
    known = ", ".join(experts) if experts is not None else f"0 .. {count - 1}"
    raise ValueError(f"expert must be one of {known}, got {expert!r}")
