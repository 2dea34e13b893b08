"""Formats in which weights are stored as small integers, and the numbers they stand for.

    bitsandbytes nf4, fp4    W_i = code[q_i] a_b,  b = i // blocksize, two q a byte, the high half first
      double quantisation    a_b = code8[p_b] a'_c + offset,  c = b // nested blocksize
    bitsandbytes int8        W[o, i] = q[o, i] SCB[o] / 127
    GPTQ                     W[o, i] = s[g, o] (q[i, o] - z[g, o]),  g = g_idx[i], q and z in 32-bit words
    AWQ (gemm)               the same with g = i // group size, and eight q of a word in an order of its own

Each class knows one tensor: its shape from headers alone, its numbers row by row, so that no more of it than is asked
for is ever there. Sources: QLoRA (arXiv:2305.14314), LLM.int8() (2208.07339), GPTQ (2210.17323), AWQ (2306.00978) and
the checkpoints that transformers, GPTQModel and AutoAWQ write.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .header import FLOATS, Weights, header

if TYPE_CHECKING:
    from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which place of a word the values 0 to 7 lie
ROW_BY_ROW = 0  # bitsandbytes' weight_format; the others were orders of certain GPUs


@dataclass(frozen=True)
class Packed:
    """One packed tensor: what it is called and stored as, and the shape of what it stands for."""

    name: str
    parts: Mapping[str, str]  # role to name in the file
    shape: tuple[int, ...]
    kind: str
    dtype: str | None = None  # what it says that it was before

    @property
    def width(self) -> int:
        """The entries of a row."""
        return self.shape[-1]

    def rows(self, weights: Weights, first: int, last: int) -> "Tensor":
        """Return rows ``[first, last)`` in fp32, the tensor seen as ``[rows, width]``."""
        raise NotImplementedError

    def damaged(self, weights: Weights) -> WeightsError:
        """Return the error for numbers that are not finite, which names the scales that are not."""
        import torch

        bad = (
            n for n in self.parts.values() if weights[n].is_floating_point() and not torch.isfinite(weights[n]).all()
        )
        return WeightsError(f"the base has NaN or inf in tensor '{next(bad, self.name)}': copy or download it again")


@dataclass(frozen=True)
class Blocks(Packed):
    """bitsandbytes with 4 bits: blocks of entries with one scale each."""

    blocksize: int = 64
    nested: tuple[int, float] | None = None  # blocksize and offset of the scales' own quantisation

    @classmethod
    def of(cls, weights: Weights, name: str, state: str, shape: tuple[int, ...] | None = None) -> "Blocks":
        """Return the tensor ``name``, which the JSON in tensor ``state`` describes; ``shape`` where that cannot be read."""
        parts = {"data": name, "state": state, "code": f"{name}.quant_map", "absmax": f"{name}.absmax"}
        size = _nbytes(weights, _there(weights, name, parts)["data"])
        if shape is not None:  # headers alone: blocks are not known, only how many entries there are
            fits = math.prod(shape) in (2 * size, 2 * size - 1)
            return cls(name, parts, shape if fits else (2 * size,), "bitsandbytes 4 bits")
        told = _state(weights, name, state)
        shape, blocksize = tuple(told["shape"]), told["blocksize"]
        count = -(-math.prod(shape) // blocksize)
        wanted = {"data": -(-math.prod(shape) // 2), "code": 16, "absmax": count}
        nested = None
        if "nested_blocksize" in told:
            nested = told["nested_blocksize"], told["nested_offset"]
            parts |= {"code8": f"{name}.nested_quant_map", "absmax2": f"{name}.nested_absmax"}
            wanted |= {"code8": 256, "absmax2": -(-count // nested[0])}
        for role, part in _there(weights, name, parts).items():
            has = size if role == "data" else math.prod(header(weights, part)[1])
            if has != wanted.get(role, has):
                raise WeightsError(f"'{part}' has {has} entries, and '{name}' {list(shape)} needs {wanted[role]}")
        kind = f"bitsandbytes {told['quant_type']}"
        return cls(name, parts, shape, kind, _dtype(told.get("dtype")), blocksize, nested)

    def rows(self, weights: Weights, first: int, last: int) -> "Tensor":
        """Return rows ``[first, last)``: ``code[q] a``, block by block."""
        import torch

        at, stop = first * self.width, last * self.width
        code = weights[self.parts["code"]].float()
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # what a byte stands for
        data = weights[self.parts["data"]].reshape(-1).view(torch.uint8)[at // 2 : -(-stop // 2)]
        values = pairs[data.long()].reshape(-1)[at % 2 : at % 2 + stop - at]
        begin, end = at // self.blocksize, -(-stop // self.blocksize)
        scales = self._scales(weights, begin, end).repeat_interleave(self.blocksize)
        return (values * scales[at - begin * self.blocksize :][: stop - at]).reshape(last - first, self.width)

    def _scales(self, weights: Weights, begin: int, end: int) -> "Tensor":
        import torch

        stored = weights[self.parts["absmax"]].reshape(-1)[begin:end]
        if self.nested is None:
            return stored.float()
        size, offset = self.nested
        outer = weights[self.parts["absmax2"]].reshape(-1).float()[torch.arange(begin, end) // size]
        return weights[self.parts["code8"]].float()[stored.long()] * outer + offset


@dataclass(frozen=True)
class Rows(Packed):
    """bitsandbytes with 8 bits: a scale each row."""

    @classmethod
    def of(cls, weights: Weights, name: str) -> "Rows":
        """Return the tensor ``name``. Raises WeightsError where its scales are not those of its rows."""
        stem = name.rpartition(".")[0]
        parts = _there(weights, name, {"data": name, "scales": f"{stem}.SCB"})
        shape, scales = header(weights, name)[1], header(weights, parts["scales"])[1]
        if scales != shape[:1]:
            raise WeightsError(f"'{parts['scales']}' is {list(scales)}, and '{name}' {list(shape)} needs [{shape[0]}]")
        if (form := f"{stem}.weight_format") in weights:
            parts["form"] = form
        return cls(name, parts, shape, "bitsandbytes int8")

    def rows(self, weights: Weights, first: int, last: int) -> "Tensor":
        """Return rows ``[first, last)``: ``q SCB / 127``."""
        if "form" in self.parts and int(weights[self.parts["form"]]) != ROW_BY_ROW:
            raise WeightsError(
                f"'{self.parts['form']}': '{self.name}' lies in an order of a certain GPU, not row by row; save the model "
                f"again with a newer bitsandbytes, or give the model that was quantised"
            )
        scales = weights[self.parts["scales"]][first:last].float()
        # multiplied in bitsandbytes' order, and by its reciprocal of 127, so that the numbers are its own
        return weights[self.name][first:last].float() * scales[:, None] * 7.874015718698502e-3


@dataclass(frozen=True)
class Words(Packed):
    """GPTQ and AWQ: several integers in a 32-bit word, groups of inputs with a scale and a zero each."""

    bits: int = 4
    add: int = 1  # what was taken from each zero before it was stored: 1 in GPTQ's first format

    @classmethod
    def of(cls, weights: Weights, stem: str, config: Mapping[str, Any]) -> "Words":
        """Return the weight of module ``stem``. Raises WeightsError at shapes that no such format has."""
        parts = {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales")}
        heads = {role: header(weights, n) for role, n in _there(weights, f"{stem}.weight", parts).items()}
        (rows, columns), (groups, out) = (_matrix(parts[r], heads[r]) for r in ("qweight", "scales"))
        if heads["scales"][0] not in FLOATS or any(heads[r][0] not in ("I32", "U32") for r in ("qweight", "qzeros")):
            raise WeightsError(f"'{parts['qweight']}' is {heads['qweight'][0]} where GPTQ and AWQ have 32-bit words")
        kind = _word_form(stem, config, "GPTQ" if columns == out else "AWQ")
        if kind == "GPTQ":
            parts |= {"g_idx": f"{stem}.g_idx"}
            inputs = math.prod(header(weights, _there(weights, f"{stem}.weight", parts)["g_idx"])[1])
            bits = 32 * rows // max(1, inputs)
        else:
            inputs, bits = rows, 32 * columns // max(1, out)
        fits = (out * bits == 32 * columns and inputs % groups == 0) if kind == "AWQ" else (inputs * bits == 32 * rows)
        if not fits or heads["qzeros"][1] != (groups, out * bits // 32):
            shapes = ", ".join(f"{role} {list(head[1])}" for role, head in heads.items())
            raise WeightsError(f"'{parts['qweight']}': shapes that do not belong together ({shapes})")
        if bits not in ((2, 4, 8) if kind == "GPTQ" else (4,)):
            raise WeightsError(
                f"'{parts['qweight']}': {kind} with {bits} bits, of which only {'2, 4 and 8' if kind == 'GPTQ' else '4'} "
                f"are read; give the model that was quantised"
            )
        first_format = kind == "GPTQ" and _format(config) != "gptq_v2"
        name = f"{kind} {bits} bits"
        return cls(f"{stem}.weight", parts, (out, inputs), name, heads["scales"][0], bits, int(first_format))

    def rows(self, weights: Weights, first: int, last: int) -> "Tensor":
        """Return rows ``[first, last)``: ``s (q - z)``, each input with the scale and zero of its group."""
        import torch

        each = 32 // self.bits
        words, skip = slice(first // each, -(-last // each)), first - first // each * each
        packed, scales = weights[self.parts["qweight"]], weights[self.parts["scales"]]
        groups = self._groups(weights, len(scales))
        # in the first format ones are added word by word, with what is carried over: that is what its loader does
        ones = self.add * sum(1 << at for at in range(0, 32, self.bits))
        zeros = weights[self.parts["qzeros"]][:, words].to(torch.int64) + ones
        zeros = self._values(zeros)[:, skip : skip + last - first].mT
        if "g_idx" in self.parts:
            values = self._values(packed[:, first:last].mT)
        else:
            values = self._values(packed[:, words])[:, skip : skip + last - first].mT
        return (values - zeros[:, groups]).float() * scales[:, first:last].float().mT[:, groups]

    def _values(self, words: "Tensor") -> "Tensor":
        """Return the integers of words, ``[rows, words]`` to ``[rows, values]``."""
        import torch

        order = range(32 // self.bits) if "g_idx" in self.parts else AWQ_ORDER
        shifts = torch.tensor([self.bits * place for place in order])
        return ((words[..., None].to(torch.int64) >> shifts) & ((1 << self.bits) - 1)).flatten(1)

    def _groups(self, weights: Weights, count: int) -> "Tensor":
        """Return each input's group."""
        import torch

        if "g_idx" not in self.parts:
            return torch.arange(self.width) // (self.width // count)
        groups = weights[self.parts["g_idx"]].reshape(-1).long()
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise WeightsError(f"'{self.parts['g_idx']}' names groups beyond the {count} of '{self.parts['scales']}'")
        return groups


