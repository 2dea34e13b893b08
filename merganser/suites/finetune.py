"""Fine-tune an expert with its head frozen: the plain supervised recipe the suites make their experts by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError
from ..evaluate.run import Labelled
from ..models.device import home, there
from ..models.encoder import bound, forward, loaded
from ..models.heads import AnyHead
from ..models.inputs import take
from ..models.statistics import counters, is_statistic, moving
from ..progress import Tick
from ..steps.moving import Moving, low_rank
from ..train import Checkpoint, Order, Plan, train
from ..weights.adapter import PREFIX
from ..weights.open import matches


@dataclass(frozen=True)
class Lora:
    """What of a network becomes ``W + alpha/rank B A``: linear modules whose path ends in one of ``targets``."""

    rank: int
    alpha: int
    targets: Sequence[str]

    def modules(self, names: Sequence[str]) -> list[str]:
        """Return the weights among ``names`` that are meant, as PEFT reads ``target_modules``."""
        ends = tuple(f".{target}.weight" for target in self.targets)
        return [name for name in names if f".{name}".endswith(ends)]

    def work(self, base: Mapping[str, Tensor], names: Sequence[str], *, start: int, turned: bool = False) -> Moving:
        """Return the training of those of ``names`` that are meant; ``start`` seeds the random A, B is zero.

        ``turned``: they lie [in, out]. Raises WeightsError if none is meant, or one is no matrix larger than the rank.
        """
        meant = self.modules(names)
        if not meant:
            raise WeightsError(f"no module of the network ends in one of {', '.join(self.targets)}")
        work = low_rank(base, meant, self.rank, seed=start, alpha=self.alpha, turned=turned)
        if work.whole:
            name = next(iter(work.whole))
            raise WeightsError(f"'{name}' {list(base[name].shape)} has no change of rank {self.rank} that is smaller")
        return work

    def tensors(self, trained: Mapping[str, Tensor], *, turned: bool = False) -> dict[str, Tensor]:
        """Return what PEFT's file holds of the trained parameters of `work`."""
        parts = {"A": "B", "B": "A"} if turned else {"A": "A", "B": "B"}
        names = [name.removesuffix("::A") for name in trained if name.endswith("::A")]
        return {
            f"{PREFIX}{name.removesuffix('.weight')}.lora_{told}.weight": (
                trained[f"{name}::{part}"].mT.contiguous() if turned else trained[f"{name}::{part}"]
            )
            for name in names
            for told, part in parts.items()
        }

    def config(self, base: str, *, task: str = "FEATURE_EXTRACTION", turned: bool = False) -> dict[str, Any]:
        """Return adapter_config.json, as PEFT writes it for a network made for ``task``."""
        told = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base}
        how = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": [*self.targets], "lora_dropout": 0.0}
        more = {"bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": turned}
        return {**told, **how, **more, "inference_mode": True}


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
    names = [name for name in _trainable(base, encoder) if not matches(name, frozen)]
    work = Moving({name: base[name] for name in names})
    trained, buffers = _trained(base, encoder, head, task, plan, work, batch, seed, kind, checkpoint, tick)
    trained |= buffers
    return {name: trained[name].to(base[name].dtype) if name in trained else base[name] for name in base}


def finetune_lora(
    base: Mapping[str, Tensor],
    encoder: nn.Module,
    head: AnyHead,
    task: Labelled,
    plan: Plan,
    lora: Lora,
    *,
    batch: int = 32,
    seed: int = 0,
    start: int = 0,
    kind: str = "auto",
    checkpoint: Checkpoint | None = None,
    tick: Tick = lambda _advance=1, **_terms: None,
) -> dict[str, Tensor]:
    """Return a LoRA adapter of ``base`` trained likewise, its tensors named as in PEFT's file; all else stays put.

    ``start`` seeds the random A (B is zero), ``seed`` the order of the inputs: experts of different tasks should not
    begin with the same A. Raises WeightsError if no tensor is meant, or one that is not a matrix larger than the rank.
    """
    work = lora.work(base, _trainable(base, encoder), start=start)
    trained, _ = _trained(base, encoder, head, task, plan, work, batch, seed, kind, checkpoint, tick)
    return lora.tensors(trained)


def _trainable(base: Mapping[str, Tensor], encoder: nn.Module) -> list[str]:
    prefix, known = getattr(encoder, "prefix", ""), bound(encoder, base)
    names = [name for name in base if prefix + name in known and not is_statistic(name)]
    return [name for name in names if base[name].is_floating_point()]


def _trained(
    base: Mapping[str, Tensor],
    encoder: nn.Module,
    head: AnyHead,
    task: Labelled,
    plan: Plan,
    work: Moving,
    batch: int,
    seed: int,
    kind: str,
    checkpoint: Checkpoint | None,
    tick: Tick,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of ``work``, trained, and the running statistics."""
    prefix = getattr(encoder, "prefix", "")
    moved = {prefix + name for name in work.names}
    fixed = {name: t for name, t in loaded(encoder, base).items() if name not in moved}
    buffers = {name: t.detach().clone() for name, t in fixed.items() if is_statistic(name)}
    counts = {name: there(torch.zeros((), dtype=torch.int64)) for name in counters(encoder)}
    fixed |= {**buffers, **counts}
    encoder.eval()
    loss = _loss(encoder, head, task, work, fixed, prefix, kind)
    order = Order(len(task), min(batch, len(task)), seed, getattr(task.inputs, "lengths", None))
    trained, _ = train(work.params, loss, order, plan, buffers=buffers, checkpoint=checkpoint, tick=tick)
    return home(trained), {name.removeprefix(prefix): tensor for name, tensor in home(buffers).items()}


def _loss(
    encoder: nn.Module, head: AnyHead, task: Labelled, work: Moving, fixed: dict[str, Tensor], prefix: str, kind: str
) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    labels = torch.from_numpy(task.labels)

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = fixed | {prefix + name: tensor for name, tensor in work.weights(work.params).items()}
        with moving(encoder):
            x = forward(encoder, weights, take(task.inputs, at), kind).cpu()
        return F.cross_entropy(head(x), labels[at]), {}

    return loss
