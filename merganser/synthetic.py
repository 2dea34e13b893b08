"""Unlabeled inputs that need no data: pictures of noise, dead leaves, fractals and textures; sequences of random tokens.

A source is written KIND:COUNT, as in ``[inputs] files = ["dead-leaves:5000", "noise:1000"]``; COUNT pictures of 64 by 64.
The same words give the same pictures on every machine.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, did_you_mean

SIZE = 64
WRITTEN = re.compile(r"([a-z][a-z-]*):(\d+)")
Picture = np.ndarray


def is_source(text: str | Path) -> bool:
    """Tell whether ``text`` has the form of a source, KIND:COUNT."""
    return WRITTEN.fullmatch(str(text)) is not None


def known_source(text: str | Path) -> tuple[str, int]:
    """Return the kind and the count of a source. Raises DataError for an unknown kind, or none of it."""
    found = WRITTEN.fullmatch(str(text))
    if found is None:
        raise DataError(f"'{text}' is no source; write KIND:COUNT, as in dead-leaves:5000")
    kind, count, known = found[1], int(found[2]), (*PICTURES, "tokens")
    if kind not in known:
        raise DataError(f"unknown source of inputs '{kind}'{did_you_mean(kind, known)}; known: {', '.join(known)}")
    if not count:
        raise DataError(f"{text}: ask for at least one")
    return kind, count


def pictures(text: str | Path, size: int = SIZE) -> np.ndarray:
    """Return the pictures of a source, uint8 ``[n, size, size, 3]``. Raises DataError as `known_source`, or for tokens."""
    kind, count = known_source(text)
    if kind == "tokens":
        raise DataError(f"{text}: texts, where pictures are needed")
    draw = PICTURES[kind]
    seeds = np.random.SeedSequence([sum(kind.encode()), len(kind)]).spawn(count)
    return np.stack([_bytes(draw(np.random.default_rng(seed), size)) for seed in seeds])


def noise(rng: np.random.Generator, size: int) -> Picture:
    """Return Gaussian noise, each pixel and channel on its own."""
    return 0.5 + 0.25 * rng.standard_normal((size, size, 3))


def dead_leaves(rng: np.random.Generator, size: int) -> Picture:
    """Return discs of random colour that cover each other, radii with density r^-3: edges at every scale.

    Source: Baradad et al., Learning to see by looking at noise (arXiv 2106.05963); Lee, Mumford and Huang (2001).
    """
    out = np.zeros((size, size, 3))
    small, large = 2.0, size / 2
    y, x = np.mgrid[:size, :size]
    free = np.ones((size, size), dtype=bool)
    while free.any():  # from the front: the first disc at a pixel is the one that is seen
        radius = 1 / np.sqrt(rng.uniform(large**-2, small**-2))
        cx, cy = rng.uniform(-radius, size + radius, 2)
        disc = free & ((x - cx) ** 2 + (y - cy) ** 2 <= radius**2)
        out[disc] = rng.uniform(0, 1, 3)
        free &= ~disc
        small = min(small * 1.01, large / 2)  # the last gaps would take the longest
    return out


def fractals(rng: np.random.Generator, size: int) -> Picture:
    """Return an iterated function system: points of two to four contracting affine maps, coloured by the map.

    Source: Kataoka et al., Pre-training without natural images (arXiv 2101.08515).
    """
    count = int(rng.integers(2, 5))
    # rotate, stretch, rotate: entries drawn one by one would mostly give thin threads
    stretched = rng.uniform(0.45, 0.85, (count, 2, 1)) * _turns(rng.uniform(0, 2 * np.pi, count))
    maps = _turns(rng.uniform(0, 2 * np.pi, count)) @ stretched
    moves, colours = rng.uniform(-1, 1, (count, 2)), rng.uniform(0.3, 1, (count, 3))
    points = rng.uniform(-1, 1, (4000, 2))
    for _ in range(24):  # each step takes every point through one of the maps
        which = rng.integers(0, count, len(points))
        points = np.einsum("nij,nj->ni", maps[which], points) + moves[which]
    low, high = points.min(axis=0), points.max(axis=0)
    at = ((points - low) / np.maximum(high - low, 1e-9) * (size - 1)).astype(int)
    out = np.full((size, size, 3), rng.uniform(0, 0.3))
    out[at[:, 1], at[:, 0]] = colours[which]
    return out


def _turns(angles: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def textures(rng: np.random.Generator, size: int) -> Picture:
    """Return bent stripes: sums of a few waves, warped by slower ones, through a random map of colours."""
    y, x = np.mgrid[:size, :size] / size
    for _ in range(2):
        x, y = x + _waves(rng, x, y, 3) * 0.15, y + _waves(rng, x, y, 3) * 0.15
    value = _waves(rng, x, y, 24)
    colours = rng.uniform(0, 1, (4, 3))
    ramp = (value - value.min()) / max(float(np.ptp(value)), 1e-9) * 3
    part = np.minimum(ramp.astype(int), 2)
    share = (ramp - part)[..., None]
    return colours[part] * (1 - share) + colours[part + 1] * share


def _waves(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, fastest: float) -> np.ndarray:
    """Return a sum of five waves of at most ``fastest`` periods, slower ones higher."""
    total = np.zeros_like(x)
    for periods in fastest ** rng.uniform(0, 1, 5):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        total += np.sin(2 * np.pi * periods * (x * np.cos(angle) + y * np.sin(angle)) + phase) / periods**0.5
    return total


PICTURES: dict[str, Callable[[np.random.Generator, int], Picture]] = {
    "noise": noise,
    "dead-leaves": dead_leaves,
    "fractals": fractals,
    "textures": textures,
}


def token_texts(text: str | Path, tokenizer: Any, words: int = 16) -> list[str]:
    """Return COUNT texts of ``words`` random tokens of a tokenizer's vocabulary (no special ones), for ``tokens:COUNT``."""
    kind, count = known_source(text)
    if kind != "tokens":
        raise DataError(f"'{text}' is no source of texts; write tokens:COUNT")
    usable = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    rng = np.random.default_rng(0)
    return [str(tokenizer.decode(rng.choice(usable, words).tolist())) for _ in range(count)]


def _bytes(picture: np.ndarray) -> np.ndarray:
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def split_sources(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files, and the sources of tokens, which need the encoder's tokenizer."""
    tokens = [str(file) for file in files if is_source(file) and str(file).startswith("tokens:")]
    return [file for file in files if str(file) not in tokens], tokens
