"""Read one tensor of base and experts: cut by cut, as deltas, and stop where a number is not finite."""

import contextlib
import math
import mmap
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import WeightsError
from .job import Job
from .weights.adapter import Factors
from .weights.header import factors, header, pieces, shape_of, touches

HUGE = 1 << 22  # bytes


class Cut(NamedTuple):
    """Entries of a flattened tensor as `read` gives them; ``moved``: whether any delta is not zero."""

    at: int
    origin: Tensor
    base: Tensor
    deltas: Tensor
    moved: bool


def read(job: Job, name: str, cut: int | None, shape: tuple[int, ...], *, hold: bool = False) -> Iterator[Cut]:
    """Yield a tensor cut by cut: place, base as stored and as computed with, deltas ``[experts, n]``, whether any moved.

    ``cut`` is the number of entries in a piece; None gives the whole tensor in its shape. The deltas lie in a buffer
    that the next piece overwrites, unless ``hold``. Raises WeightsError, naming tensor and model, at a value that is
    not finite.
    """
    numel, kind = math.prod(shape), torch.float64 if header(job.base, name)[0] == "F64" else torch.float32
    step = max(1, min(cut or numel, numel))
    parts = [_parts(weights, name, step) for weights in job.experts.values()]
    at = 0
    # splitting once is a tenth of the time of slicing each piece
    for stored, *theirs in zip(pieces(job.base, name, step), *parts, strict=False):
        n = stored.numel()
        base = stored.to(kind)
        if hold or at == 0:
            buffer = torch.empty(len(parts), n, dtype=kind) if cut else _paged(len(parts), n, kind)
            rows = list(buffer)
        if job.seen:
            job.seen("base", name, at, stored)
        for row, (piece, whole), expert in zip(rows, theirs, job.experts, strict=True):
            out = row if n == len(row) else row[:n]
            if not whole:  # a delta, or None where the expert leaves the tensor alone
                if isinstance(piece, Factors):
                    torch.mm(*piece, out=out.view(len(piece.left), -1))
                else:
                    out.zero_() if piece is None else out.copy_(piece)
                continue
            if job.seen:
                job.seen(expert, name, at, piece)
            # copying first, then subtracting in place, is faster than a subtraction of two dtypes
            torch.sub(piece, base, out=out) if piece.dtype == kind else out.copy_(piece).sub_(base)
        deltas = buffer if n == buffer.shape[1] else buffer[:, :n]
        total = deltas.sum().item()
        if not math.isfinite(total):
            _check_finite(job, name, deltas)
        moved = total != 0 or bool(deltas.any())
        if cut is None:
            base, deltas = base.reshape(shape), deltas.reshape(len(parts), *shape)
        yield Cut(at, stored, base, deltas, moved)
        at += n


def _paged(rows: int, n: int, kind: torch.dtype) -> Tensor:
    """Return a buffer; a large one in pages of 2 MiB, since those of 4 KiB take the system four times as long to clear."""
    size = rows * n * kind.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, n, dtype=kind)
    place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        place.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(place, dtype=kind).view(rows, n)


def _parts(weights: Mapping[str, Tensor], name: str, step: int) -> Iterator[tuple[Any, bool]]:
    """Yield an expert's tensor in pieces, or where it is known (an adapter's) what it adds to the base's; and which."""
    if not touches(weights, name):
        return repeat((None, False))
    low = factors(weights, name)
    if low is not None:
        whole = step >= math.prod(shape_of(weights, name)) and low.left.dtype == low.right.dtype
        return iter([(low, False)]) if whole else ((piece, False) for piece in low.pieces(step))
    return ((piece, True) for piece in weights[name].detach().reshape(-1).split(step))


def _check_finite(job: Job, name: str, deltas: Tensor) -> None:
    if torch.isfinite(deltas).all():
        return
    if not all_finite(job.base[name]):
        raise not_finite("the base", name)
    for who, weights in job.experts.items():
        if not all_finite(weights[name]):
            raise not_finite(f"expert '{who}'", name)
    raise WeightsError(f"tensor '{name}': what an expert adds to the base there is too large for fp32")


def all_finite(values: Tensor) -> bool:
    """Tell whether no entry is NaN or infinite."""
    return bool(torch.isfinite(values.float() if values.element_size() == 1 else values).all())


def not_finite(where: str, name: str) -> WeightsError:
    """Return the error for a model with such a tensor."""
    return WeightsError(f"{where} has NaN or inf in tensor '{name}': repair or leave out that checkpoint")
