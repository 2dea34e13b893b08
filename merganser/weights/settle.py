"""All or nothing: how a finished model takes the place of an older one in its folder, whenever the power goes.

What is written lies in ``FOLDER/.merganser-partial/new`` until it is complete. Then a commit journal says which files
are removed and which are placed, in an order in which no reader sees a mixture. Whoever opens the folder after a crash
carries the journal out to its end; every operation can be repeated.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|adapter_model\.safetensors")
PARTIAL = ".merganser-partial"
LOCK, NEW, COMMIT = "lock", "new", "commit.json"
CARDS = ("README.md", "card.json")  # they tell of the weights beside them; card.json is what says that all is done
TAGS = "tags: [merge, merganser]"  # by which a README.md is known as ours
PATIENCE = 60.0  # seconds; a commit is a few renames
_HINTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this disk or process may write",
    errno.EROFS: "it is on a read-only disk",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EEXIST: "a file lies where a folder should be",
    errno.ENOTDIR: "a file lies where a folder should be",
}


def fault(folder: Path, error: OSError) -> WeightsError:
    """Return the one clear line for an error of the operating system while writing into ``folder``."""
    reason = _HINTS.get(error.errno or 0, error.strerror or str(error))
    if (folder / PARTIAL / COMMIT).exists():
        return WeightsError(f"{folder}: cannot put the new model in its place: {reason}; opening it goes on with that")
    return WeightsError(f"{folder}: cannot write: {reason}; what was there before is as it was")


def lock(folder: Path) -> int | None:
    """Return an open file that holds the folder's lock, None if someone else does; closing it lets go, so does dying."""
    import fcntl

    path = folder / PARTIAL / LOCK
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # whoever had the lock has just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(file)
                raise
            warnings.warn(f"{folder}: this disk has no locks; let only one process write there", stacklevel=3)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):  # else it is the lock of a folder that was removed
                with contextlib.suppress(OSError):  # on a full disk nobody learns who has the lock
                    os.truncate(file, 0)
                    os.pwrite(file, str(os.getpid()).encode(), 0)
                return file
        os.close(file)


def busy(folder: Path) -> WeightsError:
    """Return the error for a folder whose lock someone else has."""
    try:
        who = f" (pid {int((folder / PARTIAL / LOCK).read_text())})"
    except (OSError, ValueError):
        who = ""
    return WeightsError(f"{folder}: another process{who} is writing there; wait for it or give another folder")


def clear(folder: Path) -> None:
    """Remove the staging area; only for who has the lock. A commit that has begun is kept, to be carried out."""
    partial = folder / PARTIAL
    with contextlib.suppress(OSError):
        if not (partial / COMMIT).exists():
            shutil.rmtree(partial / NEW, ignore_errors=True)
            for path in sorted(partial.iterdir(), key=lambda p: p.name == LOCK):  # the lock last
                path.unlink()
            partial.rmdir()


def plan(folder: Path, old: Iterable[str]) -> list[tuple[str, str]]:
    """Return what to do, in order: ("remove" | "place", path inside ``folder``). ``old``: weights of the older model.

    Readers look for model.safetensors, then for the index, then for the shards it names. Where the new files have
    other names than the old shards, the new model appears at one rename or removal. Where they have the same names,
    or the configuration changes, or there are weights in sub-folders, the old model is removed first: for a moment
    there is none, never a mixture. Cards go first and come last. What the older card says was put beside the older
    weights (`note_files`), and the new model has not, goes with them: a pooling module, say, that is no longer one.
    """
    staging = folder / PARTIAL / NEW
    new = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
    if wrong := [name for name in new if (folder / name).is_dir()]:
        raise WeightsError(f"{folder}: a folder lies where the file {wrong[0]} should be; remove it")
    weights = [name for name in new if _is_weights(name)]
    side = [name for name in new if name not in weights and name not in CARDS]
    first = min((str(PurePosixPath(name).parent) for name in weights), default=".")
    # the last file placed is the one without which a reader finds no model
    weights.sort(key=lambda n: (str(PurePosixPath(n).parent) == first, _is_entry(n), n))
    # the first file removed is so too; where index and model.safetensors both lie, the second is the one that is read
    gone = sorted(old, key=lambda n: (not n.endswith(INDEX), not _is_entry(n), n))
    changed = [n for n in side if (folder / n).exists() and (folder / n).read_bytes() != (staging / n).read_bytes()]
    clash = [name for name in weights if name in gone and not _is_entry(name)]
    apart = [name for name in (*weights, *gone) if "/" in name]
    place = [("place", name) for name in (*side, *weights)]
    left = [name for name in _files_told(folder) if name not in new and name not in gone]
    if changed or clash or apart or left:
        middle = [("remove", name) for name in (*gone, *left)] + place
    else:
        middle = place + [("remove", name) for name in gone if name not in weights]
    return [
        *(("remove", name) for name in CARDS if _tells_of_us(folder / name)),
        *middle,
        *(("place", name) for name in CARDS if name in new),
    ]


