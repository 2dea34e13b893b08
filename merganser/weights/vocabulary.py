"""Models whose vocabularies differ: embeddings matched by token, so that every model has the same rows.

The row of token k in the views is the model's own row for k. Where an expert lacks the token its row is the base's, so
it adds nothing; where the base lacks it, the base's row is the mean of the rows of the experts that have it. Rows that
belong to no token (padding) are the base's.

Which tensors have a row for every token is told by their shapes: the first dimension is, in each model, that model's own
number of embedding rows (vocab_size of its config.json). There is no table of architectures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError, did_you_mean
from .header import FLOATS, Head, Over, Weights, factors, folder_of, header, matches, touches
from .tokenizer import (
    add_tokens,
    copy_tokenizer,
    edit_json,
    has_tokenizer,
    read_config,
    read_tokenizer,
    renumber,
    resize,
    same_files,
    vocab_size,
)
from .tokenizer import vocabulary as vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from .adapter import Factors

BASE = "base"
PADDING = 1024  # more rows than tokens than this, and a tensor without a config is no embedding
Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Speaker:
    """One model and what it says: rows by token (those within the embedding), number of rows, which tokens were added."""

    weights: Weights
    folder: Path | None
    tokens: Mapping[str, int]
    added: frozenset[str]
    rows: int

    def map(self, target: Mapping[str, int], rows: int) -> list[int]:
        """Return, for each row of the target, this model's row of the same token, -1 where it has none."""
        found = [-1] * rows
        for token, row in target.items():
            found[row] = self.tokens.get(token, -1)
        return found


@dataclass(frozen=True)
class Difference:
    """Vocabularies that differ: the models, and the tensors that have a row for each token."""

    base: Speaker
    experts: Mapping[str, Speaker]
    names: Sequence[str]

    @property
    def differs(self) -> bool:
        """Whether they do differ."""
        return any(s.tokens != self.base.tokens or s.rows != self.base.rows for s in self.experts.values())

    def __str__(self) -> str:
        name = self.names[0]
        shapes = {who: list(header(s.weights, name)[1]) for who, s in self.experts.items()}
        mine = list(header(self.base.weights, name)[1])
        other = [f"{shape} in '{who}'" for who, shape in shapes.items() if shape != mine]
        moved = next(
            (w for w, s in self.experts.items() if s.rows == self.base.rows and s.tokens != self.base.tokens), ""
        )
        said = f"{mine} in the base, {', '.join(other[:3])}" if other else f"as large, but other tokens in '{moved}'"
        more = f" and {len(self.names) - 1} more tensors" if len(self.names) > 1 else ""
        return (
            f"the vocabularies differ ('{name}'{more}: {said}): match embeddings by token with "
            f"--vocabulary (vocabulary=) base, union or the name of the expert whose tokenizer the result gets"
        )


def match_vocabularies(
    base: Weights,
    experts: Mapping[str, Weights],
    choice: str | None = None,
    sources: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
) -> tuple[Weights, dict[str, Weights], Writer | None]:
    """Return base and experts with the rows of one vocabulary, and what writes its tokenizer into a folder.

    choice   "base"; "union": the base's tokens, then those the experts added, in the order of experts and rows; the
             name of an expert; None: raise WeightsError if the vocabularies differ
    sources  folders by model ("base", or the expert's name) for weights that did not come from a folder themselves
    own      glob patterns of tensors that are not merged, and so not matched

    Where nothing differs (or no tensor has a row for each token) the weights come back as they are. Padding: the
    target keeps the base's number of rows, or the expert's; a union fills up padding rows first, and where the base was
    padded grows to the same multiple (the largest power of two, up to 1024, that divides the base's rows). The writer
    is None where the base's own files are right; else it is to be called with the folder into which these were copied.

    Raises WeightsError: vocabularies differ and no choice was made, tokenizer files are missing, or a union is not
    possible since an expert's tokenizer was trained anew (its pieces are no added tokens).
    """
    return fitted(difference(base, experts, sources, own), base, experts, choice)


def fitted(
    found: Difference | None,
    base: Weights,
    experts: Mapping[str, Weights],
    choice: str | None,
    words: Sequence[str] = (),
) -> tuple[Weights, dict[str, Weights], Writer | None]:
    """Return what `match_vocabularies` does, for a difference that is known.

    ``words`` that the vocabulary chosen lacks join it; where no model has one, its row is zero in all of them.
    """
    if choice is not None and choice not in (BASE, "union", *experts):
        raise WeightsError(
            f"no vocabulary '{choice}'{did_you_mean(choice, [BASE, 'union', *experts])}: base, union or an expert"
        )
    if found is None:
        return base, dict(experts), None
    if choice is None:
        raise WeightsError(str(found))
    target, rows = _target(found, choice)
    if more := [word for word in dict.fromkeys(words) if word not in target]:
        first = max(target.values(), default=-1) + 1
        target |= {word: first + k for k, word in enumerate(more)}
        rows = _grown(rows, first, first + len(more))
    zero = BaseRows(found, choice, target, rows)
    views: dict[str, Weights] = {who: ExpertRows(zero, s, s.map(target, rows)) for who, s in found.experts.items()}
    return zero, views, _writer(found, choice, target, rows)


