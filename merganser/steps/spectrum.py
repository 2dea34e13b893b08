"""Singular values and vectors from Gram matrices: the arithmetic that the spectral steps share.

An eigendecomposition of the smaller Gram matrix in float64 costs a third to a half of a float32 SVD and is more exact:
its rounding, 1e-16 of the largest squared singular value, is far below NULL^2.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..parallel import beside

NULL = 1e-6  # singular values below this share of the largest are rounding noise of fp32
SETTLED, UNSAFE = 1e-4, 1e-1  # a correction this small leaves an error of about its square; this large, any error
BAND = 256  # rows taken at a time
WIDE = 2048  # a side from which on a product is done in two parts, where a thread is idle
STRIPES = 8  # of columns, where a product is symmetric: nearly half of it need not be worked out
ALIKE = 64  # times the least singular value
FEW = 1 << 18  # entries copied at a time
CONV = ("matrix", "mean")


def matrices(
    deltas: Float[Tensor, "experts *shape"], conv: str = "matrix", name: str = ""
) -> Float[Tensor, "experts out inner"] | None:
    """Return the deltas as matrices, or None where a spectral step averages them.

    Matrices: two dimensions, unless ``text_projection`` is in the name; a convolution as ``[out, in * kh * kw]`` if
    ``conv`` is "matrix". Averaged: everything else, and deltas that are all zero. Raises ValueError for another conv.
    """
    if conv not in CONV:
        raise ValueError(f"conv must be 'matrix' or 'mean', got {conv!r}")
    matrix = deltas.ndim == 3 or (deltas.ndim == 5 and conv == "matrix")
    return deltas.flatten(2) if matrix and "text_projection" not in name and moved(deltas) else None


def factored(shape: Sequence[int], conv: str = "matrix") -> bool:
    """Tell whether a spectral step sees a tensor of this shape as a matrix (see `matrices`)."""
    if conv not in CONV:
        raise ValueError(f"conv must be 'matrix' or 'mean', got {conv!r}")
    return len(shape) == 2 or (len(shape) == 4 and conv == "matrix")


def peaks(basis: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
    """Return each column's entry of the largest magnitude: its sign settles that of a singular vector."""
    return basis.gather(0, basis.detach().abs().argmax(dim=0, keepdim=True))[0]


def moved(deltas: Tensor) -> bool:
    """Tell whether any entry is not zero; mostly a sum tells it, of the first of them or of all, five times as fast."""
    return bool(deltas[:1].sum() != 0) or bool(deltas.sum() != 0) or bool(deltas.any())


