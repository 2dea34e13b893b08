"""Arcee Fusion: take over an expert's outstanding changes and leave the rest as it was."""

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 1 << 18  # entries worked on at a time


def arcee_fusion(
    deltas: Float[Tensor, "experts *shape"], *, base: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """Return the delta of one expert where its importance is an outlier of the tensor, and zero elsewhere.

        I   = |tau| * KL(softmax(theta) + 1e-8 || softmax(theta_0) + 1e-8)      softmax and KL along each row
        tau = tau where I >= q2 + 1.5 (q3 - q1),    q1, q2, q3: quartiles of I over the tensor

    A row lies along the last axis; a tensor with at most one axis is one row. A quartile is the entry at
    int(q * (n - 1)) of the sorted ones. The divergences of fine-tuned rows are small differences of logarithms, so they
    are computed in float64. Without ``base`` the deltas are the weights and the base is zero.

    Raises ValueError for more than one expert.
    Source: mergekit (arXiv 2403.13257), method arcee_fusion.
    """
    if len(deltas) != 1:
        raise ValueError(f"arcee_fusion goes from the base to one expert, got {len(deltas)}")
    delta = deltas[0]
    if delta.numel() == 0:
        return delta.clone()
    importance = _importance(delta.detach(), base).flatten()
    q1, q2, q3 = (importance.kthvalue(int(q * (len(importance) - 1)) + 1).values for q in (0.25, 0.5, 0.75))
    return delta * (importance >= q2 + 1.5 * (q3 - q1)).reshape(delta.shape)


def _importance(delta: Tensor, base: Tensor | None) -> Tensor:
    """Return I, one row of a matrix after the other."""
    width = delta.shape[-1] if delta.ndim else 1
    moves = delta.reshape(-1, width)
    origins = torch.zeros_like(moves) if base is None else base.reshape(-1, width)
    out = torch.empty(moves.shape, dtype=torch.promote_types(delta.dtype, torch.float32), device=delta.device)
    many = max(1, ROWS // width)
    for move, origin, into in zip(moves.split(many), origins.split(many), out.split(many), strict=True):
        theta0 = origin.double()
        p, q = ((theta.softmax(dim=1) + 1e-8) for theta in (theta0 + move, theta0))
        kl = (p * (p / q).log()).sum(dim=1, keepdim=True)
        into.copy_(move.double().abs() * kl)
    return out
