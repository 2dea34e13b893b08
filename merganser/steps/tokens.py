"""The two terms of RI for language models: on its own prompts an expert keeps its next tokens, on all else the base's.

Targets are the k most likely next tokens with their probabilities and, as one more bin, the probability of all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..card import is_done, write_json
from ..models.causal import places, within
from ..models.device import there
from ..models.encoder import batches, forward, loaded
from ..models.inputs import Prompts, take
from ..progress import Tick
from .twins import distance

TAIL = 1e-7  # the least probability of all other tokens together, where rounding leaves none


@dataclass(frozen=True)
class TopTokens:
    """Log-probabilities (fp16) and ids of the k most likely next tokens at every place of some texts.

    Text i has the rows ``starts[i] .. starts[i + 1]``, one a token but the last.
    """

    values: Any  # [places, k], an array in memory or mapped from a file
    ids: Any
    starts: Int[Tensor, "texts_1"]

    def at(self, texts: Int[Tensor, "batch"]) -> tuple[Float[Tensor, "places k"], Int[Tensor, "places k"]]:
        """Return the rows of some texts, one text after the other."""
        spans = [slice(int(self.starts[i]), int(self.starts[i + 1])) for i in texts.tolist()]
        values = np.concatenate([self.values[span] for span in spans])
        ids = np.concatenate([self.ids[span] for span in spans])
        return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(ids.astype(np.int64))


@torch.no_grad()
def top_tokens(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    k: int,
    *,
    kind: str = "auto",
    folder: Path | None = None,
    key: str = "",
    batch: int = 32,
    tick: Tick = lambda _advance=1, **_terms: None,
) -> TopTokens:
    """Return the k most likely next tokens at every place of every text, by ``weights``.

    ``folder``: where they are kept, mapped from files instead of held in memory (6 k bytes a place); found there with the
    same ``key``, they are not computed again.
    """
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (inputs.lengths - 1).clamp(min=0).cumsum(0)])
    if folder is not None and is_done(folder, key):
        values, ids = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("values", "ids"))
        return TopTokens(values, ids, starts)
    out, done = None, 0
    tensors = loaded(encoder, weights)
    for index in batches(inputs, batch):
        logits = forward(encoder, tensors, take(inputs, index), kind)
        mask = there(within(inputs.lengths[index], logits.shape[1]))
        found = places(logits, mask).log_softmax(dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
        if out is None:
            out = _arrays(int(starts[-1]), found.values.shape[1], folder)
        lengths = (inputs.lengths[index] - 1).clamp(min=0).tolist()
        for i, v, t in zip(index.tolist(), found.values.split(lengths), found.indices.split(lengths), strict=True):
            span = slice(int(starts[i]), int(starts[i + 1]))
            out[0][span], out[1][span] = v.cpu().numpy(), t.cpu().numpy()
        done += len(index)
        tick(0, targets=done / len(inputs))
    values, ids = out or _arrays(0, k, None)
    if folder is not None:
        for array in (values, ids):
            array.flush()
        write_json(folder / "card.json", {"kind": "targets", "key": key})
    return TopTokens(values, ids, starts)


def _arrays(rows: int, k: int, folder: Path | None) -> tuple[Any, Any]:
    if folder is None:
        return np.empty((rows, k), np.float16), np.empty((rows, k), np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").unlink(missing_ok=True)
    made = np.lib.format.open_memmap
    kinds = {"values": np.float16, "ids": np.int32}
    values, ids = (made(folder / f"{n}.npy", mode="w+", dtype=t, shape=(rows, k)) for n, t in kinds.items())
    return values, ids


class ByKind:
    """Targets by the kind of each text: an expert's on its own prompts, the base's on all others."""

    def __init__(self, inputs: Prompts, experts: Mapping[str, TopTokens], base: TopTokens):
        self.kinds, self.names = inputs.kinds, inputs.names
        self.experts, self.base = experts, base  # an expert's are of its own prompts alone, in their order
        self.nth = torch.zeros_like(inputs.kinds)
        for name in inputs.names:
            at = inputs.of(name)
            self.nth[at] = torch.arange(len(at))

    def at(self, texts: Int[Tensor, "batch"]) -> tuple[Float[Tensor, "places k"], Int[Tensor, "places k"]]:
        """Return the rows of some texts, one text after the other."""
        found = []
        for i in texts.tolist():
            kind = int(self.kinds[i])
            table = self.base if kind < 0 else self.experts.get(self.names[kind], self.base)
            at = i if table is self.base else int(self.nth[i])
            found.append(table.at(torch.tensor([at])))
        return torch.cat([values for values, _ in found]), torch.cat([ids for _, ids in found])


class NextTokens:
    """Distances to what is wanted on the own prompts and on all other texts, at every place.

        L = E_{x ~ own} [ d(p_wanted, p_theta) ] + alpha E_{x ~ others, generic} [ d(p_wanted, p_theta) ]

    ``wanted``: RI has the expert's targets on its own prompts and the base's on all others, `ByKind` of one expert.
    ``d`` as in `twins.distance`, over the target's k most likely tokens and one bin for all others.
    """

    def __init__(self, inputs: Prompts, own: str, *, alpha: float, distance: str, wanted: ByKind):
        self.inputs, self.alpha, self.distance, self.wanted = inputs, alpha, distance, wanted
        self.risen = 1.0
        self.own = inputs.kinds == inputs.names.index(own)

    def __call__(self, at: Int[Tensor, "batch"], logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the student's ``logits`` ``[batch, length, tokens]`` and its two terms."""
        mask = within(self.inputs.lengths[at], logits.shape[1])
        mine = self.own[at]
        own = self._term(self.wanted.at(at[mine]), logits[mine], mask[mine]) if mine.any() else None
        rest = self._term(self.wanted.at(at[~mine]), logits[~mine], mask[~mine]) if not mine.all() else None
        zero = logits.sum() * 0
        own, rest = (zero if term is None else term for term in (own, rest))
        weight = self.alpha * (self.risen if torch.is_grad_enabled() else 1.0)  # held-out losses are to be of one kind
        return own + weight * rest, {"own": own.detach(), "others": rest.detach()}

    def _term(self, target: tuple[Tensor, Tensor], logits: Tensor, mask: Tensor) -> Tensor:
        log_p, ids = there(target[0]), there(target[1])
        if not len(ids):
            return logits.sum() * 0
        log_q = places(logits, mask).log_softmax(dim=-1).gather(1, ids)
        return distance(self.distance, with_tail(log_p), with_tail(log_q)).mean()


def with_tail(log_p: Float[Tensor, "places k"]) -> Float[Tensor, "places k_1"]:
    """Return log-probabilities with that of all other tokens behind them."""
    rest = (1 - log_p.exp().sum(dim=1, keepdim=True)).clamp(min=TAIL)
    return torch.cat([log_p, rest.log()], dim=1)
