"""Labelled pictures in the layouts that data sets come in, kept as the bytes of their files and decoded when they are read.

SPLIT-00000-of-00003.parquet   a Hub data set: a column of pictures ({"bytes", "path"}) and one of labels
SPLIT/000.tar                  a WebDataset: NAME.jpg and NAME.cls beside each other
SPLIT/CLASS/*.jpg              a folder a class, in the alphabet's order
SPLIT.txt                      a line "PATH LABEL" a picture, paths from the file's folder (DomainNet's lists)

A picture is decoded again each time it is asked for; what is read of it is kept by who asked.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import DataError, MissingExtra

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
PICTURE = ("image", "img", "jpg", "png", "picture")
LABEL = ("label", "fine_label", "labels", "cls", "category", "target")
ROWS = 256


class Pictures(Sequence[Any]):
    """Pictures as encoded bytes or as paths; one is decoded (PIL, RGB or grey) each time it is asked for."""

    def __init__(self, encoded: Sequence[bytes | Path]):
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> "Pictures": ...
    def __getitem__(self, at: int | slice) -> Any:
        return Pictures(self.encoded[at]) if isinstance(at, slice) else decoded(self.encoded[at], f"picture {at}")

    def take(self, rows: Iterable[int]) -> "Pictures":
        """Return the pictures at ``rows``."""
        return Pictures([self.encoded[k] for k in rows])

    def raw(self) -> Iterator[bytes]:
        """Return the encoded bytes, one picture after another."""
        return (one.read_bytes() if isinstance(one, Path) else one for one in self.encoded)


def decoded(encoded: bytes | Path, what: str) -> Any:
    """Return a PIL image in mode RGB or L. Raises DataError where the bytes are no picture."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("reading picture files", "demo") from None
    try:
        with Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded)) as image:
            return image.convert("L" if image.mode in ("L", "1") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        name = encoded if isinstance(encoded, Path) else what
        raise DataError(f"{name}: not a picture that can be read: {error}") from None


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files (or the one folder) of a split in a data set's folder; none if it has no such split.

    Looked for: ``SPLIT-*.parquet``, ``SPLIT/*.parquet``, ``SPLIT/*.tar``, ``SPLIT/CLASS/`` and ``SPLIT.txt``, there
    and up to two folders below (``data/``, a configuration's name).
    """
    for pattern in (f"{split}*.parquet", f"{split}/*.parquet", f"{split}/*.tar", f"{split}.txt"):
        for below in ("", "*/", "*/*/"):
            if found := sorted(folder.glob(below + pattern)):
                return found
    for below in ("", "*/"):
        if found := [p for p in sorted(folder.glob(f"{below}{split}")) if p.is_dir() and any(p.glob("*/*"))]:
            return found[:1]
    return []


def read_pictures(places: Sequence[Path], *, labelled: bool = True) -> tuple[Pictures, np.ndarray]:
    """Return the pictures at ``places`` and their labels (int64; -1 where ``labelled`` is not asked for).

    Raises DataError, naming the file, where there is no picture or no label.
    """
    encoded: list[bytes | Path] = []
    labels: list[int] = []
    for place in places:
        pictures, numbers = _reader(place)(place, labelled)
        if not pictures:
            raise DataError(f"{place}: no pictures here")
        encoded += pictures
        labels += numbers if labelled else [-1] * len(pictures)
    return Pictures(encoded), np.array(labels, dtype=np.int64)


Reader = Callable[[Path, bool], tuple[list[Any], list[int]]]


def _reader(place: Path) -> Reader:
    if place.is_dir():
        return _folder
    readers: dict[str, Reader] = {".parquet": _parquet, ".tar": _tar, ".txt": _listed}
    if place.suffix not in readers or not place.is_file():
        raise DataError(f"{place}: no pictures here; give a folder, or a .parquet, .tar or .txt file")
    return readers[place.suffix]


def _parquet(path: Path, labelled: bool) -> tuple[list[Any], list[int]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{path}", "hf") from None
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    picture = _column(path, names, PICTURE, "pictures")
    label = _column(path, names, LABEL, "labels") if labelled else None
    encoded: list[Any] = []
    labels: list[int] = []
    for batch in file.iter_batches(ROWS, columns=[c for c in (picture, label) if c]):
        rows = batch.to_pydict()
        encoded += [row["bytes"] if isinstance(row, dict) else row for row in rows[picture]]
        labels += rows[label] if label else []
    if wrong := [k for k, one in enumerate(encoded) if not isinstance(one, bytes)]:
        raise DataError(f"{path}, row {wrong[0] + 1}: column '{picture}' holds no picture's bytes")
    if wrong := [k for k, one in enumerate(labels) if not isinstance(one, int)]:
        raise DataError(f"{path}, row {wrong[0] + 1}: column '{label}' is not a whole number")
    return encoded, [int(one) for one in labels]


def _column(path: Path, names: Sequence[str], known: Sequence[str], what: str) -> str:
    found = [name for name in known if name in names]
    if not found:
        raise DataError(f"{path}: no column of {what} (looked for {', '.join(known)}; it has {', '.join(names)})")
    return found[0]


def _tar(path: Path, labelled: bool) -> tuple[list[Any], list[int]]:
    pictures: dict[str, bytes] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stem, dot, suffix = member.name.rpartition(".")
                held = archive.extractfile(member) if member.isfile() else None
                if held is None:
                    continue
                if dot + suffix in SUFFIXES:
                    pictures[stem] = held.read()
                elif suffix == "cls":
                    classes[stem] = int(held.read())
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a WebDataset of pictures: {error}") from None
    if labelled and (lacking := [name for name in pictures if name not in classes]):
        raise DataError(f"{path}: '{lacking[0]}' has no label ({lacking[0]}.cls)")
    return list(pictures.values()), [classes.get(name, -1) for name in pictures]


def _folder(path: Path, labelled: bool) -> tuple[list[Any], list[int]]:
    if not labelled:
        return [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES], []
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    rows = [(f, k) for k, c in enumerate(classes) for f in sorted(c.rglob("*")) if f.suffix.lower() in SUFFIXES]
    return [file for file, _ in rows], [k for _, k in rows]


def _listed(path: Path, labelled: bool) -> tuple[list[Any], list[int]]:
    rows = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for k, row in enumerate(rows, 1):
        if len(row) != 2 or not row[1].isdigit():
            raise DataError(f"{path}, line {k}: needs a path and a label (a whole number)")
        if not (path.parent / row[0]).is_file():
            raise DataError(f"{path}, line {k}: {path.parent / row[0]} does not exist")
    return [path.parent / file for file, _ in rows], [int(label) for _, label in rows]
