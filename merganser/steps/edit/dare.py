"""DARE: drop and rescale."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int8
from numpy.random import Generator
from torch import Tensor

from ..select import l1_ratio, one_of

SHARES = 1 << 16  # 16 random bits an entry


def dare(
    delta: Float[Tensor, "*shape"], *, keep: float = 0.1, rescale: bool | str = True, rng: Generator
) -> Float[Tensor, "*shape"]:
    """Drop each entry of the delta at random and divide the survivors by the share that is kept.

        m ~ Bernoulli(keep),   delta' = m * delta / keep

    The expectation of delta' is delta: entries are kept with a probability of ``keep`` rounded to 1 / 65,536, and it is
    that number which they are divided by. Four entries share one 64-bit number of the generator, a tenth of the time
    that ``torch.rand`` takes; so pieces of a tensor throw the dice of the whole where they begin at multiples of four.

    keep      1 - p of the paper, which tunes p over 0.1 .. 0.9 and 0.99
    rescale   True: divide by ``keep`` (the paper); "l1": times |delta|_1 / |m delta|_1 of this tensor (mergekit; the
              tensor is not cut); False: neither

    Raises ValueError if ``keep`` lies outside (0, 1], or for an unknown rescale.
    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099).
    """
    if isinstance(keep, bool) or not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise ValueError(f"keep must lie in (0, 1], got {keep!r}")
    one_of("rescale", rescale, (True, False, "l1"))
    if keep == 1:
        return delta.clone()
    shares = _shares(keep)
    thrown = _thrown(delta.numel(), shares, rng).reshape(delta.shape).to(delta)
    if rescale is True:
        return torch.addcmul(delta.new_zeros(()), thrown, delta, value=SHARES / shares)
    kept = thrown.mul_(delta)
    if rescale == "l1":
        kept = kept * l1_ratio(*(one.detach().abs().sum(dtype=torch.float64) for one in (delta, kept)))
    return kept


def leaves(entries: int, *, keep: float = 0.1, rng: Generator, **_knobs: Any) -> int:
    """Return how many of the next ``entries`` the same dice will keep: so many at most are not zero then."""
    return entries if keep == 1 else int(_thrown(entries, _shares(keep), rng).count_nonzero())


def _shares(keep: float) -> int:
    return max(1, min(round(keep * SHARES), SHARES - 1))


def _thrown(entries: int, shares: int, rng: Generator) -> Int8[Tensor, "entries"]:
    """Return 1 with a probability of ``shares / SHARES`` for each entry, otherwise 0."""
    bits = rng.bit_generator.random_raw(-(-entries // 4)).view(np.int16)[:entries]
    # numpy compares integers of 16 bits in a tenth of torch's time
    return torch.from_numpy((bits < shares - SHARES // 2).view(np.int8))


def elementwise(*, rescale: bool | str = True, **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: not for a length of the whole."""
    return rescale != "l1"
