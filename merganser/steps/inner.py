"""Inner products of one tensor's experts and sums of them: all that steps about angles and lengths need.

Such a step is two questions to a tensor: the Gram matrix of its experts (a survey, which adds up over cuts), and a sum
of the experts with coefficients that follow from that small matrix alone, however often the step iterates.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .select import per_expert

PART = 1 << 15  # entries worked on at a time: a product of few long rows in one go takes four times as long
TINY = 1e-200  # stands for the square of a length of zero: 0 / TINY is 0, and its root has a gradient
BLOCK = 1024  # entries of which `rough_gram` takes fp32 products
SHORT = 0.1  # of the base's squared length, that of a delta
ZERO = 1e-13  # of the base's squared length: what is left when fp32 numbers cancel


def gram(
    deltas: Float[Tensor, "experts *shape"], base: Float[Tensor, "*shape"] | None = None, *, by_row: bool = False
) -> Float[Tensor, "*rows n n"]:
    """Return the inner products of all deltas, and of the base as the last one where it is given, in float64.

    Beside a base that is much longer than the deltas they are `rough_gram`'s: angles between ``base + delta_t`` are good
    to 1e-8 then, since an error in ``<base, delta_t>`` or ``<base, base>`` turns all of them alike.
    ``by_row``: one matrix for each row along the last axis, ``[*shape[:-1], n, n]``; a tensor without axes is one row.
    """
    if by_row or deltas.requires_grad or (base is not None and base.requires_grad):
        return _rows_gram(deltas, base, by_row)
    if base is not None and (products := _over_base(deltas, base)) is not None:
        return products
    rows = [one.reshape(-1) for one in (deltas if base is None else [*deltas, base])]
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=deltas.device)
    at = torch.tril_indices(len(rows), len(rows), device=deltas.device)
    for parts in zip(*(row.split(PART) for row in rows), strict=True):
        wide = [part.to(torch.float64, copy=True) for part in parts]  # how a dot sums depends on where its numbers lie
        products[at[0], at[1]] += torch.stack(
            [torch.dot(wide[i], wide[j]) for i in range(len(wide)) for j in range(i + 1)]
        )
    return products.tril() + products.tril(-1).mT


def _over_base(deltas: Float[Tensor, "experts *shape"], base: Float[Tensor, "*shape"]) -> Float[Tensor, "n n"] | None:
    """Return the inner products by `rough_gram`; None where they are not to be had, or deltas are not short."""
    if deltas.dtype != torch.float32 or base.dtype != torch.float32 or base.numel() < BLOCK:
        return None
    products = rough_gram(torch.cat([deltas.reshape(len(deltas), -1), base.reshape(1, -1)]))
    own = products.diagonal()
    return products if bool((own[:-1] <= SHORT * own[-1]).all()) else None


def _rows_gram(
    deltas: Float[Tensor, "experts *shape"], base: Float[Tensor, "*shape"] | None, by_row: bool
) -> Float[Tensor, "*rows n n"]:
    rows = deltas if base is None else torch.cat([deltas, base.to(deltas)[None]])
    if by_row:
        rows = (rows if rows.ndim > 1 else rows[:, None]).movedim(0, -2).double()
    else:
        rows = rows.reshape(len(rows), math.prod(rows.shape[1:])).double()
    return rows @ rows.mT


def rough_gram(deltas: Float[Tensor, "experts *shape"]) -> Float[Tensor, "experts experts"]:
    """Return the inner products of all deltas: fp32 over 1,024 entries at a time, float64 over those.

    Several times as fast as `gram` and good to about 1e-7 of the lengths: enough for angles between deltas, which are
    large, not for those between fine-tunings of one base.
    """
    rows = deltas.reshape(len(deltas), -1)
    blocks = rows.shape[1] // BLOCK
    if rows.dtype != torch.float32 or blocks == 0:
        return gram(deltas)
    many = rows[:, : blocks * BLOCK].reshape(len(rows), blocks, BLOCK).transpose(0, 1)
    rest = rows[:, blocks * BLOCK :].double()
    return torch.bmm(many, many.mT).double().sum(dim=0) + rest @ rest.mT


def of_weights(products: Float[Tensor, "*rows n n"]) -> Float[Tensor, "*rows experts experts"]:
    """Return the Gram matrix of ``base + delta_t`` from that of the deltas and the base.

    Weights that are zero up to the rounding of fp32 (``delta = -base``) have no direction to speak of: their rows are 0.
    """
    to_base, own = products[..., :-1, -1], products[..., -1:, -1:]
    points = products[..., :-1, :-1] + to_base[..., :, None] + to_base[..., None, :] + own
    there = points.diagonal(dim1=-2, dim2=-1) > ZERO * own[..., 0]
    return torch.where(there[..., :, None] & there[..., None, :], points, 0)


def lengths(products: Float[Tensor, "*rows n n"]) -> Float[Tensor, "*rows n"]:
    """Return the length of each vector; of a zero vector a number so small that its inverse is still finite."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=TINY).sqrt()