def _word_form(stem: str, config: Mapping[str, Any], guess: str) -> str:
    """Return "GPTQ" or "AWQ". Raises WeightsError where the config says an order of words that is not read."""
    said = _format(config)
    order = str(config.get("version") or said or "gemm").lower() if guess == "AWQ" else said
    if order not in (("gemm",) if guess == "AWQ" else (None, "gptq", "gptq_v2")):
        raise WeightsError(
            f"'{stem}.qweight': {guess} in the order '{order}' is not read; give the model that was quantised"
        )
    return guess


def _format(config: Mapping[str, Any]) -> str | None:
    told = config.get("checkpoint_format") or config.get("format")
    return None if told is None else str(told).lower()


def _matrix(name: str, head: tuple[str, tuple[int, ...]]) -> tuple[int, int]:
    if len(head[1]) != 2 or not all(head[1]):
        raise WeightsError(f"'{name}' is {list(head[1])}, which is no matrix")
    return head[1][0], head[1][1]


def _nbytes(weights: Weights, name: str) -> int:
    from .stored import DTYPES

    dtype, shape = header(weights, name)
    return DTYPES[dtype][1] * math.prod(shape)


def _there(weights: Weights, name: str, parts: dict[str, str]) -> dict[str, str]:
    """Return ``parts``. Raises WeightsError where one is not there."""
    if missing := [part for part in parts.values() if part not in weights]:
        raise WeightsError(f"'{missing[0]}' is missing, without which '{name}' cannot be dequantised; copy it again")
    return parts


def _state(weights: Weights, name: str, state: str) -> dict[str, Any]:
    """Return what bitsandbytes says of a tensor: JSON in a tensor of bytes."""
    try:
        told = json.loads(bytes(weights[state].reshape(-1).tolist()))
        numbers = [
            *told["shape"],
            told["blocksize"],
            *([told["nested_blocksize"]] if "nested_blocksize" in told else []),
        ]
        good = all(type(n) is int and n > 0 for n in numbers) and told["shape"] and isinstance(told["quant_type"], str)
        if "nested_blocksize" in told:
            good = good and isinstance(told["nested_offset"], float | int)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise WeightsError(f"'{state}' is not what bitsandbytes says of '{name}'; copy or download it again")
    return dict(told)


def _dtype(told: Any) -> str | None:
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}.get(str(told))
