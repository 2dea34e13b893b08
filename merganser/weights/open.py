"""The door to weights: whatever holds them, as one mapping from name to tensor."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WeightsError
from .renamed import Renamed
from .stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]
Source = Weights | str | Path


def open_weights(source: Source) -> Weights:
    """Return the weights at ``source``: a mapping as it is, a path as a lazily read folder or file of safetensors.

    Raises WeightsError if nothing is there, or if it is a pickle (refused: a pickle can run code when read).
    """
    return source if isinstance(source, Mapping) else Stored(source)


def named(experts: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Return experts by name; a sequence of paths is named by the folders, other sequences ``expert0, expert1, ...``."""
    if isinstance(experts, Mapping):
        return dict(experts)
    names = [Path(e).stem if isinstance(e, str | Path) else f"expert{k}" for k, e in enumerate(experts)]
    if len(set(names)) < len(names):
        names = [f"{name}-{k}" if names.count(name) > 1 else name for k, name in enumerate(names)]
    return dict(zip(names, experts, strict=True))


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """Return a tensor's shape, from the header where there is one."""
    if isinstance(weights, Renamed):
        return shape_of(weights.weights, weights.names[name])
    return weights.entries[name].shape if isinstance(weights, Stored) else tuple(weights[name].shape)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether ``name`` fits one of the glob ``patterns``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_match(base: Weights, experts: Mapping[str, Weights], own: Sequence[str] = ()) -> list[str]:
    """Return the names merged: the base's, less those that ``own`` patterns leave to each expert.

    Raises WeightsError, naming the first three, where an expert lacks a tensor, has another shape or has more tensors.
    """
    names = [n for n in base if not matches(n, own)]
    for expert, weights in experts.items():
        for what, wrong in (
            ("lacks", [n for n in names if n not in weights]),
            ("has, and the base lacks,", [n for n in weights if n not in base and not matches(n, own)]),
        ):
            if wrong:
                raise WeightsError(
                    f"expert '{expert}' {what} {_first(wrong)}; tensors that belong to an expert alone (its head) are "
                    f'left out with own=["{_pattern(wrong)}"]'
                )
        shapes = [(n, shape_of(weights, n), shape_of(base, n)) for n in names]
        if wrong := [f"'{n}' {list(has)} instead of {list(wants)}" for n, has, wants in shapes if has != wants]:
            raise WeightsError(
                f"expert '{expert}' has other shapes: {_first(wrong, quote='')}; a tensor that should not be merged is "
                f"left out with own=[NAME]"
            )
    return names


def _first(names: list[str], quote: str = "'") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{quote}{n}{quote}" for n in names[:3]) + more


def _pattern(names: list[str]) -> str:
    stem = names[0].split(".")[0]
    return f"{stem}.*" if "." in names[0] and all(n.startswith(f"{stem}.") for n in names) else names[0]
