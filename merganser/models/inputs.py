"""Inputs: what an encoder reads, indexable, without labels.

Anything with a length and a ``take(indices) -> batch`` is inputs; a plain tensor is taken along its first axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..card import digest


@dataclass(frozen=True)
class Texts:
    """Tokenised texts of different lengths; a batch is padded to its own longest text, so short texts stay cheap.

    ``ids``: one 1-D int64 tensor a text. ``pad``: the padding token.
    """

    ids: list[Tensor]
    pad: int = 0
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", torch.tensor([len(i) for i in self.ids], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return ``{"input_ids", "attention_mask"}``, both ``[batch, longest]``."""
        picked = [self.ids[i] for i in indices.tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(picked, batch_first=True, padding_value=self.pad)
        mask = torch.arange(ids.shape[1])[None, :] < self.lengths[indices][:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}


@dataclass(frozen=True)
class Said:
    """Tokenised texts with what is said to each, for an encoder and a decoder; places and lengths are the decoder's.

    ``said``: what the decoder is given, the token that it starts with and then the answer.
    """

    sources: Texts
    said: Texts

    @property
    def ids(self) -> list[Tensor]:
        return self.said.ids

    @property
    def lengths(self) -> Tensor:
        return self.said.lengths

    def __len__(self) -> int:
        return len(self.said)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return a batch as of `Texts`, and ``decoder_input_ids`` ``[batch, longest said]``."""
        return {**self.sources.take(indices), "decoder_input_ids": self.said.take(indices)["input_ids"]}

    def digest_parts(self) -> list[Tensor]:
        return [*digest_parts(self.sources), *digest_parts(self.said)]


@dataclass(frozen=True)
class Prompts:
    """Tokenised texts for language models: prompts of the kind that each expert is for, and generic text.

    ``kinds`` ``[n]``: whose prompt each text is, as an index into ``names``; -1 is generic. A batch is that of ``texts``.
    """

    texts: Texts | Said
    kinds: Tensor
    names: tuple[str, ...]

    @property
    def lengths(self) -> Tensor:
        return self.texts.lengths

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return self.texts.take(indices)

    def of(self, name: str) -> Tensor:
        """Return the indices of one expert's prompts."""
        return (self.kinds == self.names.index(name)).nonzero()[:, 0]

    def digest_parts(self) -> list[Tensor]:
        names = torch.tensor(list("\n".join(self.names).encode()), dtype=torch.uint8)
        return [*digest_parts(self.texts), self.kinds, names]


@dataclass(frozen=True)
class Images:
    """Images kept as bytes and turned into floats batch by batch.

    ``pixels``: uint8 ``[n, channels, height, width]``. A batch is ``(pixels / 255 - mean) / std``.
    """

    pixels: Tensor
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (self.pixels[indices].float() / 255 - mean) / std


def take(inputs: Any, indices: Tensor) -> Any:
    """Return the batch of ``inputs`` at ``indices``."""
    return inputs[indices] if isinstance(inputs, Tensor) else inputs.take(indices)


def digest_parts(inputs: Any) -> list[Tensor]:
    """Return the tensors that say which inputs these are (for provenance)."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Texts):
        return [torch.cat(inputs.ids) if inputs.ids else torch.zeros(0), inputs.lengths]
    if isinstance(inputs, Images):
        return [inputs.pixels, torch.tensor([*inputs.mean, *inputs.std])]
    if hasattr(inputs, "digest_parts"):
        return inputs.digest_parts()
    return [torch.tensor([len(inputs)])]


def inputs_digest(inputs: Any) -> str:
    """Return a digest of inputs."""
    return digest({str(k): part for k, part in enumerate(digest_parts(inputs))})


class Subset:
    """The inputs at some indices, as inputs."""

    def __init__(self, inputs: Any, indices: Tensor):
        self.inputs, self.indices = inputs, indices
        lengths = getattr(inputs, "lengths", None)
        if lengths is not None:
            self.lengths = lengths[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Tensor) -> Any:
        return take(self.inputs, self.indices[indices])

    def digest_parts(self) -> list[Tensor]:
        return [*digest_parts(self.inputs), self.indices]
