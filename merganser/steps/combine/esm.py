"""ESM: the directions along which each expert's delta moves the layer's outputs most, made orthogonal."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import decorrelated, leading, matrices, polar_parts, product

EIGEN_POWER = 0.15
NORM_POWER = 2  # of expert norms, column norms and layer norms
FACTOR = 2


def esm(
    deltas: Float[Tensor, "experts *shape"],
    *,
    inputs: Float[Tensor, "experts tokens inner"] | None,
    conv: str = "matrix",
    name: str = "",
    survey: Sequence[Counter[str]] | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep of each delta what moves real outputs most, decorrelate the experts, and raise what is large.

        E_t, l_t = right singular vectors and squared singular values / (tokens - 1) of X_t Delta_t^T  (not centred)
        U_t = E_t[:, :k] diag(w_t),   w_t = (l_t / mean l_t)^0.15, then / mean,   k = out // T
        V_t = diag(w_t) E_t[:, :k]^T Delta_t ||E_t^T Delta_t||^2
        V   = [V_1 .. V_T] / (mean_t ||E_t^T Delta_t||)^2, its column j times (||V_j|| / mean_j ||V_j||)^2
        Delta = 2 mean(sv(U)) mean(sv(V)) polar(U) polar(V)

    and at last Delta times (||Delta|| / mean of ||Delta|| over the layers of its kind)^2. A kind is a name with its
    numbers left out, among the matrices; a kind of one layer stays as it is.

    inputs   X_t: rows that enter this layer in expert t, such as the tokens of 32 unlabelled images; where there are
             none the layer is merged by TSV-M
    conv     "matrix": a convolution is ``[out, in * height * width]``, its inputs are patches; "mean": averaged
    survey   totals of `passes` over all tensors; without it this tensor is the only layer of its kind

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged.
    k is at most the rank of X_t Delta_t^T (tokens, in): beyond it the published code fills in arbitrary vectors.
    The norms of all layers are needed first, so every layer is merged twice. Cost: cubic in ``out``, since U is
    ``[out, k T]``: some ten seconds for 3072 on one core.

    There is no factor to tune. Gradients are finite if singular values are distinct.
    Raises ValueError for inputs of another shape or an unknown conv. Source: ESM (arXiv 2602.20208).
    """
    merged = _merged(deltas, inputs, conv, name)
    if survey is None or matrices(deltas, conv, name) is None:
        return merged
    total, layers = (survey[0][f"{what} {_kind(name)}"] for what in ("norm", "layers"))
    return merged if layers < 2 else merged * (merged.double().norm() / (total / layers)).item() ** NORM_POWER


def passes(*, conv: str = "matrix") -> list[Callable[..., Counter[str]]]:
    """Return the one look that `esm` needs: norm and number of the merged layers by kind."""

    def look(deltas: Tensor, learned: Sequence[Any], *, inputs: Tensor | None = None, name: str = "") -> Counter[str]:
        if matrices(deltas, conv, name) is None:
            return Counter()
        norm = _merged(deltas.detach(), inputs, conv, name).double().norm().item()
        totals: dict[str, Any] = {f"norm {_kind(name)}": norm, f"layers {_kind(name)}": 1}
        return Counter(totals)

    return [look]


def _kind(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _merged(deltas: Tensor, inputs: Tensor | None, conv: str, name: str) -> Tensor:
    """Return the merged delta before layers of one kind are compared."""
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    if inputs is None:
        return decorrelated(wide, None, like=deltas[0])
    if inputs.ndim != 3 or (len(inputs), inputs.shape[2]) != (len(wide), wide.shape[2]):
        raise ValueError(
            f"inputs must be [experts, tokens, in], here [{len(wide)}, any, {wide.shape[2]}], got {list(inputs.shape)}"
        )
    k = max(1, wide.shape[1] // len(wide))
    blocks = [_block(delta.double(), x.double(), k) for delta, x in zip(wide, inputs, strict=True)]
    seen = [block for block in blocks if block is not None]
    if not seen:  # no input sees any delta
        return torch.zeros_like(deltas[0])
    u = torch.cat([left for left, _, _ in seen], dim=1)
    v = torch.cat([rows * norm**NORM_POWER for _, rows, norm in seen])
    v = v / torch.stack([norm for _, _, norm in seen]).mean() ** NORM_POWER
    columns = torch.linalg.vector_norm(v, dim=0)
    v = v * (columns / columns.mean()) ** NORM_POWER
    (left, turn_u, su), (right, turn_v, sv) = polar_parts(u), polar_parts(v)
    size = FACTOR * su.sum() / min(u.shape) * sv.sum() / min(v.shape)
    return product(left * size, turn_u.mT @ right, turn_v.mT, like=deltas[0])


def _block(delta: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return weighted directions ``[out, k]``, weighted rows of the delta along them ``[k, in]``, norm of all rows."""
    rows = torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x  # fewer rows, the same right singular vectors
    moved = rows @ delta.mT
    if not moved.any():
        return None
    if (tokens := len(x)) >= len(delta):
        _, s, e = leading(moved, k)
        norm = torch.linalg.matrix_norm(delta)  # all directions of the output
    else:  # as published: beyond the tokens the directions are unit vectors
        _, s, e = leading(moved)
        norm = ((e.mT @ delta).square().sum() + delta[tokens:].square().sum()).sqrt()
    weight = s[:k] ** (2 * EIGEN_POWER)  # the mean of l cancels
    weight = weight / weight.mean()
    return e[:, :k] * weight, (e[:, :k] * weight).mT @ delta, norm
