"""What ``recipe.toml`` may say. Paths are relative to the recipe's folder.

title = "eight sentence tasks"
sentences = ["task_arithmetic | scale(by=0.3)", "ri(steps=300) | task_arithmetic | scale(by=0.3)"]
scales = [0.2, 0.4, 0.6]          # tried on the validation splits; [] takes every sentence as it is written;
                                  # all_scales = true tries each, past the peak too; choose = "experts" needs no label

[model]
base = "models/base"              # a Hugging Face folder, or what your own factory reads
encoder = "text"                  # "text", "image", "module:function" or "./file.py:function"

[experts]
sst2 = "models/sst2"

[tasks]                           # a folder each, or folder = "tasks" for all that lie in one
sst2 = "tasks/sst2"

[domains]                         # tasks of other domains (shift_of = "sst2" in their task.toml): scored, never tuned on
yelp = "tasks/shift/sst2_yelp"

[inputs]                          # unlabeled
files = ["inputs/sentences.txt.gz"]

[where."*.mlp.*"]                 # knobs for some tensors, in the sentences that have the step
ties = {density = 0.4}

[ingredients]                     # extra tensors that a step needs, by its keyword
fisher = "fisher"
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import RecipeError, closest, did_you_mean
from .evaluate.unlabeled import is_no_path

Positive = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """The network: where the base lies and how it is called. ``options`` go to the encoder's factory.

    ``statistics``: whether batch norm's running statistics are measured anew on the unlabeled inputs after each merge
    ("reset") or are the mean of the experts' ("merged"); "auto" resets them where there are batch norms and inputs.
    """

    base: Path
    encoder: str = "text"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    statistics: Literal["auto", "merged", "reset"] = "auto"
    options: dict[str, Any] = {}


class HeadsPart(_Part):
    """Heads: "zero-shot" (from the classes' phrases), "class-mean" (from the base's features of the training split),
    "expert" (split off each expert's checkpoint) or "linear" (from a safetensors ``file``: TASK.weight, TASK.bias).
    """

    kind: Literal["zero-shot", "class-mean", "expert", "linear"] = "zero-shot"
    scale: float | None = None
    file: Path | None = None


class InputsPart(_Part):
    """Unlabeled inputs, at most ``limit`` of them, an equal share a file.

    Files and columns of text, pictures, data sets of the Hub (see `evaluate.unlabeled`), or what needs no data
    (``dead-leaves:5000``, ``tokens:2000``; see `synthetic`).
    """

    files: list[Path] = Field(min_length=1)
    limit: Positive | None = None


class LimitPart(_Part):
    """At most so many rows of each task's splits are used, the first ones (None: all).

    ``diagnose``: of the test split, for the interference; 0: it is not measured. ``ensemble``: also score all experts side
    by side, a forward pass of each on every test input.
    """

    train: Positive | None = None
    val: Positive | None = 500
    test: Positive | None = None
    diagnose: Annotated[int, Field(ge=0)] = 300
    ensemble: bool = True


class Recipe(_Part):
    """A whole run: base, experts, tasks, inputs and sentences.

    ``choose``: what scales are chosen by, the "labels" of the validation splits, or how often a merged model says on
    unlabeled inputs, under every head, what that head's expert says ("experts").
    """

    title: str = "merge"
    command: str | None = None
    seed: int = 0
    sentences: list[str] = Field(min_length=1)
    scales: list[float] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    all_scales: bool = False
    choose: Literal["labels", "experts"] = "labels"
    own: list[str] = []
    model: ModelPart
    experts: dict[str, Path] = Field(min_length=1)
    tasks: dict[str, Path]
    domains: dict[str, Path] = {}
    heads: HeadsPart = HeadsPart()
    inputs: InputsPart | None = None
    where: dict[str, dict[str, dict[str, Any]]] = {}
    ingredients: dict[str, Path] = {}
    limits: LimitPart = LimitPart()

    def only(self, names: Sequence[str]) -> "Recipe":
        """Return the same with the experts and tasks of these names alone."""
        some = {part: {name: getattr(self, part)[name] for name in names} for part in ("tasks", "experts")}
        return self.model_copy(update=some)


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe at ``path`` with its paths made absolute. Raises RecipeError: one line, key and remedy."""
    path = Path(path)
    try:
        told = tomllib.loads(path.read_text())
    except OSError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    try:
        return made_absolute(Recipe.model_validate(told), path.resolve().parent)
    except ValidationError as error:
        faults = _faults(error)
        raise RecipeError(f"{path}: {'; '.join(faults)}", [f"{path}: {one}" for one in faults]) from None


def made_relative(recipe: Recipe, folder: Path) -> Recipe:
    """Return ``recipe`` with the paths that lie in ``folder`` written from there, so that the folder can move."""
    root = folder.resolve()
    return _with_paths(recipe, lambda path: path.relative_to(root) if path.is_relative_to(root) else path)


def made_absolute(recipe: Recipe, folder: Path) -> Recipe:
    """Return ``recipe`` with every path taken from ``folder``; ``tasks.folder`` becomes the tasks that lie in it."""
    tasks = dict(recipe.tasks)
    if "folder" in tasks and not (folder / tasks["folder"] / "task.toml").exists():
        root = folder / tasks.pop("folder")
        found = {p.parent.name: p.parent for p in sorted(root.glob("*/task.toml"))}
        tasks = {**{name: found[name] for name in recipe.experts if name in found}, **tasks}
    encoder = recipe.model.encoder
    if encoder.startswith("."):
        encoder = str((folder / encoder).resolve())
    model = recipe.model.model_copy(update={"encoder": encoder})
    return _with_paths(
        recipe.model_copy(update={"model": model, "tasks": tasks}),
        lambda path: path if is_no_path(path) else folder / path,
    )


def _with_paths(recipe: Recipe, change: Callable[[Path], Path]) -> Recipe:
    inputs, file = recipe.inputs, recipe.heads.file
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": change(recipe.model.base)}),
            "experts": {name: change(path) for name, path in recipe.experts.items()},
            "tasks": {name: change(path) for name, path in recipe.tasks.items()},
            "domains": {name: change(path) for name, path in recipe.domains.items()},
            "ingredients": {name: change(path) for name, path in recipe.ingredients.items()},
            "heads": recipe.heads.model_copy(update={"file": file and change(file)}),
            "inputs": inputs and inputs.model_copy(update={"files": [change(path) for path in inputs.files]}),
        }
    )


