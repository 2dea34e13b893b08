"""Experts stored as what they add to their base: LoRA adapters, and what ``merge(..., stored="delta")`` wrote."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .adapter import Adapted, Adapter
from .header import FLOATS, Head, View, Weights, header
from .stored import Stored

if TYPE_CHECKING:
    from torch import Tensor


def is_delta(weights: Weights) -> bool:
    """Tell whether ``weights`` are a stored delta, which its metadata says (``merganser.kind = "delta"``)."""
    return isinstance(weights, Stored) and weights.metadata.get("merganser.kind") == "delta"


def over(base: Weights, weights: Weights) -> Weights:
    """Return ``weights`` as they are, or ``base + weights`` where they are a stored delta or an adapter."""
    if isinstance(weights, Adapter):
        return Adapted(base, weights)
    return Sum(base, weights) if is_delta(weights) else weights


class Sum(View):
    """``base + delta`` in fp32 (float64 where the base is), tensor by tensor when touched.

    A tensor that the delta lacks, or that is not floating point, is the base's. Raises WeightsError if the delta has
    tensors that the base lacks or other shapes: it belongs to another base.
    """

    NAMES = "base"

    def __init__(self, base: Weights, delta: Weights):
        self.base, self.weights = base, delta
        self.path = getattr(delta, "path", None)
        wrong = [n for n in delta if n not in base or header(delta, n)[1] != header(base, n)[1]]
        if wrong:
            raise WeightsError(
                f"{self.path}: a delta of another base: its tensor '{wrong[0]}' is not in this one, or has another "
                f"shape there"
            )

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        origin = self.base[name]
        if not self.touches(name):
            return origin
        kind = torch.float64 if origin.dtype == torch.float64 else torch.float32
        return origin.to(kind) + self.weights[name].to(kind)

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        dtype, shape = header(self.base, name)
        return ("F64" if dtype == "F64" else "F32") if self.touches(name) else dtype, shape

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return base and delta."""
        return [of(self.base), of(self.weights)]

    def touches(self, name: str) -> bool:
        """Tell whether the delta has this tensor."""
        return name in self.weights and header(self.base, name)[0] in FLOATS and header(self.weights, name)[0] in FLOATS
