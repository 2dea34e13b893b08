"""A mergekit YAML as jobs of our loop: made from the YAML, the headers and the configs alone, so it also serves to check."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MerganserError, RecipeError, did_you_mean
from ..weights.adapter import Adapter
from ..weights.header import FLOATS, Head, Weights, folder_of, header, shape_of
from ..weights.match import Matched, match
from ..weights.open import Source as Place
from ..weights.open import named, open_headers
from ..weights.stored import first
from ..weights.vocabulary import BASE, Writer
from .config import Config, Input, Ref, Section, Slice, Source, Told
from .layers import Laid, stacked, stacks, unfit, whole
from .methods import METHODS, Method, refused
from .modules import nothing, shared_out, two_rests
from .settings import check, filters, resolve
from .views import Origin, Tuned, Zeros, promoted, taken
from .vocabulary import one_vocabulary

if TYPE_CHECKING:
    from ..job import Job
    from ..sentence import Sentence

BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias")  # computed anew by every model; older files have them
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass
class Plan:
    """All that a merge will do: jobs, every tensor of the output, and what there is to say about it."""

    path: Path
    config: Config
    text: str
    method: Method
    models: dict[str, Weights]  # by short name
    short: dict[Ref, str]  # by the names in the YAML; the first is that whose config and tokenizer the output gets
    laid: list[Laid]
    jobs: "list[Job]"
    origin: Origin
    dtype: str | None
    sentences: dict[str, int]  # how many tensors are merged by each sentence
    notes: list[str] = field(default_factory=list)
    write_tokenizer: Writer | None = None

    @property
    def names(self) -> list[str]:
        """The tensors that are merged, not copied."""
        return [name for job in self.jobs for name in job.names]

    @property
    def inputs(self) -> list[Any]:
        """All that is read: models, and adapters merged into them."""
        adapters = [weights.adapter for weights in self.models.values() if isinstance(weights, Tuned)]
        return [*self.models.values(), *map(folder_of, self.models.values()), *adapters]

    @property
    def spec(self) -> dict[str, Head]:
        """Dtype name and shape of every tensor of the output."""
        heads = {name: self.origin.header(name) for name in self.origin}
        target = DTYPES.get(self.dtype or "")
        return {n: (target if target and kind in FLOATS else kind, shape) for n, (kind, shape) in heads.items()}

    @property
    def sentence(self) -> str:
        """The sentence by which most tensors are merged."""
        return max(self.sentences, key=lambda s: self.sentences[s]) if self.sentences else "copy"


@dataclass(frozen=True)
class Sentences:
    """Sentences as a config tells them, tensor by tensor: the `where` of a job."""

    sentences: "Mapping[str, Sentence]"

    def resolve(self, sentence: "Sentence", name: str) -> "Sentence":
        """Return the sentence for tensor ``name``."""
        return self.sentences[name]


def plan_one(
    path: Path, told: Told, seed: int, opened: Callable[[Place], Weights], made: Mapping[str, Weights] | None = None,
    who: str = "",
) -> Plan:  # fmt: skip
    """Return what one config of the mergekit YAML at ``path`` asks for; no tensor is read.

    ``opened`` opens a model; ``made`` are those that other configs of the file make, by name, ``who`` says which it is.
    Raises one error for all that is wrong: RecipeError (the YAML) or WeightsError (the models).
    """
    config = told.config
    wrong: list[MerganserError] = [RecipeError(line) for line in told.wrong]
    planned = None
    if config is not None:
        method = METHODS.get(config.merge_method)
        if method is None:
            guess = did_you_mean(config.merge_method, METHODS)
            wrong.append(
                RecipeError(f"unknown merge_method '{config.merge_method}'{guess}; known: {', '.join(METHODS)}")
            )
        else:
            wrong += [RecipeError(line) for line in _faults(config, method)]
        with _gathered(wrong):
            planned = _planned(path, config, told.text, method, seed, opened, made or {}, wrong)
    if wrong or planned is None:
        of = f"{who}: " if who else ""
        parts = list(dict.fromkeys(of + part for error in wrong for part in error.parts or (str(error),)))
        raise type(wrong[0])(f"{path}: {'; '.join(parts)}", parts)
    return planned


@contextmanager
def _gathered(wrong: list[MerganserError]) -> Iterator[None]:
    """Take down what the block raises, and go on behind it."""
    try:
        yield
    except MerganserError as error:
        wrong.append(error)


def _planned(
    path: Path, config: Config, text: str, method: Method | None, seed: int, opened: Callable[[Place], Weights],
    made: Mapping[str, Weights], wrong: list[MerganserError],
) -> Plan | None:  # fmt: skip
    """Return the plan; None where something prevents it, which is in ``wrong`` then."""
    sections = [(section, _slices(config, section)) for section in config.sections]
    refs = list(dict.fromkeys(ref for ref in (config.base_model, *_refs(sections)) if ref is not None))
    said, speaker = config.chosen_tokenizer, None
    if said not in (None, "base", "union") and all(said != str(ref) for ref in refs):
        speaker = Input.model_validate({"model": said}).model  # of which only the tokenizer is used
        refs.append(speaker)
    for section, slices in sections:
        for k, one in enumerate(slices):
            with _gathered(wrong):
                where = section.where + (f"slices[{k}]" if section.inputs.slices else "models")
                _contract(where, method, one, _base(config, one))
    models, places = _opened(refs, path.parent, opened, made, wrong)
    whose = _shared_out(sections, models, wrong)
    for section, slices in sections:
        if section.inputs.slices:
            wrong += unfit(slices, whose[section.name], section.where)
    if wrong or method is None:
        return None
    short = dict(zip(refs, named(list(places.values())), strict=True))
    if method.base != "none" and short[refs[0]] == f"{BASE}-model":  # the one whose name it is
        short[refs[0]] = BASE
    notes = list(_notes(config, method, models))
    with _gathered(wrong):
        models, writer = one_vocabulary(config, models, short, notes, speaker)
    if wrong:
        return None
    plan = Plan(
        path, config, text, method, {short[ref]: weights for ref, weights in models.items()}, short, [], [],
        Origin(folder_of(models[refs[0]])), config.out_dtype or config.dtype, {}, notes, writer,
    )  # fmt: skip
    for section, slices in sections:
        names = whose[section.name]
        origins = [_base(config, one) or one.sources[0].model for one in slices]
        plan.laid += (laid := _laid(section, slices, names, origins, notes))
        for part, origin in zip(laid, origins, strict=True):
            with _gathered(wrong):
                _add(plan, part, origin, {r: (models[r], short[r]) for r in refs}, seed, opened is open_headers, names)
    _copy_the_rest(plan, models[refs[0]], whose[None][refs[0]], short[refs[0]])
    _note_filters(plan)
    return plan


def _shared_out(
    sections: Sequence[tuple[Section, list[Slice]]], models: Mapping[Ref, Weights], wrong: list[MerganserError]
) -> dict[str | None, dict[Ref, list[str]]]:
    """Return for each module, and for none of them, the tensors of every model; take down what has none."""
    modules = [section.name for section, _ in sections]
    shared = {ref: shared_out(modules, weights) for ref, weights in models.items()}
    whose = {module: {ref: its[module] for ref, its in shared.items()} for module in (*modules, None)}
    wrong += two_rests(modules)
    if len(modules) > 1:
        for one in sections:
            module = one[0].name
            empty = [ref for ref in dict.fromkeys(_refs([one])) if ref in models and not whose[module][ref]]
            wrong += [nothing(module, ref, models[ref]) for ref in empty]
    return whose


def _laid(
    section: Section, slices: list[Slice], names: Mapping[Ref, list[str]], origins: Sequence[Ref], notes: list[str]
) -> list[Laid]:
    """Lay out what is merged of the tensors ``names`` of each model; ``origins`` give those that must be there."""
    if not section.inputs.slices:
        return [replace(whole(slices[0], names[origins[0]]), section=section)]
    for extra in list(stacks(names[origins[0]]))[1:]:
        notes.append(f"'{extra}*' is a second stack of layers: it is taken whole, from the last slice")
    return [replace(one, section=section) for one in stacked(slices, names, origins)]


def _copy_the_rest(made: Plan, weights: Weights, names: Sequence[str], who: str) -> None:
    """Copy what belongs to no module, where mergekit leaves it out and the result cannot be loaded."""
    for name in names:
        made.origin.add(name, weights, header(weights, name)[0], who)
    if names:
        made.notes.append(f"{first(names)}: of no module, so '{who}' gives {'it' if len(names) == 1 else 'them'}")


def _slices(config: Config, section: Section) -> list[Slice]:
    """Return what is merged as slices; whole models are one slice, which the base joins if it was not listed."""
    inputs = section.inputs
    if inputs.slices:
        return inputs.slices
    sources = [Source(model=m.model, layer_range=None, parameters=m.parameters) for m in inputs.models or ()]
    if config.base_model and all(s.model != config.base_model for s in sources):
        sources.append(Source(model=config.base_model, layer_range=None))
    return [Slice(sources=sources)]


def _refs(sections: Sequence[tuple[Section, list[Slice]]]) -> Iterator[Ref]:
    for one in (one for _, slices in sections for one in slices):
        if one.base_model:
            yield one.base_model
        for source in one.sources:
            yield source.model


def _base(config: Config, one: Slice) -> Ref | None:
    """Return the slice's base where the model is among its sources."""
    base = one.base_model or config.base_model
    return base if any(source.model == base for source in one.sources) else None


