"""Exact order statistics of more numbers than fit in memory, by two histograms of their bits.

The bits of a positive fp32 number, read as an integer, are ordered as the number is (negative ones after a flip). So a
histogram of the upper 16 bits (`coarse`) finds the bin that holds the k-th largest number of a model, a histogram of
the lower 16 bits within that bin (`fine`) finds it exactly, and histograms add up over tensors, cuts and processes.

Both are passes of a step; `ranked` reads the numbers off their totals. The bits are handled by numpy, whose integer
operations, comparisons and selections take a fifth to a tenth of torch's time on a CPU.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import hardshrink, pad

CHUNK = 1 << 16  # entries worked on at a time, so that intermediate results stay in the processor's cache
MANY = 1 << 20  # keys that wait to be counted: counting a few at a time would mostly add up empty bins
HALF, LOWER = 1 << 15, 1 << 16  # bins of 15 and of 16 bits
MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
# a count waits for the one before it in the same bin, so many zeros are counted in four bins, by sign and by turns
LANES: NDArray[np.int32] = np.arange(CHUNK, dtype=np.int32) % 2 * LOWER

_REMEMBERED: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
Bits = NDArray[np.int32]
Keys = NDArray[Any]
Look = Callable[..., Any]


class Tally:
    """A histogram of integer keys: ``a + b`` is that of the keys of both. Keys wait uncounted until they are many.

    Keys that differ by a multiple of ``bins`` fall into the same one.
    """

    def __init__(self, bins: int, keys: tuple[Keys, ...] = (), counted: Tensor | None = None):
        self.bins, self.keys, self.counted = bins, keys, counted

    def __add__(self, other: "Tally") -> "Tally":
        counted = [one.counted for one in (self, other) if one.counted is not None]
        both = Tally(self.bins, self.keys + other.keys, reduce(torch.add, counted) if counted else None)
        return both if len(both.keys) < 64 and sum(map(len, both.keys)) < MANY else Tally(self.bins, (), both.tensor())

    def tensor(self) -> Int64[Tensor, "bins"]:
        """Return how many keys fell into each bin."""
        return self._counts

    @cached_property
    def _counts(self) -> Tensor:
        before = torch.zeros(self.bins, dtype=torch.int64) if self.counted is None else self.counted
        if not self.keys:
            return before
        counts = torch.bincount(torch.from_numpy(np.concatenate(self.keys)), minlength=self.bins)
        return before + pad(counts, (0, -len(counts) % self.bins)).view(-1, self.bins).sum(dim=0)


class Tallies:
    """A histogram for each expert: the sum of two is taken expert by expert."""

    def __init__(self, rows: Sequence[Tally]):
        self.rows = tuple(rows)

    def __add__(self, other: "Tallies") -> "Tallies":
        return Tallies([a + b for a, b in zip(self.rows, other.rows, strict=True)])

    def __getitem__(self, row: int) -> Tally:
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self) -> Int64[Tensor, "experts bins"]:
        """Return all histograms as plain numbers."""
        return torch.stack([row.tensor() for row in self.rows])


Histogram = Tally | Tensor
"""``[bins]``: totals may be used as they are, or as the tensor they make."""


def coarse(deltas: Float[Tensor, "experts *cut"], *, signed: bool = False) -> Tallies:
    """Count the upper 16 bits of each expert's |x|, or of x itself if ``signed``, in fp32."""

    def upper(bits: Bits) -> Keys:
        return (bits >> 16) + HALF if signed else (bits >> 16).astype(np.int16)

    if signed:
        return Tallies([_tally(row, LOWER, upper, signed) for row in deltas])
    return Tallies([_spread(row) if _sparse(row) else _tally(row, HALF, upper, signed) for row in deltas])


