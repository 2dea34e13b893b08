"""Models on the Hugging Face Hub, by name: ``org/name`` or ``org/name@revision`` (branch, tag or commit).

Only what a merge needs is fetched: safetensors, pickles where there are none, configs and tokenizers. Downloads go to
the Hub's own cache (HF_HOME) and show the Hub client's bars on a terminal; without a network what is cached is used.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MerganserError, MissingExtra, WeightsError
from .header import Headers
from .pickled import LEFTOVERS, PICKLE_INDEX
from .stored import INDEX, PICKLES

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
CACHED = re.compile(r"models--(.+?)--(.+)")
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


def is_name(source: object) -> bool:
    """Tell whether ``source`` can be a Hub name and is nothing on this machine."""
    if not isinstance(source, str) or not NAME.fullmatch(source) or Path(source).exists():
        return False
    return not source.endswith((".safetensors", *PICKLES))


def download(name: str) -> Path:
    """Return the folder in the Hub's cache that holds the model ``name``, fetching what is missing there.

    Raises WeightsError (no such model or revision, gated, no network and not cached) and MissingExtra.
    """
    hub = client(name)
    repo, revision = split(name)
    with one_line(name):
        try:
            files = _sizes(hub, repo, revision)
        except Exception as error:
            if not is_offline(error):
                raise
            try:  # without patterns the client would ask for every file of the repository
                cached = hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
            except Exception:
                raise error from None
            return Path(cached)
        wanted = _wanted(files, _reader(hub, repo, revision))
        return fetch(hub, repo, revision, [*wanted.weights, *wanted.beside])


def remote_entries(name: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    """Return dtype and shape of every tensor of a Hub model, and their bytes together, from the headers alone.

    Range requests fetch about 100 kB a shard, never the tensors. Raises WeightsError as `download` does, and where the
    model has no safetensors (a pickle has no header).
    """
    hub = client(name)
    repo, revision = split(name)
    with one_line(name):
        files = _sizes(hub, repo, revision)
        wanted = _wanted(files, _reader(hub, repo, revision)).weights
        pickles = [file for file in wanted if file.endswith(PICKLES)]
        if pickles:
            size = sum(files[file] for file in wanted) / 1e9
            raise WeightsError(
                f"'{name}' has only pickles on the Hub ({pickles[0]}, {size:.1f} GB in all), whose tensors are not "
                f"known before they are downloaded"
            )
        entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        total = 0
        for file in (file for file in wanted if file.endswith(".safetensors")):
            head = hub.HfApi().parse_safetensors_file_metadata(repo, file, revision=revision)
            for tensor, told in head.tensors.items():
                entries[tensor] = (str(told.dtype), tuple(told.shape))
                total += told.data_offsets[1] - told.data_offsets[0]
    return entries, total


def remote_headers(name: str) -> Headers:
    """Return the weights of a Hub model as headers only; config and tokenizer files are fetched, they are small."""
    hub = client(name)
    repo, revision = split(name)
    entries, _ = remote_entries(name)
    with one_line(name):
        wanted = _wanted(_sizes(hub, repo, revision), _reader(hub, repo, revision))
        return Headers(entries, name, fetch(hub, repo, revision, wanted.beside))


def name_of(folder: Path) -> str | None:
    """Return ``org/name@commit`` of a folder in the Hub's cache, None for any other folder."""
    if folder.parent.name == "snapshots" and (found := CACHED.fullmatch(folder.parent.parent.name)):
        return f"{found[1]}/{found[2]}@{folder.name}"
    return None


class _Wanted:
    """The files of a repository that a merge needs: weights, and what its library reads beside them."""

    def __init__(self, weights: Sequence[str], beside: Sequence[str]):
        self.weights, self.beside = weights, beside


