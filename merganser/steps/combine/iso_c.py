"""Iso-C: the summed delta with all singular values made equal."""

import torch
from jaxtyping import Float
from torch import Tensor

NULL = 1e-6  # singular values below this share of the largest are rounding noise of fp32


def iso_c(deltas: Float[Tensor, "experts *shape"], *, conv: str = "matrix", name: str = "") -> Float[Tensor, "*shape"]:
    """Sum the deltas and give every singular direction of the sum the same weight.

        sum_t Delta_t = U diag(S) V^T,   Delta = mean(S) U V^T        (mean over all min(out, in) values)

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    conv   "matrix": a convolution is ``[out, in * height * width]``, the linear map it applies to each patch;
           "mean": averaged as published, which in a convolutional net leaves most layers out of the method

    Directions in which the sum is zero up to fp32 rounding stay zero, where the published SVD fills them with
    arbitrary vectors; their zeros enter mean(S) as published. U V^T is computed in float64 from the Gram matrix,
    which is faster than an fp32 SVD and no less exact.

    The factor alpha is ``| scale(by=...)``, tuned over 0.1 .. 3.0; the paper has no default.
    Gradients are finite if singular values are distinct. Raises ValueError for an unknown conv.
    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging (arXiv 2502.04959).
    """
    if conv not in ("matrix", "mean"):
        raise ValueError(f"conv must be 'matrix' or 'mean', got {conv!r}")
    total = deltas.flatten(2).double().sum(dim=0) if deltas.ndim in (3, 5) else None
    if total is None or (deltas.ndim == 5 and conv == "mean") or "text_projection" in name or not total.any():
        return deltas.mean(dim=0)

    tall = total.mT if total.shape[0] < total.shape[1] else total
    squares, v = torch.linalg.eigh(tall.mT @ tall)
    real = squares > NULL**2 * squares[-1]
    s, v = squares[real].sqrt(), v[:, real]
    merged = (tall @ v / s) @ v.mT * (s.sum() / len(squares))
    return (merged if tall is total else merged.mT).reshape(deltas.shape[1:]).to(deltas.dtype)
