"""Weights on disk: safetensors shards read lazily, as a mapping from name to tensor.

The headers are read with the standard library alone, so names, shapes and sizes are known without torch's import.
Format: a little-endian uint64 n, n bytes of JSON, the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import errno
import json
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import WeightsError
from .named import Named
from .settle import INDEX, SHARD, SINGLE, settle

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE = "pytorch_model.bin"
MODULES = "modules.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PART = re.compile(r"\d+_\w+(/[\w.-]+)?")  # 2_Dense: how sentence-transformers names the folder of a module
PART_KEY = "merganser.part"  # in the metadata of a part's shards, so that they are known without modules.json
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E8M0": ("float8_e8m0fnu", 1), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1), "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "C64": ("complex64", 8), "F64": ("float64", 8), "I64": ("int64", 8), "U64": ("uint64", 8),
}  # fmt: skip
_HEADER_LIMIT = 100_000_000  # the format's own
# Private and writable: torch cannot tell a read-only page, and writing to one would end the process. Without reserve
# (0x4000), where the system can: no page is meant to be written, and a shard may be larger than the memory.
_MAPPING: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    if sys.platform == "linux"
    else {"access": mmap.ACCESS_COPY}
)
_PICKLE = "a pickle can run code when it is read, so it is refused here; open_weights reads it without"


class Entry(NamedTuple):
    """Where one tensor lies: its shard, dtype name ("F32", "BF16"...), shape and byte range in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Stored(Named):
    """A checkpoint on disk: a folder of safetensors (sharded or not) or one `.safetensors` file; read on touch.

    A sentence-transformers folder is presented whole: the tensors of a module in a sub-folder are called
    ``2_Dense/linear.weight``. A tensor is a view of the mapped file: it is read when it is used, and what is written
    into it stays in this process.

    Raises WeightsError, naming the file, at anything that is missing, cut short, corrupt or contradicts itself.
    """

    NAMES = "entries"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        settle(self.path if self.path.is_dir() else self.path.parent)
        self.shards: list[Path] = []
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._loaded: dict[str, Tensor] = {}
        parts = [(f"{name}/", _part_shards(self.path / name)) for name in parts_of(self.path)]
        for part, shards in ("", _shards(self.path, alone=not parts)), *parts:
            for shard in shards:
                self._add(part, shard)
            if shards and (index := shards[0].parent / INDEX).is_file() and self.path.is_dir():
                self._check_index(part, index)

    def _add(self, part: str, shard: Path) -> None:
        if shard.name != PICKLE:
            entries, metadata, self._stamps[shard] = _read(shard)
            self.metadata |= {k: v for k, v in metadata.items() if k != PART_KEY}
        else:
            from .pickled import Pickled

            loaded = {name: tensor.contiguous() for name, tensor in Pickled(shard).items()}
            entries = {n: Entry(shard, _dtype_name(n, t), tuple(t.shape), 0, t.nbytes) for n, t in loaded.items()}
            self._loaded |= {part + n: t for n, t in loaded.items()}
        self.shards.append(shard)
        for name, entry in entries.items():
            if other := self.entries.get(part + name):
                raise WeightsError(
                    f"{self.path}: tensor '{name}' is in two shards ({other.shard.name}, {shard.name}): "
                    f"delete the shards of the older model"
                )
            self.entries[part + name] = entry

    def _check_index(self, part: str, index: Path) -> None:
        listed = {part + name: index.parent / file for name, file in _read_index(index).items()}
        held = {name: e.shard for name, e in self.entries.items() if e.shard.parent == index.parent}
        if wrong := sorted(name for name in listed if held.get(name) != listed[name]):
            raise WeightsError(
                f"{index}: says that {listed[wrong[0]].name} holds {first(wrong)}, and it does not; shards of another "
                f"model, or a download that is not complete"
            )
        if extra := sorted(held.keys() - listed.keys()):
            raise WeightsError(
                f"{held[extra[0]]}: holds {first(extra)}, which {INDEX} does not list; shards of another model"
            )

    def __getitem__(self, name: str) -> "Tensor":
        return self.flat(name).view(self.entries[name].shape)

    def flat(self, name: str) -> "Tensor":
        """Return the tensor's entries in a row, without a copy: a view of the mapped file (see the class).

        Raises WeightsError if the file was changed or cut since it was opened.
        """
        import torch

        entry = self.entries[name]
        if name in self._loaded:
            return self._loaded[name].reshape(-1)
        dtype, size = DTYPES[entry.dtype]
        kind: torch.dtype = getattr(torch, dtype)
        if entry.start == entry.stop:
            return torch.empty(0, dtype=kind)
        mapped = self._maps.get(entry.shard) or self._map(entry.shard)
        if mapped.size() < entry.stop:  # touching what is not there any more would end the process
            raise WeightsError(f"{entry.shard}: the file was cut short while it was being read; copy it again")
        if entry.start % size:  # old writers did not align; torch does not say what it does then
            count = entry.stop - entry.start
            return torch.frombuffer(mapped, dtype=torch.uint8, offset=entry.start, count=count).clone().view(kind)
        return torch.frombuffer(mapped, dtype=kind, offset=entry.start, count=(entry.stop - entry.start) // size)

    def _map(self, shard: Path) -> mmap.mmap:
        def mapped() -> mmap.mmap:
            with shard.open("rb") as file:
                if _stamp(file.fileno()) != self._stamps[shard]:
                    raise WeightsError(f"{shard}: the file was changed after it was opened; open it again")
                return mmap.mmap(file.fileno(), 0, **_MAPPING)

        self._maps[shard] = _readable(shard, mapped)
        return self._maps[shard]

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.path,)

    def __repr__(self) -> str:
        return f"Stored({str(self.path)!r}: {len(self)} tensors, {self.nbytes / 1e6:.1f} MB)"

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(e.stop - e.start for e in self.entries.values())


