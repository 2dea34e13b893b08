"""Weighted: the sum of the deltas with coefficients given for each tensor."""

import math
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

ELEMENTWISE = True


def weighted(
    deltas: Float[Tensor, "experts *shape"], *, default: float = 0.3, coefficients: Tensor | None
) -> Float[Tensor, "*shape"]:
    """Return the sum of the deltas, each times the coefficient that was learned or made for it.

        tau = sum_t c_t tau_t

    coefficients   one number for all experts, one an expert ``[experts]``, or one an entry ``[experts, *shape]``; the
                   gradient reaches them
    default        the coefficient of all experts in tensors for which there are none: 0.3, where AdaMerging starts

    Raises ValueError for coefficients of another shape, or a default that is not finite.
    Source: Yang et al., AdaMerging (arXiv 2310.02575), layer-wise.
    """
    if isinstance(default, bool) or not (isinstance(default, (int, float)) and math.isfinite(default)):
        raise ValueError(f"default must be a finite number, got {default!r}")
    c = torch.tensor(float(default)) if coefficients is None else coefficients
    if c.ndim and c.shape not in (deltas.shape, deltas.shape[:1]):
        raise ValueError(
            f"coefficients must be one number, {len(deltas)} of them or {list(deltas.shape)}, are {list(c.shape)}"
        )
    each = c.to(deltas).expand(len(deltas)) if c.ndim == 0 else c.to(deltas)
    return reduce(torch.add, [one * delta for one, delta in zip(each, deltas, strict=True)])
