"""The training files of a data set on the Hugging Face Hub, named as unlabeled inputs.

hub:org/name                          its training split (all its files, where it has no splits)
hub:org/name@revision                 of a branch, tag or commit
hub:org/name/FOLDER                   of one configuration; or one file: hub:org/name/a.parquet
hub:org/name@refs/convert/parquet     the copy in parquet that the Hub itself keeps of most data sets

Downloads go to the Hub's own cache (HF_HOME), and only the files that are read; without a network what is cached is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..weights import hub
from .pictures import SUFFIXES as PICTURES

NAMED = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(refs/convert/parquet|[\w.-]+))?(?:/(.+?))?/?")
ROWS = (".parquet", ".jsonl.gz", ".jsonl", ".npz", ".tar", ".txt.gz", ".txt")  # the first kind that is there is taken
SPLITS = re.compile(r"(train|test|valid|validation|val|dev)(?![a-z])")
MOST = 4e9  # bytes that are fetched without being asked for by name


def is_hub(source: str | Path) -> bool:
    """Tell whether ``source`` is written as a data set of the Hub."""
    return str(source).startswith("hub:")


@dataclass(frozen=True)
class DataSet:
    """A data set's name, revision, and the folder or file in it that is meant."""

    repo: str
    revision: str | None
    under: str | None

    @property
    def name(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def known_data(source: str | Path) -> DataSet:
    """Return what ``hub:org/name@revision/FOLDER`` says. Raises DataError where it has another form."""
    found = NAMED.fullmatch(str(source))
    if found is None:
        raise DataError(
            f"'{source}' names no data set; write hub:org/name, hub:org/name@revision or hub:org/name/FOLDER"
        )
    return DataSet(*found.groups())


def fetched(source: str | Path) -> list[Path]:
    """Return the files of a data set's training split, fetching those that are missing in the Hub's cache.

    Raises DataError (no such data set or folder, several configurations, gated, too large to be fetched unasked, no
    network and not cached) and MissingExtra.
    """
    data, client = known_data(source), hub.client(str(source))
    with hub.one_line(data.name, "data set", DataError):
        sizes, folder = _files(client, data)
        files = training_files(sizes, data)
        folder = folder or hub.fetch(client, data.repo, data.revision, files, "dataset")
    return [folder / file for file in files]


def check_data(source: str | Path) -> int:
    """Return the bytes of a data set's training files, fetching nothing. Raises as `fetched` does."""
    data, client = known_data(source), hub.client(str(source))
    with hub.one_line(data.name, "data set", DataError):
        sizes, _ = _files(client, data)
        return sum(sizes[file] for file in training_files(sizes, data))


def _files(client: Any, data: DataSet) -> tuple[dict[str, int], Path | None]:
    """Return a data set's files and their bytes; without a network those in the cache, and the folder they lie in."""
    try:
        told = client.HfApi().dataset_info(data.repo, revision=data.revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in told.siblings or []}, None
    except Exception as error:
        if not hub.is_offline(error):
            raise
        folder = _cached(client, data, error)
        there = (file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in there}, folder


def _cached(client: Any, data: DataSet, error: Exception) -> Path:
    try:  # without patterns the client would ask for every file of the repository
        return Path(
            client.snapshot_download(
                data.repo, repo_type="dataset", revision=data.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except Exception:
        raise error from None


def training_files(sizes: Mapping[str, int], data: DataSet) -> list[str]:
    """Choose among a repository's files, by name and bytes: of the first kind of rows, or pictures, its training split."""
    wrote = f"hub:{data.name}"
    inside = {f for f in sizes if data.under is None or f == data.under or f.startswith(f"{data.under}/")}
    if not inside:
        raise DataError(f"{wrote}: has no folder or file '{data.under}'")
    kinds = [*((kind,) for kind in ROWS), PICTURES]
    meant = inside if data.under else {file for file in inside if not _beside(file)}
    found = next((files for kind in kinds if (files := sorted(f for f in meant if f.lower().endswith(kind)))), [])
    if not found:
        copy = f"hub:{data.repo}@refs/convert/parquet"
        raise DataError(f"{wrote}: no {', '.join(ROWS)} or pictures there; try the Hub's own copy in parquet, {copy}")
    chosen = _of_training(found)
    folders = sorted({_configuration(file) for file in chosen})
    if len(folders) > 1 and not chosen[0].lower().endswith(PICTURES):
        shown = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
        raise DataError(f"{wrote}: has several configurations ({shown}); name one: {wrote}/{folders[-1]}")
    total = sum(sizes[file] for file in chosen)
    if total > MOST and data.under not in chosen:
        raise DataError(f"{wrote}: {total / 1e9:.0f} GB in {len(chosen)} files; name one: {wrote}/{chosen[0]}")
    return chosen


def _beside(file: str) -> bool:
    """Tell whether a file is of a kind that stands beside data: a licence in .txt, a drawing at the top."""
    name = file.lower()
    return (name.endswith((".txt", ".txt.gz")) and _split(file) is None) or (
        name.endswith(PICTURES) and "/" not in file
    )


def _of_training(files: Sequence[str]) -> list[str]:
    """Return the files of the training split; all, where none says that it is of a split."""
    said = {file: _split(file) for file in files}
    if "train" in said.values():
        return [file for file in files if said[file] == "train"]
    return [file for file in files if said[file] is None] or list(files)


def _split(file: str) -> str | None:
    found = [one[1] for part in PurePosixPath(file).parts if (one := SPLITS.match(part.lower()))]
    return found[-1] if found else None


def _configuration(file: str) -> str:
    """Return the folder that holds a file, or the folder of its split."""
    folders = PurePosixPath(file).parent.parts
    return "/".join(takewhile(lambda part: not SPLITS.match(part.lower()), folders))
