"""Heads: from features to logits. A head is any function; a `Head` is the linear one, which can be stacked.

logits(x) = W x_hat + b,    x_hat = x / |x| if `normalize` else x
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import HeadError

AnyHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """A frozen linear head: ``weight`` ``[classes, width]``, ``bias`` ``[classes]`` or None.

    ``normalize`` divides each feature by its L2 norm first; a logit scale (CLIP: 100) is folded into ``weight``.
    """

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, "classes"] | None = None
    normalize: bool = False

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def __call__(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        if self.normalize:
            features = F.normalize(features, dim=-1)
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class Span(Head):
    """Directions of the features, the rows of ``weight`` ``[k, width]``, that ``ri(form="rows")`` is to leave as they are.

    It stands among the heads, under any name that is no expert's, where other heads are not known: the rows need not be
    orthogonal, and are taken as they are, where those of a classifier count without their mean, which a softmax does
    not see. Raises HeadError where ``weight`` is no matrix.
    """

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise HeadError(f"a span is a matrix [directions, width], got {list(self.weight.shape)}")


def linear_head(weight: Tensor, bias: Tensor | None = None) -> Head:
    """Return the head of a classifier layer, as it stands in an expert's checkpoint."""
    return Head(weight.detach().float(), None if bias is None else bias.detach().float())


def zero_shot_head(prompts: Float[Tensor, "classes templates width"], *, scale: float = 100.0) -> Head:
    """Return the head of a zero-shot classifier from the embedded prompts of each class.

    Each prompt embedding is L2-normalised, averaged over the templates of its class and normalised again; the rows
    are multiplied by the logit ``scale`` (CLIP's is 100). Source: CLIP (arXiv 2103.00020, section 3.1.4).
    """
    mean = F.normalize(prompts.float(), dim=-1).mean(dim=1)
    return Head(F.normalize(mean, dim=-1) * scale, None, normalize=True)


def prompted_head(
    embed: Callable[[list[str]], Float[Tensor, "n width"]],
    classes: Sequence[str],
    templates: str | Sequence[str],
    *,
    scale: float = 100.0,
) -> Head:
    """Return the `zero_shot_head` of ``classes`` (phrases) put at the ``{}`` of each of ``templates``.

    ``embed`` gives the features of texts, as an encoder's ``prompts`` does. Raises HeadError for a template without
    ``{}``, or without classes.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    if wrong := [t for t in templates if "{}" not in t]:
        raise HeadError(f"template '{wrong[0]}' has no {{}}, where the class goes")
    if not classes or not templates:
        raise HeadError("a zero-shot head needs at least one class and one template")
    prompts = embed([t.replace("{}", c) for c in classes for t in templates])
    return zero_shot_head(prompts.view(len(classes), len(templates), -1), scale=scale)


def class_mean_head(
    features: Float[Tensor, "n width"], labels: Int[Tensor, "n"], classes: int, *, scale: float = 20.0
) -> Head:
    """Return a head whose rows are the normalised means of each class's normalised features, times ``scale``.

    Raises HeadError if a class has no example.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes:
        raise HeadError(
            f"class-mean head: label {len(counts) - 1} in {classes} classes; labels go from 0 to {classes - 1}"
        )
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise HeadError(f"class-mean head: classes {empty[:3]} of {classes} have no example; give at least one each")
    unit = F.normalize(features.float(), dim=-1)
    sums = torch.zeros(classes, unit.shape[1]).index_add_(0, labels, unit)
    return Head(F.normalize(sums, dim=-1) * scale, None, normalize=True)


def check_width(heads: Mapping[str, AnyHead], width: int) -> None:
    """Raise HeadError for the first head that does not take features of ``width`` (of those that say so)."""
    for name, head in heads.items():
        if (takes := getattr(head, "width", width)) != width:
            raise HeadError(
                f"head '{name}' takes features of width {takes}, the encoder gives {width}: "
                f"it belongs to another model or pooling"
            )


class Stacked:
    """Many heads as one: linear heads that share ``normalize`` become a single matmul.

    ``sizes[k]`` is the number of classes of head k, in the order of ``names``; logits lie side by side in that order.
    """

    def __init__(self, heads: Mapping[str, AnyHead]):
        self.names: Sequence[str] = list(heads)
        self.heads = list(heads.values())
        linear = [h for h in self.heads if isinstance(h, Head)]
        self.plain = len(linear) == len(self.heads) and len({h.normalize for h in linear}) == 1
        self.sizes: list[int] = []
        if self.plain:
            self.sizes = [len(h.weight) for h in linear]
            biases = [torch.zeros(len(h.weight)) if h.bias is None else h.bias for h in linear]
            bias = torch.cat(biases) if any(h.bias is not None for h in linear) else None
            self.one = Head(torch.cat([h.weight for h in linear]), bias, linear[0].normalize)

    def __call__(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch all_classes"]:
        if self.plain:
            return self.one(features)
        logits = [head(features) for head in self.heads]
        self.sizes = [x.shape[1] for x in logits]
        return torch.cat(logits, dim=1)

    def log_softmax(self, logits: Float[Tensor, "batch all_classes"]) -> Float[Tensor, "batch all_classes"]:
        """Return each head's own log-probabilities, side by side."""
        return torch.cat([x.log_softmax(dim=1) for x in logits.split(self.sizes, dim=1)], dim=1)
