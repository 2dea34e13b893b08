"""Glyphs: characters drawn in the typefaces that matplotlib ships, then bent, thickened and blurred by noise.

Everything comes with matplotlib (DejaVu, STIX General and Computer Modern), so nothing is downloaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import MissingExtra

SIZE, CANVAS, POINTS = 24, 48, 30
CHUNK = 1000

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
COMPUTER_MODERN = ("cmr10", "cmss10", "cmtt10", "cmb10", "cmti10")

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LOWER = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ"
ARMENIAN = "".join(map(chr, [*range(0x531, 0x557), *range(0x561, 0x587)]))
GEORGIAN = "".join(map(chr, range(0x10D0, 0x10F0)))
PHONETIC = "".join(map(chr, range(0x250, 0x2A9)))
SIGNS = '∀∂∃∄∅∆∇∈∉∋∏∑√∛∝∞∟∠∧∨∩∪∫∬∮∴∷≃≅≈≠≡≤≥⊂⊃⊆⊕⊗⊥!"#$%&()*+/<=>?@[]{}~'


class Drawn(NamedTuple):
    """Clean drawings, uint8 ``[n, CANVAS, CANVAS]``, with the index of each one's character and typeface."""

    pixels: np.ndarray
    characters: np.ndarray
    faces: np.ndarray


@dataclass(frozen=True)
class Bend:
    """How far a glyph is distorted: degrees, factors, shares of the picture's half width, and noise (pixels in 0..1)."""

    rotation: float = 15.0
    smallest: float = 0.8
    largest: float = 1.15
    shear: float = 0.25
    shift: float = 0.09
    elastic: float = 0.06
    noise: float = 0.05
    stroke: float = 1.0


def has(face: str, character: str) -> bool:
    """Tell whether a typeface has a character: one that it lacks would be drawn as an empty box."""
    return ord(character) in _charmap(face)


def draw(characters: Sequence[str], faces: Sequence[str]) -> Drawn:
    """Draw every character in every typeface that has it, centred. Raises MissingExtra without Pillow and matplotlib."""
    needs("PIL", "matplotlib")
    from PIL import Image, ImageDraw, ImageFont

    pixels, of_character, of_face = [], [], []
    for k, face in enumerate(faces):
        font = ImageFont.truetype(str(_file(face)), POINTS)
        for c, character in enumerate(characters):
            if not has(face, character):
                continue
            picture = Image.new("L", (CANVAS, CANVAS))
            pen = ImageDraw.Draw(picture)
            left, top, right, bottom = pen.textbbox((0, 0), character, font=font)
            pen.text(((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2), character, font=font, fill=255)
            pixels.append(np.asarray(picture))
            of_character.append(c)
            of_face.append(k)
    return Drawn(np.stack(pixels), np.array(of_character), np.array(of_face))


def distort(x: Float[Tensor, "n 1 height width"], rng: torch.Generator, bend: Bend = Bend()) -> Tensor:
    """Change stroke width, turn, stretch, shear, shift and warp, dim, add noise: pixels in 0..1, ``[n, 1, SIZE, SIZE]``."""
    n = len(x)

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=rng) * (high - low) + low

    stroke = uniform(n, 1, 1, 1) * bend.stroke
    thicker, thinner = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    x = x + stroke.clamp(min=0) * (thicker - x) + 0.7 * (-stroke).clamp(min=0) * (thinner - x)
    angle = uniform(n) * math.radians(bend.rotation)
    wide, high = (1 / uniform(n, low=bend.smallest, high=bend.largest) for _ in range(2))
    shear, right, down = uniform(n) * bend.shear, uniform(n) * bend.shift, uniform(n) * bend.shift
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * wide, (shear - sin) * wide], 1), torch.stack([sin * high, cos * high], 1)]
    turn = torch.stack(rows, 1) * (1.5 * SIZE / CANVAS)
    affine = torch.cat([turn, torch.stack([right, down], 1)[:, :, None]], 2)
    grid = F.affine_grid(affine, [n, 1, SIZE, SIZE], align_corners=False)
    coarse = torch.randn(n, 2, 4, 4, generator=rng) * bend.elastic
    warp = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    y = F.grid_sample(x, grid + warp.permute(0, 2, 3, 1), align_corners=False) * uniform(n, 1, 1, 1, low=0.7)
    return (y + torch.randn(y.shape, generator=rng) * bend.noise).clamp(0, 1)


def glyphs(
    characters: Sequence[str], faces: Sequence[str], n: int, seed: int, bend: Bend = Bend()
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``n`` distorted glyphs, uint8 ``[n, SIZE, SIZE, 1]``, and the index of each one's character, shuffled.

    Every character is drawn in every typeface that has it, all of these equally often.
    """
    rng = torch.Generator().manual_seed(seed)
    drawn = draw(characters, faces)
    clean = torch.from_numpy(drawn.pixels)[:, None]
    rounds = [torch.randperm(len(clean), generator=rng) for _ in range(-(-n // len(clean)))]
    order = torch.cat(rounds)[:n]
    bent = [distort(clean[at].float() / 255, rng, bend) for at in order.split(CHUNK)]
    pixels = (torch.cat(bent) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), drawn.characters[order.numpy()].astype(np.int64)


def needs(*packages: str) -> None:
    """Raise MissingExtra unless all these packages are installed."""
    if any(find_spec(package) is None for package in packages):
        raise MissingExtra("the demo", "demo")


@cache
def _charmap(face: str) -> Mapping[int, int]:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(_file(face))).get_charmap()


def _file(face: str) -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
