"""What steps have to learn from the whole model before they are run: looks at every tensor, added up."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from .job import Job, generator, rngs
from .loop import CUT, Surveys, look_at, told_of, whole
from .models.statistics import is_statistic
from .parallel import in_order, one_thread_each
from .progress import Progress, silent
from .read import read
from .sentence import Step, takes
from .steps.select import known_before, known_of_left
from .weights.header import shape_of


def survey(job: Job, *, share: Any = None, progress: Progress = silent) -> Surveys:
    """Return what the steps have to learn from the whole model before they are run, step after step.

    Tensors whose step has the same knobs are surveyed together. ``share`` (`parts.Share`) takes other processes' sums.
    """
    surveys: dict[tuple[int, str], Any] = {}
    for i in range(len(job.sentence.steps)):
        groups: dict[str, tuple[Step, list[str]]] = {}
        for name in job.names:
            steps = job.steps(name)
            if not is_statistic(name):
                groups.setdefault(str(steps[i]), (steps[i], []))[1].append(name)
        for told, (step, names) in groups.items():
            if prepare := step.hook("prepare"):
                rng = {"rng": generator(job.seed, told, "all")} if "rng" in takes(prepare) else {}
                with told_of(step, ""):
                    surveys[i, told] = prepare(lambda n, i=i: whole(job, n, i, surveys), names, **step.knobs, **rng)
            elif step.looks and step.scope == "model":
                learned: list[Any] = []
                for p, look in enumerate(step.looks):
                    with told_of(step, ""):
                        known = known_before(look, learned)
                        if known is None and p == 0:
                            known = _of_left(job, names, i, look, share, told, progress)
                    if known is not None:
                        learned.append(known)
                        continue
                    see = partial(look_at, job, i=i, look=look, learned=learned, surveys=surveys)
                    with progress(f"survey {step}, pass {p + 1} of {len(step.looks)}", len(names)) as tick:
                        sums = _sums(job, names, see, share, (i, told, p), tick)
                    if sums is None:
                        break
                    learned.append(sums)
                surveys[i, told] = learned or None
    return surveys


class Sums:
    """A survey growing tensor by tensor; floating point sums are added in the order of names, so order never shows."""

    def __init__(self, whole: Any = None, each: dict[str, Any] | None = None):
        self.whole, self.each = whole, each or {}

    def take(self, name: str, value: Any) -> None:
        """Add one tensor's value."""
        if isinstance(value, Tensor) and not value.is_floating_point():
            self.whole = value if self.whole is None else self.whole + value
        elif value is not None:
            self.each[name] = value

    def __add__(self, other: "Sums") -> "Sums":
        wholes = [one.whole for one in (self, other) if one.whole is not None]
        return Sums(reduce(add, wholes) if wholes else None, self.each | other.each)

    def total(self) -> Any:
        """Return the sum over all tensors; None if there was none."""
        return reduce(add, (self.each[name] for name in sorted(self.each))) if self.each else self.whole


def _sums(job: Job, names: Sequence[str], see: Callable[[str], Any], share: Any, key: Any, tick: Any) -> Any:
    """Return the sum of what is seen in each tensor, tensors in parallel."""

    def of(some: Sequence[str]) -> Sums:
        sums = Sums()
        with one_thread_each() as workers:
            seen = in_order(see, some, job.sizes(some), workers)
            for name, value in zip(some, seen, strict=True):
                sums.take(name, value)
                tick(1)
        return sums

    return (of(names) if share is None else share.sums(key, names, of)).total()


def _of_left(
    job: Job, names: Sequence[str], i: int, look: Any, share: Any, told: str, progress: Progress
) -> Tensor | None:
    """Return totals of a first look, known of how few entries the edit before it leaves; None where it has to look.

    An edit says that itself (``leaves``), by its dice alone. So nearly no tensor is read: DARE leaves a tenth of the
    entries, of which TIES would trim none. They are thrown for all only where those for a few show that it may do.
    """
    if not any(_thins(job.steps(name), i) for name in names):
        return None
    first = next(name for name in names if _thins(job.steps(name), i))
    few = min(CUT, math.prod(shape_of(job.base, first)))
    if known_of_left(look, few, _left(job, first, i, few)) is None:
        return None
    with progress(f"count what {job.sentence.steps[i - 1]} leaves", len(names)) as tick:
        counted = _sums(job, names, partial(_sized, job, i=i), share, (i, told, "left"), tick)
    return None if counted is None else known_of_left(look, int(counted[0]), counted[1:].tolist())


def _thins(steps: Sequence[Step], i: int) -> Callable[..., int] | None:
    """Return how the edit before step ``i`` counts what it leaves, if it can and only edits come before."""
    edits = 0 < i < len(steps) and all(step.kind == "edit" for step in steps[:i])
    return steps[i - 1].hook("leaves") if edits else None


def _sized(job: Job, name: str, i: int) -> Tensor | None:
    """Return how many entries a tensor has, and of each expert's how many are left; None if no expert has moved it."""
    shape = shape_of(job.base, name)
    if not job.touched(name) or not any(cut.moved for cut in read(job, name, CUT, shape)):
        return None
    size = math.prod(shape)
    return torch.tensor([size, *_left(job, name, i, size)])


def _left(job: Job, name: str, i: int, size: int) -> list[int]:
    """Return how many of each expert's first ``size`` entries the edit before step ``i`` leaves at most."""
    steps = job.steps(name)
    if (leaves := _thins(steps, i)) is None:
        return [size] * len(job.experts)
    step, dice = steps[i - 1], rngs(job, name, steps[:i])

    def of(row: int, expert: str) -> int:
        knobs = {**step.knobs, **step.for_one(row), "rng": dice.get((i - 1, expert))}
        return sum(leaves(min(CUT, size - at), **knobs) for at in range(0, size, CUT))

    return [of(row, expert) for row, expert in enumerate(job.experts)]
