"""The same weights under other names, as when one checkpoint says ``bert.encoder...`` and another ``encoder...``."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Renamed(Mapping[str, "Tensor"]):
    """Weights under other names, read on touch: ``names[new] = old``; what ``names`` leaves out is not there."""

    def __init__(self, weights: "Mapping[str, Tensor]", names: Mapping[str, str]):
        self.weights = weights
        self.names = names

    def __getitem__(self, name: str) -> "Tensor":
        return self.weights[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names
