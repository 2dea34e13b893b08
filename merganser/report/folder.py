"""What a run folder says, read and checked: scores.json, and whatever else is there.

Scores are fractions, interference is in nats. Unknown keys are ignored, so an older page reads a newer folder of
the same version.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import DataError

NAN = float("nan")
VERSION = 1

# A score that could not be computed is null in JSON (or NaN, where the writer used Python's own JSON).
Number = Annotated[float, BeforeValidator(lambda value: NAN if value is None else value)]
Matrix = list[list[Number]]
T = TypeVar("T", bound="Said")


class Said(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class Score(Said):
    score: Number
    low: Number = NAN
    high: Number = NAN
    normalised: Number = NAN


class Task(Said):
    name: str
    title: str | None = None
    of: str | None = None
    classes: int | None = None
    test: int | None = None
    metric: str = "accuracy"


class Model(Said):
    """The base, or the experts (each on its own task)."""

    tasks: dict[str, Score]
    mean: Score


class Worst(Said):
    task: str
    score: Number


Hits = dict[str, dict[str, Number]]  # k, then "macro" and "micro"


class Ranked(Said):
    """How often the right class is among the first k of all tasks' classes; ``published``: as KnOTS counts them."""

    hits: Hits | None = None
    hits_published: Hits | None = None


class Joint(Said):
    """The union of all tasks' classes: its size, and what base and experts side by side reach in it."""

    classes: int = 0
    classes_published: int = 0
    base: Ranked = Ranked()
    ensemble_own: Ranked = Ranked()
    ensemble_all: Ranked = Ranked()


class Row(Model, Ranked):
    """One merged model: a sentence with the scale chosen on validation (``tuned``) or as written."""

    sentence: str
    adapt: str | None = None
    merge: str
    scale: float | None = None
    tuned: bool = False
    val: Number = NAN
    normalised: Score | None = None
    worst: Worst | None = None
    ece: Number = NAN
    consumed: list[str] = []
    xi: Number = NAN
    seconds: Number = NAN


class Gain(Said):
    """What adapting brought: row ``with`` minus row ``without``, paired."""

    merge: str
    tuned: bool = False
    without: int = Field(ge=0)
    with_: int = Field(alias="with", ge=0)
    gain: Score
    recovered: Number = NAN


class Point(Said):
    scale: float
    val: Number = NAN
    test: Number = NAN


class Curve(Said):
    merge: str
    adapt: str | None = None
    points: list[Point]


class Scores(Said):
    version: int = VERSION
    title: str = "merganser"
    chosen: str = "on validation data"  # how scales were
    date: str = ""
    seed: int | None = None
    command: str = ""
    tasks: list[Task] = Field(min_length=1)
    base: Model
    experts: Model
    rows: list[Row]
    gains: list[Gain] = []
    curves: list[Curve] = []
    adapted: dict[str, str] = {}
    overall: dict[str, Score | None] = {}
    joint: Joint | None = None
    domains: "Scores | None" = None

    @model_validator(mode="after")
    def _gains_point_at_rows(self) -> "Scores":
        for index, gain in enumerate(self.gains):
            if max(gain.without, gain.with_) >= len(self.rows):
                raise ValueError(f"gains.{index} points at a row that does not exist")
        return self


class Drift(Said):
    label: str
    matrix: Matrix


class Xi(Said):
    sentence: str
    adapt: str | None = None
    merge: str
    matrix: Matrix | None = None
    per_task: list[Number]
    sum: Number


class Diagnosis(Said):
    version: int
    tasks: list[str]
    distance: str = "kl"
    drift: list[Drift] = []
    xi: list[Xi] = []

    @model_validator(mode="after")
    def _square(self) -> "Diagnosis":
        n = len(self.tasks)
        matrices = {f"drift.{index}": item.matrix for index, item in enumerate(self.drift)}
        matrices |= {f"xi.{index}": item.matrix for index, item in enumerate(self.xi) if item.matrix is not None}
        for where, matrix in matrices.items():
            if len(matrix) != n or any(len(line) != n for line in matrix):
                raise ValueError(f"{where}.matrix is not {n} x {n}")
        for index, item in enumerate(self.xi):
            if len(item.per_task) != n:
                raise ValueError(f"xi.{index}.per_task does not hold {n} values")
        return self


class Stage(Said):
    name: str
    seconds: Number = NAN
    done: str = ""
    reused: bool = False


class Ran(Said):
    stages: list[Stage] = []
    seconds: Number = NAN
    versions: dict[str, str] = {}
    inputs: dict[str, str] = {}


class Line(Said):
    """One logged step of adapting an expert."""

    step: int
    own: Number = NAN
    others: Number = NAN
    held_own: Number = NAN
    held_others: Number = NAN


class Run(Said):
    """Everything one folder says."""

    name: str
    scores: Scores
    diagnosis: Diagnosis | None = None
    logs: dict[str, dict[str, list[Line]]] = {}
    recipe: str | None = None
    ran: Ran | None = None


def read_run(folder: Path) -> Run:
    """Read a run folder; only ``scores.json`` must be there.

    Raises ``DataError`` in one line that names the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; report reads a folder that 'merganser run' wrote")
    if not (folder / "scores.json").is_file():
        raise DataError(f"{folder}: holds no scores.json; report reads a folder that 'merganser run' wrote")
    recipe = folder / "recipe.toml"
    scores = _read(folder / "scores.json", Scores)
    return Run(
        name=folder.resolve().name,
        scores=scores,
        diagnosis=_read(folder / "diagnosis.json", Diagnosis) if (folder / "diagnosis.json").is_file() else None,
        logs=_read_logs(folder, scores.adapted),
        recipe=_text(recipe).rstrip() if recipe.is_file() else None,
        ran=_read(folder / "run.json", Ran) if (folder / "run.json").is_file() else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read(path: Path, kind: type[T]) -> T:
    try:
        value: Any = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    version = value.get("version", VERSION) if isinstance(value, dict) else VERSION
    if version != VERSION:
        raise DataError(f"{path}: has version {version!r}, this merganser reads version {VERSION}")
    return _checked(path, kind, value)


def _checked(path: Path, kind: type[T], value: Any) -> T:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def _read_logs(folder: Path, adapted: dict[str, str]) -> dict[str, dict[str, list[Line]]]:
    """Return the logs by adapt words and expert: of the folders this run names, or of all where it names none."""
    places = adapted or {path.name: f"adapted/{path.name}" for path in sorted((folder / "adapted").glob("*"))}
    logs: dict[str, dict[str, list[Line]]] = {}
    for how, place in places.items():
        for path in sorted((folder / place).glob("*/log.jsonl")):
            if lines := _read_log(path):
                logs.setdefault(how, {})[path.parent.name] = lines
    return logs


def _read_log(path: Path) -> list[Line]:
    lines = []
    texts = _text(path).splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            value = json.loads(text)
        except ValueError:
            if number == len(texts):  # a run that was stopped while writing leaves half a line
                break
            raise DataError(f"{path}: line {number} is not JSON") from None
        lines.append(_checked(path, Line, value))
    return lines
