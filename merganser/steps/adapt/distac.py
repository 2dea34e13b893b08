"""DisTaC: bring a task vector to a wanted length and confidence before merging, and distil back what that lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import HeadError
from ...models.device import home
from ...models.heads import AnyHead
from ...models.targets import Targets
from ...progress import Tick
from ...train import Checkpoint, Plan
from ..knobs import check_training
from ..moving import Moving
from ..student import Split, Student, targets_told, trainable
from ..twins import distance


def distac(
    expert: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    heads: Mapping[str, AnyHead],
    inputs: Any,
    *,
    own: str,
    encoder: nn.Module,
    by: float = 0.5,
    temperature: float = 1.0,
    sharper: float = 1.0,
    pull: float = 0.1,
    steps: int = 500,
    lr: float = 1e-5,
    batch: int = 128,
    micro: int = 0,
    weight_decay: float = 0.0,
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    _precision: str = "auto",
    _targets: Targets | None = None,
    _checkpoint: Checkpoint | None = None,
    _log: Path | None = None,
    _tick: Tick = lambda _advance=1, **_terms: None,
) -> Mapping[str, Tensor]:
    """Shorten ``expert``'s task vector and distil its own outputs back into it, on unlabeled ``inputs``.

        theta  starts at  s = base + by (expert - base)
        L(theta) = E_x [ t r KL(softmax(h_own(f(x; expert)) / t) || softmax(h_own(f(x; theta)) / r)) ]
                   + pull |theta - s|^2,          t = temperature,  r = t * sharper

    by           length of the start beside the expert's, for task vectors longer than the others'; tune it over 0.1 .. 1
    temperature  of the teacher's outputs
    sharper      above 1 the student's own outputs, without a temperature, become more confident than the teacher's: for
                 experts trained with soft or smoothed labels
    pull         weight of the squared distance to the start (not its mean), which keeps the length

    Nothing is asked of the other heads (that is `ri`'s part; ``distac | ri`` is a sentence).
    Only tensors that fine-tuning moved are trained; batch norms keep the expert's running statistics. As in `ri`, a
    share ``held_out`` of the inputs tells when to stop, and ``micro`` saves memory. Defaults are those of the published
    code, whose loss and gradient these are, but ``by`` is ours (its example has 0.1).

    Raises HeadError if ``own`` is not among the heads; ValueError at a knob out of range.
    Source: DisTaC: Conditioning Task Vectors via Distillation for Robust Model Merging (ICLR 2026).
    """
    check(
        by=by,
        temperature=temperature,
        sharper=sharper,
        pull=pull,
        steps=steps,
        lr=lr,
        batch=batch,
        micro=micro,
        held_out=held_out,
    )
    if own not in heads:
        raise HeadError(f"expert '{own}' has no head of that name; heads: {', '.join(heads)}")
    split = Split(inputs, steps, batch, held_out, seed)
    at, head = split.everything, heads[own]
    said = _targets or Targets(encoder, inputs, _precision)
    targets = said(expert, at, keep=False, progress=targets_told(_tick))
    row = at.new_full((len(inputs),), -1)
    row[at] = torch.arange(len(at))
    names = trainable(expert, base, encoder)
    start = {n: base[n].float() + by * (expert[n].float() - base[n].float()) for n in names}
    moving = Moving(start)
    student = Student(expert, encoder, inputs, moving, _precision)

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gap = distilled(head(targets[row[at]]), head(student(at).cpu()), temperature, temperature * sharper)
        far = pulled({n: moving.params[n] for n in names}, moving.whole)
        return gap + pull * far.cpu(), {"own": gap.detach()}

    plan = Plan(steps, lr, weight_decay, patience=patience)
    best = home(student.train(loss, split, plan, micro=micro, checkpoint=_checkpoint, log=_log, tick=_tick))
    return {n: best[n].to(expert[n].dtype) if n in best else expert[n] for n in expert}


def distilled(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], t: float, r: float
) -> Float[Tensor, ""]:
    """Return ``t r KL(softmax(teacher / t) || softmax(student / r))``, the mean over rows."""
    return t * r * distance("kl", teacher / t, student / r).mean()


def pulled(params: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return the squared distance of ``params`` to ``start``, summed over all entries."""
    return torch.stack([(params[n] - start[n]).square().sum() for n in params]).sum()


def check(**knobs: Any) -> None:
    """Raise ValueError at a knob out of range, before any work."""
    check_training(**knobs)
