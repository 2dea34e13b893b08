"""TALL masks and Consensus merging: keep what serves at least so many experts, or what serves one of them."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import one_of, per_expert
from .ties import passes as looks_of_ties
from .ties import ties

ELEMENTWISE = True


def consensus(
    deltas: Float[Tensor, "experts *shape"],
    *,
    threshold: float | Sequence[float] = 0.4,
    agree: int = 2,
    of: str = "sum",
    density: float = 0.2,
    rule: str = "exact",
    expert: str | int | None = None,
    experts: Sequence[str] | None = None,
    survey: Sequence[Any] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep those entries of a merged delta that matter to at least ``agree`` experts.

        m_t = [|tau_t| > lambda_t |tau_MTL - tau_t|],    tau = tau_MTL [sum_t m_t >= agree]

    Entries that matter to one expert alone are called selfish, those that matter to none catastrophic. Tensors of any
    shape.

    threshold   lambda, one or one per expert, tuned over 0.2 .. 0.6 step 0.1 on each task's validation data
    agree       2 in the paper; 1 drops catastrophic entries only, 0 nothing
    of          tau_MTL: "sum" of the deltas, or "ties" (with merge="sum" and the two knobs that follow)
    density     share kept by TIES
    rule        "exact" or "reference", as in `ties`
    expert      a name or place: the TALL model of that expert instead, tau = tau_MTL m_t, whatever ``agree``
    survey      totals of `passes` over the model, for of="ties"

    The factor alpha is ``| scale(by=...)``. Raises ValueError for a negative threshold or agree, an unknown word or
    expert, or thresholds of another number than the experts.
    Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression (arXiv 2405.07813).
    """
    passes(threshold=threshold, agree=agree, of=of, density=density, rule=rule)
    limits = per_expert("threshold", threshold, len(deltas))
    chosen = None if expert is None else _place(expert, experts, len(deltas))
    if of == "ties":
        merged = ties(deltas, density=density, merge="sum", rule=rule, survey=survey)
    else:
        merged = reduce(torch.add, deltas)
    masks = [
        (one.abs() > limit * (merged - one).abs()).to(merged)
        for one, limit in zip(deltas.detach(), limits, strict=True)
    ]
    return merged * (masks[chosen] if chosen is not None else (reduce(torch.add, masks) >= agree).to(merged))


def passes(
    *,
    threshold: float | Sequence[float] = 0.4,
    agree: int = 2,
    of: str = "sum",
    density: float = 0.2,
    rule: str = "exact",
    expert: str | int | None = None,
) -> list[select.Look]:
    """Return what TIES has to learn first, for of="ties"."""
    one_of("of", of, ("sum", "ties"))
    for limit in threshold if isinstance(threshold, (list, tuple)) else [threshold]:
        if isinstance(limit, bool) or not (isinstance(limit, (int, float)) and 0 <= limit < float("inf")):
            raise ValueError(f"threshold must not be negative, got {limit!r}")
    if isinstance(agree, bool) or not (isinstance(agree, int) and agree >= 0):
        raise ValueError(f"agree must be a whole number of at least 0, got {agree!r}")
    looks = looks_of_ties(density=density, merge="sum", rule=rule)
    return looks if of == "ties" else []


def _place(expert: str | int, experts: Sequence[str] | None, count: int) -> int:
    """Return the row of an expert given by name or place. Raises ValueError if there is none."""
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < count:
        return expert
    if isinstance(expert, str) and experts is not None and expert in experts:
        return list(experts).index(expert)
    known = ", ".join(experts) if experts is not None else f"0 .. {count - 1}"
    raise ValueError(f"expert must be one of {known}, got {expert!r}")
