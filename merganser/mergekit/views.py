"""Weights as slices see them: tensors of one model under the output's names, and a base of zeros where there is none."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..weights.adapter import Adapted, Adapter
from ..weights.header import FLOATS, Head, Headers, Over, View, Weights, folder_of, header

if TYPE_CHECKING:
    from torch import Tensor


class Taken(View):
    """Some tensors of one model under other names; ``names[new] = name there``."""

    NAMES = "names"

    def __init__(self, weights: Weights, names: Mapping[str, str]):
        self.weights, self.names = weights, {new: old for new, old in names.items() if old in weights}

    def __getitem__(self, name: str) -> "Tensor":
        return self.weights[self.names[name]]

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        return header(self.weights, self.names[name])

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return the model and the names."""
        return [of(self.weights), self.names]


class Tuned(Over):
    """A model with a LoRA adapter merged into it, in the model's own dtypes, as PEFT's merge_and_unload leaves it."""

    def __init__(self, base: Weights, adapter: Adapter):
        self.weights, self.adapter, self.whole = base, adapter, Adapted(base, adapter)
        self.path = folder_of(base)

    def __getitem__(self, name: str) -> "Tensor":
        tensor = self.whole[name]
        return tensor.to(self.weights[name].dtype) if self.whole.touches(name) else tensor

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return model and adapter."""
        return [of(self.weights), of(self.whole)]


def taken(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Return some tensors of a model under other names; headers alone where nothing else is known of the model."""
    inner = weights
    while (deeper := getattr(inner, "weights", None)) is not None:
        inner = deeper
    if isinstance(inner, Headers):
        return Headers({new: header(weights, old) for new, old in names.items() if old in weights}, inner.source)
    return Taken(weights, names)


class Zeros(Over):
    """A base of zeros, like ``weights``: deltas from it are the weights themselves. It takes no memory."""

    made_up = True  # not an input, so it has no fingerprint

    def __init__(self, weights: Weights):
        self.weights = weights

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        like = self.weights[name]
        return torch.zeros((), dtype=like.dtype).expand(like.shape)

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor."""
        return header(self.weights, name)

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return names and shapes."""
        return {name: header(self.weights, name)[1] for name in self.weights}


class Origin(View):
    """What the output is made from: every tensor of every slice, in the dtype that its sources promote to."""

    NAMES = "parts"

    def __init__(self, path: Path | None):
        self.path = path
        self.parts: dict[str, tuple[Weights, str]] = {}
        self.whose: dict[str, str] = {}

    def add(self, name: str, weights: Weights, dtype: str, whose: str) -> None:
        """Add the tensor of that name in the ``weights`` of the model ``whose``."""
        self.parts[name] = (weights, dtype)
        self.whose[name] = whose

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        weights, dtype = self.parts[name]
        tensor = weights[name]
        return tensor if header(weights, name)[0] == dtype else tensor.to(getattr(torch, TORCH[dtype]))

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        weights, dtype = self.parts[name]
        return dtype, header(weights, name)[1]


TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def promoted(dtypes: list[str]) -> str:
    """Return the dtype that holds all of these, as torch promotes them; of those that are not floating point the first."""
    kinds = {d for d in dtypes if d in FLOATS}
    if len(kinds) < 2:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"
