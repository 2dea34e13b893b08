"""A mapping that has the names of something it holds."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Named(Mapping[str, "Tensor"]):
    """Weights whose names are those in one attribute, ``NAMES``, a mapping or list that does not change."""

    NAMES: ClassVar[str]

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(self, self.NAMES))

    def __len__(self) -> int:
        return len(getattr(self, self.NAMES))

    def __contains__(self, name: object) -> bool:
        return name in getattr(self, self.NAMES)
