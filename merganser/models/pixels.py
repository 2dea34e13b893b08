"""Pictures into pixels: resize, crop and normalise as an image processor's configuration says, with torch alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .inputs import Images
from .room import room

FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
CHUNK = 256


@dataclass(frozen=True)
class Pixels:
    """How pictures become pixels.

    ``resize``: (height, width), or a number that the shorter side becomes; ``crop``: the (height, width) then cut from
    the middle, or None; ``filter``: "bicubic" or "bilinear", both antialiased, or "nearest". ``mean`` and ``std`` are
    per channel, for pixels in [0, 1].
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    filter: str = "bicubic"
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    channels: int = 3

    def __call__(self, images: Any) -> Images:
        """Return inputs from uint8 ``[n, height, width(, channels)]`` or from a list of PIL images or such arrays.

        Raises DataError for pictures that are not uint8, or whose channels do not fit.
        """
        if hasattr(images, "shape"):
            whole = self._channels(_tensor(images, f"images of shape {tuple(images.shape)}", 4))
            parts = (self._fit(part) for part in whole.split(CHUNK) if len(part))
        else:
            parts = (
                self._fit(self._channels(_tensor(_rgb(image), f"image {k}", 3, batch=True)))
                for k, image in enumerate(images)
            )
        return Images(_joined(parts, len(images)), self.mean, self.std)

    def _channels(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] == 3 and self.channels == 1:  # luminance, ITU-R 601
            red, green, blue = images.float().unbind(1)
            images = (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8)[:, None]
        if images.shape[1] != self.channels:
            raise DataError(f"images have {images.shape[1]} channels, the encoder reads {self.channels}")
        return images

    def _fit(self, images: Tensor) -> Tensor:
        size = self.resize
        if isinstance(size, int):
            height, width = images.shape[2:]
            short = min(height, width)
            size = (size * height // short, size * width // short)
        images = self._resize(images, size)
        return images if self.crop is None else _middle(images, self.crop)

    def _resize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(images.shape[2:]) == size:
            return images.contiguous()
        smooth = self.filter != "nearest"
        return F.interpolate(images.contiguous(), size=size, mode=self.filter, antialias=smooth)


def read_pixels(
    folder: str | Path, *, size: int | Sequence[int], channels: int, mean: Sequence[float], std: Sequence[float]
) -> Pixels:
    """Return how ``folder``'s image processor prepares pictures; the keywords are used where it does not say.

    Read from ``preprocessor_config.json``, or from ``processor_config.json`` (written by transformers 5).
    """
    says = _processor(Path(folder))
    want = says.get("size", size)
    if not isinstance(want, int):
        want = want["shortest_edge"] if "shortest_edge" in want else _pair(want)
    elif says.get("default_to_square", True):
        want = _pair(want)
    crop = _pair(says["crop_size"]) if says.get("do_center_crop") and "crop_size" in says else None
    means, stds = (
        (says.get("image_mean", mean), says.get("image_std", std)) if says.get("do_normalize", True) else (0, 1)
    )
    # A processor may rescale by something else than 1/255, which `Images` always does.
    factor = 255 * says.get("rescale_factor", 1 / 255) if says.get("do_rescale", True) else 255
    return Pixels(
        want,
        crop,
        FILTERS.get(says.get("resample", 3), "bicubic"),
        [m / factor for m in _each(means, channels)],
        [s / factor for s in _each(stds, channels)],
        channels,
    )


def _processor(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := folder / name).is_file():
            says = json.loads(path.read_text(encoding="utf-8"))
            return says.get("image_processor", says)
    return {}


def _joined(parts: Iterable[Tensor], n: int) -> Tensor:
    """Return ``n`` pictures in one tensor, mapped to a temporary file where it would be large."""
    joined, done = None, 0
    for part in parts:
        if joined is None:
            joined = room((n, *part.shape[1:]), torch.uint8)
        if part.shape[1:] != joined.shape[1:]:
            raise DataError("pictures come out in different sizes; crop them: an encoder reads pictures of one size")
        joined[done : done + len(part)] = part
        done += len(part)
    if joined is None:
        raise DataError("no pictures: an encoder reads pictures of one size")
    return joined


def _tensor(images: Any, what: str, axes: int, batch: bool = False) -> Tensor:
    x = torch.as_tensor(images)
    if x.dtype != torch.uint8:
        raise DataError(f"{what}: pixels are {x.dtype}, not uint8; give bytes from 0 to 255")
    if x.ndim == axes - 1:
        x = x[..., None]
    if x.ndim != axes:
        raise DataError(f"{what}: {x.ndim} axes; give [n, height, width, channels] or a list of pictures")
    return (x[None] if batch else x).permute(0, 3, 1, 2)


def _rgb(image: Any) -> Any:
    if not hasattr(image, "convert"):
        return image
    image = image if image.mode in ("RGB", "L") else image.convert("RGB")
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1)


def _middle(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle ``size`` of the pictures, with black borders where they are smaller."""
    for axis, want in ((2, size[0]), (3, size[1])):
        if (lack := want - images.shape[axis]) > 0:
            border = ((lack + 1) // 2, lack // 2)
            images = F.pad(images, (0, 0, *border) if axis == 2 else border)
        images = images.narrow(axis, (images.shape[axis] - want) // 2, want)
    return images


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _each(value: Any, channels: int) -> list[float]:
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * channels
