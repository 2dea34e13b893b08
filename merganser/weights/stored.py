"""Weights on disk: safetensors shards read lazily, as a mapping from name to tensor.

The headers are read with the standard library alone, so names, shapes and sizes are known without torch's import.
Format: a little-endian uint64 n, n bytes of JSON, the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import json
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = "convert it with `from safetensors.torch import save_file; save_file(torch.load(F, weights_only=True), OUT)`"


class Entry(NamedTuple):
    """Where one tensor lies: its shard, dtype name ("F32", "BF16"...), shape and byte range in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Stored(Mapping[str, "Tensor"]):
    """A checkpoint on disk: a folder of safetensors (sharded or not) or one `.safetensors` file; read on touch."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shards = _shards(self.path)
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        for shard in self.shards:
            entries, metadata = read_header(shard)
            if twice := sorted(entries.keys() & self.entries.keys()):
                raise WeightsError(
                    f"{self.path}: tensor '{twice[0]}' is in two shards ({self.entries[twice[0]].shard.name}, "
                    f"{shard.name}): delete the shards of the older model"
                )
            self.entries |= entries
            self.metadata |= metadata
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> "Tensor":
        shard = self.entries[name].shard
        if shard not in self._open:
            from safetensors import safe_open

            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"Stored({str(self.path)!r}: {len(self)} tensors, {self.nbytes / 1e6:.1f} MB)"

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(e.stop - e.start for e in self.entries.values())


def read_header(shard: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries and the metadata of one safetensors file. Raises WeightsError if it is not one or is cut."""
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header: dict[str, Any] = json.loads(file.read(length) if length <= size else b"")
        metadata = header.pop("__metadata__", {})
        begin = 8 + length
        entries = {
            name: Entry(
                shard, e["dtype"], tuple(e["shape"]), begin + e["data_offsets"][0], begin + e["data_offsets"][1]
            )
            for name, e in header.items()
        }
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        raise WeightsError(f"{shard}: not a safetensors file (its header cannot be read)") from None
    if any(e.stop > size for e in entries.values()):
        raise WeightsError(f"{shard}: the file is cut short ({size} bytes); copy or download it again")
    return entries, metadata


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in PICKLES:
            raise WeightsError(f"{path}: a pickle can run code when it is read, so it is refused; {_CONVERT}")
        return [path]
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; give a folder with model.safetensors, or the file itself")
    if (index := path / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise WeightsError(f"{index}: not a shard index (no 'weight_map')") from None
        if missing := [n for n in names if not (path / n).is_file()]:
            raise WeightsError(f"{path}: {INDEX} names {missing[0]}, which is missing; copy or download it again")
        return [path / n for n in names]
    if (single := path / "model.safetensors").is_file():
        return [single]
    if found := sorted(path.glob("*.safetensors")):
        return found
    if pickles := sorted(p for p in path.iterdir() if p.suffix in PICKLES):
        raise WeightsError(
            f"{path}: only a pickle ({pickles[0].name}) here; a pickle can run code when it is read, so it is refused; "
            f"{_CONVERT}"
        )
    raise WeightsError(f"{path}: no safetensors file in this folder")
