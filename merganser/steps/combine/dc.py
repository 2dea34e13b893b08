"""DC-Merge: experts' leading parts merged in one common basis, where they are sparse and keep to their own block."""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import check_rank, leading, matrices, moved, polar_parts, product

SMOOTHING = (None, "mean", "linear")


def dc(
    deltas: Float[Tensor, "experts *shape"],
    *,
    density: float = 1e-3,
    rank: int | None = None,
    smoothing: str | None = None,
    rho: float = 5.0,
    conv: str = "matrix",
    name: str = "",
) -> Float[Tensor, "*shape"]:
    """Merge the experts' leading triplets as TIES does, in the basis that decorrelates them.

        Delta_t ~ U_t diag(S_t) V_t^T  (k leading triplets),      P = polar([U_1 .. U_T]),   Q = polar([V_1 .. V_T])
        C_t = the largest entries of P^T U_t diag(S_t) V_t^T Q,   s = sign(sum_t C_t)
        C   = B * mean over {t : s C_t > 0} of C_t,               Delta = P C Q^T

    B keeps the T diagonal blocks of k x k entries: what an expert writes with its own directions into its own.

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.

    density     share of the core's entries kept per expert, at least one; entries as large as the last one kept stay
                too. The core counts as min(out, in)^2 entries, or as (k T)^2 where ``rank`` is given, as published:
                1e-3 leaves a single entry on a small layer
    rank        k, by default max(1, min(out, in) // T); 16 in the published LoRA code
    smoothing   what is done to S_t first: None (the published full fine-tuning code), "mean": its mean for all
                (the published LoRA code), "linear": a falling line of the same sum
    rho         "linear": the line's first value is at most ``rho`` times its last
    conv        "matrix": a convolution is ``[out, in * height * width]``; "mean": averaged as published

    Triplets that are zero up to fp32 rounding take no part; the smoothing is over the others.
    The factor alpha is ``| scale(by=...)``, tuned per model in the paper. Gradients are finite if singular values are
    distinct. Raises ValueError for a density outside (0, 1], a rank or rho below 1, or an unknown word.
    Source: DC-Merge (arXiv 2603.06242).
    """
    if not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(f"density must lie in (0, 1], got {density!r}")
    check_rank(rank)
    if smoothing not in SMOOTHING:
        raise ValueError(f"smoothing must be None, 'mean' or 'linear', got {smoothing!r}")
    if not (isinstance(rho, (int, float)) and 1 <= rho < float("inf")):
        raise ValueError(f"rho must be a number of at least 1, got {rho!r}")
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    side = min(wide.shape[1:])
    k = min(rank or max(1, side // len(wide)), side)
    triplets = [leading(delta, k) for delta in wide if moved(delta)]
    sizes = [len(s) for _, s, _ in triplets]
    u, v = (torch.cat([triplet[at] for triplet in triplets], dim=1) for at in (0, 2))
    (left, turn_u, cos_u), (right, turn_v, cos_v) = polar_parts(u), polar_parts(v)
    work = torch.promote_types(deltas.dtype, torch.float32)
    rows = (turn_u * cos_u @ turn_u.mT).to(work).split(sizes, dim=1)  # P^T U = (U^T U)^{1/2}
    columns = (turn_v * cos_v @ turn_v.mT).to(work).split(sizes, dim=1)
    smoothed = [_smooth(s, smoothing, rho).to(work) for _, s, _ in triplets]
    kept = max(1, int(density * (k * len(wide) if rank else side) ** 2))
    cores = [_largest(a * s @ b.mT, kept) for a, s, b in zip(rows, smoothed, columns, strict=True)]
    core = torch.block_diag(*map(_elect, zip(*(_blocks(core, sizes) for core in cores), strict=True)))
    return product(left, turn_u.mT.to(work) @ core @ turn_v.to(work), right.mT, like=deltas[0])


def _smooth(s: Tensor, smoothing: str | None, rho: float) -> Tensor:
    if smoothing is None:
        return s
    if smoothing == "mean":
        return s.mean().expand_as(s)
    first = min(rho, (s[0] / s[-1]).item())
    line = torch.linspace(first, 1, len(s), dtype=s.dtype, device=s.device)
    return s.sum() * line / line.sum()


def _largest(core: Tensor, count: int) -> Tensor:
    """Keep the entries as large as the ``count``-th largest magnitude."""
    size = core.detach().abs()
    if count >= size.numel():
        return core
    return torch.where(size >= size.flatten().kthvalue(size.numel() - count + 1).values, core, 0)


def _blocks(core: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return the diagonal blocks of a core."""
    return [row.split(sizes, dim=1)[t] for t, row in enumerate(core.split(sizes))]


def _elect(cores: Sequence[Tensor]) -> Tensor:
    """Return the mean of the entries which have the sign of their sum."""
    sign = reduce(torch.add, cores).detach().sign()
    agree = [(core.detach() * sign) > 0 for core in cores]
    total = reduce(torch.add, [core * one for core, one in zip(cores, agree, strict=True)])
    return total / reduce(torch.add, [one.to(total.dtype) for one in agree]).clamp(min=1)
