"""An encoder by its kind: text, image, or whatever a function of yours builds."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RecipeError, did_you_mean

KINDS = ("text", "image", "causal", "seq2seq")


def open_encoder(kind: str, base: str | Path, **options: Any) -> nn.Module:
    """Return the encoder of ``kind`` for the model at ``base``.

    ``kind``: "text" (`hf.text_encoder`), "image" (`hf.image_encoder`), "causal" (`causal.causal_lm`), "seq2seq"
    (`seq2seq.seq2seq_lm`), or a function of yours, "module:function" or "./file.py:function", called with ``base`` and
    the ``options``.
    Raises RecipeError if the kind, the file, the function or an option does not exist, or if no module comes back.
    """
    factory = _factory(kind)
    _check_options(kind, factory, base, options)
    encoder = factory(base, **options)
    if not isinstance(encoder, nn.Module):
        raise RecipeError(f"encoder '{kind}' returned a {type(encoder).__name__}; it must return a torch.nn.Module")
    return encoder


def _factory(kind: str) -> Callable[..., Any]:
    if kind == "causal":
        from .causal import causal_lm

        return causal_lm
    if kind == "seq2seq":
        from .seq2seq import seq2seq_lm

        return seq2seq_lm
    if kind in KINDS:
        from . import hf

        return hf.text_encoder if kind == "text" else hf.image_encoder
    place, colon, name = kind.rpartition(":")
    if not colon or not place or not name:
        raise RecipeError(
            f"unknown kind of encoder '{kind}'{did_you_mean(kind, KINDS)}: use {', '.join(KINDS)}, module:function or "
            f"./file.py:function"
        )
    module = _file(place) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if function is None:
        raise RecipeError(f"encoder '{kind}': {place} has no '{name}'{did_you_mean(name, vars(module))}")
    if not callable(function):
        raise RecipeError(f"encoder '{kind}': '{name}' is a {type(function).__name__}, not a function")
    return function


def _file(place: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise RecipeError(f"encoder file {place} does not exist (looked for {path})")
    name = f"_merganser_file_{path.stem}_{abs(hash(path)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"encoder file {place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes defined in the file find their module by this name (pickle, dataclasses)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise RecipeError(f"encoder file {place} fails on import: {type(e).__name__}: {e}") from e
    return module


def _module(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as e:
        raise RecipeError(f"encoder module '{place}' fails on import: {type(e).__name__}: {e}") from e


def _check_options(kind: str, factory: Callable[..., Any], base: str | Path, options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    names = [p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if wrong := [n for n in options if n not in names and not takes_any]:
        raise RecipeError(f"encoder '{kind}' has no option '{wrong[0]}'{did_you_mean(wrong[0], names)}")
    try:
        signature.bind(base, **options)
    except TypeError as e:
        raise RecipeError(
            f"encoder '{kind}' cannot be called with the base's path and {sorted(options)}: {e}"
        ) from None
