"""WUDI: the delta that disturbs each expert least in the directions of that expert's own delta."""

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from ..spectrum import NULL, matrices

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def wudi(
    deltas: Float[Tensor, "experts *shape"],
    *,
    solve: str = "adam",
    steps: int = 300,
    lr: float = 1e-5,
    conv: str = "matrix",
    name: str = "",
) -> Float[Tensor, "*shape"]:
    """Minimise the interference within each expert's row space, starting from the sum.

        min_X sum_t ||(X - Delta_t) Delta_t^T||^2 / ||Delta_t||^2,      X_0 = sum_t Delta_t

    The rows of Delta_t stand for the inputs of expert t's layer, so no data is needed. With
    M_t = Delta_t^T Delta_t / ||Delta_t||^2 the gradient is 2 (X sum_t M_t - sum_t Delta_t M_t): one product a step.

    Matrices are ``[out, in]``. Everything else, and a matrix with ``text_projection`` in its ``name``, is averaged (the
    published code leaves every tensor but attention and MLP matrices at the base's value).

    solve   "adam": the published method. Adam moves an entry by about ``lr`` a step whatever the gradient, so X stays
            within lr * steps of the sum: it is stopped early, and what it gives depends on the weights' absolute size.
            "exact": the minimiser of smallest norm, (sum_t Delta_t M_t)(sum_t M_t)^+, by a float64 eigendecomposition
    steps   of Adam; 300 as published
    lr      of Adam; 1e-5 as published
    conv    "matrix": a convolution is ``[out, in * height * width]``; "mean": averaged

    There is no factor to tune. Cost: steps * out * in^2 multiplications for "adam", in^3 for "exact".
    Raises ValueError for an unknown word, fewer than 0 steps or a learning rate that is not positive.
    Source: Cheng et al., Whoever Started the Interference Should End It (arXiv 2503.08099).
    """
    if solve not in ("adam", "exact"):
        raise ValueError(f"solve must be 'adam' or 'exact', got {solve!r}")
    if not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0):
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")
    if not (isinstance(lr, (int, float)) and 0 < lr < float("inf")):
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    wide = matrices(deltas, conv, name)
    if wide is None:
        return deltas.mean(dim=0)
    moving = [delta.double() for delta in wide if delta.any()]
    m = reduce(torch.add, (_unit(delta).mT @ _unit(delta) for delta in moving))
    target = reduce(torch.add, map(_pulled, moving))
    if solve == "exact":
        x = _minimiser(target, m)
    else:
        work = torch.promote_types(deltas.dtype, torch.float32)
        x = _adam(reduce(torch.add, moving).to(work), 2 * target.to(work), 2 * m.to(work), steps, lr)
    return x.reshape(deltas.shape[1:]).to(deltas.dtype)


def _unit(delta: Tensor) -> Tensor:
    return delta / torch.linalg.matrix_norm(delta)


def _pulled(delta: Tensor) -> Tensor:
    """Return Delta Delta^T Delta / ||Delta||^2, multiplied in the cheaper order."""
    unit = _unit(delta)
    return (delta @ unit.mT) @ unit if delta.shape[0] < delta.shape[1] else delta @ (unit.mT @ unit)


def _minimiser(target: Tensor, m: Tensor) -> Tensor:
    values, q = torch.linalg.eigh(m)
    real = values > NULL**2 * values[-1]
    return target @ (q[:, real] / values[real]) @ q[:, real].mT


def _adam(x: Tensor, target: Tensor, m: Tensor, steps: int, lr: float) -> Tensor:
    """Return x after ``steps`` of Adam with the gradient ``x m - target``."""
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        gradient = x @ m - target
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.square()
        root = (square.clamp(min=torch.finfo(x.dtype).tiny) / (1 - BETAS[1] ** step)).sqrt()  # finite slope at 0
        x = x - lr / (1 - BETAS[0] ** step) * mean / (root + EPSILON)
    return x
