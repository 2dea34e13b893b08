"""LoRA adapters as PEFT writes them: adapter_config.json beside adapter_model.safetensors, read without PEFT.

An adapter changes a few tensors of its base, and most of those by a product of two thin matrices. `Adapter` is what
lies in the folder, `Adapted` the base with it, tensor by tensor when touched. Neither imports torch before that.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import WeightsError, did_you_mean
from .header import Head, View, Weights, header, quantised
from .named import Named
from .pickled import Pickled
from .stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "base_model.model."
KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<what>weight|bias))?"  # between them the adapter's name, in some files
)
# settings under which the merged weights would not be W + s B A, or the tensors mean something else
UNREAD = (
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


class Factors(NamedTuple):
    """A matrix as a product, ``left @ right``; its scale is folded into ``left``."""

    left: "Tensor"  # [rows, rank]
    right: "Tensor"  # [rank, columns]

    @classmethod
    def zero(cls, shape: tuple[int, ...], kind: "Any") -> "Factors":
        """Return the product of rank 0 for a tensor of this shape: nothing."""
        import torch

        return cls(torch.empty(shape[0], 0, dtype=kind), torch.empty(0, math.prod(shape[1:]), dtype=kind))

    @classmethod
    def sum(cls, parts: "Iterable[Factors]", weights: "Tensor") -> "Factors":
        """Return the weighted sum of products as one: ``[w_1 B_1 | .. | w_T B_T] [A_1; ..; A_T]``."""
        import torch

        parts = list(parts)
        lefts = [part.left * w for part, w in zip(parts, weights.to(parts[0].left.dtype), strict=True)]
        return cls(torch.cat(lefts, dim=1), torch.cat([part.right for part in parts]))

    def pieces(self, step: int) -> "Iterator[Tensor]":
        """Yield the product's entries in a row, ``step`` at a time; never more of it is there at once."""
        rows, columns = self.left.shape[0], self.right.shape[1]
        for at in range(0, rows * columns, step):
            stop = min(at + step, rows * columns)
            first, last = at // columns, -(-stop // columns)
            block = self.left[first:last] @ self.right
            yield block.reshape(-1)[at - first * columns : stop - first * columns]

    def product(self, shape: tuple[int, ...]) -> "Tensor":
        """Return the product in the tensor's shape."""
        return (self.left @ self.right).reshape(shape)


@dataclass(frozen=True)
class Module:
    """One adapted module: the names of its tensors in the file, and ``s`` of W + s B A."""

    kind: str  # "linear", "embedding" or "conv"
    a: str
    b: str
    rank: int
    scale: float
    magnitude: str | None = None
    bias: str | None = None