def difference(
    base: Weights,
    experts: Mapping[str, Weights],
    sources: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
    *,
    always: bool = False,
) -> Difference | None:
    """Return how the vocabularies differ; None if they do not, or if no merged tensor has a row for each token.

    ``always``: also where they do not differ.

    Rows count, not files: the same tokens in the same rows are the same vocabulary. An expert without tokenizer files
    and with as many rows as the base has the base's. Raises WeightsError as `match_vocabularies`.
    """
    if isinstance(base, BaseRows) and all(isinstance(w, ExpertRows) and w.base is base for w in experts.values()):
        return None  # matched before
    folders = {who: folder_of((sources or {}).get(who)) or folder_of(w) for who, w in {BASE: base, **experts}.items()}
    folders = {who: f if f is not None and has_tokenizer(f) else None for who, f in folders.items()}
    common = [n for n in base if not matches(n, own) and _is_table(base, n) and all(n in w for w in experts.values())]
    resized = any(header(w, n)[1][:1] != header(base, n)[1][:1] for w in experts.values() for n in common)
    home = folders[BASE]
    if home is None:
        return None
    others = any(f not in (None, home) and not same_files(home, f) for f in folders.values())
    if not (always or resized or others):
        return None
    zero = _speaker(base, home, common, None)
    if zero is None:
        return None
    speakers = {who: _speaker(w, folders.get(who), common, zero) for who, w in experts.items()}
    known = {who: s for who, s in speakers.items() if s is not None}
    everyone = [zero, *known.values()]
    names = [n for n in common if all(header(s.weights, n)[1][0] == s.rows for s in everyone)]
    found = Difference(zero, known, names)
    if len(known) < len(speakers) or not names or not (always or found.differs):
        return None
    if missing := [who for who, s in known.items() if s.folder is None and s.rows != zero.rows]:
        raise WeightsError(
            f"expert '{missing[0]}' has {known[missing[0]].rows} embedding rows instead of {zero.rows}, and no tokenizer "
            f"files that say which token is which row: put them into its folder"
        )
    if len({s.rows for s in everyone}) == 1:
        _unmistakable(zero)
    return found


def _is_table(weights: Weights, name: str) -> bool:
    dtype, shape = header(weights, name)
    return dtype in FLOATS and len(shape) > 0


def _speaker(weights: Weights, folder: Path | None, common: Sequence[str], base: Speaker | None) -> Speaker | None:
    """Return a model with its rows, None where no tensor can be an embedding; without a folder it speaks as the base."""
    if folder is None and base is not None:
        pieces, added = dict(base.tokens), dict.fromkeys(base.added, 0)
        tokens = dict(base.tokens)
    else:
        pieces, added = read_tokenizer(folder)
        tokens = pieces | added
    sizes = sorted({shape[0] for n in common if len(shape := header(weights, n)[1]) == 2})
    said = vocab_size(read_config(folder))
    if said not in sizes:
        least = max(tokens.values(), default=-1) + 1
        said = next((size for size in sizes if least <= size < least + PADDING), None)
    if said is None:
        return None
    within = {token: row for token, row in tokens.items() if row < said}
    return Speaker(weights, folder, within, frozenset(added) - frozenset(pieces) & frozenset(added), said)


def _unmistakable(base: Speaker) -> None:
    """Raise WeightsError if another size in the config is that of the vocabulary: shapes would not tell them apart."""
    config = read_config(base.folder)
    for place in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key, value in place.items():
            if value == base.rows and key != "vocab_size" and type(value) is int and not key.endswith("_id"):
                raise WeightsError(
                    f"the vocabularies differ, and config.json has vocab_size = {key} = {value}: shapes do not tell which "
                    f"tensors have a row for each token; leave the embeddings out with --own '*embed*' (own=[...])"
                )


def _target(found: Difference, choice: str) -> tuple[dict[str, int], int]:
    """Return rows by token and the number of rows of the vocabulary chosen."""
    if choice == BASE:
        return dict(found.base.tokens), found.base.rows
    if choice != "union":
        return dict(found.experts[choice].tokens), found.experts[choice].rows
    target = dict(found.base.tokens)
    first = max(target.values(), default=-1) + 1
    for who, speaker in found.experts.items():
        new = sorted((row, token) for token, row in speaker.tokens.items() if token not in target)
        if trained := [token for _, token in new if token not in speaker.added]:
            raise WeightsError(
                f"expert '{who}' has {len(trained)} tokens, {trained[0]!r} first, that are pieces of its own tokenizer, "
                f"not tokens added to it: the base's tokenizer cannot be given them; take the vocabulary {who} or base"
            )
        for _, token in new:
            target[token] = len(target) if first == len(target) else max(target.values()) + 1
    return target, _grown(found.base.rows, first, max(target.values(), default=-1) + 1)


