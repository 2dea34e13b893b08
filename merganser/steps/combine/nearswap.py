"""NearSwap: move to the expert where it is near the base, and no further than t elsewhere."""

from jaxtyping import Float
from torch import Tensor

ELEMENTWISE = True


def nearswap(deltas: Float[Tensor, "experts *shape"], *, t: float = 1e-4) -> Float[Tensor, "*shape"]:
    """Return the delta of one expert with every entry cut to ``[-t, t]``.

        theta = (1 - w) theta_0 + w theta_1,    w = clamp(t / |theta_1 - theta_0|, 0, 1)

    which is theta_0 + clamp(tau, -t, t), entry by entry, on tensors of any shape. Knob ``t``: the distance up to which
    an entry is taken over whole, in units of the weights; published merges use 1e-4.

    Raises ValueError for a negative t, or more than one expert.
    Source: alchemonaut, QuartetAnemoi-70B-t0.0001 (2024); mergekit (arXiv 2403.13257), method nearswap.
    """
    if isinstance(t, bool) or not (isinstance(t, (int, float)) and t >= 0):
        raise ValueError(f"t must not be negative, got {t!r}")
    if len(deltas) != 1:
        raise ValueError(f"nearswap goes from the base to one expert, got {len(deltas)}")
    return deltas[0].clamp(-t, t)
