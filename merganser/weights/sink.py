"""Where merged tensors go: preallocated safetensors shards, written at their offsets in any order, by any thread.

The header needs only dtypes and shapes, which the base's header knows, so it is written first; every tensor then has
its place. All is staged in a hidden folder until it is complete: a folder never holds half a model.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import struct
import time
import weakref
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .header import header as header_of
from .settle import COMMIT, INDEX, NEW, PARTIAL, SINGLE, busy, clear, commit, fault, finish, lock, sync
from .stored import DTYPES as KNOWN
from .stored import PART, PART_KEY, Stored, patiently, weight_files

DTYPES = {getattr(torch, dtype): name for name, (dtype, _) in KNOWN.items() if hasattr(torch, dtype)}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
PROGRESS = "progress.json"
SHARD_SIZE = 5 * 10**9  # bytes, as the Hub has them
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", re.IGNORECASE)
Spec = Mapping[str, tuple[str, tuple[int, ...]]]


def spec_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype name and shape of every tensor, from the headers where there are any."""
    spec = {name: header_of(weights, name) for name in weights}
    for name, (dtype, _) in spec.items():
        _check_dtype(name, dtype)
    return spec


class Sink:
    """A folder being filled with one model: ``put`` every tensor of ``spec`` in any order, then ``close``.

    Nobody else can write into ``folder`` meanwhile, and what was there stays as it is until ``close``. Names like
    ``2_Dense/linear.weight`` go to the sub-folder (a module of sentence-transformers). What is put into ``staging``
    (config, tokenizer, cards) appears together with the weights. ``missing``: names that are not complete yet.
    ``single``: the file's name; one of another name than a model's is never cut into shards.
    ``key``: says what is being made; a process that was killed after some time leaves what it had done, and the next
    Sink with the same key, spec and metadata goes on with it.

    Raises WeightsError: a folder that is being written by another process, that cannot be written, or has no room.
    """

    every = 10.0  # seconds between two entries in the journal of what is done

    def __init__(
        self,
        folder: str | Path,
        spec: Spec,
        *,
        metadata: Mapping[str, str] | None = None,
        shard_size: int = SHARD_SIZE,
        single: str = SINGLE,
        key: str | None = None,
    ):
        self.folder, self.key, self.single = Path(folder), key, single
        self.staging = self.folder / PARTIAL / NEW
        self.missing = set(spec)
        self.offsets: dict[str, tuple[int, int, int]] = {}  # file, first byte, bytes
        self._dtypes = {name: _TORCH[_check_dtype(name, dtype)] for name, (dtype, _) in spec.items()}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        self._files: list[int] = []
        self._guard, self._noting, self._noted = Lock(), Lock(), time.monotonic()
        for part, names in _by_part(spec).items():
            self._lay_out(part, {n: spec[n] for n in names}, metadata or {}, shard_size)
        with self.told():
            self._made = _make(self.folder)
            if (file := lock(self.folder)) is None:
                raise busy(self.folder)
            self._let_go = weakref.finalize(self, _close, self._files, file)
            try:
                self._begin()
            except BaseException:
                self.abandon()
                raise

    def _lay_out(self, part: str, spec: Spec, metadata: Mapping[str, str], shard_size: int) -> None:
        """Decide on the shards of one part: their names, headers and sizes, and where each tensor lies."""
        groups = (
            _group(spec, shard_size)
            if self.single == SINGLE
            else [sorted(spec, key=lambda n: (-KNOWN[spec[n][0]][1], n))]
        )
        weight_map: dict[str, str] = {}
        for k, group in enumerate(groups):
            shard = self.single if len(groups) == 1 else f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
            told = {"format": "pt", **metadata, **({PART_KEY: part[:-1]} if part else {})}
            header: dict[str, Any] = {"__metadata__": told}
            at = 0
            for name in group:
                size = nbytes(*spec[name])
                header[name[len(part) :]] = {
                    "dtype": spec[name][0],
                    "shape": list(spec[name][1]),
                    "data_offsets": [at, at + size],
                }
                at += size
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes, as the format asks
            begin = 8 + len(text)
            self._headers[part + shard] = struct.pack("<Q", len(text)) + text
            self._sizes[part + shard] = begin + at
            for name in group:
                start, stop = header[name[len(part) :]]["data_offsets"]
                self._places[name] = (part + shard, begin + start, stop - start)
                weight_map[name[len(part) :]] = shard
        if len(groups) > 1:
            total = sum(nbytes(*told) for told in spec.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self._headers[part + INDEX] = (json.dumps(index, indent=2) + "\n").encode()
            self._sizes[part + INDEX] = len(self._headers[part + INDEX])

    def _begin(self) -> None:
        """Finish what a crash left, take up what can be resumed, and reserve the room."""
        if (self.folder / PARTIAL / COMMIT).exists():
            finish(self.folder)
        done = self._resumable()
        if done is None:
            (self.folder / PARTIAL / PROGRESS).unlink(missing_ok=True)  # before what it tells of
            shutil.rmtree(self.staging, ignore_errors=True)
        else:
            self.missing.difference_update(done)
        self.staging.mkdir(exist_ok=True)
        self._check_room()
        files = {shard: self._allocate(shard) for shard in self._sizes}
        self.offsets = {name: (files[shard], start, size) for name, (shard, start, size) in self._places.items()}

    def _resumable(self) -> list[str] | None:
        """Return the names that an earlier process with the same key had done, None if there was none."""
        try:
            told = json.loads((self.folder / PARTIAL / PROGRESS).read_text())
            for shard, header in self._headers.items():
                with (self.staging / shard).open("rb") as file:
                    if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != self._sizes[shard]:
                        return None
            if self.key is None or told["key"] != self.key:
                return None
            done = [name for name in told["done"] if name in self.missing]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.staging).as_posix() not in self._sizes:
                path.unlink()  # an earlier card; the caller puts its own
        return done

    def _check_room(self) -> None:
        there = (self.staging / shard for shard in self._sizes)
        have = sum(path.stat().st_blocks * 512 for path in there if path.exists())
        needs, free = sum(self._sizes.values()) - have, shutil.disk_usage(self.folder).free
        if needs > free:
            raise WeightsError(
                f"{self.folder}: needs {_bytes(needs)}, and {_bytes(free)} are free on this disk; make room, or give a "
                f"folder on another disk (an older model there is kept until the new one is complete)"
            )

    def _allocate(self, shard: str) -> int:
        path = self.staging / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        file = patiently(lambda: os.open(path, os.O_CREAT | os.O_RDWR, 0o644))
        self._files.append(file)
        _write(file, memoryview(self._headers[shard]), 0)
        _reserve(file, self._sizes[shard])
        return file

    def put(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Write entries [at, at + tensor.numel()) of a tensor at their place; the whole tensor is done with that."""
        if name not in self.offsets:
            raise WeightsError(f"{self.folder}: tensor '{name}' was not announced")
        file, offset, size = self.offsets[name]
        if tensor.dtype is not self._dtypes[name]:
            raise WeightsError(f"tensor '{name}' is {tensor.dtype} where {self._dtypes[name]} was announced")
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = whole.view(torch.uint8).numpy().data
        start = at * tensor.element_size()
        if at < 0 or start + len(data) > size:
            raise WeightsError(f"tensor '{name}' has bytes {start} to {start + len(data)}; {size} were announced")
        with self.told():
            _write(file, data, offset + start)
        if len(data) == size:
            self.done(name)

    def done(self, name: str) -> None:
        """Say that a tensor is complete."""
        with self._guard:
            self.missing.discard(name)
            if self.key is None or time.monotonic() - self._noted < self.every:
                return
            self._noted = time.monotonic()
        self._note()

    def _note(self) -> None:
        """Write down what is complete, once it would outlast a power cut."""
        with self.told(), self._noting:
            done = sorted(self.offsets.keys() - self.missing.copy())
            for file in self._files:
                getattr(os, "fdatasync", os.fsync)(file)  # macOS has only the latter
            journal = self.folder / PARTIAL / PROGRESS
            partial = journal.with_suffix(".new")
            partial.write_text(json.dumps({"key": self.key, "done": done}))
            sync(partial)
            partial.replace(journal)
        self._noted = time.monotonic()

    def close(self) -> Stored:
        """Put the model and what is staged beside it in the place of the older one, all or nothing, and return it."""
        if self.missing:
            raise WeightsError(
                f"{self.folder}: {len(self.missing)} tensors were never written, first {min(self.missing)}"
            )
        try:
            with self.told():
                commit(self.folder, weight_files(self.folder))
        finally:
            self.abandon()
        return Stored(self.folder)

    def abandon(self) -> None:
        """Remove what was written so far, and let go of the folder. A commit that has begun is not taken back."""
        if self._let_go.alive:
            clear(self.folder)
            self._let_go()
            with contextlib.suppress(OSError):
                for place in self._made:
                    place.rmdir()  # only if there is nothing in it

    def leave(self) -> None:
        """Let go of the folder as `abandon` does, but keep what is done for the next Sink with the same key."""
        if self._let_go.alive:
            if self.key is not None:
                self._note()
            self._let_go()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what the system says while writing here, into `staging` too, into one clear WeightsError."""
        try:
            yield
        except OSError as error:
            raise fault(self.folder, error) from None


def _make(folder: Path) -> list[Path]:
    """Make a folder and return those that were not there, the innermost first."""
    made = []
    place = folder
    while not place.exists():
        made.append(place)
        place = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _close(files: list[int], lock: int) -> None:
    for file in (*files, lock):
        os.close(file)
    files.clear()


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _reserve(file: int, size: int) -> None:
    """Give a file its size and its room on the disk, so that a full disk is told now and not hours later."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(file, size)


def _check_dtype(name: str, dtype: str) -> str:
    if dtype not in _TORCH:
        raise WeightsError(f"tensor '{name}' is {dtype}, which safetensors or this torch does not hold")
    return dtype


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes."""
    return KNOWN[dtype][1] * prod(shape)


def _by_part(spec: Spec) -> dict[str, list[str]]:
    """Return the names of each part: those of module folders by folder, all others together under ""."""
    parts: dict[str, list[str]] = {}
    for name in spec:
        place = name.rpartition("/")[0]
        parts.setdefault(f"{place}/" if PART.fullmatch(place) else "", []).append(name)
    return parts or {"": []}


def shard_bytes(told: int | str | None) -> int:
    """Return the bytes of ``2_000_000_000``, ``"2GB"`` or ``"2GiB"``; None: 5 GB. Raises WeightsError for all else."""
    if told is None:
        return SHARD_SIZE
    found = None if isinstance(told, bool | float) else _SIZE.fullmatch(str(told).strip())
    size = 0
    if found is not None:
        unit = (found[2] or "").lower()
        power = "kmgt".index(unit[0]) + 1 if unit else 0
        size = int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** power)
    if size < 1:
        raise WeightsError(f"a shard's size is a number of bytes, or such as 5GB, 500MB or 2GiB, got {told!r}")
    return size


def _group(spec: Spec, shard_size: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    # larger elements first keeps every tensor aligned to its own element size
    for name in sorted(spec, key=lambda n: (-KNOWN[spec[n][0]][1], n)):
        size = nbytes(*spec[name])
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
