"""The few leading singular triplets of a large fp32 matrix: a block Krylov space in fp32, checked by residuals.

    K = [X, GX, G^2 X, ..],  G = M^T M of the smaller side,  X random, the same each time;  Rayleigh-Ritz on K

What fp32 leaves of the leading vectors outside of the space is about 1e-6 of them. How much it is at most is worked out
from the residuals, in float64 where fp32 does not do; where it is more than `LEAK` the whole
matrix is decomposed. Products with a few columns are nearly all the work, a fifth to a third of a Gram matrix and its
eigenvectors.
Source: Musco and Musco, Randomized Block Krylov Methods (arXiv 1504.05477).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import spectrum
from .spectrum import BAND, NULL

LEAK = 1e-5  # the largest share of a leading vector that may be missing
STEPS = (10, 16)  # blocks after which the space is looked at
ROUNDING = 3e-6  # what is left of a block in fp32 where there is nothing new in it
MARGIN = 16  # vectors more than asked for


def leading(
    matrix: Float[Tensor, "m n"], k: int
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return the k leading singular triplets in float64, as `spectrum.leading`; their sum is within `LEAK` of its norm.

    The rounding of fp32 remains (about 1e-6). ``matrix`` is worked on as it is where k is small, else by `spectrum`.
    """
    small = min(matrix.shape)
    if matrix.dtype == torch.float32 and max(STEPS) * max(k, MARGIN) <= small // 2 and not matrix.requires_grad:
        found = _leading(matrix, k)
        if found is not None:
            return found
    return spectrum.leading(matrix, k)


def _leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    turned = matrix.shape[0] < matrix.shape[1]
    size = max(map(abs, map(float, torch.aminmax(matrix))))
    if not 0 < size < float("inf"):
        return None
    space = _Space(matrix.mT if turned else matrix, max(k, MARGIN), size)
    for steps in STEPS:
        space.grow(steps)
        if space.count * space.width <= k + MARGIN:
            return None
        s, u, v, leak = _within(matrix, turned, *space.largest(k + MARGIN), k)
        if leak <= LEAK:
            return (v, s, u) if turned else (u, s, v)
        if space.closed:
            return None
    return None


class _Space:
    """A Krylov space of a tall matrix: an orthonormal basis in blocks, and the matrix times it."""

    def __init__(self, tall: Float[Tensor, "m n"], width: int, size: float):
        self.tall, self.width, self.size = tall, width, size
        self.count, self.closed = 0, False
        n = tall.shape[1]
        self.basis = torch.empty(n, width * max(STEPS))
        self.image = torch.empty(len(tall), width * max(STEPS))  # over ``size``, so that its squares are in range
        drawn = np.random.default_rng(0).standard_normal((n, width), dtype=np.float32)
        self.next = torch.linalg.qr(torch.from_numpy(drawn)).Q

    def grow(self, steps: int) -> None:
        """Go on until the space has so many blocks, or is closed: all that the matrix makes of it lies in it."""
        while self.count < steps and not self.closed:
            new = slice(self.count * self.width, (self.count + 1) * self.width)
            self.basis[:, new] = self.next
            # so turned it is a sixth faster
            self.image[:, new] = torch.mm(self.next.mT, self.tall.mT).div_(self.size).mT
            self.count += 1
            ahead, known = torch.mm(self.tall.mT, self.image[:, new]).div_(self.size), self.basis[:, : new.stop]
            length = float(ahead.norm())
            for _ in range(2):  # once is not enough in fp32
                ahead -= known @ (known.mT @ ahead)
            self.closed = not float(ahead.norm()) > ROUNDING * length
            self.next = torch.linalg.qr(ahead).Q

    def largest(self, count: int) -> tuple[Float[Tensor, "n p"], float]:
        """Return float64 orthonormal vectors that hold the leading ones, and the next squared singular value."""
        held = slice(0, self.count * self.width)
        image = self.image[:, held]
        squares, turn = torch.linalg.eigh(image.mT @ image)  # ascending
        chosen = self.basis[:, held] @ turn[:, -count:]
        return torch.linalg.qr(chosen.double()).Q, float(squares[-count - 1]) * self.size**2


def _within(
    matrix: Tensor, turned: bool, inside: Tensor, beyond: float, k: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the k leading triplets within a span, and the largest share of a vector that may lie outside of it."""
    there, back = (matrix.mT, matrix) if turned else (matrix, matrix.mT)
    image = (there @ inside.float()).double()
    squares, turn = torch.linalg.eigh(image.mT @ image)
    squares, turn = squares[-k:].flip(0), turn[:, -k:].flip(1)
    v, image = inside @ turn, image @ turn
    s = squares.clamp(min=0).sqrt()
    if not float(s[-1]) > NULL * float(s[0]):
        return s, image, v, float("inf")

    def leak(returned: Tensor) -> float:
        residual = returned - v * squares
        return float((residual.norm(dim=0) / (squares - beyond).clamp(min=0)).amax())

    # rounding makes a residual larger: where fp32 shows a small one, float64 would show a smaller one
    missing = leak((back @ image.float()).double())
    return s, image / s, v, missing if missing <= LEAK else leak(_times(matrix, image, not turned))


def _times(matrix: Tensor, right: Tensor, turned: bool) -> Tensor:
    """Return ``matrix right``, or ``matrix^T right`` if ``turned``, in float64, of which no whole copy is made."""
    if not turned:
        return torch.cat([rows.double() @ right for rows in matrix.split(BAND)])
    out = right.new_zeros(right.shape[1], matrix.shape[1])
    for rows, part in zip(matrix.split(BAND), right.split(BAND), strict=True):
        out.addmm_(part.mT, rows.double())
    return out.mT
