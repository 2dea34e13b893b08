"""A task is a folder: ``task.toml`` (name, kind, classes, template, metric) and train, val and test files.

Text splits are ``.jsonl.gz`` or ``.jsonl`` (``{"text", "label"}`` a line) or ``.parquet`` (the same columns); image
splits are ``.npz`` (``x`` uint8 NHWC, ``y`` int64), or a data set's own files (`evaluate/pictures.py`) where they lie:

    [files]                                # from task.toml's folder, or absolute
    train = ["sun397/data/train-00000-of-00004.parquet", ...]
    test = "sun397/data/test"
    labels = [0, 172]                      # of these files, only rows with a label in [0, 172), counted from its start
    held_out = 5000                        # val is a tenth of train, at most so many rows; train is the rest
"""

import gzip
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, MissingExtra, did_you_mean
from .metrics import METRICS
from .pictures import read_pictures

KINDS = {"vision": "image"}  # what else a kind is called
SUFFIXES = (".jsonl.gz", ".jsonl", ".npz", ".parquet")


@dataclass(frozen=True)
class Split:
    """Raw inputs (a list of texts, uint8 pixels NHWC, or encoded `Pictures`) and their labels (int64)."""

    raw: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> "Split":
        """Return the first ``n`` rows (all if None); the rows of a task are shuffled on disk."""
        return self if n is None else Split(self.raw[:n], self.labels[:n])


