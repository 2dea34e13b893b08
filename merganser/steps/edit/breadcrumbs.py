"""Model Breadcrumbs: drop the smallest entries and the very largest ones."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import check_density, one_of

Band = tuple[float, float, int, int]

ELEMENTWISE = True


def breadcrumbs(
    delta: Float[Tensor, "*shape"],
    *,
    density: float = 0.1,
    gamma: float = 0.01,
    scope: str = "tensor",
    rescale: str | None = None,
    survey: Sequence[Any] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep the entries of middle magnitude: without the largest ones (outliers), and without the small ones.

        tau' = tau [low <= |tau| <= high]     after the int(gamma d) largest, the next int(density d) are kept

    Where density + gamma > 1 fewer outliers are dropped, at density=1 none. Tensors of any shape; magnitudes are
    compared in fp32, and entries as large as one of the two limits are all kept, with a warning where that is over a
    point more than the share (bf16 deltas have few magnitudes).

    density   share kept, 1 - beta - gamma in the paper's terms, which tunes both
    gamma     share of outliers, 0.01 as in mergekit; the paper tunes it
    scope     "tensor" (the paper, mergekit) or "model": over what d counts
    rescale   None; "l1": times |tau|_1 / |tau'|_1 over the scope, 1 where either is below 1e-7 (mergekit)
    survey    this expert's totals of `passes` over the scope; without it this tensor is the scope

    The factor alpha is ``| scale(by=...)`` after the combining step: ``breadcrumbs | task_arithmetic | scale(by=0.3)``.
    Raises ValueError for a density outside (0, 1], a gamma outside [0, 1) or an unknown word.
    Source: Davari and Belilovsky, Model Breadcrumbs (arXiv 2312.06795).
    """
    check_density(density)
    looks = passes(density=density, gamma=gamma, scope=scope, rescale=rescale)
    if density == 1:
        return delta.clone()
    if survey is None:
        survey = [total[0] for total in select.look_at(delta[None], looks)]
    low, high, asked, found = _band(survey, density, gamma)
    if low > 0:
        select.warn_of_equals(asked, found, select.size(survey[0]), scope)
    kept = select.trimmed(delta.to(torch.promote_types(delta.dtype, torch.float32)), low, high)
    return (kept * select.l1_ratio(*survey[2]) if rescale else kept).to(delta.dtype)


def passes(
    *,
    density: float | Sequence[float] = 0.1,
    gamma: float | Sequence[float] = 0.01,
    scope: str = "tensor",
    rescale: str | None = None,
) -> list[select.Look]:
    """Return the looks at all experts' deltas that find their two limits, and for ``rescale`` their lengths."""
    shares = [check_density(share) for share in (density if isinstance(density, (list, tuple)) else [density])]
    for one in gamma if isinstance(gamma, (list, tuple)) else [gamma]:
        if isinstance(one, bool) or not (isinstance(one, (int, float)) and 0 <= one < 1):
            raise ValueError(f"gamma must lie in [0, 1), got {one!r}")
    one_of("scope", scope, ("model", "tensor"))
    one_of("rescale", rescale, (None, "l1"))

    def each(learned: list[Any], experts: int) -> list[tuple[list[Any], float, float]]:
        knobs = select.per_expert("density", density, experts), select.per_expert("gamma", gamma, experts)
        return [([total[t] for total in learned], *own) for t, own in enumerate(zip(*knobs, strict=True))]

    def coarse(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        return select.coarse(deltas)

    def fine(deltas: Tensor, learned: list[Any]) -> select.Tallies:
        found = [select.places(row[0], _ranks(select.size(row[0]), *own)) for row, *own in each(learned, len(deltas))]
        return select.fine(deltas, found)

    def lengths(deltas: Tensor, learned: list[Any]) -> Tensor:
        bands = [_band(*own) for own in each(learned, len(deltas))]
        return select.lengths(deltas, [band[0] for band in bands], [band[1] for band in bands])

    return [coarse, fine, *([lengths] if rescale else [])] if min(shares) < 1 else []


def _ranks(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the ranks of the largest and of the smallest entry kept, 1 being the largest of all."""
    kept = select.share(density, size)
    dropped = min(int(gamma * size), size - kept)
    return dropped + 1, dropped + kept


def _band(survey: Sequence[Any], density: float, gamma: float) -> Band:
    """Return the limits, how many entries were to be kept and how many lie between them."""
    ranks = _ranks(select.size(survey[0]), density, gamma)
    (high, above, _), (low, more, equals) = select.ranked(survey[0], survey[1], ranks)
    return low, high, ranks[1] - ranks[0] + 1, more + equals - above
