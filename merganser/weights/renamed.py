"""The same weights under other names, as when one checkpoint says ``bert.encoder...`` and another ``encoder...``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .named import Named

if TYPE_CHECKING:
    from torch import Tensor


class Renamed(Named):
    """Weights under other names, read on touch: ``names[new] = old``; what ``names`` leaves out is not there."""

    NAMES = "names"

    def __init__(self, weights: "Mapping[str, Tensor]", names: Mapping[str, str]):
        self.weights = weights
        self.names = names

    def __getitem__(self, name: str) -> "Tensor":
        return self.weights[self.names[name]]