def _grown(rows: int, first: int, need: int) -> int:
    """Return the number of rows for ``need`` tokens where ``first`` had ``rows``: to a multiple if these were padded."""
    if need > rows > first:
        multiple = min(rows & -rows, PADDING)
        need = -(-need // multiple) * multiple
    return max(need, rows)


class _Rows(Over):
    """Weights whose tensors of ``names`` have other rows."""

    weights: Weights
    names: frozenset[str]
    rows: int


class BaseRows(_Rows):
    """The base with the rows of the target: its own, or the mean of the experts' that have the token, or padding."""

    def __init__(self, found: Difference, choice: str, target: Mapping[str, int], rows: int):
        self.weights, self.path = found.base.weights, found.base.folder
        self.names, self.rows, self.target = frozenset(found.names), rows, target
        self.places = found.base.map(target, rows)
        self.others = {who: (s.weights, s.map(target, rows)) for who, s in found.experts.items()}
        spoken, mine = set(target.values()), set(found.base.tokens.values())
        free = [row for row in range(rows) if row not in spoken]
        for row in free:
            if row < found.base.rows and row not in mine:
                self.places[row] = row
            elif choice in self.others:
                self.others[choice][1][row] = row
            else:  # a union that grew: one more of the base's padding rows
                self.places[row] = found.base.rows - 1

    def __getitem__(self, name: str) -> "Tensor":
        return self.take(name, range(self.rows)) if name in self.names else self.weights[name]

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        dtype, shape = header(self.weights, name)
        return dtype, (self.rows, *shape[1:]) if name in self.names else shape

    def take(self, name: str, wanted: Sequence[int]) -> "Tensor":
        """Return some rows of the target, ``[len(wanted), ...]``, in the base's dtype."""
        import torch

        origin = self.weights[name]
        places = torch.tensor([self.places[row] for row in wanted], dtype=torch.long)
        out = origin[places.clamp(min=0)]
        missing = [k for k, place in enumerate(places.tolist()) if place < 0]
        if missing:
            wide = torch.float64 if origin.dtype == torch.float64 else torch.float32
            total = torch.zeros(len(missing), *origin.shape[1:], dtype=wide)
            count = torch.zeros(len(missing), *[1] * (origin.ndim - 1), dtype=wide)
            for weights, rows in self.others.values():
                there = torch.tensor([rows[wanted[k]] for k in missing], dtype=torch.long)
                has = there >= 0
                total[has] += weights[name][there[has]].to(wide)
                count[has] += 1
            out[missing] = (total / count.clamp(min=1)).to(out.dtype)
        return out


class ExpertRows(_Rows):
    """An expert with the rows of the target: its own, or the base's, in the wider dtype so that these are equal."""

    def __init__(self, base: BaseRows, speaker: Speaker, places: Sequence[int]):
        self.base, self.weights, self.path = base, speaker.weights, speaker.folder
        self.names, self.rows, self.places = base.names, base.rows, places

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self.names:
            return self.weights[name]
        import torch

        tensor = self.weights[name]
        wide = torch.promote_types(tensor.dtype, self.base.weights[name].dtype)
        out = tensor[torch.tensor(self.places, dtype=torch.long).clamp(min=0)].to(wide)
        missing = [row for row, place in enumerate(self.places) if place < 0]
        if missing:
            out[missing] = self.base.take(name, missing).to(wide)
        return out

    def header(self, name: str) -> Head:
        """Return dtype name and shape of a tensor without its bytes."""
        dtype, shape = header(self.weights, name)
        if name not in self.names:
            return dtype, shape
        other = header(self.base.weights, name)[0]
        return _wider(dtype, other), (self.rows, *shape[1:])

    def touches(self, name: str) -> bool:
        """Tell whether a tensor may differ from the base's."""
        return name in self.names or touches(self.weights, name)

    def factors(self, name: str) -> "Factors | None":
        """Return what a tensor adds to the base's as a product."""
        return None if name in self.names else factors(self.weights, name)


def _wider(one: str, other: str) -> str:
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"  # also for BF16 with F16: neither holds the other


def _writer(found: Difference, choice: str, target: Mapping[str, int], rows: int) -> Writer | None:
    """Return what makes the base's files in a folder those of the chosen vocabulary."""
    base, other = found.base, found.experts.get(choice)
    speaker = other or base
    home = speaker.folder
    new = {token: row for token, row in target.items() if token not in speaker.tokens}
    if base.folder is None or home is None or (choice == BASE and not new):
        return None
    owners = {t: s.folder for s in reversed(list(found.experts.values())) for t in new if t in s.tokens and s.folder}
    token_at = {row: token for token, row in base.tokens.items()}

    def write_tokenizer(folder: Path) -> None:
        """Put the tokenizer of the chosen vocabulary into ``folder``, and its size and special tokens into the configs."""
        if new:
            add_tokens(home, folder, new, owners)
        elif other is not None:
            copy_tokenizer(home, folder)
        for name in ("config.json", "generation_config.json"):
            like = read_config(home if other is not None else None, name)
            edit_json(folder / name, partial(_configure, like=like))

    def _configure(told: dict[str, Any], like: Mapping[str, Any]) -> None:
        resize(told, rows)
        if choice != "union":
            renumber(told, lambda row: target.get(token_at.get(row, "")), like)

    return write_tokenizer