@dataclass(frozen=True)
class Files:
    """A split in a data set's own files: which rows of them are its own.

    ``labels``: only rows with a label in [first, last), counted from first. ``held_out``: the split is what is left of
    ("train") or taken out of ("val") a tenth of the rows, at most ``most``, drawn with seed 0.
    """

    places: tuple[Path, ...]
    labels: tuple[int, int] | None = None
    held_out: str | None = None
    most: int = 0

    def read(self) -> Split:
        """Return the rows. Raises DataError as `read_pictures` does."""
        pictures, labels = read_pictures(self.places)
        rows = np.arange(len(labels))
        if self.labels is not None:
            first, last = self.labels
            rows, labels = rows[(labels >= first) & (labels < last)], labels - first
        if self.held_out is not None:
            drawn = np.random.default_rng(0).permutation(len(rows))
            cut = min(len(rows) // 10, self.most)
            rows = rows[np.sort(drawn[:cut] if self.held_out == "val" else drawn[cut:])]
        return Split(pictures.take(rows.tolist()), labels[rows])


@dataclass(frozen=True)
class Task:
    """What a task is: its classes as phrases, its prompt templates, its metric and its splits, read on touch.

    ``shift_of``: the task whose classes and head apply, where this is the same task in another domain (test only).
    """

    name: str
    kind: str
    classes: Sequence[str]
    template: Sequence[str] = ("{}",)
    metric: str = "accuracy"
    splits: Mapping[str, Split | Path | Files] = field(default_factory=dict)
    shift_of: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise DataError(f"task '{self.name}': unknown metric '{self.metric}'{did_you_mean(self.metric, METRICS)}")

    def split(self, name: str) -> Split:
        """Return a split. Raises DataError where it is missing, empty or not what the task's kind says."""
        found = self.splits.get(name)
        if found is None:
            raise DataError(f"task '{self.name}' has no {name} split; it has: {', '.join(self.splits) or 'none'}")
        split = found if isinstance(found, Split) else found.read() if isinstance(found, Files) else read_split(found)
        if not len(split):
            raise DataError(f"task '{self.name}': the {name} split is empty")
        top = int(split.labels.max())
        if top >= len(self.classes) or split.labels.min() < 0:
            raise DataError(
                f"task '{self.name}': label {top} in {name}, but only {len(self.classes)} classes are named"
            )
        return split

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each class: every template filled with the class's phrase."""
        return [[template.format(phrase) for template in self.template] for phrase in self.classes]


def read_task(folder: str | Path) -> Task:
    """Return the task in ``folder``. Raises DataError, naming what is wrong with it."""
    folder = Path(folder)
    path = folder / "task.toml"
    if not path.is_file():
        raise DataError(f"{folder}: not a task (no task.toml)")
    try:
        told = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid TOML: {error}") from None
    if missing := [key for key in ("name", "kind", "classes") if key not in told]:
        raise DataError(f"{path}: lacks '{missing[0]}'")
    template = told.get("template", "{}")
    return Task(
        told["name"],
        KINDS.get(told["kind"], told["kind"]),
        told["classes"],
        [template] if isinstance(template, str) else template,
        told.get("metric", "accuracy"),
        {**_files(folder), **_elsewhere(path, told.get("files", {}))},
        told.get("shift_of"),
    )


def read_tasks(folder: str | Path) -> dict[str, Task]:
    """Return the tasks that are direct children of ``folder``, by name. Raises DataError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of tasks")
    tasks = [read_task(path.parent) for path in sorted(folder.glob("*/task.toml"))]
    if not tasks:
        raise DataError(f"{folder}: no task here (a task is a folder with a task.toml)")
    return {task.name: task for task in tasks}


def _files(folder: Path) -> dict[str, Path]:
    return {
        name: folder / f"{name}{suffix}"
        for name in ("train", "val", "test")
        for suffix in reversed(SUFFIXES)
        if (folder / f"{name}{suffix}").is_file()
    }


def _elsewhere(path: Path, told: Mapping[str, Any]) -> dict[str, Files]:
    """Return the splits that ``[files]`` names. Raises DataError at an unknown key or a file that does not exist."""
    known = ("train", "val", "test", "labels", "held_out")
    if unknown := [key for key in told if key not in known]:
        raise DataError(f"{path}: [files] has no '{unknown[0]}'{did_you_mean(unknown[0], known)}: {', '.join(known)}")
    labels, most = told.get("labels"), told.get("held_out", 0)
    if labels is not None and (len(labels) != 2 or not 0 <= labels[0] < labels[1]):
        raise DataError(f"{path}: [files] labels = {labels}: give [first, last] with 0 <= first < last")
    found: dict[str, Files] = {}
    for split in ("train", "val", "test"):
        named = told.get(split, [])
        places = tuple(path.parent / one for one in ([named] if isinstance(named, str) else named))
        if missing := [place for place in places if not place.exists()]:
            raise DataError(f"{path}: [files] {split}: {missing[0]} does not exist")
        if places:
            found[split] = Files(places, tuple(labels) if labels else None)
    if most and "train" in found and "val" not in found:
        whole = found["train"]
        found |= {s: Files(whole.places, whole.labels, s, most) for s in ("train", "val")}
    return found


def read_split(path: Path) -> Split:
    """Return the rows of one file. Raises DataError, naming the file and, for text, the line."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Split(arrays["x"], arrays["y"].astype(np.int64))
        except (KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}: not images with 'x' and 'y': {error}") from None
    rows = _parquet(path) if path.suffix == ".parquet" else json_rows(path)
    texts, labels = [row.get("text") for row in rows], [row.get("label") for row in rows]
    for k, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not isinstance(label, int):
            raise DataError(f"{path}, row {k + 1}: needs a 'text' (a string) and a 'label' (a whole number)")
    return Split(texts, np.array(labels, dtype=np.int64))


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines. Raises DataError, naming the line."""
    number = 0
    rows = []
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(text.decode("utf-8").splitlines(), 1):  # noqa: B007  (the error names it)
            if line.strip():
                rows.append(json.loads(line))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not JSON lines at line {number}: {error}") from None
    return rows if all(isinstance(row, dict) for row in rows) else _not_rows(path)


def _not_rows(path: Path) -> list[dict[str, Any]]:
    raise DataError(f"{path}: every line must be an object, such as " + '{"text": ..., "label": ...}')


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{path}", "hf") from None
    return pyarrow.parquet.read_table(path).to_pylist()
