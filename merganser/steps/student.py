"""A student: an expert's network, some of whose numbers are trained to give wanted outputs on unlabeled inputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..models.encoder import bound, forward, loaded
from ..models.inputs import Prompts, Subset, take
from ..models.lower import Lower, lower
from ..models.statistics import is_statistic
from ..progress import Tick
from ..train import Checkpoint, Loss, Order, Plan, train, write_log
from .moving import Moving


class Student:
    """The features of ``inputs`` by ``encoder`` with an expert's weights, those of ``moving`` being trained."""

    def __init__(self, expert: Mapping[str, Tensor], encoder: nn.Module, inputs: Any, moving: Moving, kind: str):
        self.encoder, self.inputs, self.moving, self.kind = encoder.eval(), inputs, moving, kind
        self.prefix = getattr(encoder, "prefix", "")
        tensors = loaded(encoder, expert)
        self.fixed = {n: t for n, t in tensors.items() if n.removeprefix(self.prefix) not in moving.names}
        self.lower: Lower | None = None

    def remember_lower(self, at: Int[Tensor, "some"]) -> None:
        """Run what lies below everything that is trained once on these inputs, and skip it from now on.

        Only they may be asked for then. Nothing happens where the network cannot be parted so (see `models.lower`).
        """
        trained = {self.prefix + name for name in self.moving.names}
        self.lower = lower(self.encoder, self.weights(), trained, self.inputs, self.kind)
        if self.lower is not None:
            self.lower.remember(self.weights(), at)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What `refresh` changes in place, for checkpoints."""
        return {}

    def refresh(self) -> None:
        """Take what surrounds the student as it has become; a student alone is surrounded by nothing."""

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as they are now, under the encoder's names, where it runs."""
        return self.fixed | {self.prefix + n: t for n, t in self.moving.weights(self.moving.params).items()}

    def __call__(self, at: Int[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        if self.lower is not None:
            return self.lower(self.weights(), at)
        return forward(self.encoder, self.weights(), take(self.inputs, at), self.kind)

    def train(
        self,
        loss: Loss,
        split: "Split | Halves",
        plan: Plan,
        *,
        micro: int = 0,
        refresh: int = 0,
        before: Callable[[int], None] | None = None,
        checkpoint: Checkpoint | None,
        log: Path | None,
        tick: Tick,
    ) -> dict[str, Tensor]:
        """Minimise ``loss`` of the inputs' indices; return the numbers that were best on those held out.

        ``refresh``: call the student's own `refresh` every so many steps (0: never). ``before``: as in `train.train`.
        """

        def first(step: int) -> None:
            if refresh and step and step % refresh == 0:
                self.refresh()
            if before is not None:
                before(step)

        @torch.no_grad()
        def held() -> dict[str, float]:
            sums: dict[str, float] = {}
            for at in split.checked:
                value, terms = loss(at)
                for name, term in {"loss": value, **terms}.items():
                    sums[name] = sums.get(name, 0.0) + term.item() * len(at) / len(split.kept)
            return sums

        scored = held if len(split.kept) else None
        best, history = train(
            self.moving.params, loss, split.order, plan, held_out=scored, micro=micro, checkpoint=checkpoint, tick=tick,
            buffers=self.buffers if refresh else None, before=first,
        )  # fmt: skip
        if log is not None:
            write_log(log, history)
        return best


class Split:
    """Which inputs are held out (``kept``), which the steps will see (``used``), and the batch at each step.

    ``checked``: those held out in the parts they are scored in, texts of like length together.
    """

    def __init__(self, inputs: Any, steps: int, batch: int, held_out: float, seed: int):
        shuffled = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        k = min(256, int(held_out * len(inputs)))
        self.kept, self.pool = shuffled.split([k, len(inputs) - k])
        lengths = getattr(inputs, "lengths", None)
        if lengths is not None:  # padded to the longest of a random many, they would cost four times as much
            self.kept = self.kept[torch.argsort(lengths[self.kept], stable=True)]
        self.checked = list(self.kept.split(128 if lengths is None else 32))
        n = len(self.pool)
        self.inner = Order(n, min(batch, n), seed, None if lengths is None else lengths[self.pool])
        some = steps * batch < n
        self.used = self.pool[torch.cat([self.inner(s) for s in range(steps)]).unique()] if some else self.pool
        self.everything = torch.cat([self.kept, self.used])

    def order(self, step: int) -> Int[Tensor, "batch"]:
        """Return the indices of the batch at ``step``."""
        return self.pool[self.inner(step)]


class Halves:
    """A split of `Prompts` whose batches are half of the own kind, half of all others; otherwise as `Split`."""

    def __init__(self, inputs: Prompts, own: str, steps: int, batch: int, held_out: float, seed: int):
        mine = inputs.kinds == inputs.names.index(own)
        at = [mine.nonzero()[:, 0], (~mine).nonzero()[:, 0]]
        halves = [Split(Subset(inputs, rows), steps, max(1, batch // 2), held_out, seed) for rows in at]
        self.at, self.halves = at, halves
        self.everything = self._both([half.everything for half in halves])
        self.kept = self._both([half.kept for half in halves])
        few = max(1, min(-(-len(self.kept) // 128), *(len(half.kept) for half in halves)))
        parts = [half.kept.tensor_split(few) for half in halves]  # so that every part has both kinds
        self.checked = [self._both(list(both)) for both in zip(*parts, strict=True)]

    def _both(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([rows[part] for rows, part in zip(self.at, parts, strict=True)])

    def order(self, step: int) -> Int[Tensor, "batch"]:
        """Return the indices of the batch at ``step``."""
        return self._both([half.order(step) for half in self.halves])


def moved(expert: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that fine-tuning moved, in the order of ``base``, however an expert is stored."""
    return [n for n in base if n in expert and expert[n].is_floating_point() and not torch.equal(expert[n], base[n])]


def trainable(expert: Mapping[str, Tensor], base: Mapping[str, Tensor], encoder: nn.Module) -> list[str]:
    """Return the names of the encoder's tensors that fine-tuning moved, but for batch norms' running statistics."""
    prefix = getattr(encoder, "prefix", "")
    known = {name.removeprefix(prefix) for name in bound(encoder, expert)}
    return [name for name in moved(expert, base) if name in known and not is_statistic(name)]


def targets_told(tick: Tick) -> Callable[[int, int], None]:
    """Return a progress callback that shows how many targets are computed."""
    return lambda done, total: tick(0, targets=done / total)