def fine(deltas: Float[Tensor, "experts *cut"], places: Sequence[Sequence[int]], *, signed: bool = False) -> Tallies:
    """Count the lower 16 bits of those of each expert's entries whose upper bits are one of its ``places``.

    Lower bits that are all zero are left out, since `coarse` tells how many there are: in deltas of bf16 weights they
    are nearly all, and selecting many entries is slow.
    """

    def lower_in(wanted: Sequence[int]) -> Callable[[Bits], Keys]:
        starts = [np.int32(((place - HALF * signed) << 16) + 1) for place in wanted]

        def lower(bits: Bits) -> Keys:
            inside = [_less(bits - start, LOWER - 1) + np.int32(1 + (j << 16)) for j, start in enumerate(starts)]
            return inside[0] if len(inside) == 1 else np.concatenate(inside)

        return lower

    rows = zip(deltas, places, strict=True)
    return Tallies([_tally(row, LOWER * len(wanted), lower_in(wanted), signed) for row, wanted in rows])


def coarse_beyond(kept: Callable[[int, int], Sequence[int]]) -> Look:
    """Return the look that is `coarse`, for thresholds that leave each expert ``kept(size, experts)`` of its entries.

    It need not look where an edit before has left no more than that (see `known_of_left`): then zero is the threshold.
    """

    def look(deltas: Tensor, learned: Sequence[Any]) -> Tallies:
        return coarse(deltas)

    def enough(size: int, left: Sequence[int]) -> Tensor | None:
        if any(n > k for n, k in zip(left, kept(size, len(left)), strict=True)):
            return None
        counts = torch.zeros(len(left), HALF, dtype=torch.int64)
        counts[:, 0] = size
        return counts

    look.enough = enough  # type: ignore[attr-defined]
    return look


def fine_at(found: Callable[[Sequence[Any], int], Sequence[Sequence[int]]]) -> Look:
    """Return the look that is `fine` at the places ``found(learned, experts)``, by the totals of `coarse` among others.

    It need not look where all of them are the lowest bin: magnitudes under 2^-133, of 9e-41, count as zero there. So it is
    where a step before has dropped more than is to be dropped (see `known_before`).
    """

    def look(deltas: Tensor, learned: Sequence[Any]) -> Tallies:
        return fine(deltas, found(learned, len(deltas)))

    def known(learned: Sequence[Any]) -> Tensor | None:
        wanted = found(learned, len(learned[0]))
        return None if any(map(any, wanted)) else torch.zeros(len(wanted), LOWER * len(wanted[0]), dtype=torch.int64)

    look.known = known  # type: ignore[attr-defined]
    return look


def known_before(look: Look, learned: Sequence[Any]) -> Any:
    """Return what a look would find, where that is known of the totals of those before it; None where it has to look."""
    known = getattr(look, "known", None)
    return None if known is None else known(learned)


def known_of_left(look: Look, size: int, left: Sequence[int]) -> Any:
    """Return totals that do for a look where of ``size`` entries at most so many of each expert's are not zero; or None."""
    enough = getattr(look, "enough", None)
    return None if enough is None else enough(size, left)


def size(upper: Histogram) -> int:
    """Return how many numbers a histogram has counted."""
    return _size(_Same(upper))


def places(upper: Histogram, ranks: Sequence[int]) -> list[int]:
    """Return the bins of a `coarse` histogram that hold the k-th largest number, for each k in ``ranks``."""
    return list(_places(_Same(upper), tuple(ranks)))


def ranked(
    upper: Histogram, lower: Histogram, ranks: Sequence[int], *, signed: bool = False
) -> list[tuple[float, int, int]]:
    """Return (value, how many are larger, how many are equal) of the k-th largest number, for each k in ``ranks``.

    ``lower`` is the `fine` histogram at the `places` of the same ranks.
    """
    return list(_ranked(_Same(upper), _Same(lower), tuple(ranks), signed))


def remembered(function: Callable[..., Any], survey: Sequence[Any], *args: Any) -> Any:
    """Return ``function(survey, *args)``, worked out once for a survey: a step is called with the same one for every cut."""
    key = (function.__module__, function.__name__, *map(id, survey), repr(args))
    known = _REMEMBERED.get(key)
    if known is None:
        if len(_REMEMBERED) >= 8:
            _REMEMBERED.clear()
        known = _REMEMBERED[key] = (
            function(survey, *args),
            tuple(survey),
        )  # holding the totals keeps their ids their own
    return known[0]


