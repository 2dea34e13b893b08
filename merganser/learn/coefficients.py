"""AdaMerging: one coefficient an expert and tensor, learned by making the merged model sure of itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..card import digest, key_of
from ..errors import DataError, HeadError
from ..models.device import home, there
from ..models.encoder import bound, forward, loaded
from ..models.heads import AnyHead
from ..models.inputs import digest_parts, take
from ..models.statistics import is_statistic, moving
from ..progress import Progress, silent
from ..steps.student import moved
from ..train import Checkpoint, Order, Plan, train
from ..weights.match import match
from ..weights.open import Source, named, open_weights

ALL = "*"  # the one coefficient an expert, where tensors share it


def adamerging(
    base: Source,
    experts: Mapping[str, Source] | Sequence[Source],
    *,
    encoder: nn.Module,
    heads: Mapping[str, AnyHead],
    inputs: Any,
    per: str = "tensor",
    start: float = 0.3,
    steps: int = 1000,
    lr: float = 1e-3,
    batch: int = 16,
    clamp: bool = True,
    seed: int = 0,
    kind: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Float[Tensor, "experts"]]:
    """Return for each tensor that experts moved the coefficients with which `weighted` sums their deltas.

        theta(c) = base + sum_t min(1, max(0, c_tl)) tau_tl           for each tensor l
        L(c)     = sum_t E_{x ~ task t} [ H(softmax h_t(f(x; theta(c)))) ],    H(p) = -sum_y p_y log p_y

    ``inputs``: unlabeled inputs of every task by name, as in the paper (which took the test inputs themselves), or one
    set of inputs that all heads are asked about. ``per``: "tensor" (layer-wise) or "expert" (task-wise: one coefficient an
    expert). ``clamp``: False lets coefficients leave [0, 1]. ``checkpoint``: a file to go on from after an interruption.
    Batch norms normalise by the batch meanwhile.

    Tensors that the encoder does not run with are left out: `weighted` takes its default for them. All deltas are held in
    fp32, on the device that runs the network. A step costs a forward and a backward pass for each task (one for shared
    inputs).

    Raises HeadError if an expert has no head; DataError if one has no inputs; ValueError at a knob out of range.
    Source: Yang et al., AdaMerging (arXiv 2310.02575), section 3.2; steps, lr and batch as there (Adam).
    """
    _check(per, start, steps, lr, batch)
    theta0 = open_weights(base)
    thetas = match(theta0, {n: open_weights(source) for n, source in named(experts).items()}, ()).experts
    if missing := [name for name in thetas if name not in heads]:
        raise HeadError(f"expert '{missing[0]}' has no head of that name; heads: {', '.join(heads)}")
    shared = not isinstance(inputs, Mapping)
    asked: dict[str, Any] = {ALL: inputs} if shared else {name: inputs.get(name, ()) for name in thetas}
    if empty := [name for name, some in asked.items() if not len(some)]:
        raise DataError("no inputs to learn on" if shared else f"expert '{empty[0]}' has no inputs to learn on")
    work = Coefficients(theta0, thetas, encoder, per, start, clamp)
    orders = {n: Order(len(x), min(batch, len(x)), seed, getattr(x, "lengths", None)) for n, x in asked.items()}

    def loss(step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.zeros(())
        weights = work.weights()
        for name, some in asked.items():
            x = work.features(weights, take(some, orders[name](int(step))), kind)
            total = total + sum((entropy(heads[n](x)) for n in (thetas if shared else [name])), torch.zeros(()))
        return total, {}

    plan = Plan(steps, lr, schedule="constant", warmup=0.0, clip=0.0)
    told = {n: digest({str(k): part for k, part in enumerate(digest_parts(x))}) for n, x in asked.items()}
    knobs = [per, start, steps, lr, batch, clamp, seed, kind]
    key = key_of([digest(theta0), {n: digest(t) for n, t in thetas.items()}, told, knobs])
    kept = None if checkpoint is None else Checkpoint(checkpoint, key)
    with progress("learn coefficients", steps) as tick:
        best, _ = train(work.params, loss, torch.tensor, plan, checkpoint=kept, tick=tick)
    return work.told(home(best))


class Coefficients:
    """The coefficients that are learned, and the weights that they make."""

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        encoder: nn.Module,
        per: str = "tensor",
        start: float = 0.3,
        clamp: bool = True,
    ):
        self.encoder, self.per, self.clamp = encoder.eval(), per, clamp
        self.prefix = getattr(encoder, "prefix", "")
        known = {name.removeprefix(self.prefix) for name in bound(encoder, base)}
        changed = dict.fromkeys(n for expert in experts.values() for n in moved(expert, base))
        self.names = [n for n in changed if n in known and not is_statistic(n)]
        self.base = {n: there(base[n].float()) for n in self.names}
        self.deltas = {
            n: there(torch.stack([(expert[n].float() - base[n].float()).flatten() for expert in experts.values()]))
            for n in self.names
        }
        mine = {self.prefix + n for n in self.names}
        self.fixed = {n: t.clone() for n, t in loaded(encoder, base).items() if n not in mine}
        first = torch.full((len(experts),), float(start))
        self.params = {n: there(first.clone()) for n in (self.names if per == "tensor" else [ALL])}

    def weights(self) -> dict[str, Tensor]:
        """Return the merged weights under the encoder's own names."""
        made = dict(self.fixed)
        for name in self.names:
            c = self.params[name if self.per == "tensor" else ALL]
            c = c.clamp(0, 1) if self.clamp else c
            made[self.prefix + name] = self.base[name] + (c @ self.deltas[name]).view_as(self.base[name])
        return made

    def features(self, weights: Mapping[str, Tensor], given: Any, kind: str) -> Float[Tensor, "batch width"]:
        """Return the merged model's features."""
        with moving(self.encoder, momentum=0.0):
            return forward(self.encoder, weights, given, kind).cpu()

    def told(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the coefficients of each tensor, as `weighted` takes them."""
        one = {n: found[n if self.per == "tensor" else ALL] for n in self.names}
        return {n: (c.clamp(0, 1) if self.clamp else c).detach().clone() for n, c in one.items()}


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """Return the mean entropy of the softmax, in nats."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def _check(per: str, start: float, steps: int, lr: float, batch: int) -> None:
    if per not in ("tensor", "expert"):
        raise ValueError(f"per must be one of tensor, expert, got {per!r}")
    for name, value in (("steps", steps), ("lr", lr), ("batch", batch)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= start <= 1:
        raise ValueError(f"start must lie in [0, 1], got {start}")
