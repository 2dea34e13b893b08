"""Resolving Interference: adapt an expert so that it keeps its own head's outputs and leaves every other head alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import HeadError
from ...models.encoder import bound, features, precision
from ...models.heads import AnyHead, Stacked, check_width
from ...models.inputs import Subset, take
from ...models.statistics import is_statistic
from ...progress import Tick
from ...train import Checkpoint, Order, Plan, train, write_log

DISTANCES = ("kl", "ce", "mse")


def ri(
    expert: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    heads: Mapping[str, AnyHead],
    inputs: Any,
    *,
    own: str,
    encoder: nn.Module,
    steps: int = 300,
    lr: float = 5e-5,
    alpha: float = 1.0,
    batch: int = 32,
    weight_decay: float = 1e-4,
    distance: str = "kl",
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    _precision: str = "auto",
    _base_features: Callable[[Tensor], Tensor] | None = None,
    _checkpoint: Checkpoint | None = None,
    _log: Path | None = None,
    _tick: Tick = lambda _advance=1, **_terms: None,
) -> dict[str, Tensor]:
    """Adapt ``expert`` by twin distillation on unlabeled ``inputs`` and return its new weights.

        L(theta) = E_x [ d(h_own(f(x; expert)), h_own(f(x; theta)))
                         + alpha/(N-1) sum_{j != own} d(h_j(f(x; base)), h_j(f(x; theta))) ]

    ``d``: "kl" is KL(target || student); "ce" is cross-entropy against the target's most likely class (against its
    probabilities it would have KL's gradient); "mse" is the mean squared difference of logits. Only tensors that
    fine-tuning moved are trained, so frozen embeddings stay frozen; batch norms keep the expert's running statistics.
    The targets are computed once: a step costs one forward and one backward of the student. A share ``held_out`` of
    the inputs (at most 256) is kept to tell when it has stopped helping: training ends after ``patience`` checks without
    a new best, and the best weights are returned.

    The paper's recipe for CLIP ViT-B/32 on ImageNet is steps=2500, lr=1e-6, batch=128, alpha=1, weight_decay=1e-4.
    Our defaults suit small text encoders; the grid we tried there: steps {100, 300}, lr {5e-5, 1e-4, 2e-4}.

    Raises HeadError if ``own`` is not among the heads or a head does not fit; ValueError at a knob out of range.
    Source: Resolving Interference (arXiv 2603.13467), section 5, algorithm 1.
    """
    check(steps=steps, lr=lr, alpha=alpha, batch=batch, distance=distance, held_out=held_out)
    if own not in heads:
        raise HeadError(f"expert '{own}' has no head of that name; heads: {', '.join(heads)}")
    kept, used, order = _split(inputs, steps, batch, held_out, seed)
    everything = torch.cat([kept, used])
    base_features = _base_features or (lambda at: features(encoder, base, Subset(inputs, at), kind=_precision))

    def targets(done: int, total: int) -> None:
        _tick(0, targets=done / total)

    twins = _Twins(heads, own, alpha, distance)
    twins.remember(
        everything,
        len(inputs),
        base_features(everything),
        features(encoder, expert, Subset(inputs, everything), kind=_precision, progress=targets),
    )
    names = [n for n in expert if n in base and expert[n].is_floating_point() and not torch.equal(expert[n], base[n])]
    fixed = bound(encoder, expert)
    prefix = getattr(encoder, "prefix", "")
    params = {n: expert[n].detach().float().clone() for n in names if prefix + n in fixed and not is_statistic(n)}
    fixed = {n: t for n, t in fixed.items() if n.removeprefix(prefix) not in params}
    encoder.eval()

    def student(at: Tensor) -> Tensor:
        weights = fixed | {prefix + n: t for n, t in params.items()}
        with precision(_precision):
            return torch.func.functional_call(encoder, weights, (take(inputs, at),)).float()

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return twins(at, student(at))

    @torch.no_grad()
    def held() -> dict[str, float]:
        sums: dict[str, float] = {}
        for at in kept.split(128):
            value, terms = loss(at)
            for name, term in {"loss": value, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.item() * len(at) / len(kept)
        return sums

    plan = Plan(steps, lr, weight_decay, patience=patience)
    best, history = train(
        params, loss, order, plan, held_out=held if len(kept) else None, checkpoint=_checkpoint, tick=_tick
    )
    if _log is not None:
        write_log(_log, history)
    return {n: best[n].to(expert[n].dtype) if n in best else expert[n] for n in expert}


def check(**knobs: Any) -> None:
    """Raise ValueError at a knob out of range, before any work."""
    for name in ("steps", "batch", "lr"):
        if name in knobs and not knobs[name] > 0:
            raise ValueError(f"{name} must be positive, got {knobs[name]}")
    if knobs.get("alpha", 1) < 0:
        raise ValueError(f"alpha must not be negative, got {knobs['alpha']}")
    if knobs.get("distance", "kl") not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got '{knobs['distance']}'")
    if not 0 <= knobs.get("held_out", 0) < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {knobs['held_out']}")


class _Twins:
    """The two distillation terms over all heads at once: one concatenated matmul, one target row per input."""

    def __init__(self, heads: Mapping[str, AnyHead], own: str, alpha: float, distance: str):
        self.heads, self.own, self.distance = heads, own, distance
        self.others = max(1, len(heads) - 1)
        self.alpha = alpha
        self.stacked = Stacked(heads)

    def remember(self, at: Tensor, n: int, base: Tensor, expert: Tensor) -> None:
        """Keep the features of base and expert for the inputs ``at``."""
        check_width(self.heads, base.shape[1])
        self.row = torch.full((n,), -1, dtype=torch.int64)
        self.row[at] = torch.arange(len(at))
        self.base, self.expert = base, expert
        self.stacked(base[:1])
        start = sum(self.stacked.sizes[: list(self.heads).index(self.own)])
        self.slice = slice(start, start + self.stacked.sizes[list(self.heads).index(self.own)])

    @torch.no_grad()
    def targets(self, at: Tensor) -> Float[Tensor, "batch all_classes"]:
        """Return logits: the expert's under its own head, the base's under every other."""
        row = self.row[at]
        logits = self.stacked(self.base[row])
        logits[:, self.slice] = self.heads[self.own](self.expert[row])
        return logits

    def __call__(self, at: Tensor, x: Float[Tensor, "batch width"]) -> tuple[Tensor, dict[str, Tensor]]:
        each = self._distances(self.targets(at), self.stacked(x))
        own = each[:, self.slice].sum(dim=1).mean()
        others = (each.sum(dim=1).mean() - own) / self.others
        return own + self.alpha * others, {"own": own.detach(), "others": others.detach()}

    def _distances(self, target: Tensor, logits: Tensor) -> Float[Tensor, "batch all_classes"]:
        """Return each class's share of its head's distance; a head's classes sum to the distance."""
        sizes = self.stacked.sizes
        if self.distance == "mse":
            return (logits - target).square() / torch.tensor(sizes).repeat_interleave(torch.tensor(sizes))
        log_q = self.stacked.log_softmax(logits)
        if self.distance == "ce":
            hard = [nn.functional.one_hot(t.argmax(dim=1), t.shape[1]) for t in target.split(sizes, dim=1)]
            return -torch.cat(hard, dim=1) * log_q
        log_p = self.stacked.log_softmax(target)
        return log_p.exp() * (log_p - log_q)


def _split(
    inputs: Any, steps: int, batch: int, held_out: float, seed: int
) -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """Return the indices held out, those that the steps will see, and the batch at each step."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    kept, pool = order.split([k := min(256, int(held_out * len(inputs))), len(inputs) - k])
    lengths = getattr(inputs, "lengths", None)
    inner = Order(len(pool), min(batch, len(pool)), seed, None if lengths is None else lengths[pool])
    used = pool if steps * batch >= len(pool) else pool[torch.cat([inner(s) for s in range(steps)]).unique()]
    return kept, used, lambda step: pool[inner(step)]
