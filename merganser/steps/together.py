"""A student inside merges with the other experts, and what is wanted of such a merge: every expert under its own head."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..models.device import home, there
from ..models.encoder import bound, forward, loaded
from ..models.inputs import take
from ..models.statistics import counters, is_statistic, moving
from ..models.targets import Rows
from .rank import Ranked
from .student import Student
from .twins import Twins

Weights = Mapping[str, Tensor]
SUM = "task_arithmetic"


class Inside(Student):
    """The features of ``inputs`` by merges of the student with ``others``, the student's own numbers being trained.

        theta(b) = base + b (delta + c (student - start)),   b ~ U(low, high), drawn anew for each batch

    ``delta``: what ``merger`` makes of the student as it was at the start and of the others. For a sum it is exact to add
    what the student has changed since (c = 1). Of any other merger c is, for each tensor, the share of the own task vector
    tau that arrives in the merge, ``c = <M(all) - M(all but own), tau> / |tau|^2`` with the own expert at the base in the
    second. `refresh` works ``delta`` out again from the student as it has become. Batch norms normalise by the batch, as
    statistics measured anew after merging would.
    """

    def __init__(
        self,
        expert: Weights,
        base: Weights,
        others: Mapping[str, Weights],
        encoder: nn.Module,
        inputs: Any,
        trained: Ranked,
        kind: str,
        scales: tuple[float, float],
        seed: int,
        merger: str = SUM,
    ):
        super().__init__(expert, encoder, inputs, trained.moving, kind)
        self.scales, self.seed, self.merger, self.others, self.zero = scales, seed, merger, others, base
        self.expert = expert
        known = {n.removeprefix(self.prefix) for n in bound(encoder, base)}
        start = trained.start()
        delta = self._merged({**expert, **start})
        self.share = {n: there(t) for n, t in self._shares(start, delta).items()}
        delta = self._away(start, delta)
        self.base: dict[str, Tensor] = {}
        self.away: dict[str, Tensor] = {}  # added to the share of the student's own tensor, where it has one
        for name in (n for n in base if n in delta and n in known and not is_statistic(n)):
            self.base[name] = there(base[name].float())
            self.away[name] = there(delta[name])
        merged = {self.prefix + name for name in self.base}
        self.fixed = {n: t for n, t in loaded(encoder, base).items() if n not in merged}
        # batch norms write into their statistics, even if only what was there
        self.fixed |= {n: t.clone() for n, t in self.fixed.items() if is_statistic(n)}
        self.fixed |= {n: there(torch.zeros((), dtype=torch.int64)) for n in counters(encoder)}

    def __call__(self, at: Int[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        by = self.scale(at)
        made = self.moving.weights(self.moving.params)
        tensors = dict(self.fixed)
        for name, zero in self.base.items():
            delta = torch.addcmul(self.away[name], self.share[name], made[name]) if name in made else self.away[name]
            tensors[self.prefix + name] = torch.add(zero, delta, alpha=by)
        with moving(self.encoder, momentum=0.0):
            return forward(self.encoder, tensors, take(self.inputs, at), self.kind)

    def _merged(self, own: Weights) -> dict[str, Tensor]:
        return merged_delta({"": own, **self.others}, self.zero, self.merger)

    def _shares(self, made: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return c of the student's tensors ``made``, of which and of the others ``delta`` is made."""
        if self.merger == SUM:
            return dict.fromkeys(made, torch.ones(()))
        without = self._merged(self.zero)
        return {n: arrived(delta[n], without.get(n), t - self.zero[n].float()) for n, t in made.items()}

    def _away(self, made: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``delta - c student`` with the student's tensors ``made``."""
        return {n: t - self.share[n].cpu() * made[n] if n in made else t for n, t in delta.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Work the merge out again from the student as it is now."""
        made = home(self.moving.weights(self.moving.params))
        delta = self._away(made, self._merged({**self.expert, **made}))
        for name, tensor in self.away.items():
            tensor.copy_(delta[name])

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What `refresh` changes, for checkpoints."""
        return {f"away/{n}": t for n, t in self.away.items()}

    def scale(self, at: Int[Tensor, "batch"]) -> float:
        """Return the scale of a batch: one seed and one batch have the same one, whatever came before."""
        mixed = (int((at * (1 + torch.arange(len(at)))).sum()) * 1_000_003 + self.seed) % 2**31
        low, high = self.scales
        return low + (high - low) * torch.rand((), generator=torch.Generator().manual_seed(mixed)).item()


def merged_delta(experts: Mapping[str, Weights], base: Weights, merger: str) -> dict[str, Tensor]:
    """Return what a merging sentence adds to the base, in fp32, by the names of tensors that any expert has moved."""
    from ..deltas import merged_deltas
    from ..sentence import parse

    names = [n for n in base if any(n in one and not torch.equal(one[n], base[n]) for one in experts.values())]
    if merger != SUM:
        return {n: t.float() for n, t in merged_deltas(base, experts, parse(merger), names).items()}
    sums = {n: base[n].float() for n in names if base[n].is_floating_point()}
    return {n: sum((one[n].float() - t for one in experts.values()), torch.zeros_like(t)) for n, t in sums.items()}


def arrived(delta: Tensor, without: Tensor | None, tau: Tensor) -> Tensor:
    """Return the share of ``tau`` that is in ``delta`` and not in ``without``, which a merge had made without it."""
    gap = delta if without is None else delta - without
    return (gap * tau).sum() / tau.square().sum().clamp(min=1e-30)


class Everyone(Twins):
    """Distances to every expert under its own head; the weights of the two terms are those of `Twins`."""

    def remember_all(self, at: Tensor, n: int, experts: Mapping[str, Tensor | Rows]) -> None:
        """Keep every expert's features for the inputs ``at``, out of ``n``, by its name."""
        self.experts = experts
        self.remember(at, n, experts[self.own], experts[self.own])

    @torch.no_grad()
    def targets(self, at: Tensor) -> Float[Tensor, "batch all_classes"]:
        """Return logits: each expert's under its own head."""
        row = self.row[at]
        return torch.cat([head(self.experts[name][row]) for name, head in self.heads.items()], dim=1)
