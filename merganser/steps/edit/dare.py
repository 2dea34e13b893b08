"""DARE: drop and rescale."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import threshold

from ..select import l1_ratio, one_of


def dare(
    delta: Float[Tensor, "*shape"], *, keep: float = 0.1, rescale: bool | str = True, rng: Generator
) -> Float[Tensor, "*shape"]:
    """Drop each entry of the delta at random and divide the survivors by the share that is kept.

        m ~ Bernoulli(keep),   delta' = m * delta / keep

    The expectation of delta' is delta. An entry is kept where ``torch.rand(shape, generator=rng) >= 1 - keep``, so the
    same seed drops the same entries as MergeLM and FusionBench do.

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
    uniform = torch.rand(delta.shape, generator=rng, device=rng.device)
    dropped_up_to = float(np.nextafter(np.float32(1 - keep), np.float32(0)))
    kept = threshold(uniform, dropped_up_to, 0, inplace=True).sign_().to(delta).mul_(delta)
    if rescale == "l1":
        ratio = l1_ratio(*(one.detach().abs().sum(dtype=torch.float64) for one in (delta, kept)))
        return kept * ratio
    return kept.div_(keep) if rescale else kept


def elementwise(*, rescale: bool | str = True, **_knobs: Any) -> bool:
    """Tell whether a tensor may be cut: not for a length of the whole."""
    return rescale != "l1"