class Adapter(Named):
    """What lies in an adapter's folder: tensors under the file's names, the config, and what they say together.

    ``modules`` are the LoRA modules by their path in the network, ``full`` the tensors that replace the base's
    (`modules_to_save`, trained biases), name in the network to name in the file.

    Raises WeightsError, naming file and tensor: no LoRA (another PEFT type), settings that cannot be merged, a rank that
    is none or not the tensors', half a pair of factors, tensors of unknown names.
    """

    NAMES = "weights"

    def __init__(self, path: Path, weights: Weights | None = None):
        self.path = path if path.is_dir() else path.parent
        self.config = read_config(self.path)
        self.weights = _tensors(self.path) if weights is None else weights
        self.modules: dict[str, Module] = {}
        self.full: dict[str, str] = {}
        found: dict[str, dict[str, str]] = {}
        for key in self.weights:
            name = key.removeprefix(PREFIX)
            if told := KEY.fullmatch(name):
                part = "bias" if told["what"] == "bias" else told["part"]
                found.setdefault(told["module"], {})[part] = key
            elif "lora_" in name or "trainable_tokens" in name:
                raise WeightsError(f"{self.path}: tensor '{key}' is none that LoRA has; merge it with PEFT itself")
            elif ".original_module." not in name:
                name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)|\.base_layer(?=\.)", "", name)
                self.full[name] = key
        faults = []
        for module, parts in found.items():
            try:
                self.modules[module] = self._module(module, parts)
            except WeightsError as error:
                faults.append(str(error))
        if faults:
            more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
            raise WeightsError(faults[0] + more, [])
        if not self.modules and not self.full:
            raise WeightsError(f"{self.path}: the adapter holds no tensors; train it, or copy it again")

    def _module(self, module: str, parts: Mapping[str, str]) -> Module:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        one, two = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for part in (one, two):
            if part not in parts:
                there = next(iter(parts.values()))
                raise WeightsError(f"{self.path}: '{there}' is there without its {part}; the file is not complete")
        shape, other = header(self.weights, parts[one])[1], header(self.weights, parts[two])[1]
        rank, alpha = (
            _pattern(self.config, f"{k}_pattern", module, d) for k, d in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not isinstance(alpha, int | float):
            raise WeightsError(f"{self.path}: {CONFIG} gives '{module}' rank {rank!r} and alpha {alpha!r}")
        kind = "embedding" if embedding else "conv" if len(shape) > 2 else "linear"
        if kind == "conv" and shape[0] == rank and other[1:2] != (rank,):
            raise WeightsError(
                f"{self.path}: '{parts[two]}' is of a convolution in groups, whose adapter is no convolution of that "
                f"kind and cannot be merged into it; leave the module out"
            )
        if len(shape) < 2 or len(other) < 2 or shape[0] != rank or other[1] != rank:
            raise WeightsError(
                f"{self.path}: '{parts[one]}' {list(shape)} and '{parts[two]}' {list(other)} are not of rank {rank}, "
                f"which {CONFIG} says; one of them belongs to another adapter"
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Module(kind, parts[one], parts[two], rank, scale, parts.get("lora_magnitude_vector"), parts.get("bias"))

    def __getitem__(self, name: str) -> "Tensor":
        return self.weights[name]

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r}: {len(self.modules)} modules, {len(self.full)} full tensors)"

    def factors(self, module: str, kind: "Any", *, scaled: bool = True) -> Factors:
        """Return ``s B`` and ``A`` of a module as matrices of dtype ``kind``: of an embedding turned to its weight's shape.

        A convolution's are [out, rank] and [rank, in * height * width]. Not ``scaled``: ``B`` alone.
        """
        told = self.modules[module]
        scale = told.scale if scaled else 1
        a, b = self.weights[told.a].to(kind), self.weights[told.b].to(kind)
        if told.kind == "embedding":
            return Factors(a.mT * scale, b.mT)
        return Factors(b.flatten(1) * scale, a.flatten(1))

    def stored(self, module: str, low: Factors) -> dict[str, "Tensor"]:
        """Return the file's tensors of a module for other factors, in the form that `factors` gives without a scale."""
        told = self.modules[module]
        a, b = (low.left.mT, low.right.mT) if told.kind == "embedding" else (low.right, low.left)
        return {name: tensor.reshape(header(self.weights, name)[1]) for name, tensor in ((told.a, a), (told.b, b))}

    def changed(self, tensors: Mapping[str, "Tensor"]) -> "Adapter":
        """Return the adapter with other tensors under some of the file's names, in memory, its settings the same."""
        return Adapter(self.path, {**self.weights, **tensors})

    @property
    def is_bare(self) -> bool:
        """Whether it is LoRA modules and nothing else: no tensor in full, no bias, no DoRA, which depend on the base."""
        plain = (told.magnitude is None and told.bias is None for told in self.modules.values())
        return not self.full and all(plain)

    def seen_in(self, base: Weights) -> "Callable[[str], str]":
        """Return what gives the base's name of one of the network's tensors."""
        names = [f"{module}.weight" for module in self.modules]
        return _aligned(names or list(self.full), base)

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's change, as its factors give it."""
        told = self.modules[module]
        a, b = header(self.weights, told.a)[1], header(self.weights, told.b)[1]
        return (a[1], b[0]) if told.kind == "embedding" else (b[0], *a[1:])


