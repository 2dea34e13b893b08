"""The part of a network below the first tensor that is trained: run once for every input, and skipped after that.

A network's blocks are the children of its largest list of alike modules, run one after the other (a transformer's
layers). Where no trained tensor lies below block b, what block b is given depends on the input alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .device import there
from .encoder import batches, forward
from .inputs import Subset, take
from .room import room

Blocks = nn.ModuleList | nn.Sequential
HIDDEN = "hidden_states"  # what transformers calls a block's first argument, where it is named
FAR = 2e-2  # relative: batches of other sizes round differently, in bf16 by a percent
TRIED = 4  # inputs on which skipping has to give what the whole network does, one by one, since padding says nothing


class Lower:
    """What block ``cut`` of an encoder is given for some inputs, and the forward pass from there on."""

    def __init__(self, encoder: nn.Module, blocks: Blocks, cut: int, many: int, inputs: Any, kind: str):
        self.encoder, self.blocks, self.cut, self.many = encoder, blocks, cut, many
        self.inputs, self.kind = inputs, kind
        self.lengths: Tensor | None = getattr(inputs, "lengths", None)
        self.place = torch.full((len(inputs),), -1)
        self.kept: Tensor | None = None

    def remember(self, tensors: Mapping[str, Tensor], at: Tensor, *, batch: int = 64) -> None:
        """Run the lower part with `loaded` tensors on the inputs at these indices."""
        spans = torch.ones_like(at) if self.lengths is None else self.lengths[at]
        self.place[at] = spans.cumsum(0) - spans
        for index in batches(Subset(self.inputs, at), batch):
            given = _given(self.encoder, self.blocks[self.cut], tensors, take(self.inputs, at[index]), self.kind)
            for row, k in zip(given.cpu(), at[index].tolist(), strict=True):
                piece = row[None] if self.lengths is None else row[: int(self.lengths[k])]
                if self.kept is None:
                    self.kept = room((int(spans.sum()), *piece.shape[1:]), piece.dtype)
                self.kept[self.place[k] : self.place[k] + len(piece)] = piece

    def __call__(self, tensors: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Return the network's features of the inputs at these indices, which were remembered."""
        assert self.kept is not None, "call remember first"
        if self.lengths is None:
            given = self.kept[self.place[at]]
        else:
            rows = [self.kept[p : p + n] for p, n in zip(self.place[at], self.lengths[at], strict=True)]
            given = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with _from(self.blocks, self.cut, there(given), self.many):
            return forward(self.encoder, tensors, take(self.inputs, at), self.kind)


def lower(encoder: nn.Module, tensors: Mapping[str, Tensor], trained: set[str], inputs: Any, kind: str) -> Lower | None:
    """Return the part of ``encoder`` below the tensors named ``trained``; None where there is none that can be skipped.

    Skipping is tried on a few inputs: where it does not give what the whole network does (blocks that share more than
    what one hands to the next), there is none. ``tensors``: `loaded` ones.
    """
    at = torch.arange(min(TRIED, len(inputs)))
    found = _first_trained(encoder, tensors, trained, take(inputs, at), kind) if len(inputs) else None
    if found is None:
        return None
    part = Lower(encoder, *found, inputs, kind)
    with torch.no_grad():
        try:
            part.remember(tensors, at)
            both = [(forward(encoder, tensors, take(inputs, k), kind), part(tensors, k)) for k in at.split(1)]
        except (TypeError, AttributeError, RuntimeError, IndexError, ValueError):
            return None  # blocks that want more than one tensor
    return Lower(encoder, *found, inputs, kind) if all(_close(*pair) for pair in both) else None


def _close(whole: Tensor, skipped: Tensor) -> bool:
    return whole.shape == skipped.shape and float((whole - skipped).norm()) <= FAR * float(whole.norm())


class _Stop(Exception):
    """Ends a forward pass where the lower part ends."""


def _first_trained(
    encoder: nn.Module, tensors: Mapping[str, Tensor], trained: set[str], batch: Any, kind: str
) -> tuple[Blocks, int, int] | None:
    """Return the blocks, how many of them come before everything that is trained, and how they return (`_calls`)."""
    lists = [m for m in encoder.modules() if isinstance(m, Blocks) and len(m) > 1 and len({type(b) for b in m}) == 1]
    if not lists:
        return None
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    params = dict(encoder.named_parameters(remove_duplicate=False))
    moving = {id(params[name]) for name in trained if name in params}
    above = {id(m) for m in encoder.modules() if any(part is blocks for part in m.modules())}
    own = {id(p) for m in encoder.modules() if id(m) in above for p in m.parameters(recurse=False)}
    calls, many = _calls(encoder, tensors, batch, kind, blocks[0])
    calls = [m for m in calls if id(m) not in above]
    known = {id(p) for m in calls for p in m.parameters()}
    if own & moving or not moving <= known:
        return None  # when those are used cannot be told
    numbers, cut = {id(block): k for k, block in enumerate(blocks)}, 0
    if [numbers[id(m)] for m in calls if id(m) in numbers] != list(range(len(blocks))):
        return None  # a block that runs twice, not at all, or out of turn
    for module in calls:
        number = numbers.get(id(module))
        if any(id(p) in moving for p in module.parameters()):
            cut -= number is None  # what is trained stands behind a block that has to be run again
            break
        cut += number is not None
    return (blocks, cut, many) if cut > 0 else None


def _calls(
    encoder: nn.Module, tensors: Mapping[str, Tensor], batch: Any, kind: str, block: nn.Module
) -> tuple[list[nn.Module], int]:
    """Return the modules in the order in which they are called, and how a block returns: 0 a tensor, n a tuple of n."""
    calls: list[nn.Module] = []
    many = [0]

    def returned(_block: nn.Module, _args: Any, out: Any) -> None:
        many[0] = len(out) if isinstance(out, tuple) else 0

    handles = [m.register_forward_pre_hook(lambda m, _args: calls.append(m)) for m in encoder.modules()]
    handles.append(block.register_forward_hook(returned))
    try:
        with torch.no_grad():
            forward(encoder, tensors, batch, kind)
    finally:
        for handle in handles:
            handle.remove()
    return calls, many[0]


def _given(encoder: nn.Module, block: nn.Module, tensors: Mapping[str, Tensor], batch: Any, kind: str) -> Tensor:
    """Return what a block is given for a batch; nothing behind it is run."""
    kept: list[Tensor] = []

    def look(_block: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        kept.append(args[0] if args else more[HIDDEN])
        raise _Stop

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            forward(encoder, tensors, batch, kind)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def _from(blocks: Blocks, cut: int, given: Tensor, many: int) -> Iterator[None]:
    """Have the blocks below ``cut`` hand on what they get, and block ``cut`` get ``given``."""

    def hand_on(*args: Any, **more: Any) -> Any:
        x = args[0] if args else more[HIDDEN]
        return (x, *[None] * (many - 1)) if many else x

    def give(_block: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, Any]:
        return ((given, *args[1:]), more) if args else (args, {**more, HIDDEN: given})

    below = list(blocks)[:cut]
    handle = blocks[cut].register_forward_pre_hook(give, with_kwargs=True)
    try:
        for block in below:
            block.forward = hand_on
        yield
    finally:
        handle.remove()
        for block in below:
            block.__dict__.pop("forward", None)
