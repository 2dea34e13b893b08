"""A quantised base seen as the plain model that it stands for, dequantised tensor by tensor while it is read.

The adapters of a quantised base were trained beside exactly these numbers (QLoRA: W = dequantised + s B A), so their
merge belongs to them, not to the model that was quantised.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .header import STATE, WHOLE, Head, Headers, View, Weights, folder_of, header
from .packed import Blocks, Packed, Rows, Words
from .stored import DTYPES
from .tokenizer import edit_json, read_config, write_dtype

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("bitsandbytes", "gptq", "awq")
FILES = ("quantize_config.json", "quant_config.json")  # where GPTQ and AWQ say how, beside config.json
KEYS = ("quantization_config", "_pre_quantization_dtype")
NAMES = {kind: name for name, (kind, _) in DTYPES.items() if name in ("F64", "F32", "F16", "BF16")}
# transformers' Conv1D lies [in, out]; quantised it becomes a Linear, [out, in]
CONV1D = ("gpt2", "openai-gpt", "imagegpt")
CONV1D_NAMES = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)\.weight")
ENTRIES = 1 << 17  # dequantised at once


class Dequantised(View):
    """Quantised weights as plain ones of one ``dtype``; what is not packed is passed on, what only unpacks is not there.

    ``dtype`` is a name of safetensors ("BF16"); without one it is that of config.json, else what the tensors say that
    they were. ``shapes`` are those known from elsewhere, where only headers are here (a model on the Hub).
    Raises WeightsError: a format that is not read, a part of a packed tensor that is missing or of another size.
    """

    NAMES = "names"

    def __init__(self, weights: Weights, dtype: str | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None):
        self.weights, self.path = weights, folder_of(weights)
        config = read_config(self.path)
        self.packed = _packed(weights, _method(self.path, config), shapes or {})
        parts = {part for one in self.packed.values() for part in one.parts.values()}
        states = {f"{one.name}." for one in self.packed.values() if isinstance(one, Blocks)}
        beside = {name for name in weights for state in (name[: name.rfind(".") + 1],) if state in states}
        self.names = dict.fromkeys(_plain(weights, self.packed, parts | beside))
        said = next((one.dtype for one in self.packed.values() if one.dtype), None)
        self.dtype = dtype or NAMES.get(_dtype_of(config) or "") or said or "F16"
        turned = config.get("model_type") in CONV1D
        self.turned = {name for name in self.packed if turned and CONV1D_NAMES.fullmatch(name)}

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self.packed:
            if name not in self.names:
                raise KeyError(name)
            return self.weights[name]
        import torch

        one = self.packed[name]
        out = torch.empty(one.shape, dtype=getattr(torch, DTYPES[self.dtype][0]))
        rows = out.view(-1, one.width)
        step = max(1, ENTRIES // one.width)
        for first in range(0, len(rows), step):
            last = min(first + step, len(rows))
            rows[first:last] = self._rows(one, first, last)
        return out.mT.contiguous() if name in self.turned else out

    def _rows(self, one: Packed, first: int, last: int) -> "Tensor":
        import torch

        block = one.rows(self.weights, first, last)
        if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
            raise one.damaged(self.weights)
        return block

    def pieces(self, name: str, step: int) -> "Iterator[Tensor]":
        """Yield a tensor's entries in a row, ``step`` at a time; a packed one's are made as they are asked for."""
        import torch

        one = self.packed.get(name)
        if one is None or name in self.turned or step * 2 > (numel := _numel(one)):
            yield from self[name].reshape(-1).split(step)
            return
        kind = getattr(torch, DTYPES[self.dtype][0])
        for at in range(0, numel, step):
            stop = min(at + step, numel)
            first, last = at // one.width, -(-stop // one.width)
            block = self._rows(one, first, last).reshape(-1)
            yield block[at - first * one.width : stop - first * one.width].to(kind)

    def identity(self, of: "Callable[[Weights], Any]") -> Any:
        """Return what is dequantised, and as what."""
        return [of(self.weights), self.dtype]

    def header(self, name: str) -> Head:
        """Return dtype name and shape of the plain tensor."""
        if name not in self.packed:
            return header(self.weights, name)
        shape = self.packed[name].shape
        return self.dtype, shape[::-1] if name in self.turned else shape

    def told(self) -> dict[str, Any]:
        """Return what a card says of it: how many tensors were packed in which format, and what they are now."""
        kinds = Counter(one.kind for one in self.packed.values())
        return {"tensors": dict(sorted(kinds.items())), "dtype": DTYPES[self.dtype][0]}


def as_stored(weights: Weights) -> Weights:
    """Return weights as they lie on disk, where ``weights`` are those dequantised."""
    return weights.weights if isinstance(weights, Dequantised) else weights


def say(told: Mapping[str, Any]) -> str:
    """Return in words what `Dequantised.told` says."""
    kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in told["tensors"].items())
    return f"quantised ({kinds}), dequantised to {told['dtype']}"


def write_plain(folder: Path, dtype: str) -> None:
    """Make the config in a folder that of a model that is not quantised, its weights of ``dtype``."""

    def plain(told: dict[str, Any]) -> None:
        for part in (told, *(value for value in told.values() if isinstance(value, dict))):
            for key in KEYS:
                part.pop(key, None)

    edit_json(folder / "config.json", plain)
    write_dtype(folder, dtype)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _packed(weights: Weights, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Packed]:
    """Return the packed tensors by their plain names. Raises one WeightsError for all that is wrong with them."""
    found: dict[str, Packed] = {}
    faults: list[str] = []
    states = {name.partition(STATE)[0]: name for name in weights if STATE in name}
    bare = isinstance(weights, Headers)
    for name in weights:
        stem, _, last = name.rpartition(".")
        dtype, shape = header(weights, name)
        try:
            if name in states:
                found[name] = Blocks.of(weights, name, states[name], shapes.get(name, ()) if bare else None)
            elif last == "qweight":
                found[f"{stem}.weight"] = Words.of(weights, stem, config)
            elif last == "weight" and dtype == "I8" and len(shape) == 2:
                found[name] = Rows.of(weights, name)
            elif last == "weight" and dtype in WHOLE and len(shape) > 1:
                raise WeightsError(
                    f"'{name}' holds integers, and '{name}{STATE}...', which says what they are, is missing"
                )
        except WeightsError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise WeightsError(f"the base is quantised: {faults[0]}{more}", [])
    return found


def _plain(weights: Weights, packed: Mapping[str, Packed], parts: set[str]) -> Iterator[str]:
    """Yield the plain model's names, a packed tensor's where the first of its own lies."""
    first = {part: one.name for one in packed.values() for part in one.parts.values()}
    for name in weights:
        if name in first:
            yield first[name]
        elif name not in parts:
            yield name


def _method(folder: Path | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the weights were quantised, as config.json or a file beside it says; empty where nothing does."""
    told = config.get("quantization_config")
    for name in FILES if told is None else ():
        told = told or read_config(folder, name)
    told = dict(told) if isinstance(told, Mapping) else {}
    method = str(told.get("quant_method") or METHODS[0]).lower()
    if method not in METHODS:
        raise WeightsError(
            f"the base is quantised by '{method}', and only {', '.join(METHODS)} are read; give the model that was quantised"
        )
    return told


def _dtype_of(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that config.json says, its own or that of the text model in it."""
    inner = config.get("text_config")
    for told in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(told.get(key), str):
                return str(told[key]).removeprefix("torch.")
    return None


def _numel(one: Packed) -> int:
    from math import prod

    return prod(one.shape)