class Adapted(View):
    """A base with an adapter: ``W + s B A``, with DoRA ``m (W + s B A) / |W + s B A|`` (norms of the outputs' rows).

    In fp32 (float64 where the base is), tensor by tensor when touched; a tensor that the adapter does not touch is the
    base's own. Modules are found in the base by their path; a prefix that only one side has is seen through.
    Raises WeightsError where a module or shape does not fit this base.
    """

    def __init__(self, base: Weights, adapter: Adapter):
        self.base, self.adapter, self.path = base, adapter, adapter.path
        self.seen_as = adapter.seen_in(base)
        self.modules = {self.seen_as(f"{module}.weight"): module for module in adapter.modules}
        self.full = {self.seen_as(name): key for name, key in adapter.full.items()}
        self.biases = {self.seen_as(f"{m}.bias"): m for m, told in adapter.modules.items() if told.bias is not None}
        self.turned = self._turned()
        if getattr(base, "made_up", False) and (dora := [m for m, told in adapter.modules.items() if told.magnitude]):
            raise WeightsError(f"{self.path}: '{dora[0]}' is DoRA's, whose change depends on the base; give the base")
        faults = [fault for name in (*self.modules, *self.biases) if (fault := self._fault(name))]
        if faults and (whole := quantised(base)):
            raise WeightsError(
                f"'{whole}' of the base is quantised, so nothing can be added to it as it lies; merge adapters alone, for "
                f"which it is dequantised, or give the model that was quantised",
                [],
            )
        if faults:
            more = f"; so do {len(faults) - 1} more" if len(faults) > 1 else ""
            raise WeightsError(f"{self.path}: {faults[0]}{more}: an adapter of another base", [])

    def identity(self, of: "Callable[[Weights], Any]") -> Any:
        """Return the adapter; the base is known where the merge has it."""
        return [of(self.adapter.weights), self.adapter.config]

    def _turned(self) -> set[str]:
        """Return the weights that lie [in, out], as those of transformers' Conv1D: shapes tell, but for square ones.

        One flag stands for all modules, and PEFT writes the last one's; so it is asked only where no shape tells.
        """
        linear = [
            (n, self.adapter.shape(m)) for n, m in self.modules.items() if self.adapter.modules[m].kind == "linear"
        ]
        linear = [(name, shape) for name, shape in linear if name in self.base]
        lies = {name: header(self.base, name)[1] for name, _ in linear}
        told = {n: lies[n] != s for n, s in linear if s[0] != s[1] and lies[n] in (s, s[::-1])}
        if getattr(self.base, "made_up", False):
            return set()
        square = {name for name, shape in linear if shape[0] == shape[1]}
        if square and len(set(told.values())) > 1:
            raise WeightsError(
                f"{self.path}: '{min(square)}' is square, and the other modules lie both as Linear and as Conv1D has "
                f"them, so its own way cannot be told; merge this adapter with PEFT's merge_and_unload"
            )
        turned = {name for name, one in told.items() if one}
        flag = any(told.values()) if told else bool(self.adapter.config.get("fan_in_fan_out"))
        return turned | square if flag else turned

    def _fault(self, name: str) -> str | None:
        """Return what is wrong with a tensor that LoRA changes, if anything."""
        if name not in self.base:
            tied = ", or only under the name it is tied to" if "head" in name or "embed" in name else ""
            return f"changes '{name}', which the base does not have{tied}{did_you_mean(name, self.base)}"
        if name in self.biases:
            return None
        shape, gives = header(self.base, name)[1], self.adapter.shape(self.modules[name])
        gives = gives[::-1] if name in self.turned else gives
        return None if shape == gives else f"'{name}' is {list(shape)} in the base, and its factors give {list(gives)}"

    def __getitem__(self, name: str) -> "Tensor":
        origin = self.adapter[self.full[name]] if name in self.full else self.base[name]
        if name not in self.modules and name not in self.biases:
            return origin
        kind = self._kind(name)
        wide = origin.to(kind)
        if name in self.biases:
            told = self.adapter.modules[self.biases[name]]
            return wide + self.adapter[str(told.bias)].to(kind) * told.scale
        wide = wide + self._factors(name).product(tuple(origin.shape))
        told = self.adapter.modules[self.modules[name]]
        return wide if told.magnitude is None else self._normed(name, wide, self.adapter[told.magnitude].to(kind))

    def _normed(self, name: str, wide: "Tensor", magnitude: "Tensor") -> "Tensor":
        """Return the tensor with every output's norm as DoRA learned it."""
        from torch import linalg

        embedding = self.adapter.modules[self.modules[name]].kind == "embedding"
        axis = 1 if name in self.turned or embedding else 0
        others = [d for d in range(wide.ndim) if d != axis]
        like = [1] * wide.ndim
        like[axis] = -1
        return wide * (magnitude.reshape(like) / linalg.vector_norm(wide, dim=others, keepdim=True))

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (name for name in self.full if name not in self.base)

    def __len__(self) -> int:
        return len(self.base) + sum(name not in self.base for name in self.full)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self.full

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        dtype, shape = header(self.base if name not in self.full else self.adapter.weights, self.full.get(name, name))
        made = name in self.modules or name in self.biases
        return ("F64" if dtype == "F64" else "F32") if made else dtype, shape

    def touches(self, name: str) -> bool:
        """Tell whether a tensor may differ from the base's."""
        return name in self.modules or name in self.full or name in self.biases

    def factors(self, name: str) -> Factors | None:
        """Return the change of a tensor as a product, None where it is none (DoRA, full tensors)."""
        return self._factors(name) if self.is_low(name) else None

    def is_low(self, name: str) -> bool:
        """Tell whether a tensor's change is known as a product."""
        return (
            name in self.modules
            and name not in self.full
            and self.adapter.modules[self.modules[name]].magnitude is None
        )

    def unscaled(self, name: str) -> tuple[Factors, float]:
        """Return B and A of a tensor in fp32, as they multiply to its shape, and ``s``."""
        import torch

        return self._factors(name, torch.float32, scaled=False), self.adapter.modules[self.modules[name]].scale

    def stored(self, name: str, value: "Tensor | Factors") -> dict[str, "Tensor"]:
        """Return the file's tensors that make the tensor ``value``: factors as of `unscaled`, or a whole one in its place.

        Raises KeyError where the adapter holds neither for this tensor.
        """
        if isinstance(value, Factors):
            turned = Factors(value.right.mT, value.left.mT) if name in self.turned else value
            return self.adapter.stored(self.modules[name], turned)
        if name in self.full:
            return {self.full[name]: value}
        told = self.adapter.modules[self.biases[name]]
        return {str(told.bias): (value - self.base[name].to(value.dtype)) / told.scale}

    def _factors(self, name: str, kind: "Any" = None, *, scaled: bool = True) -> Factors:
        left, right = self.adapter.factors(self.modules[name], kind or self._kind(name), scaled=scaled)
        return Factors(right.mT, left.mT) if name in self.turned else Factors(left, right)

    def _kind(self, name: str) -> "Any":
        import torch

        return torch.float64 if header(self.base, name)[0] == "F64" else torch.float32


