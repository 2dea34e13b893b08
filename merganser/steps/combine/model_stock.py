"""Model Stock: the experts' mean, drawn back to the base by as much as they disagree."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..inner import gram, known, lengths, mixed, rough_gram

SCOPE = "tensor"


def model_stock(
    deltas: Float[Tensor, "experts *shape"],
    *,
    filter_wise: bool = False,
    floor: float = 0.0,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the mean of the deltas times a ratio that follows from the angle between them.

        tau = t mean(tau_1 .. tau_T),    t = T c / (1 + (T - 1) c),    c = mean over pairs of cos(tau_i, tau_j)

    Each tensor has its own t: 1 where all agree, 0 where the deltas are orthogonal; it is not clamped (c < 0 gives
    t < 0, and at 1 + (T - 1) c = 0 it is 0). A delta of zero has cos 0 with any other. One expert is returned as it is.

    filter_wise   one t for each row along the last axis; a tensor with at most one axis is one row
    floor         least product of two lengths that a cos divides by. mergekit has 1e-6, which draws tensors with small
                  deltas (two lengths below 1e-3: biases, norms) to the base; the paper has none
    survey        the `gram` matrix, for filter_wise=False

    Raises ValueError for a negative floor.
    Source: Jang et al., Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522).
    """
    if not (isinstance(floor, (int, float)) and floor >= 0):
        raise ValueError(f"floor must not be negative, got {floor!r}")
    if survey is not None and not filter_wise:
        return mixed(deltas, known(_shares, survey[0], floor))
    return mixed(deltas, _shares(gram(deltas, by_row=filter_wise), floor))


def _shares(products: Tensor, floor: float) -> Float[Tensor, "*rows experts"]:
    experts = products.shape[-1]
    ratio = torch.ones_like(products[..., 0, 0])
    if experts > 1:
        norms = lengths(products)
        cos = (products / (norms[..., :, None] * norms[..., None, :]).clamp(min=floor)).clamp(-1, 1)
        others = cos.sum(dim=(-2, -1)) - cos.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        c = others / (experts * (experts - 1))
        below = 1 + (experts - 1) * c
        flat = below.abs() < 1e-6
        ratio = torch.where(flat, 0, experts * c / torch.where(flat, 1, below))
    return (ratio / experts)[..., None].expand(*ratio.shape, experts)


def elementwise(*, filter_wise: bool = False, **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: not through rows that have a ratio of their own."""
    return not filter_wise


def passes(*, filter_wise: bool = False, **_knobs: Any) -> list[Any]:
    """Return what `model_stock` has to learn first from a tensor: inner products."""

    def look(deltas: Tensor, _learned: list[Tensor]) -> Tensor:
        return rough_gram(deltas)

    return [] if filter_wise else [look]
