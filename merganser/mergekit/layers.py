"""Which tensors of which layers make each tensor of the output, told by the tensors' names alone.

A stack is what is numbered 0, 1, 2, ... at one place of the names (``model.layers.7.mlp.up_proj.weight``); the layers
are the stack with the most tensors. Whatever lies outside comes from the first slice's sources if its name speaks of
an embedding, else (norm, head) from the last slice's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..where import LAYER
from .config import Ref, Section, Slice
from .modules import COUNTS, PARTS

FIRST = re.compile(r"(^|[._])(w[tp]e|\w*emb|\w*embed(?!_out)\w*)([._]|$)")
KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Laid:
    """One slice of the output: for each tensor its name in every source, and its place in [0, 1] of the layers.

    ``layers`` are the numbers of its layers in the first source, None where whole models are merged.
    """

    slice: Slice
    names: Mapping[str, tuple[str, ...]]
    t: Mapping[str, float]
    layers: tuple[int, ...] | None = None
    section: Section | None = None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the prefixes of stacks and how many layers each has, the one with the most tensors first."""
    found: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for name in names:
        if place := LAYER.match(name):
            found.setdefault(place[1], set()).add(int(place[2]))
            count[place[1]] = count.get(place[1], 0) + 1
    whole = {prefix: len(seen) for prefix, seen in found.items() if len(seen) > 1 and max(seen) == len(seen) - 1}
    return dict(sorted(whole.items(), key=lambda item: -count[item[0]]))


def comes_first(name: str) -> bool:
    """Tell whether a tensor outside the layers is used before them: an embedding, by its name."""
    return FIRST.search(name) is not None


def whole(merged: Slice, names: Sequence[str]) -> Laid:
    """Lay out whole models under their own names; every stack has its gradient."""
    count = stacks(names)
    t = {}
    for name in names:
        if (place := LAYER.match(name)) and place[1] in count:
            t[name] = int(place[2]) / (count[place[1]] - 1)
    return Laid(merged, {name: (name,) * len(merged.sources) for name in names}, t)


def unfit(slices: Sequence[Slice], models: Mapping[Ref, Iterable[str]], where: str = "") -> list[RecipeError]:
    """Return what is wrong with the layers that slices ask of those models that are known; ``where``: before "slices"."""
    wrong = []
    for k, one in enumerate(slices):
        spans = []
        for i, source in enumerate(one.sources):
            try:
                if source.model in models:
                    spans.append(_span(f"{where}slices[{k}].sources[{i}]", source.layer_range, source.model, models))
            except RecipeError as error:
                wrong.append(error)
        if len({last - first for first, last in spans}) > 1:
            wrong.append(RecipeError(f"{where}slices[{k}]: its sources have different numbers of layers: {spans}"))
    return wrong


def stacked(slices: Sequence[Slice], models: Mapping[Ref, Iterable[str]], bases: Sequence[Ref]) -> list[Laid]:
    """Lay out slices one above the other; ``bases`` names, slice by slice, the model whose tensors there must be.

    The models have those layers, as many of each source of a slice (`unfit`).
    """
    laid, top = [], 0
    for k, (one, base) in enumerate(zip(slices, bases, strict=True)):
        spans = [_span(f"slices[{k}].sources[{i}]", s.layer_range, s.model, models) for i, s in enumerate(one.sources)]
        length = spans[0][1] - spans[0][0]
        prefixes = [next(iter(stacks(models[s.model]))) for s in one.sources]
        origin = next(i for i, s in enumerate(one.sources) if s.model == base)
        names: dict[str, tuple[str, ...]] = {}
        t: dict[str, float] = {}
        for name in models[base]:
            place = LAYER.match(name)
            if place and place[1] == prefixes[origin]:
                step = int(place[2]) - spans[origin][0]
                if 0 <= step < length:
                    rest = name[place.end() :]
                    made = f"{place[1]}{top + step}{rest}"
                    names[made] = tuple(
                        f"{prefix}{first + step}{rest}" for prefix, (first, _) in zip(prefixes, spans, strict=True)
                    )
                    t[made] = step / (length - 1) if length > 1 else 1.0
            elif (k == 0 and comes_first(name)) or (k == len(slices) - 1 and not comes_first(name)):
                names[name] = (name,) * len(one.sources)
        laid.append(Laid(one, names, t, tuple(range(*spans[0]))))
        top += length
    return laid


def _span(
    where: str, asked: tuple[int, int] | None, model: Ref, models: Mapping[Ref, Iterable[str]]
) -> tuple[int, int]:
    count = next(iter(stacks(models[model]).values()), 0)
    if not count:
        raise RecipeError(f"{where}: '{model}' has no numbered layers that a slice could take")
    first, last = asked or (0, count)
    if not 0 <= first < last <= count:
        raise RecipeError(f"{where}: layer_range [{first}, {last}] is not among the {count} layers of '{model}'")
    return first, last


def restack(config: dict, layers: Sequence[tuple[dict, int]], depth: int, module: str = "") -> None:
    """Write the number of layers into a config.json, and layer by layer whatever it lists for each of its layers.

    ``layers``: for each layer of the output, the config of the model that it is of, and its number there; ``depth``:
    how many layers the model has whose config it is; ``module``: which of several the layers are of, "" if there are none.
    """
    inner = PARTS.get(module, "")
    if isinstance(config.get(inner), dict):
        config, layers = config[inner], [(told.get(inner, {}), i) for told, i in layers]
    keys = COUNTS.get(module, (*KEYS, "depth"))
    for part, others in _parts(config, [told for told, _ in layers]):
        for key, value in part.items():
            if key in keys and value == depth:
                part[key] = len(layers)
            elif isinstance(value, list) and len(value) == depth and depth > 1:
                picked = [(other.get(key), i) for other, (_, i) in zip(others, layers, strict=True)]
                if all(isinstance(its, list) and i < len(its) for its, i in picked):
                    part[key] = [its[i] for its, i in picked if its]


def _parts(config: dict, others: list[dict]) -> Iterable[tuple[dict, list[dict]]]:
    """Yield the config and the configs inside it, each with the same part of the others."""
    yield config, others
    for key, value in config.items():
        if isinstance(value, dict):
            inner = [other.get(key) for other in others]
            yield value, [one if isinstance(one, dict) else {} for one in inner]
