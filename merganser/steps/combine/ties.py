"""TIES: trim, elect signs, merge what agrees."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import CHUNK, check_density, one_of, per_expert


def ties(
    deltas: Float[Tensor, "experts *shape"],
    *,
    density: float | Sequence[float] = 0.2,
    scope: str = "model",
    merge: str = "mean",
    weights: Sequence[float] | None = None,
    rule: str = "exact",
    equal: str = "all",
    elect: str = "mass",
    weights_vote: bool = True,
    survey: Sequence[Any] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep each expert's largest entries, elect one sign per entry, and merge the entries that have it.

        U_t = w_t tau_t [|tau_t| >= theta_t],   theta_t = the k-th largest |tau_t|,   k = int(density d)
        s   = sign(sum_t U_t)
        tau = s * mean / sum / max over {t : s U_t > 0} of |U_t|

    Magnitudes are compared in fp32. The mean divides by the number of agreeing experts (by the sum of their weights),
    so its size is that of one delta; the sum's grows with the experts.

    density   share kept, one number or one per expert; 0.2 in the paper, tuned over 0.1 .. 1.0 step 0.1 by KnOTS
    scope     "model": d counts the whole model (the paper); "tensor": this tensor (mergekit, PEFT)
    merge     "mean" (the paper), "sum" or "max"
    weights   w_t, default 1 each
    rule      "exact": k as above, a sum of exactly zero elects +; "reference": the published code, which keeps
              one entry more and gives zero sums the sign that most entries of the model have (one more pass)
    equal     "all": entries as large as theta_t are all kept (the paper), with a warning where that is over a point
              more than the share; "first": exactly k, the first ones in memory (mergekit, PEFT; scope="tensor" only,
              and the tensor is not cut)
    elect     "mass" as above (the paper); "count": s = sign(sum_t sign(U_t)), PEFT's "frequency"
    weights_vote   False: w_t joins after the election and the mean divides by the number of agreeing experts (PEFT)
    survey    totals of `passes` over the scope; without it this tensor is the scope

    The factor lambda is ``| scale(by=...)``, tuned over 0.8 .. 2.5 step 0.1; 1 without validation data.
    Raises ValueError for a density outside (0, 1], an unknown word, or lists of another length than the experts.
    Source: Yadav et al., TIES-Merging (arXiv 2306.01708).
    """
    looks = passes(
        density=density,
        scope=scope,
        merge=merge,
        weights=weights,
        rule=rule,
        equal=equal,
        elect=elect,
        weights_vote=weights_vote,
    )
    survey = select.look_at(deltas, looks) if survey is None else survey
    w = None if weights is None else per_expert("weights", weights, len(deltas))
    wide = _rows(deltas.to(torch.promote_types(deltas.dtype, torch.float32)))
    thetas = select.remembered(_thetas, survey, density, len(deltas), rule, scope, equal)
    if equal == "first" and looks and any(more := _surplus(survey, density, len(deltas), rule)):
        ats = zip(wide, thetas, _kept(survey, density, rule, len(deltas)), more, strict=True)
        wide = torch.stack([x * select.first_of_equals(x, theta, k) if m else x for x, theta, k, m in ats])
    majority = survey[-1].sign().to(deltas.device) if rule == "reference" else None

    def merged(part: Tensor) -> Tensor:
        trimmed = _trim(part, thetas, w if weights_vote else None)
        return _merge(trimmed, _vote(trimmed, elect), merge, w, weights_vote, majority)

    return torch.cat([merged(part) for part in wide.split(CHUNK, dim=1)]).reshape(deltas.shape[1:]).to(deltas.dtype)


def passes(
    *,
    density: float | Sequence[float] = 0.2,
    scope: str = "model",
    merge: str = "mean",
    weights: Sequence[float] | None = None,
    rule: str = "exact",
    equal: str = "all",
    elect: str = "mass",
    weights_vote: bool = True,
) -> list[select.Look]:
    """Return the two looks that find the thresholds; ``rule="reference"`` also counts signs."""
    shares = [check_density(share) for share in (density if isinstance(density, (list, tuple)) else [density])]
    one_of("scope", scope, ("model", "tensor"))
    one_of("merge", merge, ("mean", "sum", "max"))
    one_of("rule", rule, ("exact", "reference"))
    one_of("equal", equal, ("all", "first") if scope == "tensor" else ("all",))
    one_of("elect", elect, ("mass", "count"))

    def kept(size: int, experts: int) -> list[int]:
        return _shares([size] * experts, density, rule)

    def bins(learned: Sequence[Any], experts: int) -> list[list[int]]:
        return select.remembered(_bins, learned[:1], density, rule, experts)

    def signs(deltas: Tensor, learned: list[Any]) -> Tensor:
        w = per_expert("weights", weights, len(deltas)) if weights is not None and weights_vote else None
        thetas = select.remembered(_thetas, learned, density, len(deltas), rule, scope, equal)
        parts = _rows(deltas.detach().float()).split(CHUNK, dim=1)
        return _add([_vote(_trim(part, thetas, w), elect).sign().sum(dtype=torch.float64) for part in parts])

    histograms: list[select.Look] = []
    if any(share < 1 for share in shares):
        histograms = [select.coarse_beyond(kept), select.fine_at(bins)]
    return [*histograms, signs] if rule == "reference" else histograms


