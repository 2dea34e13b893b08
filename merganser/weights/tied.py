"""Tied tensors: one tensor under two names, as an output layer that is the embedding, written down once or twice.

Libraries differ in which of the names they write. Which tensors are tied is told by their bytes, never by a table of
architectures: headers name the candidates (same dtype and shape), and only candidates are read. A check reads no tensor:
it goes by config.json (``tie_word_embeddings``, ``vocab_size``) and headers, and what it takes for tied is told as such.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from .header import FLOATS, Head, Headers, Weights, folder_of, header
from .quantised import Dequantised, as_stored
from .tokenizer import sound_config, vocab_size

if TYPE_CHECKING:
    from torch import Tensor


def tied_copy(weights: Weights, name: str, among: Iterable[str], *, unread: bool = False) -> str | None:
    """Return the tensor of ``among`` of which ``name`` is a tied copy in ``weights``, or None.

    The two share storage, or have the same dtype, shape and bytes. Equal bytes of a tensor whose entries are all the
    same (a fresh bias, a fresh norm) are no sign of a tie. Where only headers are known (`Headers`), or with ``unread``,
    the one and only tensor of the same dtype and shape is taken for it, and the first of several that have a row for
    every entry of the vocabulary.
    """
    like = header(weights, name)
    candidates = [other for other in among if other != name and header(weights, other) == like]
    if unread or isinstance(weights, Headers):
        table = len(like[1]) == 2 and like[1][0] == _vocabulary(weights)
        return candidates[0] if candidates and len(like[1]) > 1 and (table or len(candidates) == 1) else None
    if math.prod(like[1]) < 2:
        return None
    for other in candidates:
        if same(weights, name, other) and (_shared(weights[name], weights[other]) or not _constant(weights[name])):
            return other
    return None


def tied_by_config(weights: Weights, name: str, shape: tuple[int, ...], among: Iterable[str]) -> str | None:
    """Return the embedding that stands for an output layer ``name`` which ``weights`` lack, as their config.json says.

    ``tie_word_embeddings`` is true there, and one tensor alone has the layer's shape; else None.
    """
    if len(shape) != 2 or not _ties(weights):
        return None
    found = [other for other in among if other != name and header(weights, other)[1] == shape]
    return found[0] if len(found) == 1 else None


def canonical(base: Weights, experts: Mapping[str, Weights]) -> dict[str, str]:
    """Return, for tensors that are tied in the base and in every expert, the name whose random numbers they share.

    ``{"lm_head.weight": "embed.weight"}``: a step that draws must treat both alike, or the merged model is no longer
    tied. Pairs of the same dtype and shape are compared, first by a few of their bytes, in full only where those agree.
    What is constant in every model (a fresh norm) is tied to nothing.
    """
    known = (base, *experts.values())
    if getattr(base, "made_up", False) or any(isinstance(as_stored(weights), Headers) for weights in known):
        return {}
    packed = base.packed if isinstance(base, Dequantised) else {}  # tied ones are not quantised, and dear to compare
    groups: dict[tuple[Head, bytes], list[str]] = defaultdict(list)
    for name, head in _pairs(base).items():
        if name not in packed:
            groups[head, sample(base, name)].append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        for first, other in combinations(names, 2):
            if other in found or first in found or any(n not in w for w in experts.values() for n in (first, other)):
                continue
            tied = all(same(weights, first, other) for weights in known)
            if tied and not all(_constant(weights[first]) for weights in known):
                found[other] = first
    return found


def canonical_by_config(base: Weights, experts: Mapping[str, Weights]) -> dict[str, str]:
    """Return what `canonical` does as far as headers and config.json files tell: every model says that it ties.

    They are the tensors with a row for every entry of the vocabulary, of the same dtype and shape.
    """
    known = (base, *experts.values())
    rows = _vocabulary(base)
    if rows is None or not all(map(_ties, known)):
        return {}
    tables = [n for n, (_, shape) in _pairs(base).items() if len(shape) == 2 and shape[0] == rows]
    first = next(iter(tables), "")
    return {n: first for n in tables if n != first and all(n in w and first in w for w in known)}


def _ties(weights: Weights) -> bool:
    """Tell whether config.json says that the output layer is the embedding, at its top or in a part."""
    config = sound_config(folder_of(weights))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _vocabulary(weights: Weights) -> int | None:
    return vocab_size(sound_config(folder_of(weights)))


def same(weights: Weights, one: str, other: str) -> bool:
    """Tell whether two tensors of ``weights`` have the same dtype, shape and bytes; NaN equals itself."""
    import torch

    if header(weights, one) != header(weights, other) or sample(weights, one) != sample(weights, other):
        return False
    a, b = weights[one], weights[other]
    return _shared(a, b) or torch.equal(_bytes(a), _bytes(b))


def _pairs(weights: Weights) -> dict[str, Head]:
    """Return the headers of tensors that have another of the same dtype and shape."""
    heads = {name: header(weights, name) for name in weights}
    count: dict[Head, int] = defaultdict(int)
    for head in heads.values():
        count[head] += 1
    return {n: h for n, h in heads.items() if count[h] > 1 and h[0] in FLOATS and math.prod(h[1]) > 1}


def sample(weights: Weights, name: str) -> bytes:
    """Return 64 bytes from each of four places of a tensor: equal for equal tensors, hardly ever for others."""
    data = _bytes(weights[name])
    return b"".join(data[at : at + 64].numpy().tobytes() for at in _places(len(data)))


def _places(size: int) -> list[int]:
    return [size * k // 4 for k in range(1, 4)] + [max(0, size - 64)]


def _bytes(tensor: "Tensor") -> "Tensor":
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _shared(a: "Tensor", b: "Tensor") -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype


def _constant(tensor: "Tensor") -> bool:
    flat = tensor.reshape(-1)
    # a few entries first: most tensors differ there, and need not be read
    return bool((flat[:64] == flat[0]).all()) and bool((flat == flat[0]).all())