def summed(wide: Float[Tensor, "experts out inner"]) -> Float[Tensor, "out inner"]:
    """Return the sum over experts in float64, band by band as `squared`."""
    if wide.requires_grad:
        return wide.sum(dim=0, dtype=torch.float64)
    total = wide.new_empty(wide.shape[1:], dtype=torch.float64)
    band = max(1, FEW // (len(wide) * wide.shape[2]))  # larger copies go back to the system, to be cleared each time
    for rows, to in zip(wide.split(band, dim=1), total.split(band), strict=True):
        torch.sum(rows.double(), dim=0, out=to)
    return total


def check_rank(rank: int | None) -> None:
    """Raise ValueError unless ``rank`` is None or a whole number of at least 1."""
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")


def leading(
    matrix: Float[Tensor, "m n"],
    k: int | None = None,
    *,
    size: float | None = None,
    kind: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return the k leading singular triplets, largest first: ``matrix ~ u diag(s) v^T``.

    Fewer than k if the numerical rank is lower: values up to NULL times ``size`` (by default the largest one) are zero.
    Computed in float64; the larger side is given as ``kind``, the others in float64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, v = leading(matrix.mT, k, size=size, kind=kind)
        return v, s, u
    s, v = top(squared(matrix), k, size)
    return times(matrix, v / s, kind=kind), s, v


def top(
    gram: Float[Tensor, "n n"], k: int | None = None, size: float | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return the k largest singular values of a matrix with this Gram matrix and their vectors, as `leading` does.

    The Gram matrix may be overwritten.
    """
    k = min(k or len(gram), len(gram))
    squares, v = _few(gram, k) or eigh(gram)  # ascending
    squares, v = squares[-k:].flip(0), v[:, -k:].flip(1)
    real = squares > (NULL * (size or squares[0].sqrt())) ** 2
    return squares[real].sqrt(), v[:, real]


def eigh(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues, ascending, and vectors of a symmetric matrix, in its own memory unless a gradient is asked for."""
    if gram.requires_grad:
        return torch.linalg.eigh(gram)
    values, vectors = gram.new_empty(len(gram)), gram.mT  # the same matrix, column by column as LAPACK has it
    torch.linalg.eigh(vectors, out=(values, vectors))
    return values, vectors


def squared(*talls: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Return ``tall^T tall`` in float64, of several matrices under each other without putting them there."""
    if talls[0].requires_grad:
        return torch.stack([tall.mT.double() @ tall.double() for tall in talls]).sum(dim=0)
    gram = squares(talls)
    assert gram is not None
    return gram


def squares(talls: Iterable[Float[Tensor, "m n"]]) -> Float[Tensor, "n n"] | None:
    """Do the same of matrices that come one after another, of which none is asked for again; None where there are none.

    Rows come in bands, so that no float64 copy of all is made; of each pair of bands of columns one product is enough.
    """
    gram: Tensor | None = None
    for tall in talls:
        if gram is None:
            n = tall.shape[1]
            gram, width = torch.zeros(n, n, dtype=torch.float64, device=tall.device), _width(n)
        starts = range(0, n, width)
        shares = [starts] if n < WIDE else [starts[::2], starts[1::2]]
        beside([partial(_add_squares, gram, tall, some, width) for some in shares])
    return None if gram is None else _mirrored(gram, width)


def _add_squares(gram: Float[Tensor, "n n"], tall: Float[Tensor, "m n"], starts: Iterable[int], width: int) -> None:
    for rows in map(_as, tall.split(BAND)):
        for a in starts:
            gram[a:, a : a + width].addmm_(rows[:, a:].mT, rows[:, a : a + width])


def times(
    tall: Float[Tensor, "m n"],
    right: Float[Tensor, "n k"],
    *,
    kind: torch.dtype = torch.float64,
    work: torch.dtype = torch.float64,
    turned: bool = False,
) -> Float[Tensor, "m k"]:
    """Return ``tall right``, computed in ``work`` and given as ``kind``, band by band as `squared`.

    ``turned``: it lies in memory so that its transpose is contiguous.
    """
    if tall.requires_grad or right.requires_grad:
        return (tall.double() @ right).to(kind)
    right = right.to(work)
    shape = (len(tall), right.shape[1])
    out = right.new_empty(shape[::-1], dtype=kind).mT if turned else right.new_empty(shape, dtype=kind)
    bands = list(zip(tall.split(BAND), out.split(BAND), strict=True))
    shares = [bands] if min(right.shape) < WIDE or len(bands) == 1 else [bands[::2], bands[1::2]]
    beside([partial(_multiply, some, right) for some in shares])
    return out


def _multiply(bands: Iterable[tuple[Tensor, Tensor]], right: Tensor) -> None:
    for rows, to in bands:
        to.copy_(_as(rows, right.dtype) @ right)


def _as(rows: Float[Tensor, "m n"], kind: torch.dtype = torch.float64) -> Float[Tensor, "m n"]:
    """Return rows as ``kind``, in the order in which they lie in memory: turning them round would cost more."""
    return rows.mT.to(kind).mT if rows.stride(0) == 1 else rows.to(kind)


def _few(gram: Float[Tensor, "n n"], k: int) -> tuple[Float[Tensor, " p"], Float[Tensor, "n p"]] | None:
    """Return the k << n largest eigenpairs, and a few more, as eigh does but faster; None where it would not be safe.

    An eigendecomposition in float32 costs half of one in float64. From it each leading vector v gets what first-order
    perturbation theory says is missing of every other vector x_i, <x_i, gram v - lambda v> / (lambda - lambda_i); the
    residual, and the eigenvectors within the span, are float64. That is repeated until the correction is so small that
    its square, the error left, is far below fp32 rounding.
    """
    n = len(gram)
    p = k + max(16, k // 4)  # a margin, so that lambda - lambda_i is not small
    if n < 256 or 4 * p > n or gram.requires_grad:
        return None
    values, x = eigh(gram.float())
    rest, (squares, v, residual) = x[:, :-p], _within(gram, x[:, -p:].double())
    for _ in range(4):
        missing = (rest.mT @ residual.float()) / (squares - values[:-p, None].double()).float()
        length = missing[:, -k:].norm(dim=0).max()
        if not length < UNSAFE:  # also NaN
            return None
        v = v + rest @ missing
        if length < SETTLED:  # lengths and right angles are off by its square too
            return squares[-k:], v[:, -k:]
        squares, v, residual = _within(gram, v)
    return None


def _within(gram: Tensor, v: Tensor) -> tuple[Float[Tensor, " p"], Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """Return eigenvalues and vectors of ``gram`` within the span of v, nearly orthonormal columns, and residuals."""
    v = torch.linalg.solve_triangular(torch.linalg.cholesky(v.mT @ v).mT, v, upper=True, left=False)
    image = gram @ v
    squares, turn = torch.linalg.eigh(v.mT @ image)
    v = v @ turn
    return squares, v, image @ turn - v * squares


def polar_parts(x: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Return p, q, s with orthonormal columns, ``x = p diag(s) q^T`` and ``polar(x) = p q^T``, on the non-null part."""
    if x.shape[0] < x.shape[1]:
        q, p, s = polar_parts(x.mT)
        return p, q, s
    s, q = _right(x)
    return times(x, q / s), q, s


def _right(x: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "n r"]]:
    """Return the singular values of a tall matrix and its right singular vectors, on the non-null part."""
    squares, q = eigh(squared(x))
    null = int((squares <= NULL**2 * squares[-1]).sum())  # the first of them, since they ascend
    return squares[null:].sqrt(), q[:, null:]


def isotropic(x: Float[Tensor, "m n"], *, like: Tensor) -> Float[Tensor, "*shape"]:
    """Return ``polar(x)`` times the mean of all min(m, n) singular values, in like's shape and dtype."""
    wide = x.shape[0] < x.shape[1]
    tall = x.mT if wide else x
    s, q = _right(tall)
    work = _precision(s, len(q), like)
    out = times(tall, _even(s, q, work), kind=like.dtype, work=work, turned=wide)
    return (out.mT if wide else out).reshape(like.shape)


def _precision(s: Float[Tensor, " r"], n: int, like: Tensor) -> torch.dtype:
    """Return the dtype in which n columns with these singular values, ascending, are to be made even: fp32 if it can be.

    It rounds every direction by 6e-8 of their root mean square, which is to be small beside the least: 2e-6 at most.
    """
    alike = len(s) == n and not s.requires_grad and s.square().mean().sqrt() < ALIKE * s[0]
    return torch.promote_types(like.dtype, torch.float32) if alike else torch.float64


def _even(s: Float[Tensor, " r"], q: Float[Tensor, "n r"], work: torch.dtype) -> Float[Tensor, "n n"]:
    return _symmetric(q.to(work), (s.sum() / len(q) / s).to(work))


def _symmetric(q: Float[Tensor, "n r"], by: Float[Tensor, " r"]) -> Float[Tensor, "n n"]:
    """Return ``q diag(by) q^T``; of each pair of bands one product is enough, as in `squared`."""
    if q.requires_grad or by.requires_grad:
        return q * by @ q.mT
    n, weighed = len(q), q * by
    width = _width(n)
    out = q.new_empty(n, n)
    for a in range(0, n, width):
        torch.mm(weighed[a:], q[a : a + width].mT, out=out[a:, a : a + width])
    return _mirrored(out, width)


def _width(n: int) -> int:
    return max(64, -(-n // STRIPES))


def _mirrored(square: Float[Tensor, "n n"], width: int) -> Float[Tensor, "n n"]:
    """Fill what lies above blocks of ``width`` on the diagonal with what lies below; return the same tensor."""
    for a in range(0, len(square), width):
        square[a : a + width, a + width :] = square[a + width :, a : a + width].mT
    return square


def polar(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Return the nearest matrix with orthonormal columns (rows), ``x (x^T x)^{-1/2}``, zero where x is null."""
    p, q, _ = polar_parts(x)
    return p @ q.mT


def decorrelated(
    wide: Float[Tensor, "experts out inner"], rank: int | None, *, like: Tensor
) -> Float[Tensor, "*shape"]:
    """Return TSV-M of matrices, in like's shape and dtype: ``polar(U) diag(S) polar(V)^T`` of all leading triplets."""
    k = rank or max(1, min(wide.shape[1:]) // len(wide))
    kind = torch.promote_types(like.dtype, torch.float32)
    triplets = [leading(delta, k, kind=kind) for delta in wide if moved(delta)]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    del triplets
    turned = len(u) < len(v)
    tall, small = (v, u) if turned else (u, v)
    even, other = _root(tall, like), _root(small, like)
    right = (small.to(other.dtype) @ other).to(even.dtype)
    out = times(tall, even * s.to(even.dtype) @ right.mT, kind=like.dtype, work=even.dtype, turned=turned)
    return (out.mT if turned else out).reshape(like.shape)


def _root(x: Float[Tensor, "m n"], like: Tensor) -> Float[Tensor, "n n"]:
    """Return ``(x^T x)^{-1/2}``, zero where x is null, so that ``polar(x)`` is x times it; in the dtype of `_precision`."""
    if x.shape[0] < x.shape[1]:
        _, q, s = polar_parts(x)
    else:
        s, q = _right(x)
    work = _precision(s, x.shape[1], like)
    return _symmetric(q.to(work), (1 / s).to(work))


def product(*factors: Tensor, like: Tensor) -> Float[Tensor, "*shape"]:
    """Multiply well-conditioned factors in fp32 (float64 where ``like`` is) and give the result like's shape and dtype."""
    work = torch.promote_types(like.dtype, torch.float32)
    return torch.linalg.multi_dot([factor.to(work) for factor in factors]).reshape(like.shape).to(like.dtype)
