"""Task arithmetic: the sum of the deltas."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..select import one_each

ELEMENTWISE = LINEAR = True


def task_arithmetic(
    deltas: Float[Tensor, "experts *shape"], *, weights: Sequence[float] | Tensor | None = None
) -> Float[Tensor, "*shape"]:
    """Return the sum of the experts' deltas.

        tau = sum_t w_t tau_t

    ``weights`` holds one coefficient per expert (default 1 each; a negative one takes an ability away). The paper's
    common factor lambda is the step after this one, ``| scale(by=0.4)``, tuned over 0.1 .. 1.0 step 0.1.

    Raises ValueError if ``weights`` has another length.
    Source: Ilharco et al., Editing Models with Task Arithmetic (arXiv 2212.04089).
    """
    if weights is None:
        return _add(deltas)
    one_each("weights", weights, len(deltas))
    w = torch.as_tensor(weights, dtype=deltas.dtype, device=deltas.device)
    if not w.isfinite().all():
        raise ValueError(f"weights must be finite, got {w.tolist()}")
    return _add([one * delta for one, delta in zip(w, deltas, strict=True)])


def _add(terms: Tensor | Sequence[Tensor]) -> Tensor:
    """Add one expert after the other: unlike torch.sum, the same bits however the tensor was cut."""
    first, *others = terms
    if not others:
        return first.clone()
    total = first + others[0]
    for term in others[1:]:
        total += term
    return total
