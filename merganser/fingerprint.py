"""What a merge says of its inputs: fingerprints, taken from samples while the tensors are read.

The first 2,048 of every 2^20 entries of each tensor go into a SHA-256 per tensor; those, with name, dtype and shape in
the order of names, go into one. It tells any two checkpoints of a training run apart and costs nothing, where hashing
all bytes would take longer than the merge. It does not see a single changed number; where that
matters (is this the very file?), compare `card.digest`, which reads every byte.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EVERY, TAKEN = 1 << 20, 1 << 11


def fingerprint(weights: "Mapping[str, Tensor]") -> str:
    """Return the fingerprint of weights, the same on disk and in memory."""
    seen = Seen()
    return combine({name: seen.of("", name, weights[name]) for name in weights})


def combine(tensors: Mapping[str, str]) -> str:
    """Return the fingerprint of weights from those of their tensors."""
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()


class Seen:
    """Tensors as they come by in pieces whose length divides 2^20 or that are whole, each sampled the first time."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, str], Any] = {}
        self._next: dict[tuple[str, str], int] = {}

    def piece(self, model: str, name: str, at: int, flat: "Tensor") -> None:
        """Take note of entries ``[at, at + n)`` of a tensor, if they follow on those seen before."""
        key = (model, name)
        if self._next.get(key, 0) != at:
            return
        if at % EVERY == 0:
            self._sample(key, flat.detach())
        self._next[key] = at + flat.numel()

    def _sample(self, key: tuple[str, str], flat: "Tensor") -> None:
        import torch

        total = self._hashes.setdefault(key, hashlib.sha256())
        for start in range(0, flat.numel(), EVERY):
            total.update(flat[start : start + TAKEN].contiguous().view(torch.uint8).numpy().data)

    def of(self, model: str, name: str, tensor: "Tensor") -> str:
        """Return one tensor's fingerprint: of the pieces that came by, or of the tensor read now."""
        key = (model, name)
        if self._next.get(key) != tensor.numel():
            self._hashes.pop(key, None)
            self._next.pop(key, None)
            self.piece(model, name, 0, tensor.reshape(-1))
        sampled = self._hashes.get(key, hashlib.sha256()).hexdigest()
        told = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sampled]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