def _contract(where: str, method: Method | None, one: Slice, base: Ref | None) -> None:
    """Raise RecipeError if the inputs are not those that the method takes."""
    refs = [source.model for source in one.sources]
    if twice := [ref for ref in refs if refs.count(ref) > 1]:
        raise RecipeError(f"{where}: '{twice[0]}' is there twice")
    if method is None:
        return
    if method.base == "required" and base is None:
        raise RecipeError(f"{where}: '{method.name}' needs base_model, and the base among the sources of every slice")
    count = len(refs) - (base is not None and method.base != "none")
    if not method.least <= count <= method.most:
        want = f"{method.least}" if method.least == method.most else f"at least {method.least}"
        beside = "" if method.base == "none" else " beside the base"
        raise RecipeError(f"{where}: '{method.name}' takes {want} model{'s' * (want != '1')}{beside}, got {count}")


def _place(path: str, revision: str | None, folder: Path) -> str:
    """Return where a model lies: a path from here or from the YAML's folder, else a name on the Hub."""
    told = f"{path}@{revision}" if revision else path
    for place in (Path(path), folder / path):
        if place.exists():
            if revision:
                raise RecipeError(f"'{told}' is a folder on this machine, which has no revisions")
            return str(place)
    return told


def _tuned(ref: Ref, model: Weights, adapter: Weights) -> Weights:
    """Return a model with its LoRA adapter merged into it."""
    if not isinstance(adapter, Adapter) or isinstance(model, Adapter):
        wrong = f"{ref.place} is an adapter" if isinstance(model, Adapter) else f"{ref.lora} is no LoRA adapter"
        raise RecipeError(f"'{ref}': {wrong}; write model+adapter")
    return Tuned(model, adapter)


