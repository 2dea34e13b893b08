"""Average: the (weighted) mean of the deltas."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..select import one_each

ELEMENTWISE = LINEAR = True


def average(
    deltas: Float[Tensor, "experts *shape"], *, weights: Sequence[float] | Tensor | None = None
) -> Float[Tensor, "*shape"]:
    """Return the weighted mean of the experts' deltas, which is the weighted mean of the experts.

        tau = sum_t w_t tau_t / sum_t w_t

    ``weights`` holds one number per expert; the default weighs all alike.

    Raises ValueError if ``weights`` has another length, or sums to zero.
    Source: Wortsman et al., Model Soups (arXiv 2203.05482).
    """
    if weights is None:
        return _add(deltas).div_(len(deltas))
    one_each("weights", weights, len(deltas))
    w = torch.as_tensor(weights, dtype=deltas.dtype, device=deltas.device)
    if w.sum() == 0 or not w.isfinite().all():
        raise ValueError(f"weights must be finite and not sum to zero, got {w.tolist()}")
    return _add([one * delta for one, delta in zip(w, deltas, strict=True)]) / w.sum()


def _add(terms: Tensor | Sequence[Tensor]) -> Tensor:
    """Add one expert after the other: unlike torch.sum, the same bits however the tensor was cut."""
    first, *others = terms
    if not others:
        return first.clone()
    total = first + others[0]
    for term in others[1:]:
        total += term
    return total
