"""tokenizer_source: models with different vocabularies get the rows of one before their layers are taken apart."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, did_you_mean
from ..weights.header import Weights
from ..weights.vocabulary import BASE, BaseRows, Writer, difference, fitted
from .config import Config, Ref
from .tokens import chosen, padded


def one_vocabulary(
    config: Config,
    models: Mapping[Ref, Weights],
    short: Mapping[Ref, str],
    notes: list[str],
    speaker: Ref | None = None,
) -> tuple[dict[Ref, Weights], Writer | None]:
    """Return the models with the rows of one vocabulary, and what writes its tokenizer.

    Without a tokenizer_source embeddings are merged row by row, as mergekit does, with a note where tokens differ.
    Raises RecipeError where numbers of rows differ then, and for a tokenizer of no model.
    """
    donor, *others = models
    experts = {short[ref]: models[ref] for ref in others}
    choice = _choice(config, short)
    if choice is None:
        found = difference(models[donor], experts)
        if found and any(s.rows != found.base.rows for s in found.experts.values()):
            raise RecipeError(f"the vocabularies differ: {_sizes(found)}; add tokenizer_source: base (or union)")
        if found:
            notes.append("the tokenizers differ and no tokenizer_source is given: embeddings are merged row by row")
        return dict(models), None
    tokens = (config.tokenizer.tokens if config.tokenizer else None) or {}
    multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
    found = difference(models[donor], experts, always=bool(tokens or multiple))
    base, matched, writer = fitted(found, models[donor], experts, choice, list(tokens))
    if found is None and (tokens or multiple):
        what = "tokens" if tokens else "pad_to_multiple_of"
        raise RecipeError(f"tokenizer.{what}: the models' folders have no tokenizer whose tokens are rows of theirs")
    if found is not None and not found.differs and all(word in found.base.tokens for word in tokens):
        writer = None
    if speaker is not None and isinstance(base, BaseRows):  # it has no part in the embeddings, only in the words
        base.others.pop(short[speaker], None)
    if tokens and found is not None:
        matched = chosen(tokens, found, {short[donor]: base, **matched}, short, short[donor])
        base = matched.pop(short[donor])
    made = {donor: base, **{ref: matched[short[ref]] for ref in others}}
    return padded(made, found, multiple, writer) if multiple and found else (made, writer)


def _choice(config: Config, short: Mapping[Ref, str]) -> str | None:
    said = config.chosen_tokenizer
    if said is None or said in (BASE, "union"):
        return said
    by_path = {str(ref): ref for ref in short}
    if said not in by_path:
        raise RecipeError(
            f"tokenizer_source '{said}'{did_you_mean(said, by_path)} is neither base nor union nor one of the models "
            f"{', '.join(by_path)}"
        )
    return BASE if by_path[said] == next(iter(short)) else short[by_path[said]]


def _sizes(found: Any) -> str:
    name = found.names[0]
    rows = {"the base": found.base.rows, **{f"'{who}'": s.rows for who, s in found.experts.items()}}
    return f"'{name}' has " + ", ".join(f"{n} rows in {who}" for who, n in rows.items())