def _opened(
    refs: Sequence[Ref],
    folder: Path,
    opened: Callable[[Place], Weights],
    made: Mapping[str, Weights],
    wrong: list[MerganserError],
) -> tuple[dict[Ref, Weights], dict[Ref, str]]:
    """Open all models; return those that can be opened, and where they lie."""
    models, places = {}, {}
    for ref in refs:
        with _gathered(wrong):
            places[ref] = ref.path if ref.path in made else _place(ref.path, ref.revision, folder)
            model = made[ref.path] if ref.path in made else opened(places[ref])
            if ref.lora:
                path, _, revision = ref.lora.partition("@")
                at = _place(path, revision or None, folder)
                model = _tuned(ref, model, opened(at))
                places[ref] += f"+{Path(at).name}"
            models[ref] = model
    return models, places


def _faults(config: Config, method: Method) -> Iterator[str]:
    """Yield everything that is wrong with the parameters."""
    for where, settings in _all_settings(config):
        yield from check(where, settings, method.parameters, method.name)


def _all_settings(config: Config) -> Iterator[tuple[str, Any]]:
    yield "parameters", config.parameters
    for section in config.sections:
        at, inputs = section.where, section.inputs
        if at:
            yield f"{at}parameters", inputs.parameters
        for i, model in enumerate(inputs.models or ()):
            yield f"{at}models[{i}].parameters", model.parameters
        for k, one in enumerate(inputs.slices or ()):
            yield f"{at}slices[{k}].parameters", one.parameters
            for i, source in enumerate(one.sources):
                yield f"{at}slices[{k}].sources[{i}].parameters", source.parameters


def _notes(config: Config, method: Method, models: Mapping[Ref, Weights]) -> Iterator[str]:
    """Yield what a reader should know who knows the papers, or mergekit."""
    yield f"{method.name} by mergekit's rules" + (f": {method.differs}" if method.differs else "")
    said = {name for _, settings in _all_settings(config) for name in settings or ()}
    for name, parameter in method.parameters.items():
        if name in said and not parameter.used:
            yield f"{name} changes nothing here"
    for name in {"density", "rescale"} & said if method.name == "task_arithmetic" else ():
        yield f"task_arithmetic has no use for {name}"
    if config.chat_template in ("alpaca", "exaone", "llama3"):
        yield f"chat_template {config.chat_template} has the line breaks its models were trained with, mergekit's others"
    if config.dtype in ("float16", "bfloat16"):
        yield f"numbers are computed in float32 and rounded to {config.out_dtype or config.dtype} once, at the end"


def _note_filters(made: Plan) -> None:
    for where, settings in _all_settings(made.config):
        for name, setting in (settings or {}).items():
            for one in filters(setting):
                if not any(one in tensor for tensor in made.origin):
                    glob = "; a filter is a part of a name, without wildcards" if "*" in one else ""
                    made.notes.append(f"{where}.{name}: no tensor's name has '{one}' in it{glob}")


