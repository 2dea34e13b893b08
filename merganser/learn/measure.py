"""Measure what `fisher` and `regmean` need, one expert at a time, from unlabeled inputs.

The results are weights like any others: save them with `merganser.save`, hand them to
``merge(..., ingredients={"fisher": {expert: measured}})``. Inputs stream by in batches; what is kept is one tensor of
each parameter's shape (Fisher), or one ``[in, in]`` matrix for each linear layer (Gram). Use some hundred inputs an
expert: a `Subset` of them, if there are more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError
from ..models.device import home
from ..models.encoder import batches, forward, loaded
from ..models.heads import AnyHead
from ..models.inputs import take
from ..progress import Progress, silent

Watched = tuple[nn.Module, Tensor, Callable[[str, Tensor], None]]


def fisher(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    head: AnyHead,
    inputs: Any,
    *,
    batch: int = 16,
    per: str = "batch",
    kind: str = "fp32",
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return how much the class probabilities on ``inputs`` depend on each parameter of ``encoder``, in fp32.

        per="batch":    F = 1/n sum_batches (d/dtheta sum_{x in batch, y} sqrt(p(y|x)).detach() log p(y|x))^2
        per="example":  F = 1/n sum_x sum_y p(y|x) (d/dtheta log p(y|x))^2

    The first is what published merges computed: one backward a batch, squared after the sum over the batch, so it has
    cross terms and depends on ``batch``. The second is the diagonal of the Fisher information: a backward for each
    input and class. ``head`` maps features to logits, as anywhere else; ``kind``: see `models.encoder.precision`.

    Raises DataError without inputs; ValueError at a knob out of range.
    Source: Matena and Raffel (arXiv 2111.09832); per="batch" as in MergeLM (arXiv 2311.03099).
    """
    check(inputs, batch)
    if per not in ("batch", "example"):
        raise ValueError(f"per must be one of batch, example, got {per!r}")
    fixed = loaded(encoder, weights)
    free = {n: fixed[n].detach().float().requires_grad_() for n in _parameters(encoder) if n in fixed}
    sums = {n: torch.zeros_like(t, requires_grad=False) for n, t in free.items()}
    with evaluating(encoder), torch.enable_grad(), progress("measure Fisher information", len(inputs)) as tick:
        for at in batches(inputs, batch if per == "batch" else 1):
            x = forward(encoder, fixed | free, take(inputs, at), kind).cpu()
            log_p = head(x).float().log_softmax(dim=1)
            for value, share in _scores(log_p, per):
                grads = torch.autograd.grad(value, list(free.values()), retain_graph=True, allow_unused=True)
                for total, grad in zip(sums.values(), grads, strict=True):
                    if grad is not None:
                        total.addcmul_(grad, grad, value=share / len(inputs))
            tick(len(at))
    return home({name: sums[own] for name, own in named_in(encoder, weights).items() if own in sums})


@torch.no_grad()
def gram(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    *,
    batch: int = 32,
    kind: str = "fp32",
    progress: Progress = silent,
) -> dict[str, Float[Tensor, "in in"]]:
    """Return ``X^T X / rows`` of the inputs X of every `nn.Linear` in ``encoder``, under its weight's name, in fp32.

    Rows are all inputs' tokens, padding included (batches hold texts of like length, so there is little of it). Linear
    layers that are not called as modules, such as those inside `nn.MultiheadAttention`, are left out: `regmean`
    averages them.

    Raises DataError without inputs, or if no linear layer was called; ValueError at a batch below 1.
    Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv 2212.09849).
    """
    check(inputs, batch)
    fixed = loaded(encoder, weights)
    named = named_in(encoder, weights)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def remember(name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        with torch.autocast(x.device.type, enabled=False):
            sums.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.mT, x)
        rows[name] = rows.get(name, 0) + len(x)

    layers = [(m, m.weight, remember) for m in encoder.modules() if isinstance(m, nn.Linear)]
    with (
        watching(encoder, fixed, layers),
        evaluating(encoder),
        progress("measure Gram matrices", len(inputs)) as tick,
    ):
        for at in batches(inputs, batch):
            forward(encoder, fixed, take(inputs, at), kind)
            tick(len(at))
    if not sums:
        raise DataError("no torch.nn.Linear with weights of its own ran in the encoder: there is nothing to measure")
    return home({name: sums[own] / rows[own] for name, own in named.items() if own in sums})


def _scores(log_p: Float[Tensor, "batch classes"], per: str) -> Iterator[tuple[Tensor, float]]:
    """Yield the numbers to differentiate, and what the squares of their gradients count."""
    p = log_p.detach().exp()
    if per == "batch":
        yield (p.sqrt() * log_p).sum(), 1.0
        return
    for y, share in enumerate(p[0].tolist()):
        yield log_p[0, y], share


def check(inputs: Any, batch: int) -> None:
    """Raise ValueError at a batch below 1, DataError without inputs."""
    if not (isinstance(batch, int) and batch >= 1):
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
    if len(inputs) == 0:
        raise DataError("no inputs to measure on")


def _parameters(encoder: nn.Module) -> list[str]:
    return [name for name, parameter in encoder.named_parameters() if parameter.is_floating_point()]


@contextmanager
def watching(encoder: nn.Module, fixed: Mapping[str, Tensor], layers: Iterable[Watched]) -> Iterator[None]:
    """Show for a while what enters layers: of each (module, its weight, see), ``see(name, what enters)``.

    ``name`` is the encoder's first one of the weight: where it has several, weights are loaded under that. Layers whose
    weight is not among ``fixed``, the loaded ones, and those called by keywords alone are left out.
    """
    first = {id(p): name for name, p in encoder.named_parameters()}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name, see=see: see(name, args[0]) if args else None)
        for module, weight, see in layers
        if (name := first.get(id(weight))) in fixed
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def named_in(encoder: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name in ``weights`` the encoder's name of that parameter; tied ones have the first one's."""
    first = {id(p): name for name, p in encoder.named_parameters()}
    prefix = getattr(encoder, "prefix", "")
    every = {name: first[id(p)] for name, p in encoder.named_parameters(remove_duplicate=False)}
    return {name: every[prefix + name] for name in weights if prefix + name in every}


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)