class Bare(View):
    """A base of which nothing is known but what adapters tell: the tensors that they change, zero, in their shapes.

    Enough to merge adapters into an adapter. Modules are assumed to lie as Linear has them; the configs' own flag is kept.
    """

    NAMES = "shapes"

    made_up = True  # not an input, so it has no fingerprint

    def __init__(self, adapters: "Iterable[Adapter]"):
        self.shapes: dict[str, tuple[int, ...]] = {}
        for adapter in adapters:
            for module in adapter.modules:
                self.shapes.setdefault(f"{module}.weight", adapter.shape(module))

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        return torch.zeros(()).expand(self.shapes[name])

    def pieces(self, name: str, step: int) -> "Iterator[Tensor]":
        """Yield zeros, ``step`` at a time, that take no memory."""
        flat = math.prod(self.shapes[name])
        yield from (self[name].new_zeros(()).expand(min(step, flat - at)) for at in range(0, flat, step))

    def identity(self, of: "Callable[[Weights], Any]") -> Any:
        """Return the shapes."""
        return self.shapes

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor."""
        return "F32", self.shapes[name]


def is_adapter(path: Path) -> bool:
    """Tell whether a folder, or the file in it, is an adapter: it has adapter_config.json and no whole model."""
    if path.is_file():
        return path.name in FILES and (path.parent / CONFIG).is_file()
    return (path / CONFIG).is_file() and not any((path / name).exists() for name in MODEL)


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises WeightsError if it is not that of a LoRA, or of one that cannot be merged."""
    try:
        told = json.loads((folder / CONFIG).read_text())
        kind = told.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise WeightsError(f"{folder / CONFIG}: cannot be read as the config of an adapter; copy it again") from None
    if kind != "LORA":
        raise WeightsError(
            f"{folder}: an adapter of type {kind}, and only LORA (rsLoRA and DoRA too) can be merged; merge it into its "
            f"base with PEFT's merge_and_unload first"
        )
    if used := [key for key in UNREAD if told.get(key)]:
        raise WeightsError(
            f"{folder}: {CONFIG} has {used[0]}, which is more than W + s B A; merge it into its base with PEFT's "
            f"merge_and_unload first"
        )
    rank = told.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise WeightsError(f"{folder}: {CONFIG} says r = {rank!r}; a rank is a whole number of at least 1")
    return told


def _tensors(folder: Path) -> Weights:
    for name in FILES:
        if (file := folder / name).is_file():
            return Stored(file) if file.suffix == ".safetensors" else Pickled(file)
    raise WeightsError(f"{folder}: has {CONFIG} and neither of {', '.join(FILES)}; copy or download it again")


def _pattern(config: Mapping[str, Any], key: str, module: str, default: str) -> Any:
    """Return the module's own rank or alpha: of the first pattern that fits the end of its path, as PEFT reads them."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise WeightsError(f"{CONFIG}: {key} has '{pattern}', which is not a pattern") from None
    return config.get(default, 8)


class _aligned:
    """The base's name of a tensor of the adapter: a prefix that only one side has is left out or put before it."""

    def __init__(self, names: Iterable[str], base: Weights):
        names, self.cut, self.put = list(names), 0, ""
        if any(name in base for name in names):
            return
        heads = {f"{head}." for head in (".".join(n.split(".")[:k]) for n in base for k in (1, 2)) if head}
        for cut, put in [(1, ""), (2, ""), *((0, head) for head in sorted(heads))]:
            self.cut, self.put = cut, put
            if names and all(self(name) in base for name in names):
                return
        self.cut, self.put = 0, ""

    def __call__(self, name: str) -> str:
        return self.put + ".".join(name.split(".")[self.cut :])
