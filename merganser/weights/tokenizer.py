"""Tokenizer files: which token is which row of the embedding, and the files of a merged model's tokenizer.

Files are read and written as JSON and text, with the standard library. Only a tokenizer that none of them describes (a
SentencePiece model alone) is asked through transformers, and never runs code of a checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, WeightsError
from .header import folder_of

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "normalizer.json", "chat_template.json", "chat_template.jinja", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm",
)  # fmt: skip
DESCRIBE = ("tokenizer.json", "vocab.json", "vocab.txt")  # the files that say which token has which id, best first
MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
IDS = ("_token_id", "_token_ids", "_token_index")
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def vocabulary(source: object) -> dict[str, int]:
    """Return ``{token: row}`` of the model in folder ``source`` (or of weights that came from a folder).

    From tokenizer.json (vocabulary and added tokens), else vocab.json or vocab.txt with added_tokens.json, else what
    transformers' AutoTokenizer reads (extra 'hf'). Raises WeightsError if the folder has no tokenizer.
    """
    pieces, added = read_tokenizer(source)
    return pieces | added


def read_tokenizer(source: object) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tokens of the tokenizer's own model, and those added to it, each ``{token: row}``; see `vocabulary`."""
    folder = folder_of(source)
    if folder is None or not has_tokenizer(folder):
        raise WeightsError(f"{folder or 'weights in memory'}: no tokenizer (tokenizer.json, vocab.json, vocab.txt)")
    path = next((folder / name for name in DESCRIBE if (folder / name).is_file()), None)
    if path is None:
        return _asked(folder)
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == "tokenizer.json":
            told = json.loads(text)
            return _pieces(told), {t["content"]: int(t["id"]) for t in told.get("added_tokens", [])}
        if path.name == "vocab.json":
            pieces = {token: int(row) for token, row in json.loads(text).items()}
        else:
            lines = text.removesuffix("\n").split("\n")  # not splitlines: a token may be another line separator
            pieces = {token.rstrip("\r"): row for row, token in enumerate(lines)}
        return pieces, {token: int(row) for token, row in read_config(folder, "added_tokens.json").items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a tokenizer file that can be read ({error})") from None


def has_tokenizer(folder: Path) -> bool:
    """Tell whether ``folder`` has tokenizer files from which a vocabulary can be read."""
    return any((folder / name).is_file() for name in (*DESCRIBE, *MODELS))


def same_files(one: Path, other: Path) -> bool:
    """Tell whether two folders have the very same files that say which token has which id."""

    def content(folder: Path) -> list[bytes | None]:
        names = (*DESCRIBE, *MODELS, "added_tokens.json")
        return [path.read_bytes() if (path := folder / name).is_file() else None for name in names]

    return content(one) == content(other)


def _pieces(told: Mapping[str, Any]) -> dict[str, int]:
    vocab = told["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        return {piece: row for row, (piece, _) in enumerate(vocab)}
    return {token: int(row) for token, row in vocab.items()}


def _asked(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    tokenizer = _auto(folder)
    added = tokenizer.get_added_vocab()
    return {token: row for token, row in tokenizer.get_vocab().items() if token not in added}, dict(added)


def _auto(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra(f"the tokenizer of {folder}", "hf") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {first})") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer of ``source`` into ``target`` in the place of the one there."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
    for path in source.glob("*.tiktoken"):
        shutil.copyfile(path, target / path.name)


def add_tokens(base: Path, target: Path, added: Mapping[str, int], owners: Mapping[str, Path]) -> None:
    """Put the tokenizer of ``base`` into ``target`` with ``added`` tokens (row by token), as their ``owners`` have them."""
    copy_tokenizer(base, target)
    entries = [{"id": row, "content": token, **_entry(owners.get(token), token)} for token, row in added.items()]
    path = target / "tokenizer.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        told["added_tokens"] = sorted([*told.get("added_tokens", []), *entries], key=lambda t: t["id"])
        _write(path, told)
        edit_json(target / "tokenizer_config.json", lambda told: _decoded(told, entries))
        if (target / "added_tokens.json").is_file():
            edit_json(target / "added_tokens.json", lambda told: told.update(added))
        return
    from tokenizers import AddedToken

    tokenizer = _auto(base)
    words = {e["content"]: AddedToken(**{k: v for k, v in e.items() if k != "id"}) for e in entries}
    tokenizer.add_tokens(list(words.values()))
    if wrong := [t for t, row in added.items() if tokenizer.convert_tokens_to_ids(t) != row]:
        raise WeightsError(f"{base}: this tokenizer does not give token {wrong[0]!r} the row {added[wrong[0]]}")
    tokenizer.save_pretrained(target)


def _entry(owner: Path | None, token: str) -> dict[str, Any]:
    path = owner and owner / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", []) if path and path.is_file() else []
    entry: dict[str, Any] = next((t for t in told if t["content"] == token), {})
    return {key: entry.get(key, value) for key, value in PLAIN.items()}


def _decoded(told: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    if "added_tokens_decoder" in told:
        told["added_tokens_decoder"] |= {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return what a config.json says about the rows of the embedding, at its top or in the part for text."""
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((p["vocab_size"] for p in places if isinstance(p.get("vocab_size"), int)), None)


def resize(config: dict[str, Any], rows: int) -> None:
    """Write another number of rows where `vocab_size` reads it."""
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    for place in places:
        if isinstance(place.get("vocab_size"), int):
            place["vocab_size"] = rows
            return


def renumber(config: dict[str, Any], new: Callable[[int], int | None], like: Mapping[str, Any]) -> None:
    """Give the special tokens of a config (``eos_token_id``, ...) other rows: those of ``like``, else ``new(row)``."""
    for key, value in config.items():
        other = like.get(key)
        if isinstance(value, dict):
            renumber(value, new, other if isinstance(other, dict) else {})
        elif not key.endswith(IDS) or value is None:
            continue
        elif other is not None:
            config[key] = other
        elif isinstance(value, int):
            config[key] = new(value)
        elif isinstance(value, list):
            config[key] = [row for v in value if isinstance(v, int) and (row := new(v)) is not None]
    config.update({k: v for k, v in like.items() if k.endswith(IDS) and v is not None and config.get(k) is None})


def write_dtype(folder: Path, dtype: str, *, add: bool = False) -> None:
    """Write the dtype of the weights where config.json and its parts name one; ``add``: also where none does."""

    def change(told: dict[str, Any]) -> None:
        for part in (told, *(value for value in told.values() if isinstance(value, dict))):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
        if add and not {"torch_dtype", "dtype"} & told.keys():
            told["torch_dtype"] = dtype

    edit_json(folder / "config.json", change)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the object in a JSON file in place; do nothing where there is no such file."""
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        change(told)
        _write(path, told)


def read_config(folder: Path | None, name: str = "config.json") -> dict[str, Any]:
    """Return the object in a folder's config file, empty where there is none. Raises WeightsError if it is broken."""
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(told, dict):
        raise WeightsError(f"{path}: not a JSON object, but {type(told).__name__}")
    return told


def sound_config(folder: Path | None) -> dict[str, Any]:
    """Return a folder's config.json, empty also where it is broken: for those who need not be the one to say so."""
    try:
        return read_config(folder)
    except WeightsError:
        return {}


def _write(path: Path, told: Any) -> None:
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
