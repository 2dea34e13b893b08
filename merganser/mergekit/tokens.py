"""Embeddings that a config chooses for single tokens (``tokenizer.tokens``), instead of what a merge would give them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, did_you_mean
from ..weights.header import Head, Over, Weights, folder_of, header
from ..weights.tokenizer import edit_json, resize
from ..weights.vocabulary import BaseRows, Difference, Writer
from .config import Ref, Token

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[Weights, int] | None  # a model and a row of its own; None: zeros


class Chosen(Over):
    """A model with other embeddings in some rows; ``rows[row]`` is where the embedding lies."""

    def __init__(self, weights: Weights, names: frozenset[str], rows: Mapping[int, Place]):
        self.weights, self.names, self.rows = weights, names, rows
        self.path = folder_of(weights)

    def __getitem__(self, name: str) -> "Tensor":
        tensor = self.weights[name]
        if name not in self.names:
            return tensor
        tensor = tensor.clone()
        for row, place in self.rows.items():
            tensor[row] = 0 if place is None else place[0][name][place[1]].to(tensor.dtype)
        return tensor

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return the model, and what lies in which row."""
        return [of(self.weights), {row: place and [of(place[0]), place[1]] for row, place in self.rows.items()}]


class Padded(Over):
    """A model whose tables of tokens have ``rows`` rows: those beyond its own are the mean of its own."""

    def __init__(self, weights: Weights, names: frozenset[str], rows: int):
        self.weights, self.names, self.rows = weights, names, rows
        self.path = folder_of(weights)

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        tensor = self.weights[name]
        if name not in self.names:
            return tensor
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(self.rows - len(tensor), *mean.shape[1:])])

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        dtype, shape = header(self.weights, name)
        return dtype, (self.rows, *shape[1:]) if name in self.names else shape

    def identity(self, of: Callable[[Weights], Any]) -> Any:
        """Return the model, and the number of rows."""
        return [of(self.weights), self.rows]


def padded(
    models: Mapping[Ref, Weights], found: Difference, multiple: int, writer: Writer | None
) -> tuple[dict[Ref, Weights], Writer | None]:
    """Return models of one vocabulary with a number of rows that ``multiple`` divides, and what writes it down."""
    names = frozenset(found.names)
    now = header(next(iter(models.values())), found.names[0])[1][0]
    rows = -(-now // multiple) * multiple
    if rows == now:
        return dict(models), writer

    def write(folder: Path) -> None:
        if writer is not None:
            writer(folder)
        edit_json(folder / "config.json", lambda told: resize(told, rows))

    return {ref: Padded(weights, names, rows) for ref, weights in models.items()}, write


def chosen(
    tokens: Mapping[str, Token],
    found: Difference,
    models: Mapping[str, Weights],
    short: Mapping[Ref, str],
    donor: str,
) -> dict[str, Weights]:
    """Return the models, which have the rows of one vocabulary already, with the embeddings chosen for ``tokens``.

    A token's embedding is for the models that lack it, for all if it is forced. ``donor`` is the model in the base's
    place. Raises one RecipeError for all tokens and models that are not there.
    """
    base = models[donor]
    assert isinstance(base, BaseRows), "one vocabulary's rows"
    wrong, rows = [], {}
    for word, token in tokens.items():
        try:
            rows[word] = base.target[word], _place(token, word, found, short, donor)
        except RecipeError as error:
            wrong.append(f"tokenizer.tokens '{word}': {error}")
    if wrong:
        raise RecipeError("; ".join(wrong), wrong)
    made: dict[str, Weights] = {}
    for who, weights in models.items():
        places = getattr(weights, "places", None)
        lacks = {
            row: place for word, (row, place) in rows.items() if tokens[word].force or places is None or places[row] < 0
        }
        made[who] = Chosen(weights, base.names, lacks) if lacks else weights
    return made


def _place(token: Token, word: str, found: Difference, short: Mapping[Ref, str], donor: str) -> Place:
    """Return where a token's embedding lies. Raises RecipeError if it does not."""
    source = token.source
    if source is None or source.kind == "zero":
        return None
    if source.model is None or source.model not in short:
        raise RecipeError(f"'{source.model}' is none of the models that are merged")
    who = short[source.model]
    speaker = found.base if who == donor else found.experts[who]
    name = source.token if source.kind == "model_token" else word
    row = source.token_id if name is None else speaker.tokens.get(name, -1)
    assert row is not None, "a token or its number"
    if not 0 <= row < speaker.rows:
        of = "" if name is not None else f" (it has {speaker.rows} rows)"
        told = f"the token '{name}'" if name is not None else f"a row {row}"
        raise RecipeError(f"'{source.model}' lacks {told}{of}{did_you_mean(name, speaker.tokens) if name else ''}")
    return speaker.weights, row
