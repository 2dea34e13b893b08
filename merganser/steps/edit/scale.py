"""Scale: multiply a delta by a number."""

import math

from jaxtyping import Float
from torch import Tensor

ELEMENTWISE = LINEAR = True


def scale(delta: Float[Tensor, "*shape"], *, by: float | Tensor = 1.0) -> Float[Tensor, "*shape"]:
    """Return the delta times a number: the scaling coefficient of nearly every merging paper.

        tau' = lambda tau

    Written after the combining step it scales the merged delta. ``by`` (lambda) is tuned on validation data:
    0.1 .. 1.0 step 0.1 for task arithmetic, 0.8 .. 2.5 step 0.1 for TIES, 0.1 .. 3.0 for TSV-M and Iso-C.
    Without validation data: 0.4 for task arithmetic, 1 otherwise. A scalar tensor is taken too: it can be learned.

    Raises ValueError if ``by`` is not a finite number.
    Source: Ilharco et al., Editing Models with Task Arithmetic (arXiv 2212.04089).
    """
    if not isinstance(by, Tensor) and not (isinstance(by, (int, float)) and math.isfinite(by)):
        raise ValueError(f"by must be a finite number, got {by!r}")
    return delta * by