def _add(
    made: Plan, laid: Laid, origin: Ref, models: Mapping[Ref, tuple[Weights, str]], seed: int, unread: bool,
    names: Mapping[Ref, list[str]],
) -> None:  # fmt: skip
    """Add the job of one slice to the plan, and its tensors to the output."""
    from ..job import Job

    refs = [source.model for source in laid.slice.sources]
    sources = [(models[ref][0], {new: old[i] for new, old in laid.names.items()}) for i, ref in enumerate(refs)]
    dropped = {n for weights, names in sources for n in names if n.endswith(BUFFERS) and names[n] not in weights}
    views = {
        ref: taken(weights, {n: old for n, old in names.items() if n not in dropped})
        for ref, (weights, names) in zip(refs, sources, strict=True)
    }
    if laid.layers is None:
        _note_beyond(made, laid, {models[ref][1]: names[ref] for ref in refs})
    matched = match(views[origin], {models[ref][1]: views[ref] for ref in refs if ref != origin}, unread=unread)
    made.notes += [f"'{who}' {text}" for who, text in matched.taken]
    based = _base(made.config, laid.slice) if made.method.base != "none" else None
    experts = {models[ref][1]: matched.base if ref == origin else matched.experts[models[ref][1]] for ref in refs}
    if based is not None:
        del experts[models[based][1]]
    for name in matched.names:
        kinds = [header(w, name)[0] for w in (matched.base, *matched.experts.values()) if name in w]
        made.origin.add(name, matched.base, promoted(kinds), models[origin][1])
    floats = [n for n in matched.names if header(matched.base, n)[0] in FLOATS]
    sizes = {name: prod(shape_of(matched.base, name)) for name in floats}
    texts = _texts(made, laid, based, {ref: models[ref][1] for ref in refs}, sizes)
    if not experts or (made.method.one and len(experts) == 1):
        for who, alone in experts.items():  # one model alone is the result, even beside a base
            for name in floats:
                made.origin.add(name, alone, made.origin.header(name)[0], who)
        texts = {}
    if not texts:
        return
    made.sentences = dict(Counter(made.sentences) + Counter(texts.values()))
    told = {text: _parsed(text) for text in set(texts.values())}
    usual = told[Counter(texts.values()).most_common(1)[0][0]]
    base = matched.base if based is not None else Zeros(matched.base)
    where: Any = Sentences({name: told[text] for name, text in texts.items()})
    made.jobs.append(Job(base, experts, usual, list(texts), seed, {}, where, _alike(matched, texts)))


def _alike(matched: Matched, texts: Mapping[str, str]) -> dict[str, str]:
    return {name: other for name, other in matched.alike.items() if name in texts and other in texts}


def _note_beyond(made: Plan, laid: Laid, names: Mapping[str, list[str]]) -> None:
    for who, its in names.items():
        if beyond := [n for n in its if n not in laid.names and not n.endswith(BUFFERS)]:
            made.notes.append(f"'{who}' has {first(beyond)}, which the others lack: left out")


@cache
def _parsed(text: str) -> "Sentence":
    from ..sentence import parse

    return parse(text)


def _texts(
    made: Plan, laid: Laid, base: Ref | None, short: Mapping[Ref, str], sizes: Mapping[str, int]
) -> dict[str, str]:
    """Return the sentence of every tensor that is merged, of those in ``sizes``, their numbers of entries.

    Raises RecipeError for values that cannot be used: all those of the first tensor that has such.
    """
    config, method, texts = made.config, made.method, {}
    common = (laid.slice.parameters, laid.section.inputs.parameters if laid.section else None, config.parameters)
    own = {source.model: (source.parameters, *common) for source in laid.slice.sources}
    places = {ref: i for i, ref in enumerate(own)}
    for name, numel in sizes.items():
        t = laid.t.get(name, 0.0)
        values: dict[str, Any] = {"numel": numel}
        wrong: list[MerganserError] = []
        for key, parameter in method.parameters.items():
            if parameter.each == "all":
                with _gathered(wrong):
                    values[key] = resolve(parameter, common, name, t)
                continue
            values[key] = {}
            for ref, said in own.items():
                if ref != base or parameter.each == "model":
                    with _gathered(wrong):
                        of_model = laid.names[name][places[ref]]
                        values[key][short[ref]] = resolve(parameter, said, of_model, t, short[ref])
        if wrong:
            raise RecipeError("; ".join(map(str, wrong)), map(str, wrong))
        if why := refused(method, values):
            raise RecipeError(f"tensor '{name}': {why}")
        if method.name == "passthrough" and set(values["scale"].values()) == {None}:
            continue
        texts[name] = method.words(values, [short[ref] for ref in own if ref != base])
    return texts
