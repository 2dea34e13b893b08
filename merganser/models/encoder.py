"""An encoder: any `torch.nn.Module` from a batch to features ``[batch, width]``.

What merganser reads from it, all optional: ``prefix`` (its parameters are named ``prefix + name`` where the checkpoint
says ``name``), ``prepare(raw) -> inputs`` (texts or pixels into inputs), ``prompts(texts) -> [n, width]`` (embeddings
of class prompts by the base, for zero-shot heads).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .device import device, placed, there
from .inputs import take

Progress = Callable[[int, int], None]


def bound(encoder: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` under the names that ``encoder``'s own parameters and buffers have."""
    prefix = getattr(encoder, "prefix", "")
    known = {*dict(encoder.named_parameters()), *dict(encoder.named_buffers())}
    return {prefix + name: weights[name] for name in weights if prefix + name in known}


def loaded(encoder: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `bound` weights where the network runs, and put ``encoder`` there too."""
    placed(encoder)
    return there(bound(encoder, weights))


def forward(encoder: nn.Module, tensors: Mapping[str, Tensor], batch: Any, kind: str = "auto") -> Float[Tensor, "..."]:
    """Return what ``encoder`` gives for ``batch`` with `loaded` tensors, in fp32, where it runs.

    The encoder's own tensors are not touched.
    """
    with precision(kind):
        return torch.func.functional_call(encoder, dict(tensors), (there(batch),)).float()


def call(encoder: nn.Module, weights: Mapping[str, Tensor], batch: Any) -> Float[Tensor, "batch width"]:
    """Return the features of ``batch`` by ``encoder`` with ``weights``, in fp32."""
    return forward(encoder, loaded(encoder, weights), batch, "fp32").cpu()


def precision(kind: str = "auto") -> AbstractContextManager[Any]:
    """Return the autocast context for ``kind``: "fp32", "bf16", or "auto" (bf16 where it is multiplied natively).

    Master weights stay in fp32 whatever the kind.
    """
    return torch.autocast(device().type, dtype=torch.bfloat16) if settled(kind) == "bf16" else nullcontext()


def settled(kind: str) -> str:
    """Return "fp32" or "bf16", as "auto" is here."""
    if kind != "auto":
        return kind
    return "bf16" if _has_bf16(device().type) else "fp32"


def _has_bf16(where: str) -> bool:
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return where == "cpu" and torch.cpu._is_avx512_bf16_supported()


def batches(inputs: Any, size: int) -> list[Tensor]:
    """Return index batches that cover ``inputs`` once, texts of like length together (less padding)."""
    lengths = getattr(inputs, "lengths", None)
    order = torch.arange(len(inputs)) if lengths is None else torch.argsort(lengths, stable=True)
    return list(order.split(size))


@torch.no_grad()
def features(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    *,
    batch: int = 64,
    kind: str = "auto",
    progress: Progress | None = None,
) -> Float[Tensor, "n width"]:
    """Return the features of all ``inputs``, in their order, in fp32."""
    was_training = encoder.training
    encoder.eval()
    tensors = loaded(encoder, weights)
    out: Tensor | None = None
    done = 0
    for index in batches(inputs, batch):
        x = forward(encoder, tensors, take(inputs, index), kind).cpu()
        if out is None:
            out = torch.empty(len(inputs), x.shape[1])
        out[index] = x
        done += len(index)
        if progress:
            progress(done, len(inputs))
    encoder.train(was_training)
    return out if out is not None else torch.empty(0, 0)
