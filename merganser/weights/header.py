"""Names, dtypes and shapes of weights, known before their bytes are read; and weights seen as other weights.

Whatever is a mapping from name to tensor is weights. One that knows more than that says so with two attributes:
``header(name)``, dtype name and shape of a tensor without its bytes, and ``path``, the file or folder it came from.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .named import Named
from .renamed import Renamed
from .stored import DTYPES, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Factors

Weights = Mapping[str, "Tensor"]
Head = tuple[str, tuple[int, ...]]

FLOATS = ("F64", "F32", "F16", "BF16")
STATE = ".quant_state.bitsandbytes__"  # and the type, after a packed tensor's name
WHOLE = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
NAMES = {f"torch.{kind}": name for name, (kind, _) in DTYPES.items()}


def header(weights: Weights, name: str) -> Head:
    """Return dtype name ("F32", "BF16", ...) and shape of a tensor, without its bytes where there is a header."""
    if isinstance(weights, Stored):
        entry = weights.entries[name]
        return entry.dtype, entry.shape
    if isinstance(weights, Renamed):
        return header(weights.weights, weights.names[name])
    if isinstance(weights, View):
        return weights.header(name)
    tensor = weights[name]
    return NAMES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape)


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """Return a tensor's shape, from the header where there is one."""
    return header(weights, name)[1]


def quantised(weights: Weights) -> str | None:
    """Return the first weight that is packed, if any: a matrix of integers, or what bitsandbytes wrote a state for.

    GPTQ and AWQ call theirs ``qweight``; bitsandbytes can keep its bytes in tensors of another dtype.
    """
    heads = ((name, header(weights, name)) for name in weights if name.endswith("weight"))
    whole = next((name for name, (kind, shape) in heads if kind in WHOLE and len(shape) > 1), None)
    return whole or next((name.partition(STATE)[0] for name in weights if STATE in name), None)


def touches(weights: Weights, name: str) -> bool:
    """Tell whether a tensor may differ from that of the base that ``weights`` are a view over; True where there is none."""
    if isinstance(weights, Renamed):
        return touches(weights.weights, weights.names[name])
    return not isinstance(weights, View) or weights.touches(name)


def factors(weights: Weights, name: str) -> "Factors | None":
    """Return what a tensor adds to its base's as a product of two matrices, None where it is not known as one."""
    if isinstance(weights, Renamed):
        return factors(weights.weights, weights.names[name])
    return weights.factors(name) if isinstance(weights, View) else None


def pieces(weights: Weights, name: str, step: int) -> "Iterator[Tensor]":
    """Yield a tensor's entries in a row, ``step`` at a time, and no more of it than that where it has to be made."""
    if isinstance(weights, Renamed):
        return pieces(weights.weights, weights.names[name], step)
    return (
        weights.pieces(name, step)
        if isinstance(weights, View)
        else iter(weights[name].detach().reshape(-1).split(step))
    )


def source(weights: Weights, name: str) -> tuple[Weights, str]:
    """Return the weights that a tensor really lies in, and its name there, where ``weights`` only pass it on."""
    if isinstance(weights, Renamed):
        return source(weights.weights, weights.names[name])
    return source(*weights.parts[name]) if isinstance(weights, Picked) else (weights, name)


def exchanged(weights: Weights, old: Weights, new: Weights) -> Weights:
    """Return ``weights`` that pass on tensors of ``new`` where they passed on those of ``old``, under the same names."""
    if weights is old:
        return new
    if isinstance(weights, Renamed):
        return Renamed(exchanged(weights.weights, old, new), weights.names)
    if isinstance(weights, Picked):
        parts = {name: (exchanged(part, old, new), there) for name, (part, there) in weights.parts.items()}
        return Picked(parts, weights.weights and exchanged(weights.weights, old, new))
    return weights


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether ``name`` is or fits one of the glob ``patterns``; a name may have signs in it that are a glob's."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def folder_of(weights: object) -> Path | None:
    """Return the folder in which config and tokenizer of ``weights`` lie: a path's own, or None in memory."""
    if isinstance(weights, Renamed):
        return folder_of(weights.weights)
    path = weights if isinstance(weights, str | Path) else getattr(weights, "path", None)
    if path is None:
        return None
    path = Path(path)
    return path.parent if path.is_file() else path


class View(Named):
    """Weights made of other weights, tensor by tensor, when touched; a view holds nothing itself."""

    path: Path | None = None

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        raise NotImplementedError

    def identity(self, of: "Callable[[Weights], Any]") -> Any:
        """Return what tells the view from others, ``of`` being what tells weights below it; None: only its bytes do."""
        return None

    def touches(self, name: str) -> bool:
        """Tell whether a tensor may differ from the base's, where the view is over one."""
        return True

    def factors(self, name: str) -> "Factors | None":
        """Return what a tensor adds to the base's as a product of two matrices, where it is known as one."""
        return None

    def pieces(self, name: str, step: int) -> "Iterator[Tensor]":
        """Yield a tensor's entries in a row, ``step`` at a time."""
        yield from self[name].detach().reshape(-1).split(step)


class Over(View):
    """A view over ``weights`` that has their names, and where nothing else is said their dtypes and shapes."""

    NAMES = "weights"

    weights: Weights

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        return header(self.weights, name)


class Picked(View):
    """Tensors from several weights, each under a name of its own: ``parts[name] = (weights, name there)``.

    ``weights`` are those it stands for, if it stands for any: config and tokenizer are theirs.
    """

    NAMES = "parts"

    def __init__(self, parts: Mapping[str, tuple[Weights, str]], weights: Weights | None = None):
        self.parts = parts
        self.weights = weights
        self.path = None if weights is None else folder_of(weights)

    def __getitem__(self, name: str) -> "Tensor":
        weights, there = self.parts[name]
        return weights[there]

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        return header(*self.parts[name])

    def identity(self, of: "Callable[[Weights], Any]") -> Any:
        """Return the weights below, and which tensor is whose."""
        below = list({id(weights): weights for weights, _ in self.parts.values()}.values())
        place = {id(weights): k for k, weights in enumerate(below)}
        return [[*map(of, below)], {n: [place[id(weights)], there] for n, (weights, there) in self.parts.items()}]

    def touches(self, name: str) -> bool:
        """Tell whether a tensor may differ from the base's."""
        return touches(*self.parts[name])

    def factors(self, name: str) -> "Factors | None":
        """Return what a tensor adds to the base's as a product."""
        return factors(*self.parts[name])

    def pieces(self, name: str, step: int) -> "Iterator[Tensor]":
        """Yield a tensor's entries in a row, ``step`` at a time."""
        return pieces(*self.parts[name], step)


class Headers(View):
    """Weights of which only the headers were read, as on the Hub before a download; a tensor cannot be touched."""

    NAMES = "entries"

    def __init__(self, entries: Mapping[str, Head], source: str, path: Path | None = None):
        self.entries = entries
        self.source = source
        self.path = path

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self.entries:
            raise KeyError(name)
        raise WeightsError(f"{self.source}: only its headers were read, so tensor '{name}' is not here; download it")

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor."""
        return self.entries[name]
