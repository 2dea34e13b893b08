"""An expert that is an adapter, trained on as one: its factors out of whatever passes them on, and new ones back in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import CONFIG, FILES, Adapted, Adapter, Factors
from .header import Picked, Weights, exchanged, source
from .renamed import Renamed

if TYPE_CHECKING:
    from torch import Tensor


class OwnRank:
    """The adapter that ``weights`` pass on, and where it holds the tensors ``names``."""

    def __init__(self, weights: Weights, adapted: Adapted, names: Mapping[str, str]):
        self.weights, self.adapted, self.names = weights, adapted, names

    @property
    def low(self) -> list[str]:
        """The names of the tensors that are known as ``W + s B A``."""
        return [name for name, there in self.names.items() if self.adapted.is_low(there)]

    def unscaled(self, name: str) -> "tuple[Tensor, Factors, float]":
        """Return ``W``, the factors B and A, and ``s`` of a tensor."""
        there = self.names[name]
        return self.adapted.base[there].float(), *self.adapted.unscaled(there)

    def changed(self, values: "Mapping[str, Tensor | Factors]") -> Weights:
        """Return the weights with other factors (or whole tensors, where the adapter holds those) under these names."""
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            tensors |= self.adapted.stored(self.names[name], value)
        return again(self.weights, self.adapted, self.adapted.adapter.changed(tensors))


def own_rank(weights: Weights, names: Sequence[str]) -> OwnRank | None:
    """Return the adapter that ``weights`` pass on, if it can hold all that training changes of the tensors ``names``.

    That is: each matrix (convolution, embedding) is known as ``W + s B A``, and of what is none the adapter has a whole
    tensor or a change. None otherwise: full models, DoRA, adapters with matrices in full.
    """
    places = {name: source(weights, name) for name in names}
    found = {id(part): part for part, _ in places.values()}
    adapted = next(iter(found.values()), None)
    if len(found) != 1 or not isinstance(adapted, Adapted):
        return None
    there = {name: place for name, (_, place) in places.items()}
    fits = all(
        adapted.is_low(place) or (place in adapted.biases or (place in adapted.full and adapted[place].ndim < 2))
        for place in there.values()
    )
    return OwnRank(weights, adapted, there) if fits else None


def adapter_in(weights: Weights) -> Adapted | None:
    """Return the base with an adapter that ``weights`` pass on, if they pass on one."""
    if isinstance(weights, Renamed):
        return adapter_in(weights.weights)
    if isinstance(weights, Picked):
        return next((one for part, _ in weights.parts.values() if (one := adapter_in(part)) is not None), None)
    return weights if isinstance(weights, Adapted) else None


def again(weights: Weights, adapted: Adapted, adapter: Adapter) -> Weights:
    """Return ``weights`` with another adapter on the same base in the place of the one they pass on."""
    return exchanged(weights, adapted, Adapted(adapted.base, adapter))


def save_adapter(
    tensors: Mapping[str, "Tensor"], config: Mapping[str, Any], folder: str | Path, card: Mapping[str, Any]
) -> Adapter:
    """Write an adapter as PEFT does (adapter_config.json, adapter_model.safetensors) with a card, all or nothing."""
    import json

    from ..card import write_card
    from .save import short
    from .sink import Sink, spec_of

    sink = Sink(folder, spec_of(tensors), metadata=short(card), single=FILES[0])
    try:
        for name in tensors:
            sink.put(name, tensors[name])
        with sink.told():
            (sink.staging / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
            write_card(sink.staging, card)
    except BaseException:
        sink.abandon()
        raise
    sink.close()
    return Adapter(Path(folder))
