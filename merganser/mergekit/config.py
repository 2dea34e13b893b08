"""What a mergekit YAML may say. Whatever else it says is one clear error before any work; mergekit would ignore it."""

import contextlib
import copy
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Settings = dict[str, Any]
DTYPES = ("float32", "float16", "bfloat16", "float64")
CHATS = Path(__file__).parent / "chat"  # templates of well-known ways to talk, by name
OTHERS = {
    "experts": "mergekit-moe",
    "gate_mode": "mergekit-moe",
    "genome": "mergekit-evolve",
    "tasks": "mergekit-evolve",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ref(_Part):
    """A model: a folder, or a name on the Hub; ``org/name@revision`` names a branch, tag or commit.

    ``model+lora`` is the model with a LoRA adapter merged into it.
    """

    path: str
    revision: str | None = None
    lora: str | None = None

    def __str__(self) -> str:
        return f"{self.place}+{self.lora}" if self.lora else self.place

    @property
    def place(self) -> str:
        """Where the model lies, without its adapter."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


def _ref(told: Any) -> Any:
    """Read mergekit's spellings: ``path``, ``path@revision``, ``path+lora``, and mappings with these parts."""
    if isinstance(told, str):
        if Path(told).exists():
            return {"path": told}
        place, _, lora = told.partition("+")
        path, _, revision = place.partition("@")
    elif isinstance(told, dict) and "model" in told and told.keys() <= {"model", "lora", "override_architecture"}:
        if isinstance(found := _ref(told["model"]), dict) and (adapter := told.get("lora")):
            text = adapter if isinstance(adapter, str) else str(Ref.model_validate(adapter))
            return {**found, "lora": text}
        return found
    elif isinstance(told, dict | Ref):
        return told
    else:
        raise ValueError("a model is a folder or a name on the Hub")
    return {"path": path, "revision": revision or None, "lora": lora or None}


def _dtype(told: Any) -> Any:
    word = str(told).removeprefix("torch.")
    if told is not None and word not in DTYPES:
        raise ValueError(f"unknown dtype{did_you_mean(word, DTYPES)}; known: {', '.join(DTYPES)}")
    return told if told is None else word


Model = Annotated[Ref, BeforeValidator(_ref)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]


class Source(_Part):
    """Layers ``[first, last)`` of one model, as one input of a slice; None: all of the model."""

    model: Model
    layer_range: tuple[int, int] | None
    parameters: Settings | None = None


class Input(_Part):
    """A whole model as an input."""

    model: Model
    parameters: Settings | None = None


class Slice(_Part):
    """Some layers of the output, merged of as many layers of each source."""

    sources: list[Source] = Field(min_length=1)
    base_model: Model | None = None
    residual_weight: None = None
    parameters: Settings | None = None


class Module(_Part):
    """A part of a model with its own inputs."""

    slices: list[Slice] | None = None
    models: list[Input] | None = None
    parameters: Settings | None = None


@dataclass(frozen=True)
class Section:
    """A part of a model: ``where`` the config speaks of it, what it is merged of, and its name among several."""

    where: str
    inputs: Module
    name: str = ""


class Row(_Part):
    """An embedding: of a token of the same name in a model, of any token of a model by name or number, or zeros."""

    kind: Literal["model", "model_token", "zero"]
    model: Model | None = None
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _says_which(self) -> "Row":
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise ValueError("a model_token is {kind, model, token} or {kind, model, token_id}")
        if self.kind == "zero" and any(one is not None for one in (self.model, self.token, self.token_id)):
            raise ValueError("zero is of no model and no token")
        return self


def _row(told: Any) -> Any:
    return told if told is None or (isinstance(told, dict) and "kind" in told) else {"kind": "model", "model": told}


class Token(_Part):
    """The embedding of a token for models that lack it; with ``force`` for all of them."""

    source: Annotated[Row | None, BeforeValidator(_row)] = None
    force: bool = False


class Tokenizer(_Part):
    """Whose tokenizer the output gets, and which embeddings single tokens."""

    source: str = "union"
    tokens: dict[str, Token] | None = None
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None


class Config(_Part):
    """A merge: method, inputs, parameters, and what the output looks like."""

    merge_method: str
    base_model: Model | None = None
    models: list[Input] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    parameters: Settings | None = None
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _once(self) -> "Config":
        if sum(bool(part) for part in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("say what is merged with one of models, slices and modules")
        if self.tokenizer_source and self.tokenizer:
            raise ValueError("tokenizer_source and tokenizer say the same thing: give one of them")
        if self.chat_template and "{" not in self.chat_template:
            known = ["auto", *sorted(file.stem for file in CHATS.glob("*.jinja"))]
            if self.chat_template not in known:
                raise ValueError(
                    f"unknown chat_template '{self.chat_template}'{did_you_mean(self.chat_template, known)}; "
                    f"known: {', '.join(known)}; or give the template itself"
                )
        for name, module in (self.modules or {}).items():
            if bool(module.models) == bool(module.slices):
                raise ValueError(f"modules.{name} needs either models or slices")
        return self

    @property
    def chosen_tokenizer(self) -> str | None:
        """Whose tokenizer: base, union, a model, or None for the base's files as they are."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def sections(self) -> list[Section]:
        """What is merged, however it was written: the modules, or one that is the whole model."""
        if self.modules:
            return [Section(f"modules.{name}.", module, name) for name, module in self.modules.items()]
        return [Section("", Module(slices=self.slices, models=self.models))]


@dataclass(frozen=True)
class Told:
    """One config as it was read: what remains of it without its faults (None: nothing), and the faults."""

    config: Config | None
    text: str
    wrong: tuple[str, ...]
    said: dict[str, Any]

    @property
    def name(self) -> str | None:
        """Its name among several."""
        name = self.said.get("name")
        return None if name is None else str(name)


def read_configs(path: str | Path) -> list[Told]:
    """Return the configs at ``path``, each with all that is wrong with it: the key and the remedy.

    Raises RecipeError for what is no config at all.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: no such config ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file") from None
    said = _loaded(path, text)
    if len(said) == 1:
        return [_read(said[0], text)]
    import yaml

    return [_read(one, yaml.safe_dump(one, sort_keys=False, allow_unicode=True)) for one in said]


def _read(said: dict[str, Any], text: str) -> Told:
    try:
        return Told(Config.model_validate(said), text, (), said)
    except ValidationError as error:
        wrong = tuple(_all(error))
        with contextlib.suppress(ValidationError, LookupError, TypeError):
            left = _without(said, [one["loc"] for one in error.errors()])
            return Told(Config.model_validate(left), text, wrong, said)
    return Told(None, text, wrong, said)


def _loaded(path: Path, text: str) -> list[dict[str, Any]]:
    import yaml

    class Once(yaml.SafeLoader):
        """Refuses a key that is there twice; YAML's last one would win without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            merging = "tag:yaml.org,2002:merge"  # <<: *other, whose keys may come again
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merging]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise RecipeError(f"{path}: '{twice[0]}' is there twice, in line {node.start_mark.line + 1} or below")
            return super().construct_mapping(node, deep)

    try:
        documents = [d for d in yaml.load_all(text, Once) if d is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not documents or not all(isinstance(one, dict) for one in documents):
        raise RecipeError(f"{path}: not a mergekit config: it needs merge_method and models or slices")
    return documents


def _all(error: ValidationError) -> list[str]:
    """Return the faults; an unknown key explains one that is missing beside it."""
    problems = error.errors()
    unknown = {problem["loc"][:-1] for problem in problems if problem["type"] == "extra_forbidden"}
    told = [one for one in problems if one["type"] != "missing" or one["loc"][:-1] not in unknown]
    return list(dict.fromkeys(map(_line, told)))


def _line(problem: "ErrorDetails") -> str:
    where = ".".join(str(part) for part in problem["loc"])
    last = str(problem["loc"][-1]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        if len(problem["loc"]) == 1 and last in OTHERS:
            return f"'{last}' belongs to {OTHERS[last]}, which makes other things than merges; it is not read here"
        known = list(_model_at(problem["loc"][:-1]).model_fields)
        return f"unknown key '{where}'{did_you_mean(last, known)}; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"lacks '{where}'"
    if where.endswith("residual_weight"):
        return f"'{where}': mergekit reads it and does nothing with it; remove it"
    said = re.sub(r"^Value error, ", "", problem["msg"])
    got = f", got {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
    return f"'{where}': {said}{got}" if where else said


def _without(told: dict[str, Any], places: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    """Return a config without what lies at ``places``. Raises LookupError or TypeError if something does not lie there."""
    left = copy.deepcopy(told)
    for place in sorted(places, key=lambda p: [str(part).zfill(9) for part in p], reverse=True):
        part: Any = left
        for key in place[:-1]:
            part = part[key]
        del part[place[-1]]
    return left


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the class of the part of a config at ``place``."""
    part: type[BaseModel] = Config
    for key in place:
        if isinstance(key, str) and key in part.model_fields:
            part = _class_in(part.model_fields[key].annotation) or part
    return part


def _class_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for arg in get_args(kind) if (found := _class_in(arg))), None)