def commit(folder: Path, old: Iterable[str]) -> None:
    """Put everything that is staged into place; from the moment the journal is written, it will come to its end."""
    partial = folder / PARTIAL
    note_files(partial / NEW)
    operations = plan(folder, old)
    for path in (partial / NEW).rglob("*"):
        sync(path)
    sync(partial / NEW)
    journal = partial / f"{COMMIT}.new"
    journal.write_text(json.dumps({"operations": operations}))
    sync(journal)
    journal.replace(partial / COMMIT)
    sync(partial)
    finish(folder)


def note_files(staging: Path) -> None:
    """Say in the card that is staged what is staged beside card and weights: the next model there takes it away."""
    card = staging / CARDS[1]
    try:
        told = json.loads(card.read_text())
    except (OSError, ValueError):  # no card, or none of ours
        return
    files = (p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
    told["files"] = sorted(name for name in files if name not in CARDS and not _is_weights(name))
    card.write_text(json.dumps(told, indent=1) + "\n")


def _files_told(folder: Path) -> list[str]:
    """Return what the card in a folder says lies beside its weights, as far as it is there."""
    try:
        told = json.loads((folder / CARDS[1]).read_text())
        files = [name for name in told.get("files", ()) if isinstance(name, str)]
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    inside = [name for name in files if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts]
    return [name for name in inside if (folder / name).is_file() and not (folder / name).is_symlink()]


def finish(folder: Path) -> None:
    """Carry out the commit journal; an operation done before the crash is left out."""
    partial = folder / PARTIAL
    try:
        operations = json.loads((partial / COMMIT).read_text())["operations"]
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{partial / COMMIT}: this commit journal cannot be read; remove {partial}") from None
    placed = {name for what, name in operations if what == "place"}
    for what, name in operations:
        staged, target = partial / NEW / name, folder / name
        if what == "place" and staged.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
        elif what == "remove" and (staged.exists() or name not in placed):  # else the new file has that name already
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
    for place in sorted({folder, *((folder / name).parent for _, name in operations)}, reverse=True):
        if place != folder:
            with contextlib.suppress(OSError):
                place.rmdir()  # only if nothing is left in it
        if place.is_dir():
            sync(place)
    (partial / COMMIT).unlink()


def settle(folder: Path) -> None:
    """Bring a commit that a crash interrupted to its end; wait for one that is under way."""
    journal = folder / PARTIAL / COMMIT
    until = time.monotonic() + PATIENCE
    while _is_there(journal):
        try:
            if (file := lock(folder)) is not None:
                try:
                    if journal.exists():
                        finish(folder)
                        clear(folder)
                finally:
                    os.close(file)
            elif time.monotonic() > until:
                raise busy(folder)
        except OSError as error:
            reason = _HINTS.get(error.errno or 0, error.strerror)
            raise WeightsError(
                f"{folder}: a merge was interrupted while it replaced the model here, and it cannot be brought to its "
                f"end: {reason}; open it once where it can be written"
            ) from None
        time.sleep(0.01)


def sync(path: Path) -> None:
    """Make a file or a folder's list of files outlast a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks do not sync folders
            raise
    finally:
        os.close(file)


def _is_weights(name: str) -> bool:
    base = PurePosixPath(name).name
    return base == INDEX or SHARD.fullmatch(base) is not None


def _is_entry(name: str) -> bool:
    return PurePosixPath(name).name in (INDEX, SINGLE)


def _tells_of_us(card: Path) -> bool:
    if not card.is_file():
        return False
    with card.open("rb") as file:
        return card.name != "README.md" or TAGS.encode() in file.read(200)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into
        return False
