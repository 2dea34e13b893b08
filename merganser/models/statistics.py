"""Running statistics of batch norm: telling them apart, letting training move them, and measuring them anew.

A mean of the experts' statistics is not that of the merged weights: features of merged weights vary less, layer after
layer ("variance collapse"), so batch norm divides by too much. Measuring them again on any inputs mends it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .encoder import batches, forward, loaded
from .inputs import take

STATISTICS = ("running_mean", "running_var")


def is_statistic(name: str) -> bool:
    """Tell whether a tensor is a running statistic of batch norm, as torch names them."""
    return name.endswith(STATISTICS)


def norms(encoder: nn.Module) -> dict[str, Any]:
    """Return the batch norms of ``encoder`` that keep running statistics, by name."""
    found = {name: module for name, module in encoder.named_modules() if isinstance(module, _BatchNorm)}
    return {name: module for name, module in found.items() if module.track_running_stats}


def counters(encoder: nn.Module) -> list[str]:
    """Return the names of the tensors that batch norms count their batches in."""
    return [f"{name}.num_batches_tracked" for name in norms(encoder)]


@contextmanager
def moving(encoder: nn.Module, momentum: float | None = 0.1) -> Iterator[None]:
    """Let batch norms normalise by the batch and update their running statistics; None: the mean over all batches."""
    kept = [(norm, norm.training, norm.momentum) for norm in norms(encoder).values()]
    try:
        for norm, _, _ in kept:
            norm.train()
            norm.momentum = momentum
        yield
    finally:
        for norm, training, before in kept:
            norm.train(training)
            norm.momentum = before


@torch.no_grad()
def reset_statistics(
    encoder: nn.Module, weights: Mapping[str, Tensor], inputs: Any, *, batch: int = 64, kind: str = "auto"
) -> dict[str, Tensor]:
    """Return ``weights`` with the running statistics of every batch norm measured anew on unlabeled ``inputs``.

        mean_l = 1/B sum_b mean(z_l over batch b),   var_l = 1/B sum_b var(z_l over batch b)

    z_l: what layer l normalises, with every layer before it normalised by its own batch. ``batch`` inputs at a time; a
    last smaller batch is left out unless it is the only one. Weights of a network without batch norm come back as they
    are. Raises ValueError for fewer than two inputs, of which there is no variance.

    Source: REPAIR (arXiv 2211.08403, section 3), for batch norm; Izmailov et al. 2018 (arXiv 1803.05407, section 3.2).
    """
    names = norms(encoder)
    if not names:
        return dict(weights)
    if len(inputs) < 2:
        raise ValueError(f"batch statistics need at least two inputs, got {len(inputs)}")
    tensors = loaded(encoder, weights)
    for name, norm in names.items():
        tensors[f"{name}.running_mean"] = torch.zeros_like(norm.running_mean)
        tensors[f"{name}.running_var"] = torch.ones_like(norm.running_var)
        tensors[f"{name}.num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    encoder.eval()
    parts = batches(inputs, batch)
    with moving(encoder, momentum=None):
        for at in [part for part in parts if len(part) == batch] or parts[:1]:
            forward(encoder, tensors, take(inputs, at), kind)
    prefix = getattr(encoder, "prefix", "")
    measured: Sequence[str] = [name for name in weights if is_statistic(name) and prefix + name in tensors]
    return {**weights, **{name: tensors[prefix + name].cpu().to(weights[name].dtype) for name in measured}}
