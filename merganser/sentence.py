"""A merge is a sentence: ``ri(steps=500) | dare(keep=0.5) | ties(density=0.2) | scale(by=1.2)``.

Grammar: adapt steps, then edits and aligns, exactly one combining step, then edits. Each word is a step's name with
literal keywords. It is valid Python syntax, read by `ast` and never executed. The folder under ``steps/`` says a
step's kind, the file its name.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import SentenceError, did_you_mean

KINDS = ("adapt", "edit", "align", "combine")
GIVEN = {"rng", "survey", "name"}
"""Keywords that the loop gives to edit, align and combine steps; a sentence cannot set them."""


@dataclass(frozen=True)
class Step:
    """One word: its name, the knobs as written, its kind and its function."""

    name: str
    kind: str
    function: Callable[..., Any]
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.knobs:
            return self.name
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.knobs.items())})"

    def call(self, *args: Any, **given: Any) -> Any:
        """Call the function with its knobs and those ``given`` values that its signature names."""
        wanted = {k: v for k, v in given.items() if k in inspect.signature(self.function).parameters}
        return self.function(*args, **self.knobs, **wanted)

    def module(self) -> Any:
        """Return the module the function comes from."""
        return inspect.getmodule(self.function)


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence; ``str(sentence)`` is its canonical text."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    @property
    def adapt(self) -> tuple[Step, ...]:
        """The adapt steps, model in, model out."""
        return tuple(s for s in self.steps if s.kind == "adapt")

    @property
    def before(self) -> tuple[Step, ...]:
        """Edits and aligns left of the combining step: they touch each expert's delta."""
        return tuple(s for s in self.steps[: self._at] if s.kind != "adapt")

    @property
    def combine(self) -> Step:
        """The one combining step."""
        return self.steps[self._at]

    @property
    def after(self) -> tuple[Step, ...]:
        """Edits right of the combining step: they touch the merged delta."""
        return self.steps[self._at + 1 :]

    @property
    def merging(self) -> "Sentence":
        """The sentence without its adapt steps."""
        return Sentence(tuple(s for s in self.steps if s.kind != "adapt"))

    @property
    def _at(self) -> int:
        return next(k for k, s in enumerate(self.steps) if s.kind == "combine")


def known_steps() -> dict[str, str]:
    """Return every step's name and kind, found by walking the folders; imports nothing."""
    root = Path(__file__).parent / "steps"
    return {
        path.stem: kind
        for kind in KINDS
        for path in sorted((root / kind).glob("*.py"))
        if not path.stem.startswith("_")
    }


@cache
def find(name: str) -> tuple[str, Callable[..., Any]]:
    """Return kind and function of the step called ``name``. Raises SentenceError with a suggestion."""
    known = known_steps()
    if name not in known:
        raise SentenceError(f"unknown step '{name}'{did_you_mean(name, known)}; known: {', '.join(sorted(known))}")
    kind = known[name]
    return kind, getattr(importlib.import_module(f"merganser.steps.{kind}.{name}"), name)


def knobs_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the knobs of a step, name and default: keywords with a plain default that the loop does not give."""
    return {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name not in GIVEN and not p.name.startswith("_")
    }


def parse(how: "str | Sentence | Iterable[Any]") -> Sentence:
    """Return the sentence ``how``: its text, or a list of functions and texts. Raises SentenceError."""
    if isinstance(how, Sentence):
        return how
    if isinstance(how, str):
        return _grammar(tuple(_word(node, how) for node in _words(how)), how)
    steps: list[Step] = []
    for item in how:
        steps += parse_words(item) if isinstance(item, str) else [_from_function(item)]
    return _grammar(tuple(steps), " | ".join(map(str, steps)))


def parse_words(text: str) -> list[Step]:
    """Return the steps of ``text`` without asking for a whole sentence (``"ri(steps=5)"`` alone is fine)."""
    return [_word(node, text) for node in _words(text)]


def _words(text: str) -> list[ast.expr]:
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SentenceError(
            f"cannot read '{text}' at character {error.offset}: a sentence is words joined by |, "
            f"such as ties(density=0.2) | scale(by=1.2)"
        ) from None
    words: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        words.insert(0, node.right)
        node = node.left
    return [node, *words]


def _word(node: ast.expr, text: str) -> Step:
    call = node if isinstance(node, ast.Call) else None
    word = call.func if call else node
    if not isinstance(word, ast.Name):
        raise SentenceError(f"'{ast.unparse(node)}' in '{text}' is not a step: write name or name(knob=value)")
    kind, function = find(word.id)
    knobs: dict[str, Any] = {}
    if call and call.args:
        raise SentenceError(
            f"'{ast.unparse(node)}': knobs are given by name, such as {word.id}({next(iter(knobs_of(function)), 'knob')}=...)"
        )
    for keyword in call.keywords if call else ():
        try:
            knobs[keyword.arg or "**"] = ast.literal_eval(keyword.value)
        except ValueError:
            raise SentenceError(f"'{ast.unparse(node)}': '{ast.unparse(keyword.value)}' is not a plain value") from None
    allowed = knobs_of(function)
    for knob in knobs:
        if knob not in allowed:
            raise SentenceError(
                f"'{word.id}' has no knob '{knob}'{did_you_mean(knob, allowed)}; its knobs: {', '.join(allowed) or 'none'}"
            )
    return Step(word.id, kind, function, knobs)


def _from_function(function: Callable[..., Any]) -> Step:
    first = next(iter(inspect.signature(function).parameters), "")
    if first not in ("deltas", "delta"):
        raise SentenceError(
            f"{getattr(function, '__name__', function)!r}: a step's first argument is called 'delta' (an edit) or "
            f"'deltas' (a combining step), this one's is '{first}'"
        )
    return Step(function.__name__, "edit" if first == "delta" else "combine", function)


def _grammar(steps: tuple[Step, ...], text: str) -> Sentence:
    combining = [s.name for s in steps if s.kind == "combine"]
    if len(combining) != 1:
        known = ", ".join(n for n, kind in known_steps().items() if kind == "combine")
        has = f"has {len(combining)} ({', '.join(combining)})" if combining else "has none"
        raise SentenceError(f"'{text}' {has}; a sentence needs exactly one combining step: {known}")
    kinds = [s.kind for s in steps]
    at = kinds.index("combine")
    if "adapt" in kinds[at:] or any(a != "adapt" and b == "adapt" for a, b in pairwise(kinds)):
        raise SentenceError(f"'{text}': adapt steps come first, before any other word")
    if "align" in kinds[at:]:
        raise SentenceError(f"'{text}': align steps stand left of the combining step '{combining[0]}'")
    return Sentence(steps)
