"""Encoder-decoder language models from folders in the Hub's layout, offline (T5, BART, mBART, Pegasus, ...)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError, WeightsError
from .causal import CausalLM, opened
from .device import there
from .encoder import forward, loaded
from .inputs import Said, Texts


class Seq2SeqLM(CausalLM):
    """An encoder-decoder model: a batch of `inputs.Said` to the decoder's logits ``[batch, length said, tokens]``.

    Texts are pairs ``(source, said)``; what `CausalLM` does at every place of a text is done at every place of ``said``.
    """

    def __init__(self, model: nn.Module, names: dict[str, str], roots: Sequence[str], tokenizer: Any, length: int):
        super().__init__(model, names, roots, tokenizer, length)
        config: Any = model.config
        start = config.decoder_start_token_id
        if start is None:
            raise WeightsError(
                f"the '{config.model_type}' has no decoder_start_token_id in its config.json; write it there"
            )
        self.start = int(start)

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "batch length tokens"]:
        return self.model(**batch, use_cache=False).logits

    def tokens(self, texts: Sequence[Any]) -> Said:
        """Return tokenised ``(source, said)`` pairs, each part cut to `length` tokens.

        Raises DataError if one is no such pair.
        """
        sources, said = [], []
        for k, pair in enumerate(texts):
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise DataError(f"text {k} is no pair of strings, (source, what is said to it)")
            sources.append(self._ids(pair[0], k, "source"))
            said.append(torch.tensor([self.start, *self._ids(pair[1], k, "what is said")][: self.length]))
        pad = self.tokenizer.pad_token_id or 0
        return Said(Texts([torch.tensor(one) for one in sources], pad), Texts(said, pad))

    def asked(self, pairs: Sequence[tuple[str, str]]) -> tuple[Said, list[int]]:
        """Return ``(prompt, answer)`` pairs, and how many tokens each answer has, the end among them.

        Raises DataError for an empty prompt or answer, or one longer than the model reads.
        """
        for k, pair in enumerate(pairs):
            for text, what in zip(pair, ("prompt", "answer"), strict=True):
                if not text:
                    raise DataError(f"pair {k}: {what} is empty")
                if (size := len(self.tokenizer(text)["input_ids"])) >= self.length:
                    raise DataError(f"pair {k}: the {what} has {size} tokens; the model reads {self.length}")
        found = self.tokens(list(pairs))
        return found, [int(n) - 1 for n in found.lengths]

    def _ids(self, text: str, k: int, what: str) -> list[int]:
        """Return a text's tokens, the end behind them."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
        if not ids:
            raise DataError(f"text {k}: {what} is empty")
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1] == end or len(ids) >= self.length else [*ids, end]

    @torch.no_grad()
    def continued(  # type: ignore[override]
        self,
        weights: Mapping[str, Tensor],
        prompts: Sequence[str],
        *,
        most: int = 32,
        batch: int = 64,
        kind: str = "auto",
    ) -> list[tuple[str, str]]:
        """Return every prompt with what ``weights`` say to it: greedily, to the end of the text or ``most`` tokens."""
        ids = [torch.tensor(self._ids(text, k, "source")) for k, text in enumerate(prompts)]
        sources = Texts(ids, self.tokenizer.pad_token_id or 0)
        tensors, end = loaded(self, weights), self.tokenizer.eos_token_id
        found: dict[int, list[int]] = {}
        for index in torch.argsort(sources.lengths, stable=True).split(batch):
            given = there(sources.take(index))
            rows = there(torch.full((len(index), 1), self.start))
            going = torch.ones_like(rows[:, 0], dtype=torch.bool)
            for _ in range(min(most, self.length - 1)):
                chosen = forward(self, tensors, {**given, "decoder_input_ids": rows}, kind)[:, -1].argmax(dim=1)
                rows = torch.cat([rows, chosen[:, None]], dim=1)
                going &= chosen != (-1 if end is None else end)
                if not going.any():
                    break
            found |= dict(zip(index.tolist(), rows[:, 1:].tolist(), strict=True))
        return [(text, self._decoded(found[k])) for k, text in enumerate(prompts)]

    def sampled(self, *_given: Any, **_more: Any) -> list[str]:
        """Raise DataError: an encoder-decoder model says nothing without a source."""
        raise DataError("an encoder-decoder model says nothing unasked: give sources to continued()")

    def _decoded(self, tokens: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


def seq2seq_lm(folder: str | Path, *, length: int = 512) -> Seq2SeqLM:
    """Return the encoder-decoder model in ``folder`` (whatever transformers knows as one), with its tokenizer.

    Sources and answers are cut to ``length`` tokens, never more than the model reads.
    Raises WeightsError if the folder is no such model or lacks a tensor.
    """
    known = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"
    return Seq2SeqLM(*opened(Path(folder), "seq2seq_lm", known, "sequence-to-sequence", length))
