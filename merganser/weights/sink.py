"""Where merged tensors go: preallocated safetensors shards, written at their offsets in any order.

The header needs only dtypes and shapes, which the base's header knows, so it is written first; every tensor then has
its place. Shards carry a temporary name until all are complete: a folder never holds half a model.
"""

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .stored import INDEX, Stored

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
Spec = Mapping[str, tuple[str, tuple[int, ...]]]


def spec_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype name and shape of every tensor, from the headers where there are any."""
    if isinstance(weights, Stored):
        return {name: (e.dtype, e.shape) for name, e in weights.entries.items()}
    return {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in weights.items()}


class Sink:
    """A folder being filled with one model: ``put`` every tensor of ``spec`` in any order, then ``close``."""

    def __init__(
        self, folder: str | Path, spec: Spec, *, metadata: Mapping[str, str] | None = None, shard_size: int = 5 * 10**9
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.missing = set(spec)
        self.offsets: dict[str, tuple[int, int, int]] = {}
        self.files: list[int] = []
        self.weight_map: dict[str, str] = {}
        groups = _group(spec, shard_size)
        self.names = [_shard_name(k, len(groups)) for k in range(len(groups))]
        for k, group in enumerate(groups):
            self._allocate(k, {n: spec[n] for n in group}, {"format": "pt", **(metadata or {})})

    def _allocate(self, k: int, spec: Spec, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, (dtype, shape) in spec.items():
            size = _nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes, as the format asks
        file = os.open(self._partial(k), os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.write(file, struct.pack("<Q", len(text)) + text)
        os.ftruncate(file, 8 + len(text) + at)
        self.files.append(file)
        for name in spec:
            start, stop = header[name]["data_offsets"]
            self.offsets[name] = (file, 8 + len(text) + start, stop - start)
            self.weight_map[name] = self.names[k]

    def _partial(self, k: int) -> Path:
        return self.folder / f".{self.names[k]}.partial"

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place."""
        file, offset, size = self.offsets[name]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if len(data) != size:
            raise WeightsError(f"tensor '{name}' has {len(data)} bytes where {size} were announced")
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written
        self.missing.discard(name)

    def close(self) -> Stored:
        """Give the shards their names, remove those of an earlier model, and return the finished model."""
        if self.missing:
            raise WeightsError(
                f"{self.folder}: {len(self.missing)} tensors were never written, first {min(self.missing)}"
            )
        for file in self.files:
            os.fsync(file)
            os.close(file)
        (self.folder / INDEX).unlink(missing_ok=True)
        for old in self.folder.glob("model*.safetensors"):
            if SHARD.fullmatch(old.name):
                old.unlink()
        for k, name in enumerate(self.names):
            self._partial(k).rename(self.folder / name)
        if len(self.names) > 1:
            total = sum(size for _, _, size in self.offsets.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return Stored(self.folder)

    def abandon(self) -> None:
        """Remove what was written so far."""
        for k, file in enumerate(self.files):
            os.close(file)
            self._partial(k).unlink(missing_ok=True)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = SIZES.get(dtype, 1)
    for n in shape:
        size *= n
    return size


def _group(spec: Spec, shard_size: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    # larger elements first keeps every tensor aligned to its own element size
    for name in sorted(spec, key=lambda n: (-SIZES.get(spec[n][0], 1), n)):
        size = _nbytes(*spec[name])
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _shard_name(k: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"
