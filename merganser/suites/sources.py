"""Where the published benchmarks' models and data sets come from: folders of yours in the Hub's layout, or the Hub.

ROOT/tanganke/sun397/data/test-00000-of-00002.parquet      as on the Hub: owner, name, files
ROOT/sun397/...                                            or without the owner

Nothing is copied: a task's folder in the cache names the files where they lie.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..card import key_of
from ..errors import DataError, MissingExtra
from ..evaluate.pictures import split_files
from ..weights.hub import download

SPLITS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}


def model(root: Path | None, name: str) -> Path:
    """Return the folder of the model ``name`` (owner/name): below ``root``, or fetched from the Hub if that is None."""
    if root is None:
        return download(name)
    return below(root, name, "model", "--models")


def dataset(root: Path | None, name: str) -> Path:
    """Return the folder of the data set ``name`` (owner/name): below ``root``, or fetched from the Hub if that is None."""
    if root is not None:
        return below(root, name, "data set", "--data")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"the data set {name}", "hf") from None
    patterns = ["*.parquet", "*.tar", "*.png", "*.jpg", "*.txt"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"data set '{name}' cannot be fetched from the Hub: {reason[0]}; give --data FOLDER") from error


def below(root: Path, name: str, what: str, option: str) -> Path:
    """Return ``root/owner/name`` or ``root/name``. Raises DataError if neither is there."""
    for place in (root / name, root / name.partition("/")[2]):
        if place.is_dir():
            return place
    raise DataError(f"{option} {root}: no {what} {name} (looked for {root / name} and {place})")


def write_task(into: Path, told: Mapping[str, Any], data: Path, *, keyed: bool = True, **files: Any) -> Path:
    """Write a task.toml that names the files of ``data`` where they lie; return its folder.

    ``files``: more of [files]. ``keyed``: below a folder named by what task.toml says.
    """
    splits: dict[str, Sequence[Path]] = {}
    for split, names in SPLITS.items():
        splits[split] = next((found for name in names if (found := split_files(data, name))), [])
    if not splits["test"]:  # then validation rows are what is scored, and nothing is chosen on them
        splits["test"], splits["val"] = splits["val"], []
    if not splits["test"]:
        raise DataError(f"{data}: no test split (test-*.parquet, test/*.tar, test/CLASS/ or test.txt)")
    named = {split: [str(place.resolve()) for place in places] for split, places in splits.items() if places}
    return write_toml(into, told, {**named, **files}, keyed)


def write_toml(into: Path, told: Mapping[str, Any], files: Mapping[str, Any], keyed: bool = True) -> Path:
    """Write task.toml with ``told`` and its ``[files]`` into a folder named by what it says; return the folder."""
    text = toml(told) + "\n[files]\n" + toml(files)
    tomllib.loads(text)
    folder = (into / key_of({"task": text})[:8] if keyed else into) / str(told["name"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.toml").write_text(text, encoding="utf-8")
    return folder


def toml(told: Mapping[str, Any]) -> str:
    """Return keys with strings, numbers and lists of them as TOML."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in told.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
