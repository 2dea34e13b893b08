"""TIES: trim, elect signs, merge what agrees."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

Pass = Callable[[Tensor, list[Tensor]], Tensor]
CHUNK = 1 << 16  # entries worked on at a time, so that intermediate results stay in the processor's cache
LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


def ties(
    deltas: Float[Tensor, "experts *shape"],
    *,
    density: float | Sequence[float] = 0.2,
    scope: str = "model",
    merge: str = "mean",
    weights: Sequence[float] | None = None,
    rule: str = "exact",
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep each expert's largest entries, elect one sign per entry, and merge the entries that have it.

        U_t = w_t tau_t [|tau_t| >= theta_t],   theta_t = the k-th largest |tau_t|,   k = int(density d)
        s   = sign(sum_t U_t)
        tau = s * mean / sum / max over {t : s U_t > 0} of |U_t|

    Magnitudes are compared in fp32 and entries as large as theta_t are all kept. The mean divides by the number of
    agreeing experts (by the sum of their weights), so its size is that of one delta; the sum's grows with the experts.

    density   share kept, one number or one per expert; 0.2 in the paper, tuned over 0.1 .. 1.0 step 0.1 by KnOTS
    scope     "model": d counts the whole model (the paper); "tensor": this tensor (mergekit, PEFT)
    merge     "mean" (the paper), "sum" or "max"
    weights   w_t, default 1 each, as in mergekit: they vote and they merge
    rule      "exact": k as above, a sum of exactly zero elects +; "reference": the published code, which keeps
              one entry more and gives zero sums the sign that most entries of the model have (one more pass)
    survey    totals of `passes` over all tensors; without it this tensor is taken as the whole model

    The factor lambda is ``| scale(by=...)``, tuned over 0.8 .. 2.5 step 0.1; 1 without validation data.
    Raises ValueError for a density outside (0, 1], an unknown word, or lists of another length than the experts.
    Source: Yadav et al., TIES-Merging (arXiv 2306.01708).
    """
    _check(density, scope, merge, rule)
    if scope == "tensor" or survey is None:
        survey = []
        for learn in passes(density=density, merge=merge, weights=weights, rule=rule):
            survey.append(learn(deltas, survey))
    below = _below(survey, _per_expert("density", density, deltas), rule)
    w = None if weights is None else _per_expert("weights", weights, deltas)
    majority = survey[-1].sign().to(deltas.device) if rule == "reference" else None

    wide = _rows(deltas.to(torch.promote_types(deltas.dtype, torch.float32)))
    merged = [_merge(_trim(part, below, w), merge, w, majority) for part in wide.split(CHUNK, dim=1)]
    return torch.cat(merged).reshape(deltas.shape[1:]).to(deltas.dtype)


def passes(
    *,
    density: float | Sequence[float] = 0.2,
    scope: str = "model",
    merge: str = "mean",
    weights: Sequence[float] | None = None,
    rule: str = "exact",
) -> list[Pass]:
    """Return what `ties` has to learn from the whole model first, as functions whose results add up over tensors.

    The bits of a positive fp32 number are ordered as the number is. So a histogram of their upper half finds the bin
    that holds the k-th largest magnitude, and a histogram of the lower half within that bin finds it exactly.
    ``rule="reference"`` also counts signs.
    """
    shares = _check(density, scope, merge, rule)
    if scope == "tensor":
        return []

    def fine(deltas: Tensor, learned: list[Tensor]) -> Tensor:
        return _fine(deltas, learned[0], _per_expert("density", density, deltas), rule)

    def signs(deltas: Tensor, learned: list[Tensor]) -> Tensor:
        below = _below(learned, _per_expert("density", density, deltas), rule)
        w = None if weights is None else _per_expert("weights", weights, deltas)
        totals = [_add(_trim(part, below, w)) for part in _rows(deltas.detach().float()).split(CHUNK, dim=1)]
        return _add([(x > 0).sum() - (x < 0).sum() for x in totals])

    trims = any(share < 1 for share in shares)
    histograms: list[Pass] = [_coarse, fine] if trims else []
    return [*histograms, signs] if rule == "reference" else histograms


def _check(density: float | Sequence[float], scope: str, merge: str, rule: str) -> list[float]:
    """Return the densities given; raise ValueError for the first knob that is off."""
    shares: list[Any] = list(density) if isinstance(density, (list, tuple)) else [density]
    for share in shares:
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise ValueError(f"density must lie in (0, 1], got {share!r}")
    words = {"scope": ("model", "tensor"), "merge": ("mean", "sum", "max"), "rule": ("exact", "reference")}
    for knob, given in (("scope", scope), ("merge", merge), ("rule", rule)):
        if given not in words[knob]:
            raise ValueError(f"{knob} must be one of {', '.join(words[knob])}, got {given!r}")
    return shares