def _faults(error: ValidationError) -> list[str]:
    """Return all that is wrong with a recipe; unknown keys first, since a misspelt one is also missing."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    guessed = {guess for problem in problems if (guess := _meant(problem)) is not None}
    return [_fault(one) for one in problems if one["type"] != "missing" or one["loc"] not in guessed]


def _meant(problem: Any) -> tuple[Any, ...] | None:
    """Return the key that an unknown one seems to be a slip of."""
    if problem["type"] != "extra_forbidden":
        return None
    *parents, last = problem["loc"]
    close = closest(str(last), _known(parents))
    return (*parents, close) if close else None


def _known(parents: Sequence[Any]) -> list[str]:
    part: Any = Recipe
    for parent in parents:
        part = part.model_fields[parent].annotation if hasattr(part, "model_fields") else part
    return list(getattr(part, "model_fields", Recipe.model_fields))


def _fault(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        known = _known(parents)
        return f"unknown key '{where}'{did_you_mean(str(last), known)}; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"lacks '{where}'"
    return f"'{where}': {problem['msg'].lower()}, got {problem['input']!r}"


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML text that `read_recipe` reads back."""
    told = recipe.model_dump(mode="json", exclude_none=True)
    tables = {k: v for k, v in told.items() if isinstance(v, dict)}
    lines = [f"{key} = {_value(value)}" for key, value in told.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{_key(k)} = {_value(v)}" for k, v in table.items() if not (isinstance(v, dict) and not v)]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        inner = [_value(v) for v in value]
        return (
            "[" + ", ".join(inner) + "]" if len(str(inner)) < 100 else "[\n" + "".join(f"  {v},\n" for v in inner) + "]"
        )
    return json.dumps(value, ensure_ascii=False)
