"""NuSLERP: between two experts along the arc of their deltas, by weights."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..inner import arc, gram, known, mixed, of_weights, weights_of
from ..select import one_of

SCOPE = "tensor"
STRAIGHT = 1 - 1e-12  # |cos| above which rounding decides the angle


def nuslerp(
    deltas: Float[Tensor, "experts *shape"],
    *,
    weights: Sequence[float] | None = None,
    on: str = "deltas",
    flatten: bool = True,
    row_wise: bool = False,
    base: Float[Tensor, "*shape"] | None = None,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the point between two experts' deltas (or weights) that their weights name, on the arc between them.

        tau = sin((1 - t) o) / sin(o) tau_1 + sin(t o) / sin(o) tau_2,    t = w_2 / (w_1 + w_2)

    weights    two numbers, alike by default
    on         "deltas": the arc is around the base (mergekit with a base); "weights": around zero (without one)
    flatten    True: the tensor is one vector; False: an angle for each of its rows or columns
    row_wise   False: an angle for each row (vectors along the last axis); True: for each column (along the first axis).
               The name is mergekit's, which has it this way round
    base       the base's tensor, for on="weights"; without it the deltas are the weights
    survey     the `gram` matrix, for flatten=True

    A tensor without axes, and for row_wise one with a single axis, has vectors of one entry: the line between them.
    Zero vectors count as orthogonal to any other, as in mergekit. Raises ValueError for other than two experts, for
    weights that sum to zero, or an unknown word.
    Source: mergekit (arXiv 2403.13257), method nuslerp.
    """
    if len(deltas) != 2:
        raise ValueError(f"nuslerp goes between two experts, got {len(deltas)}; multislerp takes any number")
    one_of("on", on, ("deltas", "weights"))
    first, second = weights_of(weights, 2)
    t = second / (first + second)
    base = base if on == "weights" else None
    if flatten and survey is not None:
        return mixed(deltas, known(_shares, survey[0], t), base)
    turned = not flatten and row_wise and deltas.ndim > 1
    if turned:
        deltas, base = deltas.movedim(1, -1), None if base is None else base.movedim(0, -1)
    merged = mixed(deltas, _shares(gram(deltas, base, by_row=not flatten), t), base)
    return merged.movedim(-1, 0) if turned else merged


def _shares(products: Tensor, t: float) -> Float[Tensor, "*rows 2"]:
    return arc(products if products.shape[-1] == 2 else of_weights(products), t, STRAIGHT)


def elementwise(*, flatten: bool = True, **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: not through rows or columns that have angles of their own."""
    return flatten


def passes(*, on: str = "deltas", flatten: bool = True, **_knobs: Any) -> list[Any]:
    """Return what `nuslerp` has to learn first from a tensor: inner products."""

    def look(deltas: Tensor, _learned: list[Tensor], base: Tensor | None = None) -> Tensor:
        return gram(deltas, base if on == "weights" else None)

    return [look] if flatten else []
