"""Which numbers an adapt step trains: whole tensors, some of them, or a low-rank change of each matrix."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..weights.open import matches


class Moving:
    """The trained parameters and the weights that they make.

    rank 0: the tensors themselves. Otherwise a matrix (more than ``rank`` rows and columns) is ``start + B A`` with A
    ``[rank, in]`` random and B ``[out, rank]`` zero; a convolution counts as ``[out, in * kh * kw]``; the rest is trained
    whole.
    """

    def __init__(self, start: Mapping[str, Tensor], names: Sequence[str], *, rank: int = 0, seed: int = 0):
        self.start = {n: start[n].detach().float().clone() for n in names}
        self.low = [n for n in names if rank and self.start[n].ndim > 1 and min(self.start[n].flatten(1).shape) > rank]
        self.params: dict[str, Tensor] = {n: self.start[n].clone() for n in names if n not in self.low}
        for k, n in enumerate(self.low):
            out, inner = self.start[n].flatten(1).shape
            rng = torch.Generator().manual_seed((seed << 16) + k)
            self.params[f"{n}::A"] = torch.randn(rank, inner, generator=rng) * inner**-0.5
            self.params[f"{n}::B"] = torch.zeros(out, rank)

    def weights(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that ``params`` make."""
        made = {n: params[n] for n in self.start if n not in self.low}
        for n in self.low:
            start = self.start[n]
            made[n] = torch.addmm(start.flatten(1), params[f"{n}::B"], params[f"{n}::A"]).reshape(start.shape)
        return made

    def pull(self, params: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> Tensor:
        """Return |theta - start|^2 / |scale|^2 over all moved tensors."""
        made = self.weights(params)
        gap = sum((made[n] - self.start[n]).square().sum() for n in self.start)
        size = sum(scale[n].float().square().sum() for n in self.start)
        return torch.as_tensor(gap) / torch.as_tensor(size).clamp(min=1e-30)


def chosen(names: Sequence[str], only: str) -> list[str]:
    """Return the names that the pattern(s) ``only`` (glob, several by ``,``) take. Raises ValueError if none is left."""
    patterns = [part.strip() for part in only.split(",") if part.strip()]
    kept = [name for name in names if matches(name, patterns)]
    if names and not kept:
        raise ValueError(
            f"only='{only}' takes none of the {len(names)} tensors that fine-tuning moved, e.g. '{names[0]}'"
        )
    return kept
