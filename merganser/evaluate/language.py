"""Scores of language models: does greedy decoding give the answer to a prompt, and how likely is the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.causal import CausalLM, places, within
from ..models.device import there
from ..models.encoder import batches, forward, loaded
from ..models.inputs import Said, Texts


@dataclass(frozen=True)
class Answered:
    """What a model makes of prompts with answers.

    ``exact``: greedy decoding gives the whole answer, end of text included. ``nats``: mean over the answer's tokens of
    -log p(token | prompt and the answer so far).
    """

    exact: np.ndarray
    nats: np.ndarray


@torch.no_grad()
def answered(
    model: CausalLM,
    weights: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    *,
    batch: int = 64,
    kind: str = "auto",
) -> Answered:
    """Return how ``model`` with ``weights`` answers ``(prompt, answer)`` pairs.

    One forward pass tells whether greedy decoding would give the answer: it does if and only if every token of it is the
    most likely one after those before it. Ties go to the lowest token, as in decoding.
    Raises DataError for an empty answer or a pair longer than the model reads.
    """
    texts, answers = model.asked(pairs)
    tensors = loaded(model, weights)
    exact, nats = np.zeros(len(texts), bool), np.zeros(len(texts))
    for index in batches(texts, batch):
        given = texts.take(index)
        logits = forward(model, tensors, given, kind)
        for row, i in enumerate(index.tolist()):
            n, length = answers[i], len(texts.ids[i])
            said, wanted = logits[row, length - n - 1 : length - 1].cpu(), texts.ids[i][length - n :]
            exact[i] = bool((said.argmax(dim=1) == wanted).all())
            nats[i] = -said.log_softmax(dim=1).gather(1, wanted[:, None]).mean().item()
    return Answered(exact, nats)


@torch.no_grad()
def divergence(
    model: CausalLM,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    texts: Texts | Said,
    *,
    batch: int = 64,
    kind: str = "auto",
) -> float:
    """Return KL(next token by ``target`` || by ``weights``), the mean over every place of ``texts``, in nats."""
    both = [loaded(model, one) for one in (target, weights)]
    total, count = 0.0, 0
    for index in batches(texts, batch):
        given = there(texts.take(index))
        logits = [forward(model, tensors, given, kind) for tensors in both]
        mask = there(within(texts.lengths[index], logits[0].shape[1]))
        log_p, log_q = (places(one, mask).log_softmax(dim=-1) for one in logits)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(log_p)
    return total / max(1, count)
