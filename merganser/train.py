"""The one small training loop: AdamW over some tensors, a held-out check, checkpoints that lose nothing.

What a step sees depends on (seed, step) alone, so a run that was killed and resumed ends in the same bytes as one that
was not. Master weights and optimiser state are fp32.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .progress import Tick

Loss = Callable[[Int[Tensor, "batch"]], tuple[Tensor, dict[str, Tensor]]]
HeldOut = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Order:
    """Which inputs each step sees: every epoch is a new permutation, batches of texts hold texts of like length.

    ``n`` inputs, ``batch`` a step. Texts are sorted by ``lengths`` inside pools of 16 batches, which saves padding while
    batches stay random.
    """

    n: int
    batch: int
    seed: int
    lengths: Tensor | None = None
    _epoch: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    def __call__(self, step: int) -> Int[Tensor, "batch"]:
        """Return the indices of the batch at ``step``."""
        epoch, k = divmod(step, max(1, self.n // self.batch))
        if epoch not in self._epoch:
            self._epoch.clear()
            self._epoch[epoch] = self._batches(epoch)
        return self._epoch[epoch][k]

    def _batches(self, epoch: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(self.n, generator=rng)
        if self.lengths is not None:
            pools = order.split(16 * self.batch)
            order = torch.cat([p[torch.argsort(self.lengths[p], stable=True)] for p in pools])
        batches = [b for b in order.split(self.batch) if len(b) == self.batch] or [order]
        return [batches[k] for k in torch.randperm(len(batches), generator=rng).tolist()]


@dataclass(frozen=True)
class Plan:
    """How to train. ``lr`` rises linearly over the first ``warmup`` share of ``steps``; then it stays ("constant") or
    falls to zero along a cosine. ``clip`` bounds the gradient's L2 norm (0: no bound).
    """

    steps: int
    lr: float
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    checks: int = 5
    patience: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate at ``step`` (0-based)."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def looks(self, step: int) -> bool:
        """Tell whether the held-out inputs are scored after ``step`` steps."""
        return step == 0 or step == self.steps or step % max(1, math.ceil(self.steps / self.checks)) == 0


@dataclass
class Checkpoint:
    """Where a run may be taken up again: one safetensors file, written every ``every`` seconds, all or nothing."""

    path: Path
    key: str = ""
    every: float = 20.0
    written: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        save_file(dict(tensors), partial, {"state": json.dumps({**state, "key": self.key})})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.path)
        self.written = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and state, or None where there is no checkpoint of this very run."""
        from safetensors import safe_open

        if not self.path.exists():
            return None
        with safe_open(self.path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            if state.pop("key") != self.key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118  (not a mapping)


@dataclass
class _Run:
    """What a checkpoint holds beside the tensors."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    lowest: float = math.inf  # since the first step
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    params: Mapping[str, Tensor],
    loss: Loss,
    order: Callable[[int], Int[Tensor, "batch"]],
    plan: Plan,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    held_out: HeldOut | None = None,
    micro: int = 0,
    before: Callable[[int], None] | None = None,
    checkpoint: Checkpoint | None = None,
    tick: Tick = lambda _advance=1, **_terms: None,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Minimise ``loss`` over ``params`` (fp32 leaves, changed in place); return the best tensors and the history.

    ``loss(indices)`` returns the loss and its terms, and may change ``buffers`` in place: checkpoints keep them too.
    ``held_out()`` returns terms with a ``loss``: the tensors with the lowest one are returned (the start's, if that was
    lower), and after ``plan.patience`` checks without a new lowest since the first step (0: never) the run stops.
    ``micro``: so many inputs of a batch at a time, their gradients added up (0: all at once), so that activations take
    memory for no more. ``before(step)`` is called before each step (0-based) and may change ``buffers``, not the parameters.
    """
    names = list(params)
    for tensor in params.values():
        tensor.requires_grad_(True)
    optimiser = torch.optim.AdamW(list(params.values()), lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    buffers = buffers or {}
    run, best = _take_up(params, buffers, optimiser, checkpoint)
    if run.step:
        tick(run.step)
    while True:
        if held_out is not None and plan.looks(run.step) and not any("held_out" in h for h in _at(run)):
            best = _look(run, params, held_out(), best)
        if run.step >= plan.steps or (plan.patience and run.stale >= plan.patience):
            break
        at = order(run.step)
        if before is not None:
            before(run.step)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(run.step)
        optimiser.zero_grad(set_to_none=True)
        shown = _backward(loss, at, micro)
        if plan.clip:
            torch.nn.utils.clip_grad_norm_(list(params.values()), plan.clip)
        optimiser.step()
        run.step += 1
        run.history.append({"step": run.step, "steps": plan.steps, **shown})
        tick(1, **shown)
        if checkpoint is not None and checkpoint.due():
            _write(checkpoint, run, params, buffers, optimiser, best, names)
    chosen = best if best is not None and run.best_step != run.step else {n: params[n].detach() for n in names}
    return {n: t.detach() for n, t in chosen.items()}, run.history


def _backward(loss: Loss, at: Tensor, micro: int) -> dict[str, float]:
    """Add the gradient of the loss to the parameters; return loss and terms, means over the batch."""
    shown: dict[str, float] = {}
    for part in at.split(micro) if micro and at.ndim else [at]:
        share = part.numel() / max(1, at.numel())
        value, terms = loss(part)
        (value * share if share != 1 else value).backward()
        for name, term in {"loss": value, **terms}.items():
            shown[name] = shown.get(name, 0.0) + share * term.item()
    return shown


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    """Write the history, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n" for line in history))


def _at(run: _Run) -> list[dict[str, float]]:
    return [h for h in run.history[-2:] if h["step"] == run.step]


def _look(
    run: _Run, params: Mapping[str, Tensor], terms: dict[str, float], best: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    held = {"held_out" if k == "loss" else f"held_{k}": v for k, v in terms.items()}
    run.history.append({"step": run.step, **held})
    # the start is no mark to be stale by: a full learning rate often loses at first what its fall wins back
    run.stale = 0 if terms["loss"] < run.lowest else run.stale + 1
    if run.step:
        run.lowest = min(run.lowest, terms["loss"])
    if terms["loss"] < run.best:
        run.best, run.best_step = terms["loss"], run.step
        return {name: tensor.detach().clone() for name, tensor in params.items()}
    return best


def _write(
    checkpoint: Checkpoint,
    run: _Run,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    best: dict[str, Tensor] | None,
    names: list[str],
) -> None:
    tensors = {f"now/{n}": params[n].detach() for n in names}
    for name in names:
        state = optimiser.state[params[name]]
        tensors |= {f"{k}/{name}": state[k] for k in ("exp_avg", "exp_avg_sq", "step") if k in state}
    tensors |= {f"best/{n}": t for n, t in (best or {}).items()}
    tensors |= {f"buffer/{n}": t for n, t in buffers.items()}
    checkpoint.write(tensors, run.__dict__)


def _take_up(
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    checkpoint: Checkpoint | None,
) -> tuple[_Run, dict[str, Tensor] | None]:
    found = checkpoint.read() if checkpoint is not None else None
    if found is None:
        return _Run(), None
    tensors, state = found
    with torch.no_grad():
        for name, tensor in params.items():
            tensor.copy_(tensors[f"now/{name}"])
            optimiser.state[tensor] = {k: tensors[f"{k}/{name}"].to(tensor) for k in ("step", "exp_avg", "exp_avg_sq")}
        for name, tensor in buffers.items():
            tensor.copy_(tensors[f"buffer/{name}"])
    best = {n: tensors[f"best/{n}"] for n in params if f"best/{n}" in tensors}
    return _Run(**state), best or None
