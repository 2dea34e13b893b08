"""Unlabeled inputs from anywhere: texts or pictures in files, folders, data sets of the Hub, or drawn.

notes.txt  notes.txt.gz                 a text a line
tickets.jsonl(.gz)  tickets.parquet     a row an input: the column "text", or the only one of strings
tickets.parquet#body                    that column
pictures/  x.npz  x.parquet  x.tar      pictures
hub:org/name                            the training split of a data set on the Hub (see `hub_data`)
dead-leaves:5000                        pictures that need no data (see `synthetic`)
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, MissingExtra, did_you_mean
from ..synthetic import is_source, known_source, pictures
from .hub_data import check_data, fetched, is_hub
from .pictures import PICTURE, Pictures, read_pictures
from .pictures import SUFFIXES as PICTURES
from .task import json_rows

TEXTS = (".parquet", ".jsonl", ".jsonl.gz")


def is_no_path(source: str | Path) -> bool:
    """Tell whether a source of inputs is no path on this machine: a data set of the Hub, or drawn."""
    return is_source(source) or is_hub(source)


def read_unlabeled(sources: Sequence[str | Path], limit: int | None = None) -> Any:
    """Return unlabeled raw inputs: a list of texts, or pictures; arrays of one size come as one array.

    With ``limit``, every source gives the same share, spread evenly over it. Raises DataError at an empty file, one
    that is not what its name says, a column that is not there or not told, or kinds mixed.
    """
    parts = [_read(source) for source in sources]
    if not parts:
        raise DataError("no unlabeled inputs given: name at least one file")
    if len({_is_text(part) for part in parts}) > 1:
        raise DataError(f"{sources[0]} and others mix texts and images: use one kind of inputs")
    share = None if limit is None else -(-limit // len(parts))
    parts = [part if share is None or len(part) <= share else _spread(part, share) for part in parts]
    joined = _joined(parts)
    return joined[:limit] if limit is not None else joined


def check_unlabeled(source: str | Path) -> int:
    """Return the bytes of a source, nothing read or fetched yet. Raises DataError where there is no such source."""
    if is_source(source):
        known_source(source)
        return 0
    name, _ = _parted(source)
    if is_hub(name):
        return check_data(name)
    if not Path(name).exists():
        raise DataError(f"{name}: no such file of unlabeled inputs; correct [inputs] files")
    return Path(name).stat().st_size


def _parted(source: str | Path) -> tuple[str, str | None]:
    """Return a source and the column that it names behind a #, as a path may hold one too."""
    text = str(source)
    name, mark, column = text.rpartition("#")
    return (name, column) if mark and not Path(text).exists() else (text, None)


def _read(source: str | Path) -> Any:
    if is_source(source):
        return pictures(source)
    name, column = _parted(source)
    if not is_hub(name):
        return _read_file(Path(name), column)
    files = fetched(name)
    if files[0].suffix.lower() in PICTURES:
        return Pictures(files)
    return _joined([_read_file(file, column) for file in files])


def _read_file(path: Path, column: str | None) -> Any:
    if path.is_dir() or path.suffix == ".tar":
        return read_pictures([path], labelled=False)[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file of unlabeled inputs")
    if path.name.endswith(TEXTS):
        return _parquet(path, column) if path.suffix == ".parquet" else _rows(path, column)
    if column is not None:
        raise DataError(f"{path}#{column}: a file of this kind has no columns")
    return _pixels(path) if path.suffix == ".npz" else _lines(path)


def _parquet(path: Path, column: str | None) -> Any:
    """Return the texts of a column, or the pictures where none is named and the file holds pictures."""
    try:
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise MissingExtra(f"{path}", "hf") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None
    schema = file.schema_arrow
    if column is None and set(PICTURE) & set(schema.names):
        return read_pictures([path], labelled=False)[0]
    strings = [f.name for f in schema if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)]
    name = _column(path, schema.names, strings, column)
    return _kept(path, file.read(columns=[name]).column(0).to_pylist())


def _rows(path: Path, column: str | None) -> list[str]:
    rows = json_rows(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {n: [row[n] for row in rows if row.get(n) is not None] for n in names}
    strings = [n for n, told in values.items() if told and all(isinstance(one, str) for one in told)]
    name = _column(path, names, strings, column)
    return _kept(path, [row.get(name) for row in rows])


def _column(path: Path, names: Sequence[str], strings: Sequence[str], asked: str | None) -> str:
    """Return the column of texts: the one that is asked for, else "text", else the only one of strings."""
    if asked is not None:
        if asked not in strings:
            guess = did_you_mean(asked, strings)
            raise DataError(f"{path}: no column of texts '{asked}'{guess}; it has {', '.join(strings) or 'none'}")
        return asked
    if "text" in strings or len(strings) == 1:
        return "text" if "text" in strings else strings[0]
    if strings:
        raise DataError(
            f"{path}: which column are the texts? Write {path.name}#{strings[0]} (or {', '.join(strings[1:])})"
        )
    raise DataError(f"{path}: no column of texts or pictures (it has {', '.join(names) or 'none'})")


def _lines(path: Path) -> list[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not UTF-8 text, one input a line: {error}") from None
    if "\x00" in text:
        raise DataError(f"{path}: not text (it has NUL bytes)")
    return _kept(path, text.splitlines())


def _kept(path: Path, texts: Sequence[str | None]) -> list[str]:
    kept = [stripped for text in texts if text and (stripped := text.strip())]
    if not kept:
        raise DataError(f"{path}: the file of unlabeled inputs is empty")
    return kept


def _pixels(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["x"]
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{path}: not images with 'x': {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
        raise DataError(
            f"{path}: 'x' must be uint8 [n, height, width, channels], is {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels


def _is_text(part: Any) -> bool:
    return isinstance(part, list) and isinstance(part[0], str)


def _joined(parts: Sequence[Any]) -> Any:
    if all(isinstance(part, Pictures) for part in parts):
        return Pictures([one for part in parts for one in part.encoded])
    alike = all(isinstance(part, np.ndarray) for part in parts) and len({part.shape[1:] for part in parts}) == 1
    return np.concatenate(parts) if alike else [one for part in parts for one in part]


def _spread(part: Any, share: int) -> Any:
    at = np.linspace(0, len(part) - 1, share).astype(int)
    if isinstance(part, Pictures):
        return part.take(at.tolist())
    return part[at] if isinstance(part, np.ndarray) else [part[k] for k in at]
