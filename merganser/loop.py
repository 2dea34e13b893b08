"""The loop: for each tensor, read the deltas in fp32, edit, align, combine, edit, and hand on what comes out.

One loop serves memory, disk and parts of a model. A tensor's result depends on that tensor, the surveys and seeds
named after it, never on where the bytes are, in which order or by which process they are read; so all agree bit by bit.

Where every step is element-wise a tensor is read, merged and written in cuts of `CUT` entries, which stay in the
processor's cache: memory does not grow with the model. Other steps see whole tensors. Tensors run in parallel, one
thread each, as many as torch would use.

Rules: tensors that are not floating point (position ids, counters) are the base's. A tensor that no expert has moved is
the base's, bit by bit, and does not count where a step looks at the whole model (TIES trims among what fine-tuning
moved). Running statistics of batch norm are the plain mean of the experts', whatever the sentence: trimmed or scaled
they would be no statistics (a variance can turn negative). Deltas are fp32, those of float64 tensors float64.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import SentenceError
from .heap import give_back
from .job import Job, rngs
from .parallel import in_order, one_thread_each
from .progress import Progress, silent
from .read import Cut, not_finite, read
from .sentence import Step, takes
from .steps.select import known_before
from .weights.adapter import Factors
from .weights.header import factors, header, pieces, shape_of, touches

CUT = 1 << 17  # entries; a multiple of 16, so that a generator draws for cuts what it draws for the whole tensor
LARGE = 1 << 23  # entries of all experts: beside what a step makes of as many, giving memory back costs nothing
Surveys = Mapping[tuple[int, str], Any]


class Piece(NamedTuple):
    """Entries ``[at, at + n)`` of a flattened tensor: the base's as stored and as computed with, and a value made there."""

    at: int
    origin: Tensor
    base: Tensor
    value: Any  # the deltas [experts, ...], a merged delta, or None where no expert has moved anything


def look_at(
    job: Job,
    name: str,
    i: int,
    look: Any,
    learned: list,
    surveys: Surveys,
    pad: dict[str, Tensor] | None = None,
    cuts: Sequence["Cut"] | None = None,
) -> Any:
    """Return what one look sees in one tensor at step ``i``; None if no expert has moved it. ``pad``: see `Kept`."""
    if not job.touched(name):
        return None
    total: Any = None
    moved = False
    wanted = takes(look)
    shape = shape_of(job.base, name)
    numel = math.prod(shape)
    steps = job.steps(name)
    extra = _ingredients(job, name, steps[i])
    merged = any(step.kind == "combine" for step in steps[:i])
    for piece in through(job, name, i, surveys, zeros=True, cuts=cuts):
        deltas, touched = piece.value
        deltas = deltas[None] if merged else deltas
        moved = moved or touched
        given: dict[str, Any] = {"base": piece.base, "name": name, "numel": numel}
        given |= _cut(steps[i], extra, piece, shape, len(deltas))
        given["kept"] = Kept(pad, piece.at, numel) if pad is not None else None
        with told_of(steps[i], name):
            seen = look(deltas, learned, **{k: v for k, v in given.items() if k in wanted})
        total = seen if total is None else total + seen
    if not moved:
        return None
    return total.tensor() if hasattr(total, "tensor") else total  # a tally that has waited for more is counted now


def whole(job: Job, name: str, i: int, surveys: Surveys) -> tuple[Tensor, Tensor]:
    """Return base and deltas of a whole tensor as step ``i`` sees them."""
    cuts = [(p.base, p.value[0].clone()) for p in through(job, name, i, surveys, zeros=True)]
    shape, rows = shape_of(job.base, name), len(job.experts)
    base = torch.cat([base.reshape(-1) for base, _ in cuts]).reshape(shape)
    return base, torch.cat([deltas.reshape(rows, -1) for _, deltas in cuts], dim=1).reshape(rows, *shape)


