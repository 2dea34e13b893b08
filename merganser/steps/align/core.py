"""Core Space: all experts' deltas as small matrices in one common basis of outputs and one of inputs."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import factored, leading, matrices, peaks

COORDINATES = "both"  # of the sides of a matrix, those that are other ones behind it
LINEAR = True  # what is linear in the coordinates is so in the deltas


def core(
    deltas: Float[Tensor, "experts *shape"], *, conv: str = "matrix"
) -> tuple[Float[Tensor, "experts *other"], Callable[[Tensor], Tensor]]:
    """Write the deltas between the left singular vectors of all of them side by side and the right ones of all stacked.

        U = left singular vectors of [Delta_1 | .. | Delta_T],    V = right singular vectors of [Delta_1; ..; Delta_T]
        M_t = U^T Delta_t V,    restore(M) = U M V^T

    For LoRA experts, Delta_t = B_t A_t, U is that of [B_1 | .. | B_T] and V that of [A_1; ..; A_T], as published
    (`core_factors`): M_t has the sum of the ranks as its sides, whatever the layer's size. Both span the same, so
    nothing is lost, and what does not depend on the basis (sums, ``tsv``, ``iso_c``) is the same; what trims entries or
    elects signs (``ties``) differs between the two. There is little to be had from it for deltas of full rank.

    conv   "matrix": a convolution is ``[out, in * height * width]``; "mean": it passes unchanged

    Tensors that are not matrices pass unchanged. Each basis vector's largest entry is positive; merging does not depend
    on that. Directions below 1e-6 of the largest are rounding noise and dropped. Raises ValueError for an unknown conv.
    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space (arXiv 2509.17786).
    """
    wide = matrices(deltas, conv)
    if wide is None:
        return deltas, _unchanged
    left, right = _basis(torch.cat(list(wide), dim=1)), _basis(torch.cat(list(wide), dim=0).mT)
    coords = torch.stack([left.mT @ one.double() @ right for one in wide]).to(deltas.dtype)
    left, right = left.to(deltas.dtype), right.to(deltas.dtype)
    return coords, lambda merged: (left @ merged.to(left.dtype) @ right.mT).reshape(deltas.shape[1:])


def core_factors(
    factors: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], *, conv: str = "matrix"
) -> tuple[Float[Tensor, "experts left right"], Callable[[Tensor], tuple[Tensor, Tensor]]] | None:
    """Do the same for deltas ``B_t A_t`` of which the factors are known, in the basis that these have.

        U = left singular vectors of [B_1 | .. | B_T],    V = right singular vectors of [A_1; ..; A_T]
        M_t = (U^T B_t) (A_t V),    restore(M) = U M, V^T  (a product again)

    ``shape`` is the tensor's. None where `core` would pass it unchanged. Source: see `core`.
    """
    if not factored(shape, conv):
        return None
    left = _basis(torch.cat([b for b, _ in factors], dim=1))
    right = _basis(torch.cat([a for _, a in factors], dim=0).mT)
    kind = factors[0][0].dtype
    coords = torch.stack([(left.mT @ b.double()) @ (a.double() @ right) for b, a in factors]).to(kind)
    return coords, lambda merged: ((left @ merged.double()).to(kind), right.mT.to(kind))


def _basis(stacked: Float[Tensor, "m n"]) -> Float[Tensor, "m k"]:
    """Return the left singular vectors in float64, each turned so that its largest entry is positive."""
    u = leading(stacked)[0]
    return u * peaks(u).sign()


def _unchanged(merged: Tensor) -> Tensor:
    return merged
