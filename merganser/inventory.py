"""What lies on disk: models and runs, told from cards and headers, without reading a tensor or importing torch."""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from .card import read_card, read_json
from .errors import MerganserError, WeightsError
from .weights.adapter import FILES as ADAPTERS
from .weights.adapter import Adapter, is_adapter
from .weights.stored import DTYPES, INDEX, PICKLES, Entry, Stored

_NUMBER = re.compile(r"(?<![^./])\d+(?=[./]|$)")


@dataclass(frozen=True)
class Found:
    """A model or a run below a folder."""

    path: str
    kind: str
    sentence: str
    tensors: int | None
    nbytes: int | None
    date: str
    wrong: str | None = None


def found_in(folders: Iterable[str | Path]) -> list[Found]:
    """Return the models and runs in and below ``folders``, told from cards and headers. Raises WeightsError."""
    told: list[Found] = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise WeightsError(f"{folder}: no such file or folder")
        if folder.is_file():
            told.append(_model(folder))
        for root, inside, files in os.walk(folder):
            place = Path(root)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            if {"run.json", "scores.json"} <= set(files):
                told.append(_run(place))
            if is_model(files):
                told.append(_model(place))
                if "modules.json" in files:  # its modules are in sub-folders, and are no models
                    inside.clear()
    return told


def is_model(files: Iterable[str]) -> bool:
    """Tell whether a folder of these files holds weights."""
    return any(f.endswith(".safetensors") and not f.startswith((".", "checkpoint")) for f in files) or any(
        f in (INDEX, *ADAPTERS) or (f.startswith("pytorch_model") and f.endswith(PICKLES)) for f in files
    )


def _run(folder: Path) -> Found:
    told = read_json(folder / "scores.json") or {}
    rows = [row["sentence"] for row in told.get("rows", []) if isinstance(row, dict) and "sentence" in row]
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    sentences = f"{told.get('title', '')}: {len(set(rows))} sentences"
    return Found(str(folder), "run", sentences, None, size, told.get("date") or _date(folder / "scores.json"))


def _model(path: Path) -> Found:
    card = (read_card(path) if path.is_dir() else None) or {}
    kind = str(card.get("kind", "adapter" if is_adapter(path) else "model"))
    if "part" in card:
        kind = f"part {'/'.join(map(str, card['part']))}"
    date = str(card.get("written", ""))[:16].replace("T", " ")
    try:
        tensors, size, files = _size(path)
        return Found(str(path), kind, str(card.get("sentence", "")), tensors, size, date or _date(*files), None)
    except MerganserError as error:
        return Found(str(path), kind, str(card.get("sentence", "")), None, None, date or _date(path), str(error))


def _size(path: Path) -> tuple[int | None, int, list[Path]]:
    """Return tensors (None for pickles, which have no header), bytes and files of a model."""
    pickles = [path] if path.is_file() else sorted(path.glob("*"))
    pickles = [p for p in pickles if p.suffix in PICKLES]
    if pickles and (path.is_file() or not list(path.glob("*.safetensors*"))):
        return None, sum(p.stat().st_size for p in pickles), pickles
    stored = Stored(path)
    return len(stored), stored.nbytes, stored.shards


def _date(*files: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(max((f.stat().st_mtime for f in files), default=0)))


