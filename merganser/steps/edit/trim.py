"""Trim: keep the largest entries of a delta."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import select
from ..select import check_density, one_of


def trim(
    delta: Float[Tensor, "*shape"],
    *,
    density: float = 0.2,
    scope: str = "model",
    equal: str = "all",
    rescale: str | None = None,
    survey: Sequence[Any] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep the entries of largest magnitude, set the others to zero.

        tau' = tau [|tau| >= theta],   theta = the k-th largest |tau|,   k = int(density d), at least 1

    Tensors of any shape; magnitudes are compared in fp32. It is the first third of TIES, before any combining step.

    density   share kept; 0.2 as in TIES
    scope     "model": d counts the expert's whole model; "tensor": each tensor keeps its share (mergekit, PEFT)
    equal     "all": entries as large as theta are all kept, with a warning where that is over a point more than the
              share (bf16 deltas have few magnitudes); "first": exactly k, the first ones in memory (scope="tensor"
              only, and the tensor is not cut)
    rescale   None; "l1": times |tau|_1 / |tau'|_1 over the scope, 1 where either is below 1e-7 (mergekit)
    survey    this expert's totals of `passes` over the scope; without it this tensor is the scope

    Raises ValueError for a density outside (0, 1] or an unknown word.
    Source: Yadav et al., TIES-Merging (arXiv 2306.01708); rescale: mergekit (arXiv 2403.13257).
    """
    check_density(density)
    looks = passes(density=density, scope=scope, equal=equal, rescale=rescale)
    if density == 1:
        return delta.clone()
    if survey is None:
        survey = [total[0] for total in select.look_at(delta[None], looks)]
    theta, above, equals = _theta(survey, density)
    asked = select.share(density, select.size(survey[0]))
    kept = select.trimmed(delta.to(torch.promote_types(delta.dtype, torch.float32)), theta)
    if equal == "first":
        kept = kept * select.first_of_equals(delta, theta, asked)
        equals, extra = asked - above, equals - (asked - above)
    elif theta > 0:
        select.warn_of_equals(asked, above + equals, select.size(survey[0]), scope, first=True)
    if rescale:
        left = survey[2][1] - (extra * theta if equal == "first" else 0)
        kept = kept * select.l1_ratio(survey[2][0], left)
    return kept.to(delta.dtype)


def passes(
    *,
    density: float | Sequence[float] = 0.2,
    scope: str = "model",
    equal: str = "all",
    rescale: str | None = None,
) -> list[select.Look]:
    """Return the looks at all experts' deltas that find their thresholds, and for ``rescale`` their lengths."""
    shares = [check_density(share) for share in (density if isinstance(density, (list, tuple)) else [density])]
    one_of("scope", scope, ("model", "tensor"))
    one_of("equal", equal, ("all", "first") if scope == "tensor" else ("all",))
    one_of("rescale", rescale, (None, "l1"))

    def each(experts: int) -> list[float]:
        return select.per_expert("density", density, experts)

    def kept(size: int, experts: int) -> list[int]:
        return [select.share(one, size) for one in each(experts)]

    def bins(learned: Sequence[Any], experts: int) -> list[list[int]]:
        rows = zip(each(experts), (learned[0][t] for t in range(experts)), strict=True)
        return [select.places(row, [select.share(one, select.size(row))]) for one, row in rows]

    def lengths(deltas: Tensor, learned: list[Any]) -> Tensor:
        found = [_theta([total[t] for total in learned], one) for t, one in enumerate(each(len(deltas)))]
        return select.lengths(deltas, [theta for theta, _, _ in found])

    return (
        [select.coarse_beyond(kept), select.fine_at(bins), *([lengths] if rescale else [])] if min(shares) < 1 else []
    )


def elementwise(*, equal: str = "all", **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: which of its equal entries are the first ones cannot be told from a cut."""
    return equal == "all"


def _theta(survey: Sequence[Any], density: float) -> tuple[float, int, int]:
    return select.ranked(survey[0], survey[1], [select.share(density, select.size(survey[0]))])[0]