def elementwise(*, equal: str = "all", **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: which of its equal entries are the first ones cannot be told from a cut."""
    return equal == "all"


def _kept(survey: Sequence[Any], density: float | Sequence[float], rule: str, experts: int) -> list[int]:
    return _shares([select.size(survey[0][t]) for t in range(experts)], density, rule)


def _shares(sizes: list[int], density: float | Sequence[float], rule: str) -> list[int]:
    """Return how many entries each expert keeps: int(density d), at least one; the published code has one more."""
    more = 1 if rule == "reference" else 0
    shares = per_expert("density", density, len(sizes))
    return [min(d, max(1, int(share * d) + more)) for share, d in zip(shares, sizes, strict=True)]


def _bins(survey: Sequence[Any], density: float | Sequence[float], rule: str, experts: int) -> list[list[int]]:
    return [select.places(survey[0][t], [k]) for t, k in enumerate(_kept(survey, density, rule, experts))]


def _thetas(
    survey: Sequence[Any], density: float | Sequence[float], experts: int, rule: str, scope: str, equal: str
) -> list[float]:
    """Return each expert's threshold; 0 where nothing is trimmed."""
    if all(share == 1 for share in per_expert("density", density, experts)):
        return [0.0] * experts
    ranked, kept = _ranked(survey, density, experts, rule)
    if equal == "all":
        more = [_more(*one, k) for one, k in zip(ranked, kept, strict=True)]
        t = max(range(experts), key=more.__getitem__)
        select.warn_of_equals(kept[t], kept[t] + more[t], select.size(survey[0][t]), scope, first=True)
    return [theta for theta, _, _ in ranked]


def _surplus(survey: Sequence[Any], density: float | Sequence[float], experts: int, rule: str) -> list[int]:
    """Return how many entries more than asked for reach each expert's threshold."""
    ranked, kept = _ranked(survey, density, experts, rule)
    return [_more(*one, k) for one, k in zip(ranked, kept, strict=True)]


def _ranked(
    survey: Sequence[Any], density: float | Sequence[float], experts: int, rule: str
) -> tuple[list[tuple[float, int, int]], list[int]]:
    """Return each expert's (threshold, how many are larger, how many are equal), and how many it is to keep."""
    kept = _kept(survey, density, rule, experts)
    return [select.ranked(survey[0][t], survey[1][t], [k])[0] for t, k in enumerate(kept)], kept


def _more(theta: float, above: int, equals: int, k: int) -> int:
    return above + equals - k if theta > 0 else 0


def _trim(part: Tensor, thetas: list[float], w: list[float] | None) -> list[Tensor]:
    """Return each expert's entries that reach its threshold, the others as zero, times its weight."""
    kept = [select.trimmed(one, theta) if theta else one for one, theta in zip(part, thetas, strict=True)]
    return kept if w is None else [x * one for x, one in zip(w, kept, strict=True)]


def _vote(trimmed: list[Tensor], elect: str) -> Tensor:
    return _add([one.detach() if elect == "mass" else one.detach().sign() for one in trimmed])


def _merge(
    trimmed: list[Tensor], vote: Tensor, merge: str, w: list[float] | None, voted: bool, majority: Tensor | None
) -> Tensor:
    """Elect a sign for each of ``[n]`` entries and merge the experts' entries that have it."""
    if majority is None:
        sign = elected = vote.sign().add_(0.5).sign_()  # zero elects +
    else:  # as published: where even the majority is zero, the negative entries are merged, and max gives zero
        elected = torch.where(vote == 0, majority.to(vote), vote.sign())
        sign = elected.sub(0.5).sign_()
    total, weight = torch.zeros_like(sign), torch.zeros_like(sign)
    for t, one in enumerate(trimmed):
        agreeing = torch.relu_(one * sign)
        votes = agreeing.detach().sign()
        if w is not None and voted:
            votes = votes.mul_(w[t])
        elif w is not None:
            agreeing = agreeing * w[t]
        total = torch.maximum(total, agreeing) if merge == "max" else total.add_(agreeing)
        weight.add_(votes)
    if merge == "mean":
        return total.mul_(sign).div_(weight.clamp_(min=1) if w is None else weight.add_(weight == 0))
    return total.mul_(sign if merge == "sum" else elected)


def _add(rows: Sequence[Tensor]) -> Tensor:
    """Add one expert after the other: unlike torch.sum, the same bits however the tensor was cut."""
    return reduce(torch.add, rows)


def _rows(deltas: Tensor) -> Tensor:
    return deltas.reshape(len(deltas), math.prod(deltas.shape[1:]))
