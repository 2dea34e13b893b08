"""SCE: select the entries in which experts differ, weigh experts by what is selected, erase minority signs."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import CHUNK, check_density

SCOPE = "tensor"
ELEMENTWISE = True


def sce(
    deltas: Float[Tensor, "experts *shape"],
    *,
    density: float = 0.1,
    floor: float = 0.0,
    numel: int | None = None,
    survey: Sequence[Any] | None = None,
    kept: Any = None,
) -> Float[Tensor, "*shape"]:
    """Merge the entries of largest variance over experts, with weights from the selected entries' energy.

        S    = [var_t tau_t >= v],  v = the k-th largest variance of the tensor,  k = int(density #{var > 0})
        w_t  = mean((S tau_t)^2) / sum_t mean((S tau_t)^2)
        s    = sign(sum_t S tau_t), 0 elects +
        tau  = sum_t w_t S tau_t / sum_t w_t       over {t : S tau_t has the sign s}

    Tensors of any shape, each alone. Entries with a variance equal to v are all kept, with a warning where that is
    over a point more than the share; one of which all experts have the same value is not selected.

    density   share of the varying entries that is selected, tuned; 1 selects all, also those that do not vary (the
              default of mergekit's select_topk)
    floor     weights are alike where the means sum to less; mergekit's is 1e-6, above those of many fine-tuned models
    numel     number of entries of the whole tensor, where deltas are a part of it
    survey    totals of `passes` over this tensor
    kept      where `passes` have put its variances (`loop.Kept`), which take most of the time

    Raises ValueError for a density outside (0, 1] or a negative floor.
    Source: Wan et al., FuseChat (arXiv 2408.07990).
    """
    looks = passes(density=density, floor=floor)
    survey = select.look_at(deltas, looks) if survey is None else survey
    theta = _theta(survey, density)
    energy = survey[-1] / max(1, deltas[0].numel() if numel is None else numel)
    alike = energy.sum() <= floor
    w = torch.full_like(energy, 1 / len(energy)) if alike else energy / energy.sum()

    wide = deltas.reshape(len(deltas), deltas[0].numel()).to(torch.promote_types(deltas.dtype, torch.float32))
    merged = [_merged(part, chosen, w.tolist()) for part, chosen in _selected(deltas, wide, theta, kept)]
    return torch.cat(merged).reshape(deltas.shape[1:]).to(deltas.dtype)


def passes(*, density: float = 0.1, floor: float = 0.0) -> list[select.Look]:
    """Return the looks that find the least variance selected, and then the energy of what is selected."""
    check_density(density)
    if isinstance(floor, bool) or not (isinstance(floor, (int, float)) and 0 <= floor < float("inf")):
        raise ValueError(f"floor must not be negative, got {floor!r}")

    def coarse(deltas: Tensor, learned: list[Any], kept: Any = None) -> select.Tallies:
        variance = _variance(deltas)
        if kept is not None:
            kept.put("variance", variance)
        return select.coarse(variance[None])

    def fine(deltas: Tensor, learned: list[Any], kept: Any = None) -> select.Tallies:
        return select.fine(_known(deltas, kept)[None], [select.places(learned[0][0], [_asked(learned, density)])])

    def energy(deltas: Tensor, learned: list[Any], kept: Any = None) -> Tensor:
        theta = _theta(learned, density)
        total = torch.zeros(len(deltas), dtype=torch.float64, device=deltas.device)
        for part, chosen in _selected(deltas, deltas.detach().reshape(len(deltas), -1).float(), theta, kept):
            rows = ((one if chosen is None else one * chosen).double() for one in part)
            total += torch.stack([torch.dot(one, one) for one in rows])
        return total.cpu()

    return [coarse, fine, energy] if density < 1 else [energy]


def _merged(part: Float[Tensor, "experts n"], chosen: Tensor | None, w: list[float]) -> Float[Tensor, "n"]:
    rows = list(part)
    sign = reduce(torch.add, rows).detach().sign().add_(0.5).sign_()
    total, weight = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    for x, one in zip(w, rows, strict=True):
        agreeing = torch.relu(one * sign)
        total = total.add_(agreeing, alpha=x)
        weight.add_(agreeing.detach().sign(), alpha=x)
    merged = total.mul(sign).div_(weight.clamp_(min=1e-6))
    return merged if chosen is None else merged.mul_(chosen)


def _selected(
    deltas: Float[Tensor, "experts *cut"], wide: Float[Tensor, "experts n"], theta: float, kept: Any
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield parts of ``wide``, the flat deltas, with 1 where the variance is at least ``theta`` and 0 elsewhere.

    None instead of ones where all are selected.
    """
    parts = wide.split(CHUNK // 2, dim=1)
    if theta == 0:
        yield from ((part, None) for part in parts)
        return
    variances = _known(deltas, kept).reshape(-1).split(CHUNK // 2)
    yield from ((part, select.trimmed(one, theta).sign_()) for part, one in zip(parts, variances, strict=True))


def _known(deltas: Float[Tensor, "experts *cut"], kept: Any) -> Float[Tensor, "*cut"]:
    """Return the variance, as it was found before where that is kept."""
    found = kept.get("variance", deltas[0].numel()) if kept is not None else None
    return _variance(deltas) if found is None else found


def _variance(deltas: Float[Tensor, "experts *cut"]) -> Float[Tensor, "*cut"]:
    """Return the population variance over T experts, ``(T sum x^2 - (sum x)^2) / T^2`` in float64, rounded to fp32.

    Squares of fp32 numbers and a few sums of them are exact in float64, so variances that are equal come out equal in
    whatever order experts are added, and are 0 where all agree; with more than 32 experts what is left of the rounding
    counts as 0.
    """
    rows = deltas.detach().reshape(len(deltas), deltas[0].numel())
    count = len(rows)
    times = count if count <= 32 and rows.dtype != torch.float64 else count * (1 - 2**-50)
    variance = torch.empty(rows.shape[1], device=rows.device)
    for part, to in zip(rows.split(CHUNK // 2, dim=1), variance.split(CHUNK // 2), strict=True):
        total = part[0].to(torch.float64, copy=True)
        squares = total * total
        for one in part[1:]:
            wide = one.double()
            total.add_(wide)
            squares.addcmul_(wide, wide)
        to.copy_(squares.mul_(times).sub_(total.square_()).relu_().mul_(1 / count**2))
    return variance.reshape(deltas.shape[1:])


def _asked(survey: Sequence[Any], density: float) -> int:
    """Return how many entries are selected; variances below 1e-40 count as zero."""
    upper = survey[0][0] if isinstance(survey[0][0], Tensor) else survey[0][0].tensor()
    return int(int(upper[1:].sum()) * density)


def _theta(survey: Sequence[Any], density: float) -> float:
    """Return the least variance that is selected: 0 selects all, infinity nothing."""
    if density == 1:
        return 0.0
    k = _asked(survey, density)
    if k == 0:
        return float("inf")
    theta, above, equals = select.ranked(survey[0][0], survey[1][0], [k])[0]
    select.warn_of_equals(k, above + equals, select.size(survey[0][0]), "tensor")
    return theta
