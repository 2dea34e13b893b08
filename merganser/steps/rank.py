"""At what rank an expert is trained, and what is returned of it: whole tensors, a new low-rank change, its own factors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.device import home
from ..weights.adapter import Factors
from ..weights.own_rank import OwnRank, own_rank
from .moving import Low, Moving, leading_factors, low_rank


class Ranked:
    """What is trained of ``expert``'s tensors ``names`` (``moving``), and the weights that come of it (`result`).

    ``rank``: of a new change B A of each matrix, 0 for the matrices themselves; "own": where the expert is a LoRA
    adapter its own B and A, and the result is an adapter again, otherwise as 0. ``within`` (not 0): the whole task vector
    of each matrix is held at this rank (see `share_of`), beginning with its leading singular triplets over ``base``.
    """

    def __init__(
        self,
        expert: Mapping[str, Tensor],
        names: list[str],
        rank: int | str,
        seed: int,
        *,
        base: Mapping[str, Tensor] | None = None,
        within: int | str = 0,
        experts: int = 1,
    ):
        self.expert = expert
        self.own: OwnRank | None = own_rank(expert, names) if rank == "own" else None
        if within and self.own is None and base is not None:
            ranks = {n: share_of(within, expert[n].flatten(1).shape, experts) for n in names if expert[n].ndim > 1}
            self.moving = leading_factors(expert, base, names, ranks)
        else:
            self.moving = self._moving(names, 0 if isinstance(rank, str) else rank, seed)

    def _moving(self, names: list[str], rank: int, seed: int) -> Moving:
        if self.own is None:
            return low_rank(self.expert, names, rank, seed=seed)
        low = {}
        for name in self.own.low:
            origin, factors, scale = self.own.unscaled(name)
            low[name] = Low(origin, factors.left, factors.right, scale)
        return Moving({n: self.expert[n] for n in names if n not in low}, low)

    def start(self) -> dict[str, Tensor]:
        """Return the trained tensors as they are before any step."""
        return home(self.moving.weights(self.moving.params))

    def result(self, best: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the expert with the trained numbers ``best``."""
        moving = self.moving
        if self.own is not None:
            best = home(best)
            low = {n: Factors(best[f"{n}::B"], best[f"{n}::A"]) for n in moving.low}
            return self.own.changed({**low, **{n: best[n] for n in moving.whole}})
        made = home(moving.weights(best))
        return {n: made[n].to(self.expert[n].dtype) if n in made else self.expert[n] for n in self.expert}


def share_of(within: int | str, shape: tuple[int, ...], experts: int) -> int:
    """Return the rank that a task vector of this shape is held at: "tsv" is what TSV-M keeps of each of N experts."""
    return max(1, min(shape) // experts) if within == "tsv" else int(within)


def check_rank(rank: Any) -> None:
    """Raise ValueError for a rank that is neither "own" nor a whole number from 0."""
    if rank != "own" and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise ValueError(f'rank must be "own" or a whole number, got {rank!r}')
    if rank != "own" and rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")


def check_within(within: Any, rank: Any) -> None:
    """Raise ValueError unless ``within`` is "tsv" or a whole number from 0, and 0 beside a number as ``rank``."""
    if within != "tsv" and (not isinstance(within, int) or isinstance(within, bool) or within < 0):
        raise ValueError(f'within must be "tsv" or a whole number from 0, got {within!r}')
    if within and rank not in ("own", 0):
        raise ValueError(
            f"within={within!r} holds the whole task vector at a rank, rank={rank!r} a change of it: give one"
        )
