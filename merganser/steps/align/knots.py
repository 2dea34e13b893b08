"""KnOTS: all experts' deltas in one common basis of the outputs, where entries of one index mean the same."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import BAND, NULL, eigh, factored, leading, matrices, moved, peaks, squared, squares, times

COORDINATES = "out"  # of the sides of a matrix, those that are other ones behind it
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
    positive, which settles the sign. The basis is computed in float64 from the smaller Gram matrix. Cost: cubic in
    min(out, T in), on one core below a second at 768 and some ten seconds at 3072; keep tall embeddings out of it. A merge
    reads the deltas one after another (`knots_in_turn`) and needs three times the Gram matrix beside their coordinates.
    Gradients are finite if singular values are distinct. Raises ValueError for a negative threshold or unknown conv.
    Source: Stoica et al., Model merging with SVD to tie the KnOTS (arXiv 2410.19735).
    """
    _check(threshold)
    wide = matrices(deltas, conv)
    if wide is None:
        return deltas, _unchanged
    if wide.shape[1] > len(wide) * wide.shape[2]:
        u, s, _ = leading(torch.cat(list(wide), dim=1))
    else:
        u, s = _left(squared(*wide.mT))
    return _tied(_kept(u, s, threshold), wide, deltas.shape)


def knots_in_turn(
    deltas: Callable[[], Iterator[Float[Tensor, "*shape"]]],
    shape: Sequence[int],
    *,
    threshold: float = 1e-5,
    conv: str = "matrix",
) -> tuple[Float[Tensor, "experts *other"], Callable[[Tensor], Tensor]] | None:
    """Do the same, to the bit, for deltas that are had one after another, and once more: never all of them at a time.

    ``shape`` is that of all, ``[experts, ...]``. None where `knots` would pass them unchanged or needs them side by side.
    Source: see `knots`.
    """
    _check(threshold)
    if not factored(shape[1:], conv) or shape[1] > shape[0] * math.prod(shape[2:]):
        return None
    basis = _basis(deltas, threshold)
    if basis is None:
        return None
    held = [basis]
    del basis  # handed on, not kept: in float64 it is the largest thing here
    return _tied(held.pop(), (one.flatten(1) for one in deltas()), shape)


def _basis(deltas: Callable[[], Iterator[Tensor]], threshold: float) -> Float[Tensor, "out r"] | None:
    gram = squares(one.flatten(1).mT for one in deltas() if moved(one))
    return None if gram is None else _kept(*_left(gram), threshold)


def _left(gram: Float[Tensor, "out out"]) -> tuple[Float[Tensor, "out out"], Float[Tensor, " out"]]:
    """Return left singular vectors and singular values, largest first, from a Gram matrix, which may be overwritten."""
    values, u = eigh(gram.neg_())  # ascending, so that those of the largest come first
    return u, values.neg().clamp(min=0).sqrt()


def _kept(u: Float[Tensor, "out n"], s: Float[Tensor, " n"], threshold: float) -> Float[Tensor, "out r"]:
    u = u[:, : int(((s > threshold) & (s > NULL * s[:1])).sum())]
    sign = torch.cat([peaks(some).sign() for some in u.split(BAND, dim=1)])
    return u * sign if u.requires_grad else u.mul_(sign)


def _tied(
    basis: Float[Tensor, "out r"], wide: Iterable[Float[Tensor, "out inner"]], shape: Sequence[int]
) -> tuple[Float[Tensor, "experts r inner"], Callable[[Tensor], Tensor]]:
    """Return the coordinates of deltas as they come, and the way back.

    Both are products with an orthonormal basis, whose rounding to fp32 is as small beside each delta as its own.
    """
    if basis.requires_grad:
        coords = torch.stack([(basis.mT @ one.double()).to(one.dtype) for one in wide])
    else:
        for t, one in enumerate(wide):
            if t == 0:
                basis = basis.to(torch.promote_types(one.dtype, torch.float32))
                coords = one.new_empty(shape[0], basis.shape[1], one.shape[1])
            coords[t] = times(one.mT, basis, kind=one.dtype, work=basis.dtype, turned=True).mT
    basis = basis.to(coords.dtype)
    return coords, lambda merged: (basis @ merged.to(basis.dtype)).reshape(shape[1:])


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
