"""Iso-C: the summed delta with all singular values made equal."""

from jaxtyping import Float
from torch import Tensor

from ..spectrum import isotropic, matrices, moved, summed


def iso_c(deltas: Float[Tensor, "experts *shape"], *, conv: str = "matrix", name: str = "") -> Float[Tensor, "*shape"]:
    """Sum the deltas and give every singular direction of the sum the same weight.

        sum_t Delta_t = U diag(S) V^T,   Delta = mean(S) U V^T        (mean over all min(out, in) values)

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    conv   "matrix": a convolution is ``[out, in * height * width]``, the linear map it applies to each patch;
           "mean": averaged as published, which in a convolutional net leaves most layers out of the method

    Directions in which the sum is zero up to fp32 rounding stay zero, where the published SVD fills them with
    arbitrary vectors; their zeros enter mean(S) as published. U V^T is computed in float64 from the Gram matrix,
    which is faster than an fp32 SVD and no less exact; the last product is fp32 where that costs no more than 2e-6.

    The factor alpha is ``| scale(by=...)``, tuned over 0.1 .. 3.0; the paper has no default.
    Gradients are finite if singular values are distinct. Raises ValueError for an unknown conv.
    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging (arXiv 2502.04959).
    """
    wide = matrices(deltas, conv, name)
    total = None if wide is None else summed(wide)
    if total is None or not moved(total):
        return deltas.mean(dim=0)
    return isotropic(total, like=deltas[0])