def weight_files(folder: Path) -> list[str]:
    """Return the weights of the model in ``folder`` that a new one replaces: shards and indexes of Hub names.

    Pickles and files of other names are not among them: somebody else wrote those.
    """
    try:
        parts = parts_of(folder)
    except WeightsError:  # what is there need not be in order
        parts = []
    files = (p for part in ("", *parts) for p in (folder / part).glob("model*.safetensors*"))
    found = [p.relative_to(folder).as_posix() for p in files if p.name == INDEX or SHARD.fullmatch(p.name)]
    whole = all((folder / name).is_file() for name in ADAPTER)  # one of them alone says nothing of what the folder is
    return found + [*ADAPTER] * whole


def first(names: Sequence[str]) -> str:
    """Return the first three of ``names`` in quotes, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{n}'" for n in names[:3]) + more


def read_header(shard: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries and the metadata of one safetensors file. Raises WeightsError if it is not one or is cut."""
    return _read(shard)[:2]


def _read(shard: Path) -> tuple[dict[str, Entry], dict[str, str], tuple[int, ...]]:
    with _readable(shard, lambda: shard.open("rb")) as file:
        stamp = _stamp(file.fileno())
        size = stamp[0]
        if size == 0:
            raise WeightsError(f"{shard}: the file is empty; copy or download it again")
        head = file.read(9)
        length = struct.unpack("<Q", head[:8])[0] if size >= 8 else _HEADER_LIMIT + 1
        if length > _HEADER_LIMIT or head[8:] not in (b"{", b""):
            raise WeightsError(f"{shard}: not a safetensors file (it has no header)")
        if 8 + length > size:
            raise WeightsError(f"{shard}: the file is cut short ({size} bytes); copy or download it again")
        text = head[8:] + file.read(max(length - 1, 0))
    try:
        header = json.loads(text, object_pairs_hook=_once)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("metadata other than text")
        entries = {name: _entry(shard, name, told, 8 + length) for name, told in header.items()}
        _check_layout(shard, entries, 8 + length, size)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else "it is not the JSON of one"
        raise WeightsError(f"{shard}: not a safetensors file, or a corrupt one (its header: {why})") from None
    return entries, metadata, stamp


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)}' is there twice")
    return held


def _entry(shard: Path, name: str, told: Mapping[str, Any], begin: int) -> Entry:
    dtype, shape, (start, stop) = told["dtype"], told["shape"], told["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or start > stop:
        raise ValueError(f"tensor '{name}' has shape {shape} and bytes {start} to {stop}")
    if dtype not in DTYPES:
        raise WeightsError(f"{shard}: tensor '{name}' has dtype {dtype}, which is none of {', '.join(DTYPES)}")
    if stop - start != (wants := DTYPES[dtype][1] * prod(shape)):
        raise ValueError(f"tensor '{name}' has {stop - start} bytes where {dtype} {shape} has {wants}")
    return Entry(shard, dtype, tuple(shape), begin + start, begin + stop)


def _check_layout(shard: Path, entries: Mapping[str, Entry], begin: int, size: int) -> None:
    at = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ValueError(f"tensor '{name}' {'overlaps another' if entry.start < at else 'comes after a hole'}")
        at = entry.stop
    if at > size:
        raise WeightsError(f"{shard}: the file is cut short ({size} bytes of {at}); copy or download it again")
    if at < size:
        raise ValueError(f"{size - at} bytes after the last tensor")


def patiently(opened: Callable[[], T]) -> T:
    """Open or map a file; many shards may need more open files at once, which the system grants when asked."""
    try:
        return opened()
    except OSError as error:
        if error.errno != errno.EMFILE or not _more_files():
            raise
    return opened()


def _readable(file: Path, opened: Callable[[], T]) -> T:
    try:
        return patiently(opened)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror}") from None


