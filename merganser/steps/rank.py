"""At what rank an expert is trained, and what is returned of it: whole tensors, a new low-rank change, its own factors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.device import home
from ..weights.adapter import Factors
from ..weights.own_rank import OwnRank, own_rank
from .moving import Low, Moving, low_rank


class Ranked:
    """What is trained of ``expert``'s tensors ``names`` (``moving``), and the weights that come of it (`result`).

    ``rank``: of a new change B A of each matrix, 0 for the matrices themselves; "own": where the expert is a LoRA
    adapter its own B and A, and the result is an adapter again, otherwise as 0.
    """

    def __init__(self, expert: Mapping[str, Tensor], names: list[str], rank: int | str, seed: int):
        self.expert = expert
        self.own: OwnRank | None = own_rank(expert, names) if rank == "own" else None
        self.moving = self._moving(names, 0 if isinstance(rank, str) else rank, seed)

    def _moving(self, names: list[str], rank: int, seed: int) -> Moving:
        if self.own is None:
            return low_rank(self.expert, names, rank, seed=seed)
        low = {}
        for name in self.own.low:
            origin, factors, scale = self.own.unscaled(name)
            low[name] = Low(origin, factors.left, factors.right, scale)
        return Moving({n: self.expert[n] for n in names if n not in low}, low)

    def result(self, best: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the expert with the trained numbers ``best``."""
        moving = self.moving
        if self.own is not None:
            best = home(best)
            low = {n: Factors(best[f"{n}::B"], best[f"{n}::A"]) for n in moving.low}
            return self.own.changed({**low, **{n: best[n] for n in moving.whole}})
        made = home(moving.weights(best))
        return {n: made[n].to(self.expert[n].dtype) if n in made else self.expert[n] for n in self.expert}


def check_rank(rank: Any) -> None:
    """Raise ValueError for a rank that is neither "own" nor a whole number from 0."""
    if rank != "own" and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise ValueError(f'rank must be "own" or a whole number, got {rank!r}')
    if rank != "own" and rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
