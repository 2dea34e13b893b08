"""What an expert's own inputs see of a change, without any of them: its task vector tells where they lie."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.device import there
from .spectrum import leading

TOP = 32  # directions a matrix; the spectrum of a task vector falls fast


class Guard:
    """Size of a change in the directions of the own task's inputs.

        guard(theta) = sum_l |(theta_l - expert_l) V_l diag(s_l)|^2 / sum_l |s_l^2|^2,   U_l diag(s_l) V_l^T ~ tau_l

    with tau the task vector ``expert - base``.

    A step of gradient descent on a matrix is a sum of outer products with the inputs it was given, so the right singular
    vectors of a task vector span what the layer sees of its own task. Source: WUDI-Merging (arXiv 2503.08099, section 3),
    which uses it to merge.
    """

    def __init__(self, expert: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Sequence[str]):
        self.seen: dict[str, Tensor] = {}  # V diag(s) [in, TOP]
        self.start: dict[str, Tensor] = {}  # expert V diag(s)
        self.size = 1e-30
        for name in (n for n in names if expert[n].ndim == 2):
            _, s, v = leading((expert[name].float() - base[name].float()), TOP)
            self.seen[name] = there((v * s).float())
            self.start[name] = there(expert[name].float()) @ self.seen[name]
            self.size += float(s.square().square().sum())

    def __call__(self, made: Mapping[str, Tensor]) -> Tensor:
        """Return the size of the change to the weights ``made``."""
        gaps = [(made[n] @ seen - self.start[n]).square().sum() for n, seen in self.seen.items() if n in made]
        return torch.stack(gaps).sum() / self.size if gaps else torch.zeros(())
