"""What there is to merge with: steps and suites, told from their files alone, without importing torch.

A step is read with `ast`, never imported: name and kind from the file, formula from the docstring, knobs from the
signature, how it streams from the names at the top of the module.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import SentenceError, did_you_mean, unknown_step
from .sentence import ENTRY_POINTS, FILE, GIVEN, known_steps

ROOT = Path(__file__).parent
COSTS = {
    "stream": "one pass over the experts in cuts; memory does not grow with the model",
    "by knobs": "one pass over the experts, in cuts or by whole tensors as its knobs say",
    "whole": "one pass over the experts by whole tensors",
    "spectral": "by whole tensors; singular values of every matrix, cubic in its smaller side",
    "adapt": "trains each expert: steps x batch forward and backward passes",
}
DEFINED = re.compile(r"^def (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class StepInfo:
    """One step as its file tells: what it does, what can be set, what it needs, what it costs."""

    name: str
    kind: str
    summary: str
    doc: str
    knobs: dict[str, Any]
    needs: list[str]  # ingredients: extra tensors under the model's names
    takes: list[str]  # what the loop gives it: base, rng, ...
    scope: str | None  # over what it learns first: the "model", a "tensor"; None where it learns nothing
    cost: str
    source: str
    origin: str = "merganser"

    @property
    def signature(self) -> str:
        """The word with its knobs at their defaults, as a sentence has it."""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.knobs.items())})" if self.knobs else self.name

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "cost": {"class": self.cost, "means": COSTS[self.cost]}}


def steps() -> list[StepInfo]:
    """Return every step: ours, then those that other packages announce as entry points (read, not imported)."""
    ours = [step_in_file(ROOT / "steps" / kind / f"{name}.py", name, kind) for name, kind in known_steps().items()]
    return ours + [told for name, value in _entry_points().items() if (told := _announced(name, value)) is not None]


def step(name: str) -> StepInfo:
    """Return the step called ``name``: ours, an entry point's, or ``file.py:function``. Raises SentenceError."""
    if match := FILE.fullmatch(name):
        if not Path(match[1]).is_file():
            raise SentenceError(f"{match[1]}: no such file; a step of your own is written PATH.py:FUNCTION")
        return step_in_file(Path(match[1]), match[2], None, origin="file", called=name)
    known, others = known_steps(), _entry_points()
    if name in known:
        return step_in_file(ROOT / "steps" / known[name] / f"{name}.py", name, known[name])
    if name in others and (told := _announced(name, others[name])) is not None:
        return told
    raise unknown_step(name, [*known, *others])


def is_step(name: str) -> bool:
    """Tell whether ``name`` is a step's: a known one, or written ``file.py:function``."""
    return FILE.fullmatch(name) is not None or name in known_steps() or name in _entry_points()


def step_in_file(
    path: Path, name: str, kind: str | None, *, origin: str = "merganser", called: str | None = None
) -> StepInfo:
    """Read one step from its file without running it. Raises SentenceError where the file has no such function."""
    text = path.read_text(encoding="utf-8", errors="replace")
    functions = DEFINED.findall(text)
    if name not in functions:
        raise SentenceError(f"{path}: has no function '{name}'{did_you_mean(name, functions)}")
    tree = _parsed(path, text, name)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    constants = dict(_constants(tree))
    kind = kind or _kind(function, path)
    doc = ast.get_docstring(function) or ""
    defaults = list(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))
    shown = [(a.arg, d) for a, d in defaults if a.arg not in GIVEN and not a.arg.startswith("_")]
    learns = "passes" in functions or "prepare" in functions
    knobs = {arg: _value(default, constants) for arg, default in shown if default is not None}
    given = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} & GIVEN
    return StepInfo(
        name=called or name,
        kind=kind,
        summary=_summary(ast.get_docstring(tree) or "", doc, origin),
        doc=doc,
        knobs=knobs,
        needs=[arg for arg, default in shown if default is None] if kind != "adapt" else ["encoder", "heads", "inputs"],
        takes=sorted(given - {"survey"}),
        scope=("by knob" if "scope" in knobs else str(constants.get("SCOPE", "model"))) if learns else None,
        cost=_cost(tree, functions, constants, kind),
        source=str(path),
        origin=origin,
    )


