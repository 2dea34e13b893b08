"""Cross-task interference: how far a merged model is from each expert, and what each expert does to others.

xi(theta_M) = sum_i E_{x ~ D_i} [ KL(h_i(f(x; theta_i)) || h_i(f(x; theta_M))) ]      (Resolving Interference, eq. 1)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models.encoder import features
from ..models.heads import AnyHead, Stacked
from ..progress import Progress, silent
from ..weights.delta import over
from ..weights.open import Source, named, open_weights


@dataclass(frozen=True)
class Diagnosis:
    """Matrices over ``tasks``, in nats.

    ``drift[i][j]``: on task j's inputs, KL(h_j(base) || h_j(expert i)) for i != j; on the diagonal, KL between the
    original expert and this one under its own head (0 unless it was adapted).
    ``xi[s][i][j]``: on task i's inputs, KL(h_j(expert j) || h_j(merged model s)); its trace is the paper's xi.
    """

    tasks: list[str]
    drift: list[list[float]]
    xi: dict[str, list[list[float]]]

    def total(self, merged: str) -> float:
        """Return the paper's xi of one merged model: the sum of the diagonal."""
        return sum(row[i] for i, row in enumerate(self.xi[merged]))


@torch.no_grad()
def diagnose(
    base: Source,
    experts: Mapping[str, Source],
    merged: Mapping[str, Any],
    *,
    encoder: nn.Module,
    heads: Mapping[str, AnyHead],
    inputs: Any,
    reference: Mapping[str, Source] | None = None,
    kind: str = "auto",
    progress: Progress = silent,
) -> Diagnosis:
    """Measure the interference of ``merged`` models and the drift of ``experts``; labels are not needed.

    ``merged``: one model (its weights) or several by name. ``inputs``: the tasks' own inputs by task, or one set of
    inputs used for all. ``reference``: the original experts where ``experts`` are adapted ones.
    """
    tasks = list(heads)
    models = {"merged": merged} if any(isinstance(value, Tensor) for value in merged.values()) else merged
    data = inputs if isinstance(inputs, Mapping) else dict.fromkeys(tasks, inputs)
    zero_weights = open_weights(base)
    after = {name: over(zero_weights, open_weights(source)) for name, source in named(experts).items()}
    before = after
    if reference is not None:
        before = {name: over(zero_weights, open_weights(source)) for name, source in named(reference).items()}
    look = _Look(encoder, heads, data, kind)
    total = len(tasks) * (1 + len(tasks) * (2 if reference is not None else 1) + len(models))
    with progress("diagnose", total) as tick:
        zero = look(zero_weights, tick)
        originals = {name: look(weights, tick) for name, weights in before.items()}
        adapted = originals if reference is None else {n: look(w, tick) for n, w in after.items()}
        drift = [
            [
                divergence(originals[i][i][i], adapted[i][i][i]) if i == j else divergence(zero[j][j], adapted[i][j][j])
                for j in tasks
            ]
            for i in tasks
        ]
        xi = {}
        for name, weights in models.items():
            said = look(over(zero_weights, open_weights(weights)), tick)
            xi[name] = [[divergence(originals[j][i][j], said[i][j]) for j in tasks] for i in tasks]
    return Diagnosis(tasks, drift, xi)


def divergence(target: Float[Tensor, "n classes"], other: Float[Tensor, "n classes"]) -> float:
    """Return the mean KL(target || other) of log-probabilities, in nats."""
    return float((target.exp() * (target - other)).sum(dim=1).mean().clamp(min=0))


class _Look:
    """What a model says: log-probabilities by task's inputs, then by head."""

    def __init__(self, encoder: nn.Module, heads: Mapping[str, AnyHead], data: Mapping[str, Any], kind: str):
        self.encoder, self.data, self.kind = encoder, data, kind
        self.names, self.stacked = list(heads), Stacked(heads)

    def __call__(self, weights: Mapping[str, Tensor], tick: Any) -> dict[str, dict[str, Tensor]]:
        said = {}
        for task in self.names:
            logits = self.stacked(features(self.encoder, weights, self.data[task], kind=self.kind))
            parts = self.stacked.log_softmax(logits).split(self.stacked.sizes, dim=1)
            said[task] = dict(zip(self.names, parts, strict=True))
            tick(1)
        return said