def _more_files() -> bool:
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(now, 1 << 16) if most == resource.RLIM_INFINITY else most
    if now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return now < most


def _stamp(file: int) -> tuple[int, ...]:
    status = os.fstat(file)
    return status.st_size, status.st_ino, status.st_mtime_ns


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index}: not a shard index (no 'weight_map')") from None
    if wrong := [f for f in files if not isinstance(f, str) or Path(f).name != f]:
        raise WeightsError(f"{index}: names {wrong[0]!r}, which is not a file beside it")
    return weight_map


def _shards(path: Path, *, alone: bool = True) -> list[Path]:
    """Return the files of a model or of a part of it; a root without any is an error only if it stands alone."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise WeightsError(f"{path}: {_PICKLE}")
        return [path]
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; give a folder with model.safetensors, or the file itself")
    if (index := path / INDEX).is_file():
        names = sorted(set(_read_index(index).values()))
        if missing := [n for n in names if not (path / n).is_file()]:
            raise WeightsError(f"{path}: {INDEX} names {missing[0]}, which is missing; copy or download it again")
        if SINGLE not in names and (path / SINGLE).is_file():
            raise WeightsError(
                f"{path}: {SINGLE}, and {INDEX} of other files beside it: two models, of which libraries read different "
                f"ones; delete the one that is not wanted, or name {SINGLE} itself"
            )
        return [path / n for n in names]
    if (single := path / SINGLE).is_file():
        return [single]
    if found := sorted(path.glob("*.safetensors")):
        return found
    if parts := sorted(path.glob("part-*-of-*")):
        raise WeightsError(f"{path}: parts of a merge that are not one model yet ({parts[0].name}); join them first")
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES and not p.name.startswith("."))
    if pickles and (alone or path / PICKLE in pickles):
        raise WeightsError(f"{path}: only a pickle ({pickles[0].name}) here; {_PICKLE}")
    if alone:
        raise WeightsError(f"{path}: no safetensors file in this folder")
    return []


def parts_of(folder: Path) -> list[str]:
    """Return the sub-folders that hold weights of the model: those of modules.json, or else those that we wrote."""
    modules = _modules(folder)
    if modules is not None:
        places = {p.parent for module in modules for name in (SINGLE, INDEX, PICKLE) for p in module.rglob(name)}
    elif folder.is_dir():
        shards = (p for depth in ("*", "*/*") for p in folder.glob(f"[0-9]{depth}/model*.safetensors"))
        places = {p.parent for p in shards if _is_ours(p, p.parent.relative_to(folder).as_posix())}
    else:
        places = set()
    return sorted(place.relative_to(folder).as_posix() for place in places)


def _part_shards(place: Path) -> list[Path]:
    """Return a module's files; where there is only a pickle, it is read without running code."""
    return _shards(place) if (place / INDEX).is_file() or (place / SINGLE).is_file() else [place / PICKLE]


def _modules(folder: Path) -> list[Path] | None:
    if not (file := folder / MODULES).is_file():
        return None
    try:
        listed = json.loads(file.read_text())
        paths = [module["path"] for module in listed if isinstance(module["path"], str)]
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{file}: not the list of a sentence-transformers model's modules") from None
    return [folder / path for path in paths if PurePosixPath(path).parts and ".." not in PurePosixPath(path).parts]


def _is_ours(shard: Path, part: str) -> bool:
    try:
        return PART.fullmatch(part) is not None and read_header(shard)[1].get(PART_KEY) == part
    except WeightsError:
        return False


def _dtype_name(name: str, tensor: "Tensor") -> str:
    wanted = str(tensor.dtype).removeprefix("torch.")
    for dtype, (known, _) in DTYPES.items():
        if known == wanted:
            return dtype
    raise WeightsError(f"tensor '{name}' is {wanted}, which safetensors does not hold")
