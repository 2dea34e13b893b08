"""Iso-CTS: the common directions of the sum and each expert's own ones, all with the same weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import NULL, eigh, leading, matrices, moved, polar, squared, summed, times, top

Triplets = tuple[Tensor, Tensor, Tensor]  # u [out, k], s [k], v [in, k]


def iso_cts(
    deltas: Float[Tensor, "experts *shape"], *, common: float = 0.8, conv: str = "matrix", name: str = ""
) -> Float[Tensor, "*shape"]:
    """Keep the leading directions of the sum, replace the others by each expert's own, and weigh all alike.

        U_c, S_c, V_c = the c leading triplets of sum_t Delta_t
        U_t, S_t, V_t = the s leading triplets of Delta_t - U_c U_c^T Delta_t       (projected on the left only)
        U = [U_1 .. U_T, U_c],  S and V likewise,     Delta = mean(S) polar(U) polar(V)^T

    with r = min(out, in) directions in all: s T = (1 - common) r rounded to a multiple of T, half to even, at most r;
    c = r - s T. Where s = 0, with many experts on a small matrix, this is Iso-C.

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    common   share of directions taken from the sum; 0.8 in the paper
    conv     "matrix": a convolution is ``[out, in * height * width]``; "mean": averaged as published

    Directions that are zero up to fp32 rounding stay out, where the published SVD fills them with arbitrary vectors;
    their zeros enter mean(S). Computed in float64 from Gram matrices.

    The factor alpha is ``| scale(by=...)``, tuned over 0.1 .. 3.0; the paper has no default.
    Gradients are finite if singular values are distinct. Raises ValueError for a share outside [0, 1] or another conv.
    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging (arXiv 2502.04959).
    """
    if not (isinstance(common, (int, float)) and 0 <= common <= 1):
        raise ValueError(f"common must lie in [0, 1], got {common!r}")
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    r = min(wide.shape[1:])
    c, s = _ranks(r, len(wide), common)
    total = summed(wide)
    shared, rest = _common(total, c) if c and moved(total) else (None, None)
    del total  # as large as two deltas
    own = [_own(delta, s, shared, rest) for delta in wide if s and moved(delta)]
    own = [triplets for triplets in own if len(triplets[1])]
    triplets = own if shared is None else [*own, shared]
    if not triplets:  # the deltas cancel, so the sum has no direction
        return deltas.mean(dim=0)
    mean = torch.cat([values for _, values, _ in triplets]).sum() / r
    sides = [torch.cat([one[at] for one in own], dim=1) for at in (0, 2)] if own else []
    del own, triplets
    if shared is None:
        u, v = map(polar, sides)
    elif sides:
        u, v = _beside(sides[0], sides[1], shared[0], shared[2])
    else:
        u, _, v = shared
    del sides, shared
    if len(u) < len(v):
        return times(v, mean * u.mT.double(), kind=deltas.dtype, turned=True).mT.reshape(deltas.shape[1:])
    return times(u, mean * v.mT.double(), kind=deltas.dtype).reshape(deltas.shape[1:])


def _beside(u: Tensor, v: Tensor, shared_u: Tensor, shared_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return x, y with ``x y^T = polar([u, shared_u]) polar([v, shared_v])^T``.

    The shared sides have orthonormal columns, and u has no part in shared_u: polar([u, shared_u]) is [polar(u), shared_u].
    Of shared_v only the few directions q which v sees can turn: the others stay as they are.
    """
    u = u - shared_u @ (shared_u.mT @ u)  # what rounding left of them
    q = torch.linalg.qr(shared_v.mT @ v).Q
    seen = shared_v @ q
    turned = polar(torch.cat([v, seen], dim=1))
    x = torch.cat([shared_u, polar(u), shared_u @ q], dim=1)
    return x, torch.cat([shared_v, turned[:, : v.shape[1]], turned[:, v.shape[1] :] - seen], dim=1)


def _ranks(r: int, experts: int, common: float) -> tuple[int, int]:
    """Return (directions of the sum, directions of each expert)."""
    own = min(round((r - int(r * common)) / experts), r // experts)
    return r - own * experts, own


def _common(total: Tensor, c: int) -> tuple[Triplets, Tensor | None]:
    """Return the c leading triplets of the sum and, unless it is tall, a basis of what they leave of the outputs."""
    if total.shape[0] > total.shape[1]:
        return leading(total, c), None
    squares, u = eigh(squared(total.mT))  # ascending
    real = min(c, int((squares > NULL**2 * squares[-1]).sum()))
    u, rest = u[:, -real:].flip(1), u[:, :-real]
    s = squares[-real:].flip(0).sqrt()
    return (u, s, times(total.mT, u / s)), rest


def _own(delta: Tensor, s: int, shared: Triplets | None, rest: Tensor | None) -> Triplets:
    """Return the s leading triplets of what the shared directions leave of a delta.

    With an orthonormal basis W of the outputs that they leave, that is W W^T Delta, and those of W^T Delta, with few rows,
    are enough. Of a tall matrix it is R = Delta - U_c c^T, c = Delta^T U_c, R^T R = Delta^T Delta - c c^T.
    """
    size = torch.linalg.matrix_norm(delta.detach()).item()
    if shared is None:
        return leading(delta, s, size=size)
    if rest is not None:
        left = times(delta.mT, rest)
        values, u = top(left.mT @ left, s, size)
        return rest @ u, values, left @ (u / values)
    common = shared[0]
    seen = times(delta.mT, common)
    values, v = top(squared(delta) - seen @ seen.mT, s, size)
    return times(delta, v / values) - common @ (seen.mT @ (v / values)), values, v
