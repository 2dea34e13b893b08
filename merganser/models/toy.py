"""A small convolutional net for small pictures, which trains in a minute on a processor: the demo's encoder.

A recipe names it as ``encoder = "merganser.models.toy:conv_net"``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError
from ..weights.stored import Stored
from .inputs import Images
from .pixels import Pixels

GROUPS = 8
MEAN, STD = (0.15,), (0.35,)


class Block(nn.Module):
    """A residual block: x + conv(relu(norm(conv(relu(norm(x)))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ConvNet(nn.Module):
    """Three convolutions of stride 2, a residual block after the second and the third, the mean over places, a layer.

    GroupNorm alone normalises: it keeps no running statistics, which merging would have to repair.
    ``channels``: after each of the three convolutions, three multiples of 8. ``width``: of the features, which have norm 1.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 128), width: int = 128):
        super().__init__()
        self.size: int | None = None
        a, b, c = channels
        self.conv1 = nn.Conv2d(1, a, 5, stride=2, padding=2)
        self.norm1 = nn.GroupNorm(GROUPS, a)
        self.conv2 = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.block2 = Block(b)
        self.norm2 = nn.GroupNorm(GROUPS, b)
        self.conv3 = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.block3 = Block(c)
        self.norm3 = nn.GroupNorm(GROUPS, c)
        self.project = nn.Linear(c, width)

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch features"]:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.block2(self.conv2(x))))
        x = F.relu(self.norm3(self.block3(self.conv3(x))))
        return F.normalize(self.project(x.mean(dim=(2, 3))), dim=1)

    def prepare(self, raw: Any) -> Images:
        """Return uint8 pictures ``[n, height, width, 1]`` as inputs. Raises DataError for anything else.

        With a ``size``, pictures of any size and colour: they become grey, ``size`` by ``size`` pixels.
        """
        if self.size is not None:
            return Pixels((self.size, self.size), None, "bilinear", MEAN, STD, channels=1)(raw)
        if not isinstance(raw, np.ndarray):
            raise DataError("pictures must be one array [n, height, width, 1]: give files of one size")
        pixels = raw
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 1:
            raise DataError(f"pictures must be uint8 [n, height, width, 1], are {pixels.dtype} {list(pixels.shape)}")
        return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), mean=MEAN, std=STD)


def conv_net(
    base: str | Path, *, channels: Sequence[int] = (32, 64, 128), width: int = 128, size: int | None = None
) -> ConvNet:
    """Return the net with the weights in the folder ``base``; ``size``: see `ConvNet.prepare`."""
    net = ConvNet(channels, width)
    net.size = size
    net.load_state_dict(dict(Stored(base)))
    return net.eval()
