"""What is merged: weights, a sentence, and what the steps are given, the dice among it."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .models.statistics import is_statistic
from .sentence import Sentence, Step, find, takes
from .weights.header import shape_of, touches
from .where import Where


@dataclass(frozen=True)
class Ingredient:
    """Extra tensors under the model's names: one set shared by all experts, or one set an expert."""

    shared: Mapping[str, Tensor] | None = None
    each: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def of(self, name: str) -> Tensor | None:
        """Return the tensor for ``name``, shared or stacked over experts; None where it is not there."""
        if self.shared is not None:
            return self.shared.get(name)
        rows = [weights[name] for weights in self.each.values() if name in weights]
        return torch.stack(rows) if rows and len(rows) == len(self.each) else None


@dataclass(frozen=True)
class Job:
    """What is merged: the weights, the sentence, the names, and what the steps are given."""

    base: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, Tensor]]
    sentence: Sentence
    names: Sequence[str]
    seed: int = 0
    ingredients: Mapping[str, Ingredient] = field(default_factory=dict)
    where: Where = field(default_factory=Where)
    alike: Mapping[str, str] = field(default_factory=dict)  # tied tensors draw the random numbers of one of them
    factored: bool = False  # hand on a merged product as `Factors` where the steps leave it one
    seen: Callable[[str, str, int, Tensor], None] | None = None  # told model, name, place and piece of what is merged

    def steps(self, name: str) -> tuple[Step, ...]:
        """Return the steps for one tensor with the knobs they have there."""
        if is_statistic(name):
            return (Step("average", *find("average")),)
        experts, steps = tuple(self.experts), self.where.resolve(self.sentence, name).steps
        at = next(k for k, step in enumerate(steps) if step.kind == "combine")
        return tuple(step.for_experts(experts if k <= at else ()) for k, step in enumerate(steps))

    def touched(self, name: str) -> bool:
        """Tell whether an expert may have moved a tensor; adapters know what they leave alone."""
        return any(touches(weights, name) for weights in self.experts.values())

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Return the number of entries of each tensor, of all experts together."""
        return [len(self.experts) * math.prod(shape_of(self.base, name)) for name in names]


def rngs(job: Job, name: str, steps: Sequence[Step]) -> dict[tuple[int, str], np.random.Generator]:
    """Return the generators of one tensor's steps: an expert's own for edits before the combining step."""
    drawn_as = job.alike.get(name, name)
    at = next((k for k, step in enumerate(steps) if step.kind == "combine"), len(steps))
    words = [step.function for step in steps]
    return {
        (k, who): generator(job.seed, drawn_as, who, words[:k].count(step.function))
        for k, step in enumerate(steps)
        if "rng" in takes(step.function)
        for who in (tuple(job.experts) if step.kind == "edit" and k < at else ("merged",))
    }


def generator(seed: int, tensor: str, expert: str, nth: int = 0) -> np.random.Generator:
    """Return a generator seeded from names, so neither the order of work nor the machine changes what is drawn.

    ``nth`` counts the earlier uses of the same step in a sentence, so that a second ``dare`` throws other dice. SFC64 takes
    half the time of torch's own for a number.
    """
    named_seed = hashlib.sha256(f"{seed}|{tensor}|{expert}{f'|{nth}' if nth else ''}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(named_seed[:8], "little")))