def look_at(deltas: Tensor, looks: Sequence[Look], **given: Any) -> list[Any]:
    """Return what the looks learn from these deltas alone, as if they were the whole model."""
    learned: list[Any] = []
    for look in looks:
        known = known_before(look, learned)
        learned.append(look(deltas, learned, **given) if known is None else known)
    return learned


def trimmed(x: Float[Tensor, "*shape"], low: float, high: float = math.inf) -> Float[Tensor, "*shape"]:
    """Return the entries with low <= |x| <= high, the others as zero; both are fp32 numbers, not negative."""
    kept = hardshrink(x, float(np.nextafter(np.float32(low), np.float32(0))))
    return kept if high == math.inf else kept - hardshrink(x, high)


def lengths(
    deltas: Float[Tensor, "experts *cut"], lows: Sequence[float], highs: Sequence[float] | None = None
) -> Float[Tensor, "experts 2"]:
    """Return each expert's sum of |x|, and of |x| between its two limits."""
    sums = torch.zeros(len(deltas), 2, dtype=torch.float64)
    for row, x, low, high in zip(sums, deltas.detach(), lows, highs or [math.inf] * len(lows), strict=True):
        for part in x.float().reshape(-1).split(CHUNK):
            row += torch.stack([one.abs().sum(dtype=torch.float64) for one in (part, trimmed(part, low, high))]).cpu()
    return sums


def l1_ratio(whole: Tensor | float, kept: Tensor | float) -> float:
    """Return by what mergekit rescales a sparse delta: |delta|_1 / |sparse|_1, 1 where one of them is below 1e-7."""
    return float(whole) / float(kept) if min(float(whole), float(kept)) >= 1e-7 else 1.0


def first_of_equals(x: Float[Tensor, "*shape"], theta: float, k: int) -> Tensor:
    """Return which k entries are the largest by magnitude; of those equal to ``theta`` the first ones in memory."""
    magnitude = x.detach().float().abs().flatten()
    kept = magnitude > theta
    kept[(magnitude == theta).nonzero()[: k - int(kept.sum()), 0]] = True
    return kept.reshape(x.shape)


def share(density: float, size: int) -> int:
    """Return how many of ``size`` entries a share is: int(density size), at least one."""
    return min(size, max(1, int(density * size)))


def check_density(density: Any) -> float:
    """Return the density; raise ValueError if it is not a number in (0, 1]."""
    if isinstance(density, bool) or not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(f"density must lie in (0, 1], got {density!r}")
    return density


def one_of(knob: str, value: object, words: Sequence[object]) -> None:
    """Raise ValueError if the knob's value is not one of the words."""
    if not any(type(value) is type(word) and value == word for word in words):
        raise ValueError(f"{knob} must be one of {', '.join(map(str, words))}, got {value!r}")


def one_each(knob: str, values: Any, experts: int) -> None:
    """Raise ValueError unless ``values`` are as many as there are experts."""
    listed = isinstance(values, (list, tuple)) or (isinstance(values, Tensor) and values.ndim > 0)
    count = len(values) if listed else None
    if count != experts:
        told = f"{count} given" if count is not None else f"got {values!r}"
        raise ValueError(f"{knob} must hold one number per expert: {told}, {experts} experts")


def per_expert(knob: str, value: float | Sequence[float], experts: int) -> list[float]:
    """Return one number per expert; raise ValueError for another count, or one that is not finite."""
    values: list[float] = list(value) if isinstance(value, (list, tuple, Tensor)) else [value] * experts  # type: ignore[list-item]
    if len(values) != experts:
        raise ValueError(f"{knob} must hold one number per expert: {len(values)} given, {experts} experts")
    if not all(isinstance(x, (int, float, Tensor)) and math.isfinite(x) for x in values):
        raise ValueError(f"{knob} must be finite numbers, got {values}")
    return values


