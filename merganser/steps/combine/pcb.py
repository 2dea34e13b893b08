"""PCB-Merging: weigh entries by their size within an expert and by their agreement with the others."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import check_density, one_of, per_expert

ELEMENTWISE = True
TAIL = {"paper": 1e-4, "vision": 1e-2}
Limits = list[tuple[float, float]]  # of each expert


def pcb(
    deltas: Float[Tensor, "experts *shape"],
    *,
    density: float = 0.05,
    scope: str = "model",
    weights: Sequence[float] | None = None,
    rule: str = "paper",
    survey: Sequence[Any] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep each expert's entries of highest parameter competition score, weighted by it.

        a_t = clamp(|tau_t|) between its quantiles 1e-4 and 1 - 1e-4,    z_t = minmax(a_t)^2        (intra-balancing)
        b_t = exp(T z_t) tanh(tau_t sum_k tau_k)                                                     (inter-balancing)
        w_t = minmax(b_t cut off below its quantile 1 - density)
        tau = sum_t w_t sign(tau_t) a_t / sum_t w_t            0 where no expert has a weight

    Tensors of any shape. The tanh sees products of weights, so the result does not scale with the deltas.

    density   share of entries with a weight, the paper's ratio: 0.05 and 0.1, tuned
    scope     over what quantiles are taken: "model" (the paper) or "tensor"
    weights   lambda_t, one per expert, not normalised; the paper may search them in 0.8 .. 1.3
    rule      "paper", as above; "vision": the authors' script for ViTs, with quantiles of 1e-2 and
              b_t = exp(T z_t) tanh(tau_t sum_k sign(tau_k) minmax(a_k))
    survey    totals of `passes` over the scope; without it this tensor is the scope

    The paper's common lambda is ``| scale(by=1.2)``.
    Raises ValueError for a density outside (0, 1], an unknown word or weights of another number than the experts.
    Source: Du et al., Parameter Competition Balancing for Model Merging (arXiv 2410.02396).
    """
    looks = passes(density=density, scope=scope, weights=weights, rule=rule)
    each = per_expert("weights", 1.0 if weights is None else weights, len(deltas))
    survey = select.look_at(deltas, looks) if survey is None else survey
    wide = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    sizes, scores = _sizes(survey, len(deltas), rule), _scores(survey, len(deltas), density)
    shares = [
        _minmax(one, *limits) for one, limits in zip(_competition(wide.detach(), sizes, rule), scores, strict=True)
    ]
    terms = [
        x * share * one.sign() * _between(one.abs(), *limits)
        for x, share, one, limits in zip(each, shares, wide, sizes, strict=True)
    ]
    return (reduce(torch.add, terms) / reduce(torch.add, shares).clamp(min=1e-12)).to(deltas.dtype)


def passes(
    *, density: float = 0.05, scope: str = "model", weights: Sequence[float] | None = None, rule: str = "paper"
) -> list[select.Look]:
    """Return the looks that find the quantiles of |tau_t|, then those of the scores b_t."""
    check_density(density)
    one_of("scope", scope, ("model", "tensor"))
    one_of("rule", rule, ("paper", "vision"))

    def scored(deltas: Tensor, learned: list[Any]) -> Tensor:
        wide = deltas.detach().to(torch.promote_types(deltas.dtype, torch.float32))
        return torch.stack(_competition(wide, _sizes(learned, len(deltas), rule), rule))

    def coarse(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        return select.coarse(deltas)

    def fine(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        rows = [learned[0][t] for t in range(len(deltas))]
        return select.fine(deltas, [select.places(row, _size_ranks(row, rule)) for row in rows])

    def coarse_scores(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        return select.coarse(scored(deltas, learned), signed=True)

    def fine_scores(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        rows = [learned[2][t] for t in range(len(deltas))]
        found = [select.places(row, _score_ranks(row, density)) for row in rows]
        return select.fine(scored(deltas, learned), found, signed=True)

    return [coarse, fine, coarse_scores, fine_scores]


def _competition(deltas: Float[Tensor, "experts *cut"], sizes: Limits, rule: str) -> list[Tensor]:
    """Return b_t."""
    small = [_minmax(one.abs(), *limits) for one, limits in zip(deltas, sizes, strict=True)]
    signed = deltas if rule == "paper" else [one.sign() * x for one, x in zip(deltas, small, strict=True)]
    # in float64, so that what cancels is zero whatever the order of experts: a weight of rounding noise would count in full
    total = reduce(torch.add, [one.double() for one in signed]).to(deltas.dtype)
    return [torch.exp(len(deltas) * x.square()) * torch.tanh(one * total) for one, x in zip(deltas, small, strict=True)]


def _between(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(min=low).clamp(max=high)


def _minmax(x: Tensor, low: float, high: float) -> Tensor:
    """Return x cut to its limits, which become 0 and 1; all 0 where they are one."""
    return (_between(x, low, high) - low) / (high - low) if high > low else torch.zeros_like(x)


def _sizes(survey: Sequence[Any], experts: int, rule: str) -> Limits:
    """Return between what each expert's |tau_t| is clamped."""
    return _limits(survey[0], survey[1], [_size_ranks(survey[0][t], rule) for t in range(experts)], signed=False)


def _scores(survey: Sequence[Any], experts: int, density: float) -> Limits:
    """Return each expert's least score with a weight, and its largest."""
    return _limits(survey[2], survey[3], [_score_ranks(survey[2][t], density) for t in range(experts)], signed=True)


def _limits(upper: Any, lower: Any, ranks: list[list[int]], *, signed: bool) -> Limits:
    found = [select.ranked(upper[t], lower[t], own, signed=signed) for t, own in enumerate(ranks)]
    return [(low[0], high[0]) for low, high in found]


def _size_ranks(upper: Any, rule: str) -> list[int]:
    """Return the ranks, 1 being the largest, of the places int(d tail) and int(d (1 - tail) - 1) in ascending order."""
    d, tail = select.size(upper), TAIL[rule]
    return [d - int(d * tail), d - int(d * (1 - tail) - 1)]


def _score_ranks(upper: Any, density: float) -> list[int]:
    d = select.size(upper)
    return [d - int(d * (1 - density)), 1]
