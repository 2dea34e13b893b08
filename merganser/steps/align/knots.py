"""KnOTS: all experts' deltas in one common basis of the outputs, where entries of one index mean the same."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import NULL, factored, leading, matrices, peaks, squared, times

LINEAR = True  # what is linear in the coordinates is so in the deltas


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
    _check(threshold)
    wide = matrices(deltas, conv)
    if wide is None:
        return deltas, _unchanged
    u, s = _left(wide)
    keep = (s > threshold) & (s > NULL * s.max())
    basis = u[:, keep] * peaks(u).sign()[keep]
    coords = torch.stack([times(delta.mT, basis, kind=deltas.dtype, turned=True).mT for delta in wide])
    basis = basis.to(deltas.dtype)
    return coords, lambda merged: (basis @ merged.to(basis.dtype)).reshape(deltas.shape[1:])


def _left(wide: Float[Tensor, "experts out inner"]) -> tuple[Float[Tensor, "out r"], Float[Tensor, " r"]]:
    """Return left singular vectors and singular values of all deltas side by side, in float64, largest first."""
    if wide.shape[1] > len(wide) * wide.shape[2]:
        u, s, _ = leading(torch.cat(list(wide), dim=1))
        return u, s
    squares, u = torch.linalg.eigh(squared(*wide.mT))
    return u.flip(1), squares.clamp(min=0).sqrt().flip(0)


def knots_factors(
    factors: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], *, threshold: float = 1e-5, conv: str = "matrix"
) -> tuple[Float[Tensor, "experts rank inner"], Callable[[Tensor], tuple[Tensor, Tensor]]] | None:
    """Do the same for deltas ``B_t A_t`` of which the factors are known: exact, and without a decomposition of that size.

        [B_1 | .. | B_T] = Q R,    A_t^T = Q_t R_t,    R diag(R_1^T, .., R_T^T) = u diag(S) v^T  (of the ranks' sum)
        U = Q u,    X_t = diag(S) v_t^T Q_t^T,    restore(X) = U, X  (a product again)

    ``shape`` is the tensor's. None where `knots` would pass it unchanged. Source: see `knots`.
    """
    _check(threshold)
    if not factored(shape, conv):
        return None
    q, r = torch.linalg.qr(torch.cat([b for b, _ in factors], dim=1).double())
    rows = [torch.linalg.qr(a.mT.double()) for _, a in factors]
    u, s, vt = torch.linalg.svd(r @ torch.block_diag(*(one.R.mT for one in rows)), full_matrices=False)
    u, keep = q @ u, (s > threshold) & (s > NULL * s[:1])
    sign = peaks(u).sign()[keep]
    basis = (u[:, keep] * sign).to(factors[0][0].dtype)
    mine = (vt[keep] * (s[keep] * sign)[:, None]).split([one.R.shape[0] for one in rows], dim=1)
    coords = torch.stack([part @ one.Q.mT for part, one in zip(mine, rows, strict=True)]).to(basis.dtype)
    return coords, lambda merged: (basis, merged.to(basis.dtype))


def _check(threshold: float) -> None:
    if not (isinstance(threshold, (int, float)) and 0 <= threshold < float("inf")):
        raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}")


def _unchanged(merged: Tensor) -> Tensor:
    return merged
