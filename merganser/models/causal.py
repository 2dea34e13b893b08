"""Causal language models from folders in the Hub's layout, offline: logits of the next token at every place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError, WeightsError
from ..weights.open import open_weights
from .device import there
from .encoder import forward, loaded
from .hf import Wrapped, _load, _loading, _reads, _transformers
from .inputs import Prompts, Said, Texts


class CausalLM(Wrapped):
    """A causal language model: ``{"input_ids", "attention_mask"}`` to logits ``[batch, length, tokens]``."""

    def __init__(self, model: nn.Module, names: dict[str, str], roots: Sequence[str], tokenizer: Any, length: int):
        super().__init__(model, names, roots)
        self.tokenizer = tokenizer
        self.length = length

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "batch length tokens"]:
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    def tokens(self, texts: Sequence[Any]) -> Texts | Said:
        """Return the tokenised ``texts``, cut to `length` tokens. Raises DataError if one is no string, or too short."""
        ids = []
        for k, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {k} is a {type(text).__name__}, not a string")
            one = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
            if len(one) < 2:
                raise DataError(f"text {k}, {text!r}, has {len(one)} token{'s' * (len(one) != 1)}: nothing to predict")
            ids.append(torch.tensor(one))
        return Texts(ids, self.tokenizer.pad_token_id or 0)

    @torch.no_grad()
    def continued(
        self,
        weights: Mapping[str, Tensor],
        prompts: Sequence[str],
        *,
        most: int = 32,
        batch: int = 64,
        kind: str = "auto",
    ) -> list[str]:
        """Return every prompt with what ``weights`` say next: greedily, to the end of the text or ``most`` tokens.

        These are texts to adapt on where there are prompts but no answers. Prompts of one length go side by side, so
        there is no padding to look at.
        """
        ids = [self.tokenizer(text)["input_ids"] for text in prompts]
        tensors, end = loaded(self, weights), self.tokenizer.eos_token_id
        said: dict[int, list[int]] = {}
        for length in sorted({len(one) for one in ids}):
            alike = [k for k, one in enumerate(ids) if len(one) == length]
            for some in (alike[k : k + batch] for k in range(0, len(alike), batch)):
                rows = there(torch.tensor([ids[k] for k in some]))
                going = torch.ones_like(rows[:, 0], dtype=torch.bool)
                for _ in range(min(most, self.length - length)):
                    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
                    chosen = forward(self, tensors, given, kind)[:, -1].argmax(dim=1)
                    rows = torch.cat([rows, chosen[:, None]], dim=1)
                    going &= chosen != (-1 if end is None else end)
                    if not going.any():
                        break
                said |= dict(zip(some, rows[:, length:].tolist(), strict=True))
        return [text + self._decoded(said[k]) for k, text in enumerate(prompts)]

    @torch.no_grad()
    def sampled(
        self,
        weights: Mapping[str, Tensor],
        count: int,
        *,
        most: int = 32,
        temperature: float = 1.0,
        batch: int = 64,
        seed: int = 0,
        kind: str = "auto",
    ) -> list[str]:
        """Return ``count`` texts that ``weights`` say unasked, each token drawn from softmax(logits / temperature).

        Generic text to adapt on where there is none: what the base says is what it knows. A text begins behind the token
        that begins texts (else the one that ends them) and goes on to the end of the text or ``most`` tokens; one that
        says nothing at all is drawn again. ``seed`` and ``batch`` decide what is drawn.

        Raises WeightsError if the tokenizer has neither token, ValueError at a temperature that is not positive or less than
        two tokens.
        """
        if not temperature > 0 or most < 2:
            raise ValueError(f"temperature must be positive and most at least 2, got {temperature} and {most}")
        first, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if (first := end if first is None else first) is None:
            raise WeightsError(
                "this tokenizer has no token that begins or ends a text, so nothing can be drawn unasked"
            )
        rng, tensors, texts = torch.Generator().manual_seed(seed), loaded(self, weights), list[str]()
        for _ in range(100 * count):
            if len(texts) >= count:
                break
            rows = there(torch.full((batch, 1), first))
            going = torch.ones(batch, dtype=torch.bool)
            for _ in range(min(most, self.length - 1)):
                given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
                logits = forward(self, tensors, given, kind)[:, -1].float().cpu() / temperature
                drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=rng)[:, 0]
                rows = torch.cat([rows, there(drawn)[:, None]], dim=1)
                going &= drawn != (-1 if end is None else end)
                if not going.any():
                    break
            said = (row[: row.index(end)] if end in row else row for row in rows[:, 1:].tolist())
            texts += [self.tokenizer.decode(one) for one in said if len(one) > 1]
        return texts[:count]

    def _decoded(self, tokens: list[int]) -> str:
        """Return the text of tokens up to the end of text, that included."""
        end = self.tokenizer.eos_token_id
        if end in tokens:
            return self.tokenizer.decode(tokens[: tokens.index(end)]) + self.tokenizer.eos_token
        return self.tokenizer.decode(tokens)

    def asked(self, pairs: Sequence[tuple[str, str]]) -> tuple[Texts | Said, list[int]]:
        """Return ``(prompt, answer)`` pairs with the end of the text behind, and how many tokens each answer has.

        Raises DataError for an empty answer or a pair longer than the model reads.
        """
        ids, answers = [], []
        for k, (prompt, answer) in enumerate(pairs):
            one, more = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
            if not one or not more:
                raise DataError(f"pair {k}: {'prompt' if not one else 'answer'} is empty")
            end = self.tokenizer.eos_token_id
            more = [*more, *([] if end is None else [end])]
            if len(one) + len(more) > self.length:
                raise DataError(f"pair {k} has {len(one) + len(more)} tokens; the model reads {self.length}")
            ids.append(torch.tensor([*one, *more]))
            answers.append(len(more))
        return Texts(ids, self.tokenizer.pad_token_id or 0), answers

    def prepare(self, own: Mapping[str, Sequence[Any]], generic: Sequence[Any] = ()) -> Prompts:
        """Return inputs for `ri`: prompts of each expert's kind, by its name, and generic text.

        Raises DataError where an expert has no prompts, or only one has any and there is no generic text.
        """
        if empty := [name for name, texts in own.items() if not len(texts)]:
            raise DataError(f"expert '{empty[0]}' has no prompts")
        if len(own) + bool(len(generic)) < 2:
            raise DataError("adapting needs prompts of at least two kinds, or generic text beside those of one")
        kinds = [k for k, texts in enumerate(own.values()) for _ in texts] + [-1] * len(generic)
        texts = self.tokens([text for some in (*own.values(), generic) for text in some])
        return Prompts(texts, torch.tensor(kinds), tuple(own))


def causal_lm(folder: str | Path, *, length: int = 512) -> CausalLM:
    """Return the causal language model in ``folder`` (whatever transformers knows as one), with its tokenizer.

    Texts are cut to ``length`` tokens, never more than the model reads.
    Raises WeightsError if the folder is no such model or lacks a tensor.
    """
    return CausalLM(*opened(Path(folder), "causal_lm", "MODEL_FOR_CAUSAL_LM_MAPPING", "causal language", length))


def opened(
    folder: Path, who: str, known: str, what: str, length: int
) -> tuple[Any, dict[str, str], list[str], Any, int]:
    """Return the model in ``folder`` by transformers' mapping ``known``, its tensors' names, roots, tokenizer and length."""
    transformers = _transformers(who)
    if length < 2:
        raise DataError(f"length must be at least 2, got {length}")
    with _loading(folder, transformers):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        try:
            kind = getattr(transformers, known)[type(config)]
        except KeyError:
            raise WeightsError(f"{folder}: a '{config.model_type}' is no {what} model") from None
        model, names = _load(kind, config, open_weights(folder), folder, True)
    _reads(model, "input_ids", folder)
    places = getattr(config, "max_position_embeddings", None) or length
    return model, names, [f"{model.base_model_prefix}."], tokenizer, min(length, tokenizer.model_max_length, places)


def places(logits: Float[Tensor, "batch length tokens"], mask: Tensor) -> Float[Tensor, "places tokens"]:
    """Return the logits at every place that is followed by a token, one text after the other."""
    return logits[:, :-1][mask[:, 1:].bool()]


def within(lengths: Tensor, width: int) -> Tensor:
    """Return which of ``width`` places are within texts of these lengths, ``[texts, width]``."""
    return torch.arange(width)[None, :] < lengths[:, None]