@dataclass(frozen=True)
class Group:
    """Tensors of one name but for the numbers in it, of one dtype and shape."""

    pattern: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What a model is: its card, files, tensors by pattern, totals, ties and vocabulary."""

    path: str
    card: dict[str, Any] | None
    metadata: dict[str, str]
    config: dict[str, Any]
    files: dict[str, int]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, dict[str, int]]
    groups: list[Group] = field(default_factory=list)
    tied: list[tuple[str, str]] = field(default_factory=list)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def model(path: str | Path) -> ModelInfo:
    """Read what can be known of a model without its tensors. Raises WeightsError: nothing there, damaged, a pickle."""
    adapter = Adapter(path) if is_adapter(path := Path(path)) else None
    stored = adapter.weights if adapter is not None else Stored(path)
    if not isinstance(stored, Stored):
        raise WeightsError(
            f"{path}: only a pickle here, whose tensors are not known before it is read; `ls` has its size"
        )
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    dtypes: dict[str, dict[str, int]] = {}
    for entry in stored.entries.values():
        total = dtypes.setdefault(entry.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += _numel(entry)
        total["bytes"] += entry.stop - entry.start
    keep = (
        "model_type",
        "architectures",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "torch_dtype",
        "dtype",
    )
    return ModelInfo(
        path=str(path),
        card=read_card(folder) if path.is_dir() else None,
        metadata=stored.metadata,
        config={key: config[key] for key in keep if key in config},
        files={str(shard.relative_to(folder)): shard.stat().st_size for shard in stored.shards},
        tensors=len(stored),
        parameters=sum(map(_numel, stored.entries.values())),
        nbytes=stored.nbytes,
        dtypes=dtypes,
        groups=grouped(stored.entries),
        tied=tied_pairs(stored.entries),
        vocabulary=_vocabulary(folder, config, stored.entries),
        adapter={} if adapter is None else _adapter(adapter),
    )


def _adapter(adapter: Adapter) -> dict[str, Any]:
    """Return what the config of an adapter and its tensors say."""
    keep = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "base_model_name_or_path", "task_type")
    told = {key: adapter.config[key] for key in keep if adapter.config.get(key) not in (None, False, "none", "")}
    ranks = sorted({module.rank for module in adapter.modules.values()})
    return {**told, "ranks": ranks, "modules": len(adapter.modules), "full": list(adapter.full)}


def grouped(entries: Mapping[str, Entry]) -> list[Group]:
    """Return tensors by pattern: ``layer.{0..11}.weight`` stands for twelve; another dtype or shape is another group."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault((_NUMBER.sub("#", name), entry.dtype, entry.shape), []).append(name)
    return [
        Group(pattern_of(names), len(names), dtype, shape, sum(entries[n].stop - entries[n].start for n in names))
        for (_, dtype, shape), names in groups.items()
    ]


def pattern_of(names: Sequence[str]) -> str:
    """Return one text for names that differ in their numbers only: ``{0..11}`` for a range, ``{0,2,5}`` for others."""
    numbers = [[int(n) for n in _NUMBER.findall(name)] for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    texts = iter(columns)

    def told(_match: re.Match[str]) -> str:
        values = next(texts)
        if len(values) == 1:
            return str(values[0])
        whole = values == list(range(values[0], values[-1] + 1))
        some = ",".join(map(str, values[:4])) + (",..." if len(values) > 4 else "")
        return f"{{{values[0]}..{values[-1]}}}" if whole else f"{{{some}}}"

    return _NUMBER.sub(told, names[0])


def tied_pairs(entries: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Return tables (two axes or more) that are there twice, byte by byte; headers and a few bytes name the candidates."""
    tables = [(n, e) for n, e in entries.items() if len(e.shape) > 1 and e.shard.suffix == ".safetensors"]
    groups: dict[Any, list[tuple[str, Entry]]] = {}
    for name, entry in tables:
        groups.setdefault((entry.dtype, entry.shape), []).append((name, entry))
    pairs = []
    for group in groups.values():
        if len(group) > 1:
            like = {name: _some_bytes(entry) for name, entry in group}
            for (one, a), (other, b) in combinations(group, 2):
                if like[one] == like[other] and not _constant(like[one], a.dtype) and _equal(a, b):
                    pairs.append((one, other))
    return pairs


def _some_bytes(entry: Entry) -> bytes:
    size = entry.stop - entry.start
    with entry.shard.open("rb") as file:
        parts = []
        for k in range(4):
            file.seek(entry.start + min(size * k // 4 // 8 * 8, max(0, size - 64)))
            parts.append(file.read(min(64, size)))
    return b"".join(parts)


def _constant(data: bytes, dtype: str) -> bool:
    size = DTYPES[dtype][1]
    return data == data[:size] * (len(data) // size)


def _equal(a: Entry, b: Entry, chunk: int = 1 << 22) -> bool:
    with a.shard.open("rb") as one, b.shard.open("rb") as other:
        one.seek(a.start)
        other.seek(b.start)
        left = a.stop - a.start
        while left:
            n = min(chunk, left)
            if one.read(n) != other.read(n):
                return False
            left -= n
    return True


def _vocabulary(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return what config and tokenizer say of tokens, and the tensors that have as many rows as config.json says."""
    from .weights.tokenizer import vocab_size, vocabulary

    told: dict[str, Any] = {}
    if (size := vocab_size(config)) is not None:
        told["vocab_size"] = size
        told["tables"] = [n for n, e in entries.items() if e.shape[:1] == (size,) and len(e.shape) == 2]
    if "tie_word_embeddings" in config:
        told["tie_word_embeddings"] = config["tie_word_embeddings"]
    if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        try:
            told["tokens"] = len(vocabulary(folder))
        except MerganserError:
            told["tokens"] = None
    return told


def _numel(entry: Entry) -> int:
    return (entry.stop - entry.start) // DTYPES[entry.dtype][1]
