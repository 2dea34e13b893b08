"""SCE: select the entries in which experts differ, weigh experts by what is selected, erase minority signs."""

from collections.abc import Sequence
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
    merged = [_merged(part, theta, w.tolist()) for part in wide.split(CHUNK, dim=1)]
    return torch.cat(merged).reshape(deltas.shape[1:]).to(deltas.dtype)


def passes(*, density: float = 0.1, floor: float = 0.0) -> list[select.Look]:
    """Return the looks that find the least variance selected, and then the energy of what is selected."""
    check_density(density)
    if isinstance(floor, bool) or not (isinstance(floor, (int, float)) and 0 <= floor < float("inf")):
        raise ValueError(f"floor must not be negative, got {floor!r}")

    def coarse(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        return select.coarse(_variance(deltas)[None])

    def fine(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        return select.fine(_variance(deltas)[None], [select.places(learned[0][0], [_asked(learned, density)])])

    def energy(deltas: Tensor, learned: list[Any]) -> Tensor:
        theta = _theta(learned, density)
        kept = _selected(deltas.detach().reshape(len(deltas), -1).float(), theta)
        return torch.stack([one.square().sum(dtype=torch.float64) for one in kept]).cpu()

    return [coarse, fine, energy] if density < 1 else [energy]


def _merged(part: Float[Tensor, "experts n"], theta: float, w: list[float]) -> Float[Tensor, "n"]:
    kept = _selected(part, theta)
    sign = reduce(torch.add, kept).detach().sign().add_(0.5).sign_()
    agreeing = [torch.relu(one * sign) for one in kept]
    total = reduce(torch.add, [x * one for x, one in zip(w, agreeing, strict=True)])
    weight = reduce(torch.add, [x * one.detach().sign() for x, one in zip(w, agreeing, strict=True)])
    return total * sign / weight.clamp(min=1e-6)


def _selected(deltas: Float[Tensor, "experts n"], theta: float) -> list[Tensor]:
    if theta == 0:
        return list(deltas)
    chosen = select.trimmed(_variance(deltas), theta).sign_()
    return [one * chosen for one in deltas]


def _variance(deltas: Float[Tensor, "experts *cut"]) -> Float[Tensor, "*cut"]:
    """Return the population variance over experts, one added after the other: the same bits however cut.

    In float64, so that variances which are equal come out equal in whatever order experts are added.
    """
    rows = deltas.detach().double()
    mean = reduce(torch.add, rows) / len(rows)
    return (reduce(torch.add, [(one - mean).square() for one in rows]) / len(rows)).float()


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
