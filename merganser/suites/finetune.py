"""Fine-tune an expert with its head frozen: the plain supervised recipe the suites make their experts by."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluate.run import Labelled
from ..models.encoder import bound, precision
from ..models.heads import AnyHead
from ..models.inputs import take
from ..models.statistics import counters, is_statistic, moving
from ..progress import Tick
from ..train import Checkpoint, Order, Plan, train
from ..weights.open import matches


def finetune(
    base: Mapping[str, Tensor],
    encoder: nn.Module,
    head: AnyHead,
    task: Labelled,
    plan: Plan,
    *,
    batch: int = 32,
    frozen: Sequence[str] = (),
    seed: int = 0,
    kind: str = "auto",
    checkpoint: Checkpoint | None = None,
    tick: Tick = lambda _advance=1, **_terms: None,
) -> dict[str, Tensor]:
    """Return ``base`` trained by cross-entropy through the frozen ``head``; ``frozen`` patterns stay put.

    Batch norms normalise by the batch and their running statistics follow, as in any training.
    """
    prefix = getattr(encoder, "prefix", "")
    fixed = bound(encoder, base)
    params = {
        name: base[name].detach().float().clone()
        for name in base
        if prefix + name in fixed
        and base[name].is_floating_point()
        and not matches(name, frozen)
        and not is_statistic(name)
    }
    fixed = {name: t for name, t in fixed.items() if name.removeprefix(prefix) not in params}
    buffers = {name: t.detach().clone() for name, t in fixed.items() if is_statistic(name)}
    counts = {name: torch.zeros((), dtype=torch.int64) for name in counters(encoder)}
    fixed |= {**buffers, **counts}
    labels = torch.from_numpy(task.labels)
    encoder.eval()

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = fixed | {prefix + name: tensor for name, tensor in params.items()}
        with precision(kind), moving(encoder):
            x = torch.func.functional_call(encoder, weights, (take(task.inputs, at),)).float()
        return F.cross_entropy(head(x), labels[at]), {}

    order = Order(len(task), min(batch, len(task)), seed, getattr(task.inputs, "lengths", None))
    trained, _ = train(params, loss, order, plan, buffers=buffers, checkpoint=checkpoint, tick=tick)
    trained |= {name.removeprefix(prefix): tensor for name, tensor in buffers.items()}
    return {name: trained[name].to(base[name].dtype) if name in trained else base[name] for name in base}
