"""RAM: keep what one expert alone has changed, average what several have."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

SCOPE = "tensor"
ELEMENTWISE = True


def ram(
    deltas: Float[Tensor, "experts *shape"],
    *,
    epsilon: float = 1e-5,
    plus: bool = False,
    r: float = 0.1,
    alpha: float = 0.2,
    survey: Sequence[Tensor] | None = None,
) -> Float[Tensor, "*shape"]:
    """Average each entry over the experts that have changed it.

        C = {t : |tau_t| > epsilon},    tau = sum_{t in C} s_t tau_t / |C|,    0 where C is empty
        s_t = 1 + r clamp(shared_t / unique_t, 0, alpha) where t alone changed the entry (plus), else 1

    shared_t and unique_t count the entries of the tensor that expert t changed together with others, and alone. Made
    for experts trained by reinforcement learning, whose deltas are sparse. Tensors of any shape alike.

    epsilon   in units of the weights: what is no larger counts as unchanged
    plus      RAM+ (mergekit's ramplus_tl): also make up for what averaging takes from the shared entries
    survey    [shared, unique] counts, for plus=True

    Raises ValueError for a negative epsilon, r or alpha.
    Source: Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models (arXiv 2601.13572).
    """
    for knob, value in (("epsilon", epsilon), ("r", r), ("alpha", alpha)):
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{knob} must not be negative, got {value!r}")
    kept, count, alone = _kept(deltas, epsilon)
    total = reduce(torch.add, kept)
    if plus:
        shared, unique = survey[0] if survey is not None else _counts(deltas, epsilon)
        more = r * (shared / unique.clamp(min=1)).clamp(0, alpha)
        extra = reduce(torch.add, [m * one for m, one in zip(more.to(total.dtype), kept, strict=True)])
        total = total + extra * alone
    return (total / count.clamp(min=1)).to(deltas.dtype)


def passes(*, epsilon: float = 1e-5, plus: bool = False, **_knobs: Any) -> list[Any]:
    """Return what ``plus`` has to learn first from a tensor: how much each expert has changed alone."""

    def look(deltas: Tensor, _learned: list[Tensor]) -> Tensor:
        return _counts(deltas, epsilon)

    return [look] if plus else []


def _kept(deltas: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return each expert's changed entries, how many experts changed an entry, and 1 where one alone did.

    Signs and products of numbers are a tenth of the time of comparisons and selections.
    """
    kept = [hardshrink(one, epsilon) for one in deltas.to(torch.promote_types(deltas.dtype, torch.float32))]
    count = reduce(torch.add, [one.detach().sign().abs() for one in kept])
    return kept, count, (2 - count).clamp(0, 1)


def _counts(deltas: Tensor, epsilon: float) -> Float[Tensor, "2 experts"]:
    """Return how many entries each expert changed with others, and alone; numbers below 2^53, so sums are exact."""
    kept, _, alone = _kept(deltas.detach(), epsilon)
    signs = [one.sign().abs() for one in kept]
    every = torch.stack([one.sum(dtype=torch.float64) for one in signs])
    unique = torch.stack([(one * alone).sum(dtype=torch.float64) for one in signs])
    return torch.stack([every - unique, unique])