def arc(products: Float[Tensor, "*rows 2 2"], t: float, straight: float) -> Float[Tensor, "*rows 2"]:
    """Return the coefficients of two vectors at ``t`` on the arc between them, on the line if |cos| > ``straight``.

    A zero vector has no angle; it counts as orthogonal to any other.
    """
    norm = lengths(products)
    cos = products[..., 0, 1] / (norm[..., 0] * norm[..., 1])
    line = cos.abs() > straight
    angle = torch.where(line, 0, cos).acos()
    first, second = ((angle * x).sin() / angle.sin() for x in (1 - t, t))
    return torch.stack([torch.where(line, 1 - t, first), torch.where(line, t, second)], dim=-1)


def known(solve: Callable[..., Tensor], products: Float[Tensor, "n n"], *knobs: float | tuple[float, ...]) -> Tensor:
    """Return ``solve(products, *knobs)``, computed once for all cuts of a tensor, since their survey is the same."""
    return _known(solve, len(products), tuple(products.flatten().tolist()), knobs)


@lru_cache(maxsize=64)
def _known(solve: Callable[..., Tensor], n: int, products: tuple[float, ...], knobs: tuple[Any, ...]) -> Tensor:
    return solve(torch.tensor(products, dtype=torch.float64).reshape(n, n), *knobs)


def mixed(
    deltas: Float[Tensor, "experts *shape"],
    shares: Float[Tensor, "*rows experts"],
    base: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return ``sum_t c_t delta_t``; with ``base`` the same sum of weights ``base + delta_t``, less the base.

    The terms are added one after the other: the same bits however the tensor is cut.
    """
    kind = torch.promote_types(deltas.dtype, torch.float32)
    terms = list(deltas) if base is None else [*deltas, base]
    cs = shares if base is None else torch.cat([shares, shares.sum(dim=-1, keepdim=True) - 1], dim=-1)
    if cs.ndim > 1 and deltas.ndim > 1:
        cs = cs[..., None, :]
    if cs.ndim == 1 and not (cs.requires_grad or deltas.requires_grad):  # plain numbers: one operation a term
        first, *others = cs.to(kind).tolist()
        total = terms[0].to(kind) * first
        for number, term in zip(others, terms[1:], strict=True):
            total.add_(term, alpha=number)
        return total.to(deltas.dtype)
    sums = None
    for c, term in zip(cs.to(kind).unbind(-1), terms, strict=True):
        sums = c * term.to(kind) if sums is None else sums.add_(c * term.to(kind))
    assert sums is not None
    return sums.to(deltas.dtype)


def weights_of(weights: Sequence[float] | None, experts: int, *, negative: bool = True) -> tuple[float, ...]:
    """Return one weight an expert, all 1 by default.

    Raises ValueError for another number of them, one that is not finite, or a sum of zero.
    """
    w = per_expert("weights", 1.0 if weights is None else weights, experts)
    if abs(sum(w)) < 1e-6:
        raise ValueError(f"weights must not sum to zero, got {w}")
    if not negative and min(w) < 0:
        raise ValueError(f"weights must not be negative, got {w}")
    return tuple(w)
