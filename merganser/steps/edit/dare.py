"""DARE: drop and rescale."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def dare(
    delta: Float[Tensor, "*shape"], *, keep: float = 0.1, rescale: bool = True, rng: Generator
) -> Float[Tensor, "*shape"]:
    """Drop each entry of the delta at random and divide the survivors by the share that is kept.

        m ~ Bernoulli(keep),   delta' = m * delta / keep

    The expectation of delta' is delta. ``keep`` is 1 - p of the paper, which tunes p over 0.1 .. 0.9 and 0.99;
    ``rescale=False`` leaves the division out. An entry is kept where ``torch.rand(shape, generator=rng) >= 1 - keep``,
    so the same seed drops the same entries as MergeLM and FusionBench do.

    Raises ValueError if ``keep`` lies outside (0, 1].
    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099).
    """
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise ValueError(f"keep must lie in (0, 1], got {keep!r}")
    uniform = torch.rand(delta.shape, generator=rng, device=rng.device)
    kept = torch.where((uniform >= 1 - keep).to(delta.device), delta, 0)
    return kept / keep if rescale else kept
