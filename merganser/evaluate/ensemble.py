"""The experts side by side instead of merged: what a merged model should reach in the union of all tasks' classes.

Every expert runs on every input, and the logits of all of them are ranked together:

own    each expert under its own head alone
all    each expert under all heads, the largest logit of each class: KnOTS' ensemble

It costs as many forward passes and as many models in memory as there are experts.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import HeadError
from ..models.encoder import features
from .joint import FORMS, Union
from .run import Labelled, Outcome, Scores, outcome

HEADS = ("own", "all")


def ensembles(
    encoder: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    tasks: Mapping[str, Labelled],
    union: Union,
    *,
    batch: int = 256,
    kind: str = "auto",
) -> dict[str, Scores]:
    """Return what the ensemble of ``experts`` scores on ``tasks``, with every form of `HEADS`.

        own:  z_c(x) = W_i f(x; theta_i)          c a row of head i
        all:  z_c(x) = max_i W_c f(x; theta_i)

    A task's own score is that among its own rows; ``hits`` are those in the union. Raises HeadError if the experts are
    not those of the union's heads. Source: KnOTS (arXiv 2410.19735, section 5.2).
    """
    if experts.keys() != union.heads.keys():
        raise HeadError(f"an ensemble needs an expert for each of the heads {', '.join(union.heads)}")
    found: dict[str, dict[str, Outcome]] = {form: {} for form in HEADS}
    for name, task in tasks.items():
        own: dict[str, Tensor] = {}
        largest: Tensor | None = None
        for expert, weights in experts.items():
            x = features(encoder, weights, task.inputs, batch=batch, kind=kind)
            logits = union.stacked(x).detach()
            own[expert] = logits[:, union.rows[expert]].clone()
            largest = logits if largest is None else torch.maximum(largest, logits)
        assert largest is not None
        for form, logits in (("own", torch.cat([own[e] for e in union.heads], dim=1)), ("all", largest)):
            found[form][name] = _ranked(union, logits, name, task)
    return {form: Scores(outcomes) for form, outcomes in found.items()}


def _ranked(union: Union, logits: Tensor, name: str, task: Labelled) -> Outcome:
    ranks, published = (union.ranks_of(logits, name, task.labels, form) for form in FORMS)
    return replace(outcome(logits[:, union.rows[name]], task), ranks=ranks, published=published)