def _wanted(files: Mapping[str, int], read: Any) -> _Wanted:
    """Choose among a repository's ``files``; ``read`` returns the JSON of one of them."""
    folders = [""]
    if "modules.json" in files:  # sentence-transformers: a model in sub-folders
        folders += sorted({f"{m['path']}/" for m in read("modules.json") if m.get("path")})
    weights: list[str] = []
    beside: list[str] = []
    for folder in folders:
        inside = [f for f in files if f.startswith(folder) and "/" not in f[len(folder) :]]
        chosen = _weights(folder, inside, read)
        weights += chosen
        indices = {f for f in inside if f.endswith(".index.json")}
        kept = {folder + (PICKLE_INDEX if any(f.endswith(PICKLES) for f in chosen) else INDEX)}
        beside += [f for f in inside if f.endswith(BESIDE) and (f not in indices or f in kept)]
    return _Wanted(weights, beside)


def _weights(folder: str, inside: Sequence[str], read: Any) -> list[str]:
    for index, single, endings in (
        (INDEX, "model.safetensors", (".safetensors",)),
        (PICKLE_INDEX, "pytorch_model.bin", PICKLES),
    ):
        if folder + index in inside:
            return sorted({folder + shard for shard in read(folder + index)["weight_map"].values()})
        if folder + single in inside:
            return [folder + single]
        if found := [f for f in inside if f.endswith(endings) and not LEFTOVERS.fullmatch(f[len(folder) :])]:
            return sorted(found)
    return []


def _sizes(hub: Any, repo: str, revision: str | None) -> dict[str, int]:
    told = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in told.siblings or []}


def _reader(hub: Any, repo: str, revision: str | None) -> Any:
    return lambda file: json.loads(Path(hub.hf_hub_download(repo, file, revision=revision)).read_text())


def fetch(hub: Any, repo: str, revision: str | None, files: Sequence[str], repo_type: str = "model") -> Path:
    """Return the folder in the Hub's cache that holds these files of a repository."""
    from huggingface_hub.utils import tqdm

    class Shown(tqdm):
        """The client's bar, on a terminal only."""

        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **{**settings, "disable": settings.get("disable") or None})

    literal = [re.sub(r"([*?\[])", r"[\1]", file) for file in files]
    return Path(
        hub.snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=literal, tqdm_class=Shown)
    )


def client(name: str) -> Any:
    """Return the Hub's client. Raises MissingExtra."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra(f"'{name}' is no file or folder here, and the Hub", "hf") from None
    return huggingface_hub


def split(name: str) -> tuple[str, str | None]:
    """Return the repository and the revision of a Hub name. Raises WeightsError where it is none."""
    found = NAME.fullmatch(name)
    if found is None:
        raise WeightsError(f"'{name}' is not a Hub name: org/name or org/name@revision")
    return found[1], found[2]


def is_offline(error: Exception) -> bool:
    """Tell whether the Hub cannot be reached, or is not to be asked."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError", "Timeout"}
    return bool(names & offline)


@contextmanager
def one_line(name: str, what: str = "model", wrong: type[MerganserError] = WeightsError) -> Iterator[None]:
    """Turn what the Hub's client raises over a ``what`` into one line, an error of the kind ``wrong``."""
    from huggingface_hub import errors

    repo, revision = split(name)
    lacking = f"'{repo}' is no file or folder here, and " if what == "model" else f"{what} '{repo}': "
    try:
        yield
    except MerganserError:
        raise
    except errors.GatedRepoError:
        raise wrong(
            f"'{repo}' is gated: ask for access on its page at the Hub, then `hf auth login` (or set HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise wrong(f"{lacking}the Hub has no such {what} (if it is private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise wrong(f"'{repo}' has no revision '{revision}' on the Hub") from None
    except errors.HFValidationError:
        raise wrong(f"{lacking}not a name the Hub can have") from None
    except Exception as error:
        if is_offline(error):
            raise wrong(
                f"{lacking}the Hub cannot be reached ({type(error).__name__}) and the cache does not have it; "
                f"fetch it once with a network"
            ) from None
        said = str(error).strip().splitlines()
        raise wrong(f"'{name}' cannot be fetched from the Hub: {said[0] if said else type(error).__name__}") from None