def _parsed(path: Path, text: str, name: str) -> ast.Module:
    """Parse a file up to the end of a function's docstring, which takes a third of the time; all of it if that fails."""
    begin = re.search(rf"^def {name}\b", text, re.MULTILINE)
    first = text.find('"""', begin.start() if begin else 0)
    end = text.find('"""', first + 3)
    for part in (text[: end + 3], text) if 0 < first < end else (text,):
        try:
            return ast.parse(part)
        except SyntaxError as error:
            wrong = error
    raise SentenceError(f"{path}: not Python that can be read: {wrong}")


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            with suppress(ValueError):
                value = ast.literal_eval(node.value)
                yield from ((target.id, value) for target in node.targets if isinstance(target, ast.Name))


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return a default's value: a literal, a constant of the module, or else its source text."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _summary(module: str, doc: str, origin: str) -> str:
    """Return the first sentence of the module for ours ("TIES: trim, elect signs, ..."), else of the function."""
    text = module if origin == "merganser" and module else doc or module
    return " ".join(text.split("\n\n")[0].split())


def _kind(function: ast.FunctionDef, path: Path) -> str:
    """Return the kind of a step from its first argument and what it returns, by the rule of `sentence.kind_of`."""
    first = next((a.arg for a in [*function.args.posonlyargs, *function.args.args]), "")
    if first not in ("delta", "deltas"):
        raise SentenceError(
            f"{path}:{function.name}: a step's first argument is called 'delta' (an edit) or 'deltas' (an align or "
            f"combining step), this one's is '{first}'"
        )
    returns = ast.unparse(function.returns).lower() if function.returns else ""
    return "edit" if first == "delta" else "align" if returns.startswith(("tuple", "typing.tuple")) else "combine"


def _cost(tree: ast.Module, functions: list[str], constants: Mapping[str, Any], kind: str) -> str:
    imported = {alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    imported |= {(n.module or "").split(".")[-1] for n in tree.body if isinstance(n, ast.ImportFrom)}
    if kind == "adapt":
        return "adapt"
    if "spectrum" in imported:
        return "spectral"
    if "elementwise" in functions:
        return "by knobs"
    return "stream" if constants.get("ELEMENTWISE") else "whole"


@cache
def _entry_points() -> dict[str, str]:
    files = (file for place in sys.path for file in Path(place).glob("*.*-info/entry_points.txt"))
    if not any(ENTRY_POINTS.encode() in file.read_bytes() for file in files):
        return {}  # spares an import that takes longer than reading all steps
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _announced(name: str, value: str) -> StepInfo | None:
    """Return the step of an entry point ``package.module:function`` from its file; None where no file is found."""
    from importlib.util import find_spec

    module, _, function = value.partition(":")
    package, *inside = module.strip().split(".")
    try:
        spec = find_spec(package)  # finds, and imports nothing, as the name has no dots
    except (ImportError, ValueError):
        return None
    roots = [Path(p) for p in spec.submodule_search_locations or []] if spec else []
    files = [
        p for root in roots for p in (root.joinpath(*inside).with_suffix(".py"), root.joinpath(*inside, "__init__.py"))
    ]
    if spec is not None and not inside and spec.origin:
        files = [Path(spec.origin)]
    try:
        path = next(p for p in files if p.is_file())
        return step_in_file(path, function.strip(), None, origin=f"entry point {value}", called=name)
    except (StopIteration, SentenceError):
        return None


def suites() -> dict[str, str]:
    """Return every suite and its first line."""
    from .suites import SUITES, module_of

    return {name: _first_line(ROOT / "suites" / f"{module_of(name)}.py") for name in (*SUITES, "demo")}


def _first_line(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    return " ".join(text.split('"""')[1].split("\n\n")[0].split())
