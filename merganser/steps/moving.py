"""Which numbers a training changes: whole tensors, some of them, or a low-rank change of each matrix."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.device import there
from ..weights.open import matches
from .spectrum import leading


class Low(NamedTuple):
    """A matrix as ``origin + scale * left @ right``, of which only the two thin factors are trained."""

    origin: Tensor
    left: Tensor  # B [out, rank]
    right: Tensor  # A [rank, in]; a convolution counts as [out, in * kh * kw]
    scale: float = 1.0

    def made(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the tensor that other factors make."""
        whole = torch.addmm(self.origin.flatten(1), left, right, alpha=self.scale)
        return whole.reshape(self.origin.shape)


class Moving:
    """The trained parameters and the weights that they make.

    ``whole`` tensors are parameters themselves; each of ``low`` has two, ``NAME::A`` and ``NAME::B``.
    """

    def __init__(self, whole: Mapping[str, Tensor], low: Mapping[str, Low] | None = None):
        self.whole = {n: there(t.detach().float()) for n, t in whole.items()}
        self.low = {n: one._replace(origin=there(one.origin)) for n, one in (low or {}).items()}
        self.params: dict[str, Tensor] = {n: t.clone() for n, t in self.whole.items()}
        for n, one in self.low.items():
            for part, factor in (("A", one.right), ("B", one.left)):  # turned ones lie crosswise; a checkpoint cannot
                self.params[f"{n}::{part}"] = there(
                    factor.detach().float().clone(memory_format=torch.contiguous_format)
                )

    @property
    def names(self) -> list[str]:
        """The names of the tensors that change."""
        return [*self.whole, *self.low]

    def weights(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that ``params`` make."""
        made = {n: params[n] for n in self.whole}
        return made | {n: one.made(params[f"{n}::B"], params[f"{n}::A"]) for n, one in self.low.items()}

    def pull(self, params: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> Tensor:
        """Return |theta - start|^2 / |scale|^2 over all moved tensors."""
        made = self.weights(params)
        start = self.whole | {
            n: one.made(there(one.left.float()), there(one.right.float())) for n, one in self.low.items()
        }
        gap = sum((made[n] - start[n]).square().sum() for n in start)
        size = sum(there(scale[n]).float().square().sum() for n in start)
        return torch.as_tensor(gap) / torch.as_tensor(size).clamp(min=1e-30)


def low_rank(
    start: Mapping[str, Tensor],
    names: Sequence[str],
    rank: int,
    *,
    seed: int = 0,
    alpha: float | None = None,
    turned: bool = False,
) -> Moving:
    """Return a training of ``start + s B A`` for each matrix, ``s = alpha / rank`` (1 without ``alpha``).

    A ``[rank, in]`` is random (normal, variance 1/in), B ``[out, rank]`` zero, so it begins at ``start``. A tensor that
    has no more than ``rank`` rows or columns is trained whole. ``turned``: matrices lie [in, out], as those of
    transformers' Conv1D, so that the left factor is the random A and the right one B, each turned.
    Source: LoRA (arXiv 2106.09685, section 4.1).
    """
    thin = [n for n in names if rank and start[n].ndim > 1 and min(start[n].flatten(1).shape) > rank]
    low = {}
    for k, n in enumerate(thin):
        origin = start[n].detach().float()
        out, inner = origin.flatten(1).shape[:: -1 if turned else 1]
        rng = torch.Generator().manual_seed((seed << 16) + k)
        a = torch.randn(rank, inner, generator=rng) * inner**-0.5
        b, scale = torch.zeros(out, rank), 1.0 if alpha is None else alpha / rank
        low[n] = Low(origin, a.mT, b.mT, scale) if turned else Low(origin, b, a, scale)
    return Moving({n: start[n] for n in names if n not in low}, low)


def leading_factors(
    start: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Sequence[str], ranks: Mapping[str, int]
) -> Moving:
    """Return a training of ``base + B A`` that begins with the leading singular triplets of ``start - base``.

        start - base ~ U diag(s) V^T  (rank leading triplets),   B = U diag(sqrt s),   A = diag(sqrt s) V^T

    Both factors are as large as each other, so that one learning rate suits them. ``ranks`` of tensors by name; others, and
    those that have no more rows or columns than their rank, are trained whole.
    """
    low = {}
    for n in names:
        shape = start[n].flatten(1).shape if start[n].ndim > 1 else (0, 0)
        if min(shape) > ranks.get(n, 0) > 0:
            u, s, v = leading((start[n].float() - base[n].float()).flatten(1), ranks[n])
            low[n] = Low(base[n].detach().float(), (u * s.sqrt()).float(), (v * s.sqrt()).mT.float())
    return Moving({n: start[n] for n in names if n not in low}, low)


NUMBERED = re.compile(r"(?<=\.)(\d+)(?=\.)|^(\d+)(?=\.)")


def last_blocks(names: Sequence[str], count: int) -> list[str]:
    """Return the names of tensors of the last ``count`` blocks: ``layer.4.*`` and ``layer.5.*`` of six.

    Blocks are the numbered parts of names of which there are most. Raises ValueError for more than there are.
    """
    found: dict[str, dict[str, int]] = {}
    for name in names:
        for match in NUMBERED.finditer(name):
            found.setdefault(name[: match.start()], {})[name] = int(match[0])
    numbers = max(found.values(), key=lambda some: len(set(some.values())), default={})
    there = sorted(set(numbers.values()))
    if count > len(there):
        raise ValueError(f"blocks={count}: the network has {len(there)} numbered blocks")
    return [name for name in names if numbers.get(name, -1) in there[-count:]]


def chosen(names: Sequence[str], only: str) -> list[str]:
    """Return the names that the pattern(s) ``only`` (glob, several by ``,``) take. Raises ValueError if none is left."""
    patterns = [part.strip() for part in only.split(",") if part.strip()]
    kept = [name for name in names if matches(name, patterns)]
    if names and not kept:
        raise ValueError(
            f"only='{only}' takes none of the {len(names)} tensors that fine-tuning moved, e.g. '{names[0]}'"
        )
    return kept