def through(
    job: Job,
    name: str,
    upto: int | None,
    surveys: Surveys,
    *,
    zeros: bool = False,
    cuts: Sequence[Cut] | None = None,
) -> Iterator[Piece]:
    """Run the first ``upto`` steps (default: all) on one tensor and yield it piece by piece.

    A piece's value is None where no expert has moved anything; with ``zeros`` it is (value, moved), moved or not. The
    value may lie in a buffer that the next piece overwrites. ``cuts``: the tensor's, where they are held.
    """
    if not zeros and not job.touched(name):
        yield from _copied(job, name)
        return
    steps = job.steps(name)
    if upto is not None and len(steps) < upto:
        upto = len(steps)
    cut = CUT if all(step.elementwise for step in steps) else None
    chosen = steps[:upto]
    pads: list[dict[str, Tensor]] = [{} for _ in chosen]
    shape = shape_of(job.base, name)
    if cuts is None and read_once(steps[: len(chosen)], surveys):
        cuts = list(read(job, name, cut, shape, hold=True))
    known = _tensor_surveys(job, name, steps, pads, surveys, cuts)
    run = _Run(job, name, chosen, known, pads, shape)
    if run.takes_factors(zeros) and (given := _held(job, name, shape)) is not None:
        low = _from_factors(job, name, run, given, cut, zeros)
        if low is not None:
            yield from low
            return
    if cuts is None and (turn := _in_turn(job, name, run, shape)) is not None:
        yield from _aligned(job, name, run, *turn, zeros)
        return
    edited = any(step.kind == "edit" for step in chosen[: run.at])
    for at, origin, base, deltas, moved in read(job, name, cut, shape) if cuts is None else cuts:
        if cuts is not None and edited:
            deltas = deltas.clone()  # edits write into what they are given, and others have yet to look at it
        if zeros:
            yield Piece(at, origin, base, (run(at, base, deltas), moved))
        elif moved or run.draws:
            value = run(at, base, deltas)
            yield Piece(at, origin, base, value if moved else None)
        else:
            yield Piece(at, origin, base, None)


def _held(job: Job, name: str, shape: tuple[int, ...]) -> list[Factors] | None:
    """Return what every expert adds to a tensor as factors; None where one's are not known, or nothing is added."""
    kind = torch.float64 if header(job.base, name)[0] == "F64" else torch.float32
    held = []
    for expert, weights in job.experts.items():
        low = factors(weights, name) if touches(weights, name) else Factors.zero(shape, kind)
        if low is None:
            return None
        if not math.isfinite(low.left.sum().item() + low.right.sum().item()):
            raise not_finite(f"expert '{expert}'", name)
        held.append(low)
    return held if any(low.left.any() and low.right.any() for low in held) else None


def _from_factors(
    job: Job, name: str, run: "_Run", held: list[Factors], cut: int | None, zeros: bool
) -> Iterator[Piece] | None:
    """Run the steps on factors, of which no expert's delta is ever made; None where the first step has no form for it."""
    if not run.linear or zeros:
        started = run.started(held)
        return None if started is None else _aligned(job, name, run, *started, zeros)
    merged = Factors.sum(held, run.coefficients())
    if job.factored:
        return iter([Piece(0, merged.left, merged.left, merged)])
    return _product(job, name, merged, cut)


