"""SLERP: go from one model to another along the arc between them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ..inner import arc, gram, known, mixed, of_weights

SCOPE = "tensor"
ELEMENTWISE = True
STRAIGHT = 0.9995  # |cos| above which arc and line are taken as one


def slerp(
    deltas: Float[Tensor, "experts *shape"],
    *,
    t: float = 0.5,
    base: Float[Tensor, "*shape"] | None = None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the point at ``t`` on the arc between two models' weights, less the base.

        theta = sin((1 - t) o) / sin(o) theta_a + sin(t o) / sin(o) theta_b,    cos(o) = <theta_a, theta_b> / |..| |..|

    a and b are the two experts; with one expert, a is the base, so t=0 is the base. A tensor of any shape is one
    vector. Where |cos| > 0.9995, the usual case between fine-tunings of one base, it is the line (1 - t) a + t b.
    A zero tensor has no angle and counts as orthogonal, as in mergekit.

    t        0 .. 1, how far from a to b
    base     the base's tensor; without it the deltas are the weights
    survey   the `gram` matrix of deltas and base

    Raises ValueError for a t outside [0, 1], or other than one or two experts.
    Source: Shoemake, Animating Rotation with Quaternion Curves (1985); for checkpoints: mergekit (arXiv 2403.13257).
    """
    looks = passes(t=t)
    if len(deltas) > 2:
        raise ValueError(f"slerp goes between two models, got {len(deltas)} experts; karcher takes any number")
    solve = _between if len(deltas) == 2 else _from_base
    shares = known(solve, survey[0], t) if survey is not None else solve(looks[0](deltas, [], base), t)
    if len(deltas) == 1 and base is not None:
        return mixed(torch.cat([deltas, base.to(deltas)[None]]), shares)
    return mixed(deltas, shares, base)


def _between(products: Tensor, t: float) -> Float[Tensor, "2"]:
    """Return the coefficients of two experts' weights."""
    return arc(products if len(products) == 2 else of_weights(products), t, STRAIGHT)


def _from_base(products: Tensor, t: float) -> Float[Tensor, "n"]:
    """Return the coefficients of one expert's delta and, if there is one, the base: b delta + (a + b - 1) base."""
    ends = pad(products, (1, 0, 1, 0))  # the base is an expert whose delta is zero
    if len(products) == 1:
        return arc(ends, t, STRAIGHT)[1:]
    a, b = arc(of_weights(ends), t, STRAIGHT)
    return torch.stack([b, a + b - 1])


def passes(*, t: float = 0.5) -> list[Any]:
    """Return what `slerp` has to learn first from a tensor: inner products."""
    if not (isinstance(t, (int, float)) and 0 <= t <= 1):
        raise ValueError(f"t must lie in [0, 1], got {t!r}")

    def look(deltas: Tensor, _learned: list[Tensor], base: Tensor | None = None) -> Tensor:
        return gram(deltas, base)

    return [look]
