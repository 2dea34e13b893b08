"""Karcher mean: the point on the sphere with the least sum of squared arcs to the experts."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..inner import TINY, gram, known, lengths, mixed, of_weights, weights_of
from ..select import one_of

SCOPE = "tensor"
ELEMENTWISE = True
HERE = 5e-11  # 1 - cos of an angle of 1e-5: a point that near does not pull
OPPOSED = 1e-8  # units whose mean is shorter cancel; 1 + cos below which a point pulls in no direction


def karcher(
    deltas: Float[Tensor, "experts *shape"],
    *,
    weights: Sequence[float] | None = None,
    steps: int = 10,
    tol: float = 1e-5,
    on: str = "weights",
    base: Float[Tensor, "*shape"] | None = None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the Riemannian centre of mass of the experts' directions, at their mean length, less the base.

        mu <- exp_mu(sum_t w_t log_mu(u_t)) until the step is shorter than tol,    u_t = theta_t / |theta_t|
        theta = (sum_t w_t |theta_t|) mu

    A tensor of any shape is one vector. mu starts at the normalised mean of the units; zero tensors have no direction
    and count in the mean length only. Tangents and steps are sums of the experts, so all of it needs only their inner
    products. Where the units cancel, as two opposite ones do, there is no centre and the weighted mean is taken.

    weights   one an expert, not negative, alike by default (mergekit has none)
    steps     at most so many iterations
    tol       length of a step at which it has converged
    on        "weights": around zero, as in mergekit; "deltas": around the base
    base      the base's tensor, for on="weights"; without it the deltas are the weights
    survey    the `gram` matrix

    Raises ValueError for negative weights or ones of another number than the experts, steps below 1, a tol that is not
    positive, or an unknown word.
    Source: Karcher, Riemannian Center of Mass (1977); for checkpoints: mergekit (arXiv 2403.13257), method karcher.
    """
    one_of("on", on, ("weights", "deltas"))
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if not (isinstance(tol, (int, float)) and tol > 0):
        raise ValueError(f"tol must be positive, got {tol!r}")
    w = weights_of(weights, len(deltas), negative=False)
    base = base if on == "weights" else None
    shares = (
        known(_shares, survey[0], w, steps, tol) if survey is not None else _shares(gram(deltas, base), w, steps, tol)
    )
    return mixed(deltas, shares, base)


def _shares(products: Tensor, w: tuple[float, ...], steps: int, tol: float) -> Float[Tensor, "experts"]:
    """Return the coefficients of the centre in the experts: mu's while it is sought, times the mean length."""
    points = products if len(products) == len(w) else of_weights(products)
    norms = lengths(points)
    each = torch.tensor(w, dtype=points.dtype, device=points.device)
    each = each / each.sum()
    there = norms > 2 * TINY**0.5
    pull = torch.where(there, each, 0)
    pull = pull / pull.sum().clamp(min=TINY)
    mu = pull / norms
    if _length(mu, points) < OPPOSED:
        return each
    mu = mu / _length(mu, points)
    for _ in range(steps):
        cos = points @ mu / norms
        pulls = there & (cos < 1 - HERE) & (cos > -1 + OPPOSED)
        angle = torch.where(pulls, cos, 0).acos()
        log = torch.where(pulls, pull * angle / angle.sin(), 0)
        tangent = log / norms - (log * cos).sum() * mu
        speed = _length(tangent, points)
        if speed < tol:
            break
        mu = speed.cos() * mu + speed.sin() / speed * tangent
        mu = mu / _length(mu, points)
    return mu * (each * norms).sum()


def _length(shares: Tensor, points: Tensor) -> Tensor:
    return (shares @ points @ shares).clamp(min=TINY).sqrt()


def passes(*, on: str = "weights", **_knobs: Any) -> list[Any]:
    """Return what `karcher` has to learn first from a tensor: inner products."""

    def look(deltas: Tensor, _learned: list[Tensor], base: Tensor | None = None) -> Tensor:
        return gram(deltas, base if on == "weights" else None)

    return [look]