def _merge(trimmed: list[Tensor], merge: str, w: list[float] | None, majority: Tensor | None) -> Tensor:
    """Elect a sign for each of ``[n]`` entries and merge the experts' entries that have it."""
    total = _add(trimmed).detach()
    if majority is None:
        sign = elected = torch.copysign(torch.ones_like(total), total)
    else:  # as published: where even the majority is zero, the negative entries are merged, and max gives zero
        elected = torch.where(total == 0, majority, total.sign())
        sign = torch.where(elected > 0, 1.0, -1.0).to(total)
    agreeing = [torch.relu(one * sign) for one in trimmed]
    if merge == "max":
        return reduce(torch.maximum, agreeing) * elected
    result = _add(agreeing) * sign
    if merge == "sum":
        return result
    signs = [one.detach().sign() for one in agreeing]
    weight = _add(signs if w is None else [x * one for x, one in zip(w, signs, strict=True)])
    return result / torch.where(weight == 0, 1, weight)


def _trim(part: Tensor, below: list[float], w: list[float] | None) -> list[Tensor]:
    """Return each expert's entries whose magnitude exceeds its ``below``, the others as zero, times its weight."""
    kept = [hardshrink(one, limit) for one, limit in zip(part, below, strict=True)]
    return kept if w is None else [x * one for x, one in zip(w, kept, strict=True)]


def _add(rows: Sequence[Tensor]) -> Tensor:
    """Add one expert after the other: unlike torch.sum, the same bits however the tensor was cut."""
    return reduce(torch.add, rows)


def _rows(deltas: Tensor) -> Tensor:
    return deltas.reshape(len(deltas), math.prod(deltas.shape[1:]))


def _per_expert(knob: str, value: float | Sequence[float], deltas: Tensor) -> list[float]:
    values: list[float] = [value] * len(deltas) if isinstance(value, (int, float)) else list(value)
    if len(values) != len(deltas):
        raise ValueError(f"{knob} must hold one number per expert: {len(values)} given, {len(deltas)} experts")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{knob} must be finite, got {values}")
    return values


def _halves(deltas: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the (lower, upper) 16 bits of each expert's fp32 numbers."""
    bits = _rows(deltas.detach()).float().contiguous().view(torch.int16)
    return [(row[LOW::2], row[HIGH::2]) for row in bits]


def _coarse(deltas: Tensor, learned: list[Tensor]) -> Tensor:
    """Count the upper 16 bits of |x|, sign bit gone: ``[experts, 32768]``; each row sums to the number of entries."""
    counts = torch.zeros(len(deltas), 1 << 15, dtype=torch.int64, device=deltas.device)
    for row, (_, high) in zip(counts, _halves(deltas), strict=True):
        for part in high.split(16 * CHUNK):
            row += torch.bincount(part & 0x7FFF, minlength=1 << 15)
    return counts


def _fine(deltas: Tensor, coarse: Tensor, density: list[float], rule: str) -> Tensor:
    """Count the lower 16 bits of the entries in the bin which holds the threshold: ``[experts, 65536]``."""
    counts = torch.zeros(len(deltas), 1 << 16, dtype=torch.int64, device=deltas.device)
    bins, _ = _locate(coarse, _kept(coarse, density, rule))
    for row, (low, high), place in zip(counts, _halves(deltas), bins.tolist(), strict=True):
        for lower, upper in zip(low.split(CHUNK), high.split(CHUNK), strict=True):
            inside = lower[(upper & 0x7FFF) == place]
            row += torch.bincount(inside.int() & 0xFFFF, minlength=1 << 16)
    return counts


def _below(survey: Sequence[Tensor], density: list[float], rule: str) -> list[float]:
    """Return each expert's largest fp32 number below theta_t; 0 where nothing is trimmed."""
    if all(share == 1 for share in density):
        return [0.0] * len(density)
    coarse, fine = survey[0], survey[1]
    upper, rest = _locate(coarse, _kept(coarse, density, rule))
    lower, _ = _locate(fine, rest)
    return (((upper << 16 | lower) - 1).clamp(min=0).int().view(torch.float32)).tolist()


def _kept(coarse: Tensor, density: list[float], rule: str) -> Tensor:
    """Return how many entries each expert keeps: int(density d), at least one; the published code has one more."""
    sizes = coarse.sum(dim=1).tolist()
    more = 1 if rule == "reference" else 0
    kept = [min(d, max(1, int(share * d) + more)) for share, d in zip(density, sizes, strict=True)]
    return torch.tensor(kept, device=coarse.device)


def _locate(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin that holds the k-th largest entry, and how many entries from that bin are among the k."""
    counts = counts.flip(1)
    reached = counts.cumsum(dim=1)
    place = (reached < k[:, None]).sum(dim=1)
    above = (reached - counts).gather(1, place[:, None])[:, 0]
    return counts.shape[1] - 1 - place, k - above
