"""What a merge will need: bytes, memory, time, worked out from headers and the sentence alone."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalog import step as told_of
from .errors import MerganserError
from .weights.header import header
from .weights.quantised import as_stored
from .weights.stored import DTYPES

if TYPE_CHECKING:
    from .job import Job
    from .sentence import Step

TORCH = 220 << 20  # bytes that a process with torch has before it merges anything
# nanoseconds of one core for an entry of one model, measured on an EPYC of 2025 with deltas in memory: reading it and
# taking the difference; a step that is element-wise, one that draws random numbers, one that sees whole tensors
READ, STREAM, RANDOM, WHOLE = 4.0, 4.0, 20.0, 40.0
# the same for each unit of the matrix's smaller side, of steps about products of matrices: what tsv and dc take, and the
# others' own; wudi's is that of its exact solution, and that of a step of its descent
SPECTRAL = 0.15
OWN = {"iso_c": 0.03, "esm": 0.05, "cart": 0.08, "iso_cts": 0.1, "knots": 0.4, "wudi": 0.45, "core": 1.0}
DESCENT = 0.016
DISK = 1.5e9  # bytes a second from a page cache or a good solid-state disk


def nbytes(head: tuple[str, tuple[int, ...]]) -> int:
    """Return the bytes of a tensor of this dtype and shape."""
    return DTYPES.get(head[0], ("", 1))[1] * math.prod(head[1])


def numbers(
    jobs: "Sequence[Job]",
    sources: Mapping[str, Mapping[str, Any]],
    written: Mapping[str, tuple[str, tuple[int, ...]]],
    part: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return what jobs read, write and need. ``sources``: the models as they lie there; ``written``: the result.

    ``memory`` is anonymous memory at the peak: cuts where every step is element-wise and none looks at single tensors,
    else as many whole tensors in fp32 as are in flight, each of them (experts + 3) times. ``seconds`` is a rough model,
    right within a factor of three where nothing else runs.
    """
    from .loop import looks_again, read_once
    from .parallel import ROOM

    work, flying, looks, whole = 0.0, 0, 0, 0
    sizes: dict[str, int] = {}
    for job in jobs:
        heavy = [0]
        for name in job.names:
            entries, steps = math.prod(header(job.base, name)[1]), job.steps(name)
            sizes[name] = entries
            if not job.touched(name):  # what no adapter touches is copied
                continue
            work += _nanoseconds(job, name, steps, entries) * 1e-9
            cut, again = all(step.elementwise for step in steps), looks_again(steps)
            once = read_once(steps)  # for all looks at this tensor alone
            looks = max(looks, sum(len(step.looks) for step in steps if not (once and step.scope == "tensor")))
            if again or not cut:
                heavy.append(entries)
        room = max(ROOM // max(1, len(job.experts)), *heavy)
        flying = max(flying, (len(job.experts) + 3) * min(sum(heavy), room))
        whole += len(heavy) - 1
    share = part[1] if part else 1
    read = sum(nbytes(header(weights, name)) for weights in map(as_stored, sources.values()) for name in weights)
    out = sum(map(nbytes, written.values())) // share
    largest = max(sizes, key=lambda n: sizes[n], default="")
    return {
        "tensors": len(written),
        "merged": len(sizes),
        "bytes_read": read // share,
        "bytes_written": out,
        "passes": 1 + looks,
        "whole_tensors": whole,
        "largest": {"tensor": largest, "bytes_fp32": 4 * sizes.get(largest, 0)},
        "memory": TORCH + (64 << 20) + 4 * flying,
        "memory_free": free_memory(),
        "seconds": round(1 + (read / share + out) / DISK + work / share / threads(), 1),
        "threads": threads(),
    }


def _nanoseconds(job: "Job", name: str, steps: "Sequence[Step]", entries: int) -> float:
    shape = header(job.base, name)[1]
    side = min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 1
    looks = sum(len(step.looks) for step in steps)
    each = READ + sum(_cost(step, side) for step in steps)
    return (1 + looks) * each * entries * (len(job.experts) + 1)


def _cost(step: "Step", side: int) -> float:
    try:
        told = told_of(step.name)
    except MerganserError:  # a function of somebody's own
        return STREAM if step.elementwise else WHOLE
    if step.name == "wudi" and step.knobs.get("solve", "adam") == "adam":
        return DESCENT * side * step.knobs.get("steps", told.knobs["steps"])
    if told.cost == "spectral":
        return OWN.get(step.name, SPECTRAL) * side
    return RANDOM if "rng" in told.takes else STREAM if step.elementwise else WHOLE


def threads() -> int:
    """Return how many tensors are merged side by side."""
    import torch

    return torch.get_num_threads()


def free_disk(folder: Path) -> int | None:
    """Return the bytes free where ``folder`` is or will be."""
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError:
        return None


def writable(folder: Path) -> bool:
    """Tell whether files can be made in ``folder``, or the folder itself where it does not exist yet."""
    return os.access(existing(folder), os.W_OK | os.X_OK)


def existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def free_memory() -> int | None:
    """Return the bytes of memory available: the machine's, or what the process's group may still take."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no group, or "max"
        pass
    return min(found, default=None)
