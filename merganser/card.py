"""The card: how an artifact came to be, as JSON beside it, and the key that tells whether it is still right.

An artifact's key is the SHA-256 of everything its content depends on (the settings and the keys or digests of its
inputs). A folder whose card holds the wanted key is done; any other is made again.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CARD = "card.json"


def versions() -> dict[str, str]:
    """Return the versions of what computes: merganser, torch, Python."""
    found = {"python": platform.python_version()}
    for package in ("merganser", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def key_of(settings: Any) -> str:
    """Return the SHA-256 (hex) of plain JSON ``settings``, independent of the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(weights: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes in the order of names, on disk as in memory."""
    import torch

    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, or None where there is none (or only a broken one)."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``card`` into ``folder``, with versions and the time of writing."""
    write_json(folder / CARD, {**card, "versions": versions(), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card in ``folder``, or None where there is none (or only a broken one)."""
    card = read_json(folder / CARD)
    return card if isinstance(card, dict) else None


def is_done(folder: Path, key: str) -> bool:
    """Tell whether ``folder`` holds the artifact with this key."""
    card = read_card(folder)
    return card is not None and card.get("key") == key
