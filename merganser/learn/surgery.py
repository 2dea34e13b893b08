"""Representation Surgery: for each task a small correction of a merged model's features, learned without labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..card import read_card
from ..errors import DataError, HeadError, WeightsError
from ..models.encoder import features
from ..models.heads import AnyHead
from ..progress import Progress, silent
from ..train import Order, Plan, train
from ..weights.stored import Stored

DOWN, UP = ".down", ".up"


@dataclass(frozen=True)
class Correction:
    """What is taken away from a merged model's features ``z`` for one task.

        z' = z - U relu(D z)

    ``down`` D is ``[rank, width]``, ``up`` U ``[width, rank]``; no biases. Source: Yang et al., Representation Surgery
    for Multi-Task Model Merging (arXiv 2402.02705), section 4.
    """

    down: Float[Tensor, "rank width"]
    up: Float[Tensor, "width rank"]

    def __call__(self, z: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        return z - F.linear(torch.relu(F.linear(z, self.down)), self.up)


def surgery(
    merged: Float[Tensor, "n width"],
    expert: Float[Tensor, "n width"],
    *,
    rank: int = 16,
    steps: int = 1000,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
) -> Correction:
    """Return the correction that brings a merged model's features near to one expert's, on the same inputs.

        L(D, U) = mean |z_merged - U relu(D z_merged) - z_expert|        over a batch and all of its entries

    Neither network changes, so features are worked out once, and a step costs two products of ``batch x width x rank``.
    D starts as ``nn.Linear`` does (uniform in +-1/sqrt(width)), U at zero: an untrained correction changes nothing. Adam
    with a constant ``lr``; rank, lr, batch and steps (500 to 1,000) are the paper's.

    Raises ValueError for a knob out of range; DataError without inputs, or for features of two lengths.
    Source: Yang et al., Representation Surgery (arXiv 2402.02705), section 4.
    """
    for name, value in (("rank", rank), ("steps", steps), ("lr", lr), ("batch", batch)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not len(merged) or merged.shape != expert.shape:
        raise DataError(f"features of the merged model {[*merged.shape]} and the expert's {[*expert.shape]} must agree")
    width, rng = merged.shape[1], torch.Generator().manual_seed(seed)
    down = (2 * torch.rand(rank, width, generator=rng) - 1) / math.sqrt(width)
    order = Order(len(merged), min(batch, len(merged)), seed)

    def some(step: Tensor) -> tuple[Tensor, Tensor]:
        rows = order(int(step))
        return merged[rows], expert[rows]

    return fitted(down, some, Plan(steps, lr, schedule="constant", warmup=0.0, clip=0.0))


def fitted(down: Float[Tensor, "rank width"], some: Any, plan: Plan) -> Correction:
    """Return the correction trained from ``down`` on what ``some(step)`` gives: merged and expert's features."""
    params = {"down": down.clone(), "up": torch.zeros(down.shape[1], down.shape[0])}

    def loss(step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        merged, expert = some(step)
        return F.l1_loss(Correction(params["down"], params["up"])(merged), expert), {}

    best, _ = train(params, loss, torch.tensor, plan)
    return Correction(best["down"].detach(), best["up"].detach())


def surgeries(
    merged: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    encoder: nn.Module,
    inputs: Mapping[str, Any],
    kind: str = "auto",
    progress: Progress = silent,
    **knobs: Any,
) -> dict[str, Correction]:
    """Return the correction of a merged model for each expert's task, learned on that task's unlabeled ``inputs``.

    ``knobs`` are those of `surgery`. Costs a forward pass of both models over the inputs, and then seconds.
    """
    found, seen = {}, None
    for name, weights in experts.items():
        with progress(f"features for {name}", 2) as tick:
            if seen is None or seen[0] is not inputs[name]:  # tasks may share their inputs
                seen = inputs[name], features(encoder, merged, inputs[name], kind=kind)
            tick(1)
            own = features(encoder, weights, inputs[name], kind=kind)
            tick(1)
        found[name] = surgery(seen[1], own, **knobs)
    return found


def corrected(heads: Mapping[str, AnyHead], corrections: Mapping[str, Correction]) -> dict[str, AnyHead]:
    """Return heads that see corrected features. Raises HeadError where a task's has no correction."""
    if missing := [name for name in heads if name not in corrections]:
        raise HeadError(f"task '{missing[0]}' has no correction; there are those of {', '.join(corrections)}")
    return {name: partial(_behind, corrections[name], head) for name, head in heads.items()}


def _behind(correction: Correction, head: AnyHead, z: Tensor) -> Tensor:
    return head(correction(z))


def tensors(corrections: Mapping[str, Correction]) -> dict[str, Tensor]:
    """Return corrections as tensors to be stored, ``TASK.down`` and ``TASK.up``."""
    return {name + end: t for name, c in corrections.items() for end, t in ((DOWN, c.down), (UP, c.up))}


def check_one(models: Sequence[Any]) -> None:
    """Raise DataError unless there is one model to be corrected."""
    if len(models) != 1:
        raise DataError(f"--surgery corrects one model, got {len(models)}: give the one it was learned for")


def read_surgery(folder: Path, model: str | None = None) -> dict[str, Correction]:
    """Return the corrections that ``merganser learn surgery`` stored; ``model``: the digest of the model they have to be of.

    Raises WeightsError where there are none, or where they are another model's.
    """
    card = read_card(folder)
    if card is None or card.get("kind") != "surgery":
        raise WeightsError(f"{folder}: no corrections here; make them with merganser learn surgery")
    if model is not None and card["model"] != model:
        raise WeightsError(f"{folder} was learned for another model than this one; learn it anew for it")
    held = Stored(folder)
    names = [name.removesuffix(DOWN) for name in held if name.endswith(DOWN)]
    return {name: Correction(held[name + DOWN].clone(), held[name + UP].clone()) for name in names}
