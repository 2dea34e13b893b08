"""Score a model on tasks: every task with its own head, in one pass over its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import HeadError
from ..models.encoder import features
from ..models.heads import AnyHead
from .joint import FORMS, Union, hits
from .metrics import calibration_error, interval, mean_scores, score


@dataclass(frozen=True)
class Model:
    """A network to score: an encoder, the weights it is called with, a head for every task."""

    encoder: nn.Module
    weights: Mapping[str, Tensor]
    heads: Mapping[str, AnyHead]
    kind: str = "auto"


@dataclass(frozen=True)
class Labelled:
    """Inputs ready for an encoder with their labels (int64) and the metric they are scored by."""

    inputs: Any
    labels: np.ndarray
    metric: str = "accuracy"

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Outcome:
    """What a model said on one task: the class it predicts for every input, and how sure it is.

    ``ranks``: how many classes of all tasks it puts before the right one (`joint.Union`), where that was asked for;
    ``published``: the same with the rows of all heads apart, as KnOTS counts.
    """

    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    metric: str = "accuracy"
    ranks: np.ndarray | None = None
    published: np.ndarray | None = None

    @property
    def score(self) -> float:
        return score(self.metric, self.labels, self.predictions)

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.confidences, self.predictions == self.labels)


@dataclass(frozen=True)
class Scores(Mapping[str, Outcome]):
    """Outcomes by task. ``mean`` is the plain mean over the tasks; intervals are 95 % bootstrap intervals."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

    def __getitem__(self, task: str) -> Outcome:
        return self.outcomes[task]

    def __iter__(self) -> Any:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __or__(self, other: "Scores") -> "Scores":
        return Scores({**self.outcomes, **other.outcomes})

    @property
    def mean(self) -> float:
        return float(np.mean([o.score for o in self.outcomes.values()]))

    @property
    def calibration_error(self) -> float:
        return float(np.mean([o.calibration_error for o in self.outcomes.values()]))

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean."""
        both = interval(means([self])[:, 0])
        return both["low"], both["high"]

    def normalised(self, experts: "Scores") -> dict[str, float]:
        """Return each task's score divided by that of the task's own expert (1 where the expert gets nothing right)."""
        return {task: o.score / e if (e := experts[task].score) else 1.0 for task, o in self.outcomes.items()}

    def gain(self, other: "Scores") -> tuple[float, float, float]:
        """Return this mean minus the other's with its paired 95 % interval: ``(gain, low, high)``."""
        told = self.compared(other)
        return told["score"], told["low"], told["high"]

    def compared(self, other: "Scores") -> dict[str, float]:
        """Return the gain over ``other`` with its paired interval and the p value of no difference (paired bootstrap)."""
        told = gained([(other, self)])
        return {part: told[part] for part in ("score", "low", "high", "p")}

    def hits(self, form: str = "names") -> dict[str, dict[str, float]] | None:
        """Return hits@k over the classes of all tasks (`joint.hits`), or None where they were not asked for.

        ``form``: "names", classes with the same name are one; "published", the rows of all heads apart (`joint`).
        """
        kept = {task: o.ranks if form == "names" else o.published for task, o in self.outcomes.items()}
        ranks = {task: rank for task, rank in kept.items() if rank is not None}
        return hits(ranks) if ranks and len(ranks) == len(self) else None


def evaluate(model: Model, tasks: Mapping[str, Labelled], *, union: Union | None = None, batch: int = 64) -> Scores:
    """Return the scores of ``model`` on ``tasks``, each with the head of its own name.

    ``union``: also rank the right class among the classes of all tasks.
    Raises HeadError if a task has no head.
    """
    outcomes = {}
    for name, task in tasks.items():
        if name not in model.heads:
            raise HeadError(f"task '{name}' has no head of that name; heads: {', '.join(model.heads)}")
        x = features(model.encoder, model.weights, task.inputs, batch=batch, kind=model.kind)
        said = outcome(model.heads[name](x), task)
        if union:
            ranks, published = (union.ranks(x, name, task.labels, form) for form in FORMS)
            said = replace(said, ranks=ranks, published=published)
        outcomes[name] = said
    return Scores(outcomes)


def outcome(logits: Tensor, task: Labelled) -> Outcome:
    """Return what ``logits`` ``[n, classes]`` say on ``task``."""
    confidences, predictions = logits.detach().softmax(dim=1).max(dim=1)
    return Outcome(task.labels, predictions.numpy().astype(np.int64), confidences.double().numpy(), task.metric)


def means(rows: "list[Scores]", seed: int = 0) -> np.ndarray:
    """Return bootstrap draws of each row's mean over the tasks, paired over rows, ``[draws, rows]``."""
    tasks = {name: (o.metric, o.labels) for name, o in rows[0].items()}
    return mean_scores(tasks, [{name: o.predictions for name, o in row.items()} for row in rows], seed=seed)


def gained(pairs: Sequence[tuple[Scores, Scores]]) -> dict[str, Any]:
    """Return what the second of each pair scores more than the first, the mean over pairs (seeds, mergers): ``score``.

    ``low`` and ``high`` are its 95 % interval over test examples, paired, pairs averaged first; ``p`` the two-sided p value
    of that bootstrap; ``each`` every pair's own difference.
    """
    draws = means([scores for pair in pairs for scores in pair])
    difference = (draws[:, 1::2] - draws[:, 0::2]).mean(axis=1)
    tail = min((difference <= 0).mean(), (difference >= 0).mean())
    each = [b.mean - a.mean for a, b in pairs]
    p = min(1.0, 2 * max(float(tail), 1 / len(difference)))
    return {"score": float(np.mean(each)), **interval(difference), "p": p, "each": each}
