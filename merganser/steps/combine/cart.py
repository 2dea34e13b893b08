"""CART: the mean of the experts and the leading part of what each is apart from it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import leading, matrices, summed


def cart(
    deltas: Float[Tensor, "experts *shape"],
    *,
    share: float = 0.08,
    by: float = 1.0,
    conv: str = "matrix",
    name: str = "",
) -> Float[Tensor, "*shape"]:
    """Average the deltas and add the leading singular triplets of each one's distance from the average.

        M = mean_t Delta_t,    Delta = M + by sum_t U_t diag(S_t) V_t^T  (k leading triplets of Delta_t - M)

    Over all triplets the distances sum to zero, so it is what lies in few directions that is made longer. Matrices are
    ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    share   k = ceil(share min(out, in)); 0.08 is the paper's
    by      the paper's lambda, which it tunes on validation; 1 keeps the distances' own length
    conv    "matrix": a convolution is ``[out, in * height * width]``, the linear map it applies to each patch;
            "mean": averaged

    Directions below 1e-6 of the expert's delta are rounding noise and dropped. Gradients are finite if singular values are
    distinct. Raises ValueError for a share outside (0, 1], a factor that is not finite, or an unknown conv.
    Source: Choi et al., Revisiting Weight Averaging for Model Merging (arXiv 2412.12153).
    """
    if isinstance(share, bool) or not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
    if isinstance(by, bool) or not (isinstance(by, (int, float)) and math.isfinite(by)):
        raise ValueError(f"by must be a finite number, got {by!r}")
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    k, total = math.ceil(share * min(wide.shape[1:])), summed(wide) / len(wide)
    mean = total.to(torch.promote_types(deltas.dtype, torch.float32))
    for delta in wide:
        u, s, v = leading(delta - mean, k, size=float(delta.detach().norm()))  # experts that are alike have no distance
        total = total.addmm(u * s, v.mT, alpha=by)
    return total.reshape(deltas.shape[1:]).to(deltas.dtype)
