"""An expert's checkpoint, split into what it shares with the base and what is its own: its head.

The rule: a tensor is the encoder's if the base has it, under any of its usual names. The classifier is always the
expert's own. BERT's pooler is in between: where the base has one it is merged like the rest, where the base has none
(a masked language model) each expert has grown its own, and it moves into the head.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import HeadError, WeightsError
from ..weights.adapter import is_adapter
from ..weights.delta import over
from ..weights.open import Source, Weights, open_weights
from ..weights.renamed import Renamed
from .heads import AnyHead, Head, linear_head

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}


class Family(NamedTuple):
    """How one architecture classifies: pool, perhaps a ``dense`` layer with an ``activation``, the layer ``out``."""

    root: str
    pooling: str
    dense: str | None = None
    activation: str = "tanh"
    out: str = "classifier"


_ROBERTA = Family("roberta.", "cls", "classifier.dense", "tanh", "classifier.out_proj")
_DEBERTA = Family("deberta.", "cls", "pooler.dense", "gelu")
FAMILIES = {
    "bert": Family("bert.", "pooler"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA._replace(root="mpnet."),
    "electra": _ROBERTA._replace(root="electra.", activation="gelu"),
    "distilbert": Family("distilbert.", "cls", "pre_classifier", "relu"),
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "vit": Family("vit.", "cls"),
    "clip": Family("vision_model.", "mean"),
}


@dataclass(frozen=True)
class DenseHead:
    """A head of two layers: ``logits(x) = W2 f(W1 x + b1) + b2`` with f = tanh, relu or gelu."""

    dense: Head
    activation: str
    out: Head

    @property
    def width(self) -> int:
        return self.dense.weight.shape[1]

    def __call__(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        return self.out(ACTIVATIONS[self.activation](self.dense(features)))


class Split(NamedTuple):
    """An expert in two: encoder ``weights``, ``head``, the names of its ``own`` tensors, the ``pooling`` it reads."""

    weights: Weights
    head: AnyHead
    own: list[str]
    pooling: str


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return a model folder's ``config.json``. Raises WeightsError if there is none or it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WeightsError(f"{folder}: no config.json; give the folder of a Hugging Face model on this disk") from None
    except ValueError as e:
        raise WeightsError(f"{path}: not JSON ({e})") from None


def classifier_pooling(config: Any) -> str | None:
    """Return the pooling that this architecture's classifier reads, or None if it is not one we know."""
    family = FAMILIES.get(_plain(config).get("model_type", ""))
    return family.pooling if family else None


def encoder_weights(weights: Weights, encoder: nn.Module) -> Weights:
    """Return the tensors of ``weights`` that are the encoder's, under the base's names, read on touch.

    Names agree up to the architecture's prefix (``bert.``), which a checkpoint has or has not, and up to the old names
    of layer norms (``gamma``, ``beta``). Raises WeightsError if the encoder has a parameter that ``weights`` lacks.
    """
    prefix = getattr(encoder, "prefix", "")
    known = [n.removeprefix(prefix) for n, _ in encoder.named_parameters() if n.startswith(prefix)]
    names = aligned(weights, known, getattr(encoder, "roots", ()))
    if lacks := [n for n in known if n not in names]:
        more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
        raise WeightsError(
            f"these weights lack '{lacks[0]}'{more} of the encoder's {len(known)} tensors: "
            f"is it a checkpoint of the same architecture?"
        )
    return Renamed(weights, names)


def aligned(names: Iterable[str], known: Collection[str], roots: Sequence[str]) -> dict[str, str]:
    """Return ``{known name: name}`` for each of ``names`` that is a known tensor under another prefix."""
    by_key = {_key(n, roots): n for n in known}
    return {by_key[key]: n for n in names if (key := _key(n, roots)) in by_key}


def split_head(expert: Source, config: Any = None, *, base: Source | None = None) -> Split:
    """Return an expert classifier of the `FAMILIES` in two: the encoder's weights and the head that follows it.

    ``config`` is the expert's ``config.json`` (a mapping, a transformers config or, by default, the one in its folder).
    With ``base`` the weights come under the base's names, and a pooler that the base lacks goes to the head.
    ``head(features) = logits`` for an encoder with the returned ``pooling``. A head of one layer is a `Head`.
    Raises HeadError if the architecture is unknown or the checkpoint holds no classifier.
    """
    if config is None:
        if isinstance(expert, Mapping):
            raise HeadError("splitting weights in memory needs their config: split_head(weights, config)")
        config = read_config(base if isinstance(base, str | Path) and is_adapter(Path(expert)) else expert)
    who = "the expert" if isinstance(expert, Mapping) else str(expert)
    weights, known = open_weights(expert), None if base is None else open_weights(base)
    weights = weights if known is None else over(known, weights)
    family = _family(_plain(config), who)
    if known is not None and family.pooling == "pooler" and not aligned(known, ["pooler.dense.weight"], [family.root]):
        family = family._replace(pooling="cls", dense=f"{family.root}pooler.dense")
    for layer in filter(None, (family.dense, family.out)):
        if f"{layer}.weight" not in weights:
            raise HeadError(
                f"{who} holds no classifier ('{layer}.weight' is missing): give its head as a function, or build one "
                f"from prompts or labelled examples"
            )
    own = [n for n in weights if n.startswith(tuple(f"{layer}." for layer in (family.dense, family.out) if layer))]
    shared = [n for n in weights if n not in own]
    names = {} if known is None else aligned(shared, known, [family.root])
    found = set(names.values())
    names |= {n: n for n in shared if n not in found}
    return Split(Renamed(weights, names), _head(weights, family), own, family.pooling)


def _head(weights: Weights, family: Family) -> AnyHead:
    out = _linear(weights, family.out)
    return out if family.dense is None else DenseHead(_linear(weights, family.dense), family.activation, out)


def _linear(weights: Weights, layer: str) -> Head:
    return linear_head(weights[f"{layer}.weight"], weights.get(f"{layer}.bias"))


def _family(config: Mapping[str, Any], who: str) -> Family:
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise HeadError(
            f"{who} is a '{kind}', whose classifier we cannot split off (known: {', '.join(FAMILIES)}): "
            f"give its head as a function from features to logits"
        )
    family = FAMILIES[kind]
    if family is _DEBERTA:
        family = family._replace(activation=config.get("pooler_hidden_act", family.activation))
    if family.activation not in ACTIVATIONS:
        raise HeadError(f"{who}: its classifier uses '{family.activation}': give its head as a function")
    return family


def _plain(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else config.to_dict()


def _key(name: str, roots: Sequence[str]) -> str:
    for root in roots:
        name = name.removeprefix(root)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
