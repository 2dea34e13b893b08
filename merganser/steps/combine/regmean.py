"""RegMean: the linear layer whose outputs are nearest to every expert's on that expert's inputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..inner import mixed


def regmean(
    deltas: Float[Tensor, "experts *shape"],
    *,
    reduce: float = 1.0,
    ridge: float = 1e-6,
    gram: Float[Tensor, "experts in in"] | None,
) -> Float[Tensor, "*shape"]:
    """Merge a linear layer by least squares on its inputs.

        Delta = (sum_t Delta_t G_t) (sum_t G_t)^-1,    G_t = X_t^T X_t / rows,  off its diagonal times ``reduce``

    The minimiser of sum_t |X_t (Delta - Delta_t)^T|^2; merging weights instead of deltas gives the same. Matrices are
    ``[out, in]``. Everything else (biases too), and a matrix for which ``gram`` has no tensor, is averaged.

    reduce   1 as derived; published runs use 0.9 to 0.95; 0 leaves the diagonal
    ridge    times the mean of a G_t's diagonal is added to it: where no inputs reach (dead units, fewer rows than
             columns) the mean of the experts is taken, in place of a singular system. 0 is the published formula
    gram     G_t, as `merganser.learn.measure.gram` measures it

    Solved in float64 by a Cholesky factor. Raises ValueError for a reduce outside [0, 1], a negative ridge, a gram of
    another shape, or one that is singular without a ridge.
    Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv 2212.09849).
    """
    if isinstance(reduce, bool) or not (isinstance(reduce, (int, float)) and 0 <= reduce <= 1):
        raise ValueError(f"reduce must lie in [0, 1], got {reduce!r}")
    if isinstance(ridge, bool) or not (isinstance(ridge, (int, float)) and ridge >= 0):
        raise ValueError(f"ridge must not be negative, got {ridge!r}")
    mean = torch.full((len(deltas),), 1 / len(deltas), dtype=torch.float64, device=deltas.device)
    if gram is None or deltas.ndim != 3 or deltas.numel() == 0:
        return mixed(deltas, mean)
    width = deltas.shape[2]
    if gram.shape != (len(deltas), width, width):
        raise ValueError(f"gram must be {[len(deltas), width, width]} for {list(deltas.shape)}, is {list(gram.shape)}")
    total = torch.zeros(width, width, dtype=torch.float64, device=deltas.device)
    pulled = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    for delta, one in zip(deltas, gram, strict=True):
        own = one.double()
        diagonal = own.diagonal()
        own = own * reduce + torch.diag(diagonal * (1 - reduce) + ridge * diagonal.mean())
        total = total + own
        pulled = pulled + delta.double() @ own
    if not total.any():
        return mixed(deltas, mean)  # no expert's inputs reach this layer
    factor, singular = torch.linalg.cholesky_ex(total)
    if singular:
        raise ValueError("gram is singular: give a ridge above 0")
    return torch.cholesky_solve(pulled.mT, factor).mT.to(deltas.dtype)
