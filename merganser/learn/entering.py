"""What enters each layer of an expert: the rows of which `esm` takes its directions, from unlabeled inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError
from ..models.device import home
from ..models.encoder import batches, forward, loaded
from ..models.inputs import take
from ..progress import Progress, silent
from .measure import check, evaluating, named_in, watching

Rows = Callable[[Tensor], Float[Tensor, "rows in"]]


@torch.no_grad()
def entering(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    *,
    rows: int = 1024,
    batch: int = 32,
    kind: str = "fp32",
    progress: Progress = silent,
) -> dict[str, Float[Tensor, "rows in"]]:
    """Return ``rows`` of the rows that enter each layer of ``encoder``, under its weight's name, in fp32.

    Layers are `nn.Linear` (a row a token), `nn.Conv2d` without groups that pads with zeros (a row a patch,
    ``[in * height * width]``) and the joint projection of `nn.MultiheadAttention` as it attends to itself. Of each batch
    evenly many rows are kept, evenly spaced; where there are too few, zeros follow, which give no direction. Padding
    counts as a row, as in `gram`. Layers that are not called have none: `esm` merges them as `tsv` does.

    Raises DataError without inputs, or if no such layer was called; ValueError at rows or a batch below 1.
    Source: ESM (arXiv 2602.20208), which takes the tokens of at most 32 images.
    """
    check(inputs, batch)
    if not (isinstance(rows, int) and rows >= 1):
        raise ValueError(f"rows must be a whole number of at least 1, got {rows!r}")
    fixed = loaded(encoder, weights)
    kept: dict[str, list[Tensor]] = {}
    share = [0]  # of the rows, how many this batch gives

    def seen_as(rows_of: Rows) -> Callable[[str, Tensor], None]:
        def remember(name: str, x: Tensor) -> None:
            found = rows_of(x.detach())
            at = torch.linspace(0, len(found) - 1, min(share[0], len(found)), device=found.device)
            kept.setdefault(name, []).append(found[at.round().long()].float())

        return remember

    layers = [(m, told[0], seen_as(told[1])) for m in encoder.modules() if (told := _told(m)) is not None]
    with (
        watching(encoder, fixed, layers),
        evaluating(encoder),
        progress("keep what enters the layers", len(inputs)) as tick,
    ):
        for at in batches(inputs, batch):
            share[0] = -(-rows * len(at) // len(inputs))
            forward(encoder, fixed, take(inputs, at), kind)
            tick(len(at))
    if not kept:
        raise DataError("no linear layer or convolution of these weights ran in the encoder: nothing entered one")
    own = named_in(encoder, weights)
    return home({name: _exactly(torch.cat(kept[at]), rows) for name, at in own.items() if at in kept})


def _told(module: nn.Module) -> tuple[Tensor, Rows] | None:
    """Return a layer's weight and how rows are made of what enters it; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.weight, _tokens
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return None if module.padding == "same" else (module.weight, partial(_patches, module))  # which pads unevenly
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return module.in_proj_weight, _tokens
    return None


def _tokens(x: Tensor) -> Float[Tensor, "rows in"]:
    return x.reshape(-1, x.shape[-1])


def _patches(layer: Any, x: Tensor) -> Float[Tensor, "rows in"]:
    padding = 0 if layer.padding == "valid" else layer.padding
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.mT.reshape(-1, patches.shape[1])


def _exactly(found: Tensor, rows: int) -> Float[Tensor, "rows in"]:
    """Cut to ``rows``, evenly spaced, or fill up with zeros."""
    if len(found) >= rows:
        return found[torch.linspace(0, len(found) - 1, rows, device=found.device).round().long()]
    return torch.cat([found, found.new_zeros(rows - len(found), found.shape[1])])
