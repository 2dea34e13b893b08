"""Memory for numbers that may be many: a large tensor lies in a temporary file that is mapped."""

import math
import tempfile

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 30  # bytes


def room(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, mapped to a temporary file where it is larger than `LARGE`."""
    size = math.prod(shape) * kind.itemsize
    if size <= LARGE:
        return torch.empty(shape, dtype=kind)
    with tempfile.TemporaryFile() as file:  # gone with the mapping; the kernel writes out what does not fit in memory
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="w+", shape=size)).view(kind).reshape(shape)
