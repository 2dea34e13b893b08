"""Mask: multiply a delta by a given mask."""

from jaxtyping import Shaped
from torch import Tensor

ELEMENTWISE = True


def mask(delta: Shaped[Tensor, "*shape"], *, mask: Shaped[Tensor, "*shape"] | None) -> Shaped[Tensor, "*shape"]:
    """Return the delta times the mask that was learned or made for it, entry by entry.

        tau' = m tau

    mask   of the delta's shape, one for all experts or one an expert; 0 and 1, truth values, or any numbers. A tensor
           for which there is none stays as it is

    Raises ValueError for a mask of another shape.
    Source: the masks of Tang et al., Concrete Subspace Learning (arXiv 2312.06173), and of many others.
    """
    if mask is None:
        return delta.clone()
    if mask.shape != delta.shape:
        raise ValueError(f"mask must have the delta's shape {list(delta.shape)}, has {list(mask.shape)}")
    return delta * mask.to(delta)
