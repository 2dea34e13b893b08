"""What frozen networks say on unlabeled inputs: features that are worked out once, in memory or mapped from files.

FOLDER/KEY.npy      [n, width], by the weights, inputs, encoder, precision and indices of a key

They are shared by all experts that ask the same network, by words that ask the same inputs (``ri(alpha=0.3)`` behind
``ri``, ``coadapt`` behind both), and by a run that goes on. They are fp16 where the network computes in bf16, whose rounding
is eight times as coarse. The folder may be deleted at any time.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..card import digest, key_of
from .encoder import Progress, features, settled
from .inputs import Subset, inputs_digest

LARGEST = 6e4  # beyond it fp16 has no numbers, and fp32 is kept


class Rows:
    """Features of some inputs by their rows; what is taken out of it is fp32, and in memory."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Int[Tensor, "batch"] | slice) -> Float[Tensor, "batch width"]:
        at = rows if isinstance(rows, slice) else rows.numpy()
        return torch.from_numpy(np.array(self.array[at], dtype=np.float32))


class Targets:
    """Features by any weights of one encoder on any of ``inputs``, each set of them once.

    ``folder``: where they are kept, found there and mapped, instead of held in memory; what is read is the same to the bit.
    """

    def __init__(self, encoder: nn.Module, inputs: Any, kind: str = "auto", folder: Path | None = None):
        self.encoder, self.inputs, self.kind, self.folder = encoder, inputs, settled(kind), folder
        self.known: dict[str, Rows] = {}
        self.digests: dict[
            int, tuple[Mapping[str, Tensor], str]
        ] = {}  # by the object, which is held so that it stays one
        self.same: list[Any] | None = None

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        at: Int[Tensor, "n"],
        *,
        keep: bool = True,
        progress: Progress | None = None,
    ) -> Rows:
        """Return the features of the inputs ``at``; without a folder, ``keep`` tells whether they stay in memory."""
        key = self._key(weights, at, keep) if keep or self.folder else ""
        if key in self.known:
            return self.known[key]
        path = self.folder / f"{key[:32]}.npy" if self.folder else None
        if path is None or not path.is_file():
            x = features(self.encoder, weights, Subset(self.inputs, at), kind=self.kind, progress=progress)
            made = (x.half() if self.kind == "bf16" and _fits(x) else x).numpy()
            if path is not None:
                _write(path, made)
        rows = Rows(made if path is None else np.load(path, mmap_mode="r"))
        if keep:
            self.known[key] = rows
        return rows

    def _key(self, weights: Mapping[str, Tensor], at: Int[Tensor, "n"], keep: bool) -> str:
        if self.same is None:
            encoder = [type(self.encoder).__qualname__, getattr(self.encoder, "pooling", None)]
            self.same = [encoder, self.kind, inputs_digest(self.inputs)]
        if (known := self.digests.get(id(weights))) is None:
            known = weights, digest(weights)
            if keep:
                self.digests[id(weights)] = known
        return key_of([*self.same, known[1], digest({"at": at})])


def _fits(x: Float[Tensor, "n width"]) -> bool:
    return not len(x) or float(x.abs().max()) < LARGEST


def _write(path: Path, made: np.ndarray) -> None:
    """Write so that a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, made)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
