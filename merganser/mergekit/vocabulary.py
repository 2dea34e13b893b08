"""tokenizer_source: models with different vocabularies get the rows of one before their layers are taken apart."""

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, did_you_mean
from ..weights.header import Weights, shape_of
from ..weights.vocabulary import BASE, Writer, difference, fitted
from .config import Config, Ref
from .tokens import chosen


def one_vocabulary(
    config: Config, models: Mapping[Ref, Weights], short: Mapping[Ref, str], notes: list[str]
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
    found = difference(models[donor], experts, always=bool(tokens))
    base, matched, writer = fitted(found, models[donor], experts, choice)
    if tokens:
        if found is None:
            raise RecipeError("tokenizer.tokens: the models' folders have no tokenizer whose tokens are rows of theirs")
        matched = chosen(tokens, found, {short[donor]: base, **matched}, short, short[donor])
        base = matched.pop(short[donor])
        writer = writer if found.differs else None
    multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
    if multiple and (uneven := _uneven(models[donor], base, multiple)):
        raise RecipeError(f"tokenizer.pad_to_multiple_of: the vocabulary has {uneven} rows, and padding is the base's")
    return {donor: base, **{ref: matched[short[ref]] for ref in others}}, writer


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


def _uneven(before: Weights, after: Weights, multiple: int) -> int:
    tables = [n for n in after if n in before and shape_of(after, n)[:1] != shape_of(before, n)[:1]]
    rows = {shape_of(after, n)[0] for n in tables}
    return next((n for n in rows if n % multiple), 0)