def _in_turn(job: Job, name: str, run: "_Run", shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
    """Return coordinates and the way back from deltas that are read one expert after another; None where that cannot be."""
    if not run.steps or (function := _turns(run.steps[0])) is None:
        return None
    alone = [replace(job, experts={expert: weights}) for expert, weights in job.experts.items()]

    def deltas() -> Iterator[Tensor]:
        return (one.deltas[0] for single in alone for one in read(single, name, None, shape))

    return named(replace(run.steps[0], function=function), name, deltas, shape=(len(alone), *shape))


def _product(job: Job, name: str, merged: Factors, cut: int | None) -> Iterator[Piece]:
    """Yield a merged product piece by piece."""
    at, step = 0, max(1, min(cut or CUT, math.prod(shape_of(job.base, name))))
    for stored, value in zip(pieces(job.base, name, step), merged.pieces(step), strict=True):
        if job.seen:
            job.seen("base", name, at, stored)
        yield Piece(at, stored, stored.to(value.dtype), value)
        at += len(value)


def _aligned(
    job: Job, name: str, run: "_Run", coords: Tensor, restore: Callable[[Tensor], Any], zeros: bool
) -> Iterator[Piece]:
    """Yield a tensor whole, by steps that begin with coordinates found from factors."""
    if job.factored and not any("base" in takes(step.function) for step in run.steps):
        origin = base = coords.new_zeros(()).expand(run.shape)  # nobody asks for it, so it is not read
    else:
        origin = job.base[name].detach().reshape(-1)
        if job.seen:
            job.seen("base", name, 0, origin)
        base = origin.to(coords.dtype).reshape(run.shape)
    value = run(0, base, coords, restore, factored=job.factored and not zeros)
    yield Piece(0, origin, base, (value, True) if zeros else value)


def _copied(job: Job, name: str) -> Iterator[Piece]:
    """Yield a tensor that no expert touches: only the base's is read."""
    for k, stored in enumerate(pieces(job.base, name, CUT)):
        if job.seen:
            job.seen("base", name, k * CUT, stored)
        yield Piece(k * CUT, stored, stored, None)


def looks_again(steps: Sequence[Step], surveys: Surveys = MappingProxyType({})) -> bool:
    """Tell whether a tensor is looked at more than once before it is merged, so that its deltas are better held.

    Not where the first step works on factors, of which no expert's delta is ever made.
    """
    looks = sum(len(step.looks) for i, step in enumerate(steps) if _looks_here(i, step, surveys))
    return looks > 1 and not any(map(by_factors, steps[:1]))


def read_once(steps: Sequence[Step], surveys: Surveys = MappingProxyType({})) -> bool:
    """Tell whether a tensor's deltas are read once for all looks at it and for the merge.

    That takes as much memory as the experts' tensor in fp32. A sentence that is not cut has them in memory anyway, unless
    edits write into them: those would need a copy more.
    """
    at = next((k for k, step in enumerate(steps) if step.kind == "combine"), len(steps))
    edited = any(step.kind == "edit" for step in steps[:at])
    return looks_again(steps, surveys) and (not edited or all(step.elementwise for step in steps))


def _looks_here(i: int, step: Step, surveys: Surveys) -> bool:
    return (i, str(step)) not in surveys and bool(step.looks) and step.scope == "tensor"


def _tensor_surveys(
    job: Job,
    name: str,
    steps: Sequence[Step],
    pads: Sequence[dict[str, Tensor]],
    surveys: Surveys,
    cuts: Sequence[Cut] | None,
) -> list[Any]:
    """Return the survey of each step that has a pad: the model's, or this tensor's where that is the scope."""
    local = dict(surveys)
    for i, (step, pad) in enumerate(zip(steps, pads, strict=False)):
        if _looks_here(i, step, surveys):
            learned: list[Any] = []
            for look in step.looks:
                with told_of(step, name):
                    seen = known_before(look, learned)
                if seen is None:
                    seen = look_at(job, name, i, look, learned, local, pad, cuts)
                if seen is None:
                    break
                learned.append(seen)
            local[i, str(step)] = learned or None
    return [local.get((i, str(step))) for i, step in enumerate(steps[: len(pads)])]


class Kept:
    """What the looks at one tensor keep for each other and for the step itself: flat tensors along its entries.

    A look that finds something which later ones need again may `put` it and `get` it back, cut as deltas are then.
    """

    def __init__(self, pad: dict[str, Tensor], at: int, numel: int):
        self.pad, self.at, self.numel = pad, at, numel

    def put(self, name: str, values: Tensor) -> None:
        """Keep ``values``, one for each entry of these deltas."""
        if name not in self.pad:
            self.pad[name] = values.new_empty(max(self.numel, values.numel()))
        self.pad[name][self.at : self.at + values.numel()] = values.reshape(-1)

    def get(self, name: str, numel: int) -> Tensor | None:
        """Return the flat values of the next ``numel`` entries; None where none are kept."""
        return self.pad[name][self.at : self.at + numel] if name in self.pad else None


class _Run:
    """The steps over one tensor: generators, ingredients and surveys stay from piece to piece."""

    def __init__(
        self,
        job: Job,
        name: str,
        steps: Sequence[Step],
        surveys: list[Any],
        pads: Sequence[dict[str, Tensor]],
        shape: tuple[int, ...],
    ):
        self.name, self.steps, self.surveys, self.pads, self.shape = name, steps, surveys, pads, shape
        self.numel = math.prod(shape)
        self.experts = tuple(job.experts)
        self.at = next((k for k, step in enumerate(steps) if step.kind == "combine"), len(steps))
        self.draws = any("rng" in takes(step.function) for step in steps)
        self.tail = _tail(steps, self.at)
        self.extra = [_ingredients(job, name, step) for step in steps]
        self.rows = {
            k: _rows(surveys[k], 1 if k > self.at else len(self.experts))
            for k, step in enumerate(steps)
            if step.kind == "edit"
        }
        self.rngs = rngs(job, name, steps)

    @property
    def linear(self) -> bool:
        """Whether the merged delta is a weighted sum of the experts' whatever they are: every step says so."""
        return self.at < len(self.steps) and stays_linear(self.steps)

    def takes_factors(self, zeros: bool) -> bool:
        """Tell whether deltas may come as factors: where all is linear, or an align step stands first that takes them."""
        return (self.linear and not zeros) or any(map(by_factors, self.steps[:1]))

    def coefficients(self) -> Tensor:
        """Return the weight of each expert in a linear merge: what becomes of as many unit vectors."""
        unit = torch.eye(len(self.experts), dtype=torch.float64)
        return self(0, torch.zeros(len(unit), dtype=unit.dtype), unit)

    def started(self, held: Sequence[Factors]) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
        """Return the first step's coordinates and way back, found from factors; None where it has no form for them."""
        step = self.steps[0]
        function = by_factors(step)
        return None if function is None else named(replace(step, function=function), self.name, held, shape=self.shape)

    def __call__(
        self,
        at: int,
        base: Tensor,
        deltas: Tensor,
        restore: Callable[[Tensor], Any] | None = None,
        *,
        factored: bool = False,
    ) -> Any:
        """Return what the steps make of deltas, or of coordinates that the first step has found, with the way back.

        With ``factored`` the merged delta stays `Factors` if it comes back so and the edits after are linear.
        """
        if restore is not None:
            return self._steps(range(1, len(self.steps)), at, base, deltas, restore, factored)
        numel = base.numel()
        if not 0 < self.tail < len(self.steps) or numel <= CUT:
            return self._steps(range(len(self.steps)), at, base, deltas, None, factored)
        # steps that need the whole tensor first, then the others as they would be without them: cut by cut
        value = self._steps(range(self.tail), at, base, deltas).flatten(1)
        out, flat = torch.empty(numel, dtype=value.dtype), base.reshape(-1)
        for start in range(0, numel, CUT):
            cut = slice(start, start + CUT)
            out[cut] = self._steps(range(self.tail, len(self.steps)), at + start, flat[cut], value[:, cut])
        return out.reshape(base.shape)

    def _steps(
        self,
        some: range,
        at: int,
        base: Tensor,
        deltas: Tensor,
        restore: Callable[[Tensor], Any] | None = None,
        factored: bool = False,
    ) -> Any:
        value: Any = deltas
        restores = [] if restore is None else [restore]
        for k in some:
            step = self.steps[k]
            given = {"name": self.name, "base": base, "numel": self.numel, "experts": self.experts}
            if step.kind == "edit":
                value = self._edit(k, step, at, value, given)
                continue
            given |= {"survey": self.surveys[k], "rng": self.rngs.get((k, "merged"))}
            given["kept"] = Kept(self.pads[k], at, self.numel)
            given |= _cut(step, self.extra[k], Piece(at, base, base, None), self.shape, len(self.experts))
            if step.kind == "align":
                value, restore = named(step, self.name, value, **given)
                restores.append(restore)
            else:
                value = named(step, self.name, value, **given)
                while restores:
                    value = restores.pop()(value)
                if isinstance(value, tuple):
                    stays = factored and stays_linear(self.steps[k + 1 :])
                    value = Factors(*value) if stays else Factors(*value).product(self.shape)
                if not _finite(value):
                    raise SentenceError(f"{step}: makes NaN or inf in tensor '{self.name}'")
        return value

    def _edit(self, k: int, step: Step, at: int, value: Any, given: dict[str, Any]) -> Any:
        if isinstance(value, Factors):
            return Factors(self._edit(k, step, at, value.left, given), value.right)
        merged = k > self.at
        rows = value[None] if merged else value
        whos = ("merged",) if merged else self.experts
        for r, (row, who) in enumerate(zip(rows, whos, strict=True)):
            extra = _cut(step, self.extra[k], Piece(at, row, row, None), self.shape, len(whos))
            own = {n: t[r] if t is not None and t.ndim > row.ndim else t for n, t in extra.items()}
            given |= {"survey": self.rows[k][r], "rng": self.rngs.get((k, who)), **step.for_one(r)}
            edited = named(step, self.name, row, **given, **own)
            if edited.shape != row.shape:
                raise SentenceError(f"{step}: gives shape {[*edited.shape]} for {[*row.shape]} (tensor '{self.name}')")
            if merged:
                return edited
            row.copy_(edited)  # back into the buffer: a stack of the results would be as large once more
        return value


def _tail(steps: Sequence[Step], combine: int) -> int:
    """Return the first of the steps at the end, the combining one among them, that can take a tensor in cuts.

    The number of steps if there are none such, or if a step before them has to be undone on the whole tensor.
    """
    first = len(steps)
    while first and steps[first - 1].elementwise:
        first -= 1
    aligned = any(step.kind == "align" for step in steps)
    return first if first <= combine < len(steps) and not aligned else len(steps)


def stays_linear(steps: Sequence[Step]) -> bool:
    """Tell whether steps do no more than weigh deltas and add them, which their modules say (``LINEAR = True``)."""
    return all(step.hook("LINEAR") for step in steps)


def by_factors(step: Step) -> Callable[..., Any] | None:
    """Return the form of an align step that takes factors: ``NAME_factors`` beside it."""
    return step.hook(f"{step.function.__name__}_factors") if step.kind == "align" else None


def _turns(step: Step) -> Callable[..., Any] | None:
    """Return the form of an align step that takes the experts' deltas in turn: ``NAME_in_turn`` beside it."""
    return step.hook(f"{step.function.__name__}_in_turn") if step.kind == "align" else None


def _finite(value: Any) -> bool:
    tensors = value if isinstance(value, Factors) else (value,)
    return all(math.isfinite(t.detach().sum().item()) or bool(torch.isfinite(t).all()) for t in tensors)


def _rows(totals: Any, count: int) -> list[Any]:
    """Return each expert's part of the totals of an edit."""
    return [None if totals is None else [total[r] for total in totals] for r in range(count)]


def _ingredients(job: Job, name: str, step: Step) -> dict[str, Tensor | None]:
    return {n: job.ingredients[n].of(name) if n in job.ingredients else None for n in step.ingredients}


def _cut(
    step: Step, extra: Mapping[str, Tensor | None], piece: Piece, shape: tuple[int, ...], experts: int
) -> dict[str, Tensor | None]:
    """Return the entries of the ingredients that lie under a piece, for ingredients of the tensor's own shape.

    One of that shape, or with one such tensor an expert. All others are handed on as they are: a Gram matrix may have
    as many entries as the tensor.
    """
    if not extra:
        return {}
    cut = slice(piece.at, piece.at + piece.base.numel())

    def under(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and tensor.shape == shape:
            return tensor.reshape(-1)[cut].reshape(piece.base.shape)
        if tensor is not None and tensor.shape == (experts, *shape):
            if not shape and name not in step.entrywise:
                return tensor  # a number an expert, not an entry of each of their tensors
            return tensor.reshape(experts, -1)[:, cut].reshape(experts, *piece.base.shape)
        return tensor

    return {name: under(name, tensor) for name, tensor in extra.items()}


def merge_each(
    job: Job,
    surveys: Surveys,
    put: Callable[[str, Piece], None],
    *,
    only: Sequence[str] | None = None,
    done: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> None:
    """Merge the job's tensors (or ``only`` some) and hand each piece, its value the merged delta or None, to ``put``.

    ``put`` is called from several threads, for one tensor in the order of its pieces; then ``done``.
    """

    def one(name: str) -> None:
        large = job.sizes([name])[0] >= LARGE and not all(step.elementwise for step in job.steps(name))
        if large:
            give_back()  # what smaller ones left
        for piece in through(job, name, None, surveys):
            put(name, piece)
        if done is not None:
            done(name)
        if large:
            give_back()

    names = job.names if only is None else only
    with one_thread_each() as workers, progress(f"merge {job.sentence}", len(names)) as tick:
        for _ in in_order(one, names, job.sizes(names), workers):
            tick(1)


def is_float(weights: Mapping[str, Tensor], name: str) -> bool:
    """Tell whether a tensor is floating point, from the header where there is one."""
    return header(weights, name)[0].startswith(("F", "BF"))


def named(step: Step, tensor: str, *args: Any, **given: Any) -> Any:
    """Call a step; its own terse error gets sentence word and tensor added, once."""
    with told_of(step, tensor):
        return step.call(*args, **given)


@contextmanager
def told_of(step: Step, tensor: str) -> Iterator[None]:
    """Say with an error of a step, of its looks too, which step and tensor it was."""
    try:
        yield
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        if not tensor and isinstance(error, RuntimeError):
            raise  # of a trial, which says so
        where = f" (tensor '{tensor}')" if tensor else ""
        raise SentenceError(f"{step}: {error}{where}") from None