def warn_of_equals(asked: int, kept: int, size: int, scope: str, *, first: bool = False) -> None:
    """Warn where equal magnitudes make the share that is kept more than a point larger than the one asked for.

    Without numbers where every tensor has its own, so that a merge says it once. ``first``: the step can keep the first.
    """
    if kept - asked > 0.01 * size:
        told = f"{kept / size:.1%} of them are kept" if scope == "model" else "a tensor keeps over a point"
        more = f"instead of {asked / size:.1%}" if scope == "model" else "more than its share"
        more += "; equal='first' keeps it" if first and scope != "model" else ""
        warnings.warn(f"many entries have equal magnitudes, as in bf16: {told} {more}", stacklevel=3)


class _Same:
    """A histogram as a key: the same numbers at the same place in memory are the same histogram."""

    def __init__(self, histogram: Histogram):
        self.tensor = histogram if isinstance(histogram, Tensor) else histogram.tensor()
        self.key = (self.tensor.data_ptr(), self.tensor.numel(), self.tensor._version)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.key == other.key


@lru_cache(maxsize=16)
def _size(upper: _Same) -> int:
    return int(upper.tensor.sum())


@lru_cache(maxsize=16)
def _places(upper: _Same, ranks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_locate(upper.tensor, k)[0] for k in ranks)


@lru_cache(maxsize=16)
def _ranked(upper: _Same, lower: _Same, ranks: tuple[int, ...], signed: bool) -> tuple[tuple[float, int, int], ...]:
    found = []
    for k, within in zip(ranks, lower.tensor.split(LOWER), strict=True):
        high, above = _locate(upper.tensor, k)
        within = within.clone()
        within[0] = upper.tensor[high] - within.sum()
        low, more = _locate(within, k - above)
        bits = np.array([(high - HALF * signed) << 16 | low]).astype(np.int32)
        found.append((float(_ordered(bits, signed).view(np.float32)[0]), above + more, int(within[low])))
    return tuple(found)


def _locate(counts: Int64[Tensor, "bins"], k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest key, and how many keys lie in higher bins."""
    reached = counts.flip(0).cumsum(0)
    back = min(int(torch.searchsorted(reached, k)), len(counts) - 1)
    place = len(counts) - 1 - back
    return place, int(reached[back] - counts[place])


def _sparse(row: Tensor) -> bool:
    """Tell whether the first entries are mostly zero."""
    return int(row.detach().reshape(-1)[:256].count_nonzero()) < min(128, row.numel() / 2)


def _spread(row: Tensor) -> Tally:
    """Count the upper bits of |x|, the sign among them, which `Tally` takes for the same."""
    bits = row.detach().reshape(-1).float().cpu().contiguous().numpy().view(np.uint32)
    total = Tally(HALF)
    for at in range(0, len(bits), CHUNK):
        upper = (bits[at : at + CHUNK] >> 16).view(np.int32)
        total += Tally(HALF, (np.add(upper, LANES[: len(upper)], out=upper),))
    return total


def _tally(row: Tensor, bins: int, key: Callable[[Bits], Keys], signed: bool) -> Tally:
    total = Tally(bins)
    for bits in _bits(row, signed):
        total += Tally(bins, (key(bits),))
    return total


def _less(bits: Bits, limit: int) -> Bits:
    """Return those that are less than ``limit`` and not negative: one comparison of the bits as unsigned numbers."""
    return bits[bits.view(np.uint32) < limit]


def _bits(row: Tensor, signed: bool) -> Iterator[Bits]:
    """Yield integers that are ordered as |x|, or as x if ``signed``, in fp32."""
    bits = row.detach().reshape(-1).float().cpu().contiguous().numpy().view(np.int32)
    for at in range(0, len(bits), CHUNK):
        part = bits[at : at + CHUNK]
        yield _ordered(part, signed) if signed else part & MAGNITUDE


def _ordered(bits: Bits, signed: bool) -> Bits:
    """Flip what orders negative numbers the wrong way round; a second time flips it back."""
    return bits ^ (bits >> 31 & MAGNITUDE) if signed else bits
