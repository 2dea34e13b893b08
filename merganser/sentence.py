"""A merge is a sentence: ``ri(steps=500) | dare(keep=0.5) | ties(density=0.2) | scale(by=1.2)``.

Grammar: adapt steps, then edits and aligns, exactly one combining step, then edits. Each word is a step's name with
literal keywords. It is valid Python syntax, read by `ast` and never executed. The folder under ``steps/`` says a
step's kind, the file its name.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import late
from .errors import SentenceError, did_you_mean, meant, unknown_step

KINDS = ("adapt", "edit", "align", "combine")
GIVEN = {"rng", "survey", "name", "base", "numel", "experts", "kept"}
"""Keywords that the loop gives to edit, align and combine steps; a sentence cannot set them."""
FILE = re.compile(r"([^\s|()'\"]+\.py):([A-Za-z_]\w*)")
ENTRY_POINTS = "merganser.steps"


class Each(list):
    """A knob's values, one an expert: written ``density={"a": 0.2, "b": 0.5}``, by the experts' names."""


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
        wanted = takes(self.function)
        return self.function(*args, **{**self.knobs, **{k: v for k, v in given.items() if k in wanted}})

    def for_experts(self, experts: Sequence[str]) -> "Step":
        """Return the step with knobs given by experts' names as lists in their order. Raises SentenceError for a name."""
        knobs = dict(self.knobs)
        for knob, value in self.knobs.items():
            each = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
            if any(isinstance(one, Mapping) and "gradient" in one for one in ({} if value is None else value, *each)):
                raise SentenceError(
                    f"{self}: {knob}: a gradient over layers is told for a pattern of tensors: "
                    f"where = {{'*': {{'{self.name}': {{'{knob}': {value!r}}}}}}}"
                )
            number = type(knobs_of(self.function).get(knob)) in (int, float)
            if not experts and (isinstance(value, Mapping) or (number and isinstance(value, list | tuple))):
                raise SentenceError(
                    f"{self}: {knob}: one value an expert, but behind the combining step there is one merged model: "
                    f"give one value"
                )
            if isinstance(value, Mapping):
                for name in [*value, *experts]:
                    if name not in experts or name not in value:
                        what = "there is no such expert" if name not in experts else "it has no value"
                        raise SentenceError(
                            f"{self}: {knob}: '{name}': {what}; give one value for each of {[*experts]}"
                        )
                knobs[knob] = Each(value[name] for name in experts)
        return self if knobs == self.knobs else replace(self, knobs=knobs)

    def for_one(self, row: int) -> dict[str, Any]:
        """Return the knobs that the expert in this row has."""
        return {k: v[row] if isinstance(v, Each) else v for k, v in self.knobs.items()}

    def hook(self, name: str) -> Any:
        """Return what the function's module says under ``name`` (``passes``, ``prepare``, ...), or None."""
        return getattr(inspect.getmodule(self.function), name, None)

    @cached_property
    def looks(self) -> list[Callable[..., Any]]:
        """What the step has to learn first: functions whose results add up over tensors and cuts."""
        passes = self.hook("passes")
        try:
            return passes(**self.knobs) if passes else []
        except (ValueError, TypeError) as error:
            raise SentenceError(f"{self}: {error}") from None

    @cached_property
    def scope(self) -> str:
        """Over what a survey sums: the "model", or one "tensor"."""
        default = knobs_of(self.function).get("scope", self.hook("SCOPE") or "model")
        return str(self.knobs.get("scope", default))

    @cached_property
    def elementwise(self) -> bool:
        """Whether, given its survey, an entry of the result depends on that entry alone, so tensors may be cut."""
        told = self.hook("elementwise")
        return bool(told(**self.knobs)) if told else bool(self.hook("ELEMENTWISE"))

    @cached_property
    def ingredients(self) -> list[str]:
        """The extra tensors it needs: keywords without a default that the loop does not give."""
        return ingredients_of(self.function) if self.kind != "adapt" else []

    @cached_property
    def entrywise(self) -> list[str]:
        """Those ingredients that have an entry for each of the tensor's: their annotation says ``*shape``."""
        told = inspect.signature(self.function).parameters
        return [name for name in self.ingredients if "*shape" in _dims(told[name].annotation)]

    @cached_property
    def sided(self) -> list[str]:
        """Those ingredients that belong to a matrix's inputs or outputs: their annotation has named dimensions."""
        told = inspect.signature(self.function).parameters
        return [name for name in self.ingredients if _dims(told[name].annotation).strip()]

    @cached_property
    def inward(self) -> list[str]:
        """Those ingredients whose last dimension is what enters the layer: their annotation ends with ``in`` or ``inner``."""
        told = inspect.signature(self.function).parameters
        return [name for name in self.ingredients if _dims(told[name].annotation).split()[-1:] in (["in"], ["inner"])]

    @property
    def on_weights(self) -> bool:
        """Whether it looks at the base's weights, not at what experts add to them alone."""
        on = self.knobs.get("on", knobs_of(self.function).get("on", "weights"))
        return "base" in takes(self.function) and self.kind != "align" and on == "weights"


