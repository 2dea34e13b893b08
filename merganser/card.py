"""The card: how an artifact came to be, as JSON beside it, and the key that tells whether it is still right.

An artifact's key is the SHA-256 of everything its content depends on (the settings and the keys or digests of its
inputs). A folder whose card holds the wanted key is done; any other is made again.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CARD = "card.json"
BLOCK = 1 << 16  # bytes hashed together


def versions() -> dict[str, str]:
    """Return the versions of what computes: merganser, torch, Python."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

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
    """Return the fingerprint of weights: over names, dtypes, shapes and bytes, the same on disk and in memory.

    Each block of 64 KiB, as 8,192 words x of 64 bits (zeros at the end), has the two sums mod 2^64

        sum_i w_i x_i    and    sum_i w_i floor(x_i / 2^32)

    with fixed pseudo-random weights w; these go into a SHA-256 per tensor, and those, with name, dtype and shape in the
    order of names, into one SHA-256. The second sum is there for the upper halves of words: in the first, two flipped
    signs would cancel. It is three to four times as fast as SHA-256 over all bytes.

    It tells apart what accidents and work make: two checkpoints, a flipped bit, rows in another order go unnoticed with
    a chance of about 2^-32. It is no protection from somebody who wants two checkpoints to look the same; against
    that, compare SHA-256 of the files.
    """
    return combine({name: (t.dtype, t.shape, hash_piece(t.detach().reshape(-1))) for name, t in weights.items()})


def hash_piece(flat: "Tensor") -> bytes:
    """Return 16 bytes for each block of 64 KiB of a tensor's entries in a row.

    A tensor may be hashed in pieces that start at multiples of 65,536 entries; what they return is joined in order.
    """
    import numpy as np
    import torch

    weights = _block_weights()
    data = flat.detach().cpu().resolve_conj().contiguous().view(torch.uint8).numpy()
    whole = len(data) // BLOCK * BLOCK
    parts = [data[k : min(k + 8 * BLOCK, whole)] for k in range(0, whole, 8 * BLOCK)]
    if whole < len(data):
        parts.append(np.zeros(BLOCK, np.uint8))
        parts[-1][: len(data) - whole] = data[whole:]
    sums = []
    for part in parts:
        words = part.view(np.uint64).reshape(-1, BLOCK // 8)
        both = np.einsum("ij,j->i", words, weights), np.einsum("ij,j->i", words >> np.uint64(32), weights)
        sums.append(np.stack(both, axis=1).tobytes())
    return b"".join(sums)


def combine(tensors: "Mapping[str, tuple[Any, Sequence[int], bytes]]") -> str:
    """Return the fingerprint of weights from each tensor's dtype, shape and the joined `hash_piece` of its pieces."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, hashes = tensors[name]
        told = [name, str(dtype).removeprefix("torch."), [int(n) for n in shape], hashlib.sha256(hashes).hexdigest()]
        total.update((json.dumps(told) + "\n").encode())
    return total.hexdigest()


@cache
def _block_weights() -> Any:
    import numpy as np

    return np.frombuffer(hashlib.shake_256(b"merganser fingerprint 1").digest(BLOCK), np.uint64) | np.uint64(1)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every safetensors file in and below a folder, by relative path."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {str(file.relative_to(path.parent)): file_digest(file) for file in files}


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
    from .weights.settle import settle

    settle(folder)  # else the card might be that of a model which a crash left half replaced
    card = read_json(folder / CARD)
    return card if isinstance(card, dict) else None


def is_done(folder: Path, key: str) -> bool:
    """Tell whether ``folder`` holds the artifact with this key."""
    card = read_card(folder)
    return card is not None and card.get("key") == key
