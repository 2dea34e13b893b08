"""TSV-M: the leading singular vectors of all experts, made orthogonal to each other."""

import torch
from jaxtyping import Float
from torch import Tensor

NULL = 1e-6  # singular values below this share of the largest are rounding noise of fp32


def tsv(
    deltas: Float[Tensor, "experts *shape"], *, rank: int | None = None, conv: str = "matrix", name: str = ""
) -> Float[Tensor, "*shape"]:
    """Keep each expert's leading singular triplets and decorrelate those of different experts.

        Delta_t ~ U_t diag(S_t) V_t^T  (k leading triplets),   U = [U_1 .. U_T],  S = [S_1 .. S_T],  V = [V_1 .. V_T]
        Delta   = polar(U) diag(S) polar(V)^T,                 polar(X) = X (X^T X)^{-1/2}

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    rank   k, by default max(1, min(out, in) // T); the published code takes 0 where there are more experts than
           min(out, in) and so silently loses the layer's update
    conv   "matrix": a convolution is ``[out, in * height * width]``, the linear map it applies to each patch;
           "mean": averaged as published, which in a convolutional net leaves most layers at 1/T of the matrices' size

    The polar factor is that of the non-null part: directions which are zero up to fp32 rounding (low-rank deltas,
    identical experts) take no part, where the published SVD fills them with arbitrary vectors. It is computed in
    float64 from Gram matrices, which is faster than an fp32 SVD and no less exact.

    The factor alpha is ``| scale(by=...)``, 1 by default, tuned over 0.1 .. 3.0; it scales the averaged tensors too.
    Gradients are finite if singular values are distinct. Raises ValueError for a rank below 1 or an unknown conv.
    Source: Gargiulo et al., Task Singular Vectors (arXiv 2412.00081).
    """
    if rank is not None and not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if conv not in ("matrix", "mean"):
        raise ValueError(f"conv must be 'matrix' or 'mean', got {conv!r}")
    matrix = deltas.ndim == 3 or (deltas.ndim == 5 and conv == "matrix")
    if not matrix or "text_projection" in name or not deltas.any():
        return deltas.mean(dim=0)

    tall = deltas.flatten(2).double()
    if turned := tall.shape[1] < tall.shape[2]:
        tall = tall.mT
    k = rank or max(1, tall.shape[2] // len(tall))
    triplets = [_leading(delta, k) for delta in tall if delta.any()]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    merged = u @ (_inverse_root(u) * s @ _inverse_root(v)) @ v.mT
    return (merged.mT if turned else merged).reshape(deltas.shape[1:]).to(deltas.dtype)


def _leading(delta: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading singular triplets of a tall matrix, fewer if its rank is lower."""
    squares, v = torch.linalg.eigh(delta.mT @ delta)  # ascending
    squares, v = squares[-k:], v[:, -k:]
    real = squares > NULL**2 * squares[-1]
    s, v = squares[real].sqrt(), v[:, real]
    return delta @ v / s, s, v


def _inverse_root(x: Tensor) -> Tensor:
    """Return (X^T X)^{-1/2} on the non-null part."""
    squares, q = torch.linalg.eigh(x.mT @ x)
    real = squares > NULL**2 * squares[-1]
    q = q[:, real]
    return q * squares[real].rsqrt() @ q.mT
