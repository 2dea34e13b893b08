"""Multi-SLERP: the mean direction of any number of experts, at their mean length."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..inner import TINY, gram, known, lengths, mixed, of_weights, weights_of
from ..select import one_of

SCOPE = "tensor"
ELEMENTWISE = True
OPPOSED = 1e-8  # length of the mean of unit vectors below which they cancel


def multislerp(
    deltas: Float[Tensor, "experts *shape"],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    on: str = "deltas",
    base: Float[Tensor, "*shape"] | None = None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the weighted mean direction of the experts' deltas (or weights), as long as they are on average.

        tau = (sum_t w_t |tau_t|) m / |m|,    m = sum_t w_t tau_t / |tau_t|

    A tensor of any shape is one vector. mergekit adds a step along the tangents u_t - <u_t, m> m at the mean; these
    are projections of the units that m is the mean of and sum to zero, so that step does not move it.
    Where the units cancel (|m| < 1e-8) there is no mean direction, and the weighted sum of the deltas is taken.

    weights     one an expert, alike by default
    normalize   divide the weights by their sum
    on          "deltas": directions from the base (mergekit with a base); "weights": from zero (without one)
    base        the base's tensor, for on="weights"; without it the deltas are the weights
    survey      the `gram` matrix

    Raises ValueError for weights of another number than the experts or that sum to zero, or an unknown word.
    Source: mergekit (arXiv 2403.13257), method multislerp.
    """
    one_of("on", on, ("deltas", "weights"))
    w = weights_of(weights, len(deltas))
    if normalize or weights is None:
        w = tuple(x / sum(w) for x in w)
    base = base if on == "weights" else None
    shares = known(_shares, survey[0], w) if survey is not None else _shares(gram(deltas, base), w)
    return mixed(deltas, shares, base)


def _shares(products: Tensor, w: tuple[float, ...]) -> Float[Tensor, "experts"]:
    points = products if len(products) == len(w) else of_weights(products)
    norms = lengths(points)
    each = torch.tensor(w, dtype=points.dtype, device=points.device)
    units = torch.where(norms > 2 * TINY**0.5, each / norms, 0)  # a zero vector has no direction
    length = (units @ points @ units).clamp(min=TINY).sqrt()
    return torch.where(length < OPPOSED, each, units * ((each * norms).sum() / length.clamp(min=OPPOSED)))


def passes(*, on: str = "deltas", **_knobs: Any) -> list[Any]:
    """Return what `multislerp` has to learn first from a tensor: inner products."""

    def look(deltas: Tensor, _learned: list[Tensor], base: Tensor | None = None) -> Tensor:
        return gram(deltas, base if on == "weights" else None)

    return [look]