def _dims(annotation: Any) -> str:
    """Return the dimensions that a jaxtyping annotation names, alone or beside None."""
    each = getattr(annotation, "__args__", ()) if not hasattr(annotation, "dim_str") else (annotation,)
    return " ".join(getattr(one, "dim_str", "") for one in each)


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
    def draws(self) -> bool:
        """Tell whether a seed can change the result: a step is given a generator, or is somebody else's."""
        asked = [f for step in self.steps for f in (step.function, step.hook("prepare")) if f is not None]
        return any("rng" in takes(f) for f in asked) or any(
            not step.function.__module__.startswith(f"{__package__}.steps.") for step in self.steps
        )

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
    """Return kind and function of the step called ``name``: ours, an entry point's, or ``file.py:function``.

    Raises SentenceError with a suggestion.
    """
    if match := FILE.fullmatch(name):
        return _from_file(Path(match[1]), match[2])
    known = known_steps()
    if name in known:
        return known[name], getattr(importlib.import_module(f"merganser.steps.{known[name]}.{name}"), name)
    from importlib.metadata import entry_points

    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name in others:
        late.now()
        function = others[name].load()
        return kind_of(function), function
    raise unknown_step(name, [*known, *others])


def _from_file(path: Path, name: str) -> tuple[str, Callable[..., Any]]:
    if not path.is_file():
        raise SentenceError(f"{path}:{name}: no such file; a step of your own is written PATH.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"merganser_step_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that inspect finds passes and constants beside the function
    late.now()
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SentenceError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        raise SentenceError(f"{path}: has no function '{name}'{did_you_mean(name, there)}")
    return kind_of(function), function


@cache
def takes(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def ingredients_of(function: Callable[..., Any]) -> list[str]:
    """Return the ingredients of a step: keywords without a default that the loop does not give."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in GIVEN
    ]


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
        return _grammar(tuple(step_of(node, how) for node in words_of(how)), how)
    steps: list[Step] = []
    for item in how:
        steps += parse_words(item) if isinstance(item, str) else [_from_function(item)]
    return _grammar(tuple(steps), " | ".join(map(str, steps)))


def parse_words(text: str) -> list[Step]:
    """Return the steps of ``text`` without asking for a whole sentence (``"ri(steps=5)"`` alone is fine)."""
    return [step_of(node, text) for node in words_of(text)]


def words_of(text: str) -> list[ast.expr]:
    """Return the words of a sentence as syntax; ``file.py:function`` is read as a name of that spelling."""
    files: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        files.append(match[0])
        return f"__file{len(files) - 1}__"

    plain = FILE.sub(stand_in, text.strip())
    try:
        node = ast.parse(plain, mode="eval").body
    except SyntaxError as error:
        raise SentenceError(
            f"cannot read '{text}' at character {error.offset}: a sentence is words joined by |, "
            f"such as ties(density=0.2) | scale(by=1.2)"
        ) from None
    words: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        words.insert(0, node.right)
        node = node.left
    words.insert(0, node)
    for word in words:
        for name in ast.walk(word):
            if isinstance(name, ast.Name) and (match := re.fullmatch(r"__file(\d+)__", name.id)):
                name.id = files[int(match[1])]
    return words


def step_of(node: ast.expr, text: str) -> Step:
    """Return the step that a word of ``text`` says. Raises SentenceError."""
    call = node if isinstance(node, ast.Call) else None
    word = call.func if call else node
    if not isinstance(word, ast.Name):
        raise SentenceError(
            f"'{ast.unparse(node)}' in '{text}' is not a step: write name or name(knob=value){_dashed(node)}"
        )
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
    its = f"its knobs: {', '.join(allowed) or 'none'}"
    wrong = [f"'{word.id}' has no knob '{knob}'{did_you_mean(knob, allowed)}" for knob in knobs if knob not in allowed]
    if wrong:
        raise SentenceError(f"{', '.join(wrong)}; {its}", [f"{one}; {its}" for one in wrong])
    check_truth(word.id, function, knobs)
    return Step(word.id, kind, function, knobs)


def _dashed(node: ast.expr) -> str:
    """Return what is meant by a name with dashes, which Python reads as a difference of names."""
    name = ast.unparse(node).partition("(")[0].replace(" - ", "_")
    if not name.isidentifier() or "-" not in ast.unparse(node):
        return ""
    return f"; there is {name}" if name in known_steps() else meant(name) or did_you_mean(name, known_steps())


def check_truth(word: str, function: Callable[..., Any], knobs: Mapping[str, Any]) -> None:
    """Raise SentenceError where a knob that is true or false is something else, or a number is true or false.

    Python would take any of them: ``plus='no'`` as true, ``steps=True`` as 1.
    """
    told = inspect.signature(function).parameters
    for knob, value in knobs.items():
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        values = [one for one in inner if not isinstance(one, list | tuple | Mapping)]
        if told[knob].annotation is bool and not all(isinstance(one, bool) for one in values):
            raise SentenceError(f"{word}: {knob} must be True or False, got {value!r}")
        number = type(told[knob].default) in (int, float)
        if number and any(isinstance(one, bool) for one in values):
            raise SentenceError(f"{word}: {knob} must be a number, got {value!r}")


def _from_function(function: Callable[..., Any]) -> Step:
    return Step(getattr(function, "__name__", "step"), kind_of(function), function)


def kind_of(function: Callable[..., Any]) -> str:
    """Return the kind of a step that is a plain function, from its first argument's name and what it returns.

    ``delta`` is an edit; ``deltas`` is an align step if its return annotation is a tuple, else a combining step; one of
    ours is what its folder says. Raises SentenceError for any other signature.
    """
    room = (function.__module__ or "").split(".")
    if room[:2] == ["merganser", "steps"] and room[2] in KINDS:
        return room[2]
    signature = inspect.signature(function)
    first = next(iter(signature.parameters), "")
    if first not in ("deltas", "delta"):
        raise SentenceError(
            f"{getattr(function, '__name__', function)!r}: a step's first argument is called 'delta' (an edit) or "
            f"'deltas' (an align or combining step), this one's is '{first}'"
        )
    pair = str(signature.return_annotation).removeprefix("<class '").lower().startswith(("tuple", "typing.tuple"))
    return "edit" if first == "delta" else "align" if pair else "combine"


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
    _coordinates(steps[: at + 1], text)
    return Sentence(steps)


def _coordinates(steps: Sequence[Step], text: str) -> None:
    """Raise SentenceError for a step that is given what has no place in the coordinates which an align step leaves."""
    other: dict[str, str] = {}
    for step in steps:
        needs = [*step.entrywise, *(step.sided if "both" in other.values() else []), *(["base"] * step.on_weights)]
        if other and needs:
            align = next(iter(other))
            raise SentenceError(
                f"'{text}': '{step.name}' takes '{needs[0]}' in the tensor's own coordinates, and {align} leaves other "
                f"ones; leave {align} out, or take another step"
            )
        if sides := step.hook("COORDINATES"):
            other[step.name] = sides
