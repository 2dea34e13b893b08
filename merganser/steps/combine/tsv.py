"""TSV-M: the leading singular vectors of all experts, made orthogonal to each other."""

from jaxtyping import Float
from torch import Tensor

from ..spectrum import check_rank, decorrelated, matrices


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
    check_rank(rank)
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    return decorrelated(wide, rank, like=deltas[0])
