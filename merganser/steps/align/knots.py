"""KnOTS: all experts' deltas in one common basis of the outputs, where entries of one index mean the same."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import leading, matrices


def knots(
    deltas: Float[Tensor, "experts *shape"], *, threshold: float = 1e-5, conv: str = "matrix"
) -> tuple[Float[Tensor, "experts *other"], Callable[[Tensor], Tensor]]:
    """Write the deltas in the left singular vectors of all of them side by side.

        [Delta_1 | .. | Delta_T] = U diag(S) [V_1 | .. | V_T],    X_t = diag(S) V_t = U^T Delta_t,    restore(X) = U X

    Coordinates are ``[experts, rank, in]``, rank at most min(out, T in). Linear combinations are the same in any basis,
    so ``knots | average`` is ``average``; what trims entries or elects signs is not. A model-wide trim (``ties``) counts
    the coordinates of all tensors.

    threshold   singular values at most this large are dropped: 1e-5 as published, in absolute terms; so are those below
                1e-6 of the largest, which are rounding noise of fp32
    conv        "matrix": a convolution is ``[out, in * height * width]``; "mean": it passes unchanged

    Tensors that are not matrices pass unchanged (the published code drops them). Each basis vector's largest entry is
    positive, which settles the sign. Computed in float64 from the smaller Gram matrix. Cost: cubic in min(out, T in),
    on one core below a second at 768 and some ten seconds at 3072; keep tall embeddings out of it.
    Gradients are finite if singular values are distinct. Raises ValueError for a negative threshold or unknown conv.
    Source: Stoica et al., Model merging with SVD to tie the KnOTS (arXiv 2410.19735).
    """
    if not (isinstance(threshold, (int, float)) and 0 <= threshold < float("inf")):
        raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}")
    wide = matrices(deltas, conv)
    if wide is None:
        return deltas, _unchanged
    u, s, v = leading(torch.cat(list(wide), dim=1))
    peaks = u.gather(0, u.detach().abs().argmax(dim=0, keepdim=True))
    keep = s > threshold
    sign = peaks.sign()[0, keep]
    basis = (u[:, keep] * sign).to(deltas.dtype)
    stacked = (v[:, keep] * (s[keep] * sign)).to(deltas.dtype)
    coords = stacked.reshape(len(wide), wide.shape[2], -1).mT.contiguous()
    return coords, lambda merged: (basis @ merged.to(basis.dtype)).reshape(deltas.shape[1:])


def _unchanged(merged: Tensor) -> Tensor:
    return merged
