"""What a merge insists on before it starts: models that open and match, a sentence that runs, and what its steps need.

Everything that is wrong is gathered, not only the first of it. `merge` raises it together; `check` reports it, and adds
what can be foreseen beyond that.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .as_adapter import Plan
from .errors import MerganserError, SentenceError, WeightsError, did_you_mean
from .findings import Findings
from .job import Ingredient, Job
from .loop import is_float, merge_each
from .sentence import Sentence, Step, find, parse, step_of, words_of
from .survey import survey
from .weights.adapter import Adapter, Bare
from .weights.delta import is_delta
from .weights.header import Headers, folder_of, matches, quantised, shape_of
from .weights.hub import name_of as hub_name
from .weights.match import Matched, match
from .weights.open import Source, Weights, named, open_headers, open_weights
from .weights.parts import check_part
from .weights.quantised import Dequantised, say
from .weights.save import refuse_overwriting
from .weights.sink import shard_bytes
from .weights.tokenizer import read_config, sound_config
from .where import Patterns, Where, fitting

How = str | Sentence | Iterable[Callable[..., Any] | str]
Ingredients = Mapping[str, Source | Mapping[str, Source]]
KIND = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
OUTPUTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Ready(NamedTuple):
    """What a merge works on, once nothing is wrong."""

    job: Job
    matched: Matched
    target: torch.dtype | None  # of the output; None: the base's own
    adapter: Plan | None = None  # where the result is one adapter


class Examined(NamedTuple):
    """What is wrong, what could be opened, and the job if nothing is wrong."""

    found: Findings
    sources: dict[str, Weights]  # by expert's name; "" is the base
    sentence: Sentence | None
    ready: Ready | None


def examine(
    base: Source | None,
    experts: Mapping[str, Source] | Sequence[Source],
    how: How,
    *,
    into: str | Path | None = None,
    own: Sequence[str] = (),
    seed: int = 0,
    ingredients: Ingredients | None = None,
    part: tuple[int, int] | None = None,
    where: Patterns | None = None,
    vocabulary: str | None = None,
    dtype: str | None = None,
    stored: str = "model",
    rank: int | str | None = None,
    shard_size: int | str | None = None,
    opener: Callable[[Source], Weights] = open_weights,
) -> Examined:
    """Open and check what `merge` is given (the same arguments)."""
    found = Findings()
    sources: dict[str, Weights] = {}
    with found.gather("arguments"):
        _check_kinds(experts, how, seed, into)
        _check_more(own, where, ingredients, vocabulary, part)
    if not found.ok:
        return Examined(found, sources, None, None)
    own = [own] if isinstance(own, str) else own
    wanted = named(experts if isinstance(experts, Mapping | Sequence) else list(experts))
    for who, source in {**({} if base is None else {"": base}), **wanted}.items():
        with found.gather(f"expert '{who}'" if who else "base"):
            sources[who] = opener(source)
    if base is None:
        with found.gather("base"):
            sources = {"": _no_base(sources, stored), **sources}
    elif "" in sources and is_delta(sources[""]):
        found.error(f"{base} is a stored delta, not a model", "base", "give the base that the delta is added to")
    if not wanted:
        found.error("there are no experts to merge", "experts", "give at least one", SentenceError)
    sentence = _sentence(found, how, tuple(wanted))
    with found.gather("output"):
        target = check_output(dtype, stored, rank)
    with found.gather("output"):
        check_shards(shard_size, into, stored)
    if base is not None and "" in sources:
        origin = sources.pop("")
        with found.gather("base"):
            sources = {"": _plain(found, origin, list(sources.values()), stored, dtype), **sources}
    for who, source in sources.items():
        with found.gather(f"expert '{who}'" if who else "base"):
            read_config(folder_of(source))
    if part is not None:
        with found.gather("--part"):
            check_part(part)
            if into is None:
                raise SentenceError("a part of the model is written to a folder: give --to (into=FOLDER) too")
            if stored == "adapter":
                raise SentenceError("an adapter is written in one part; leave --part (part=(k, n)) out")
    _adapters(found, base, sources)
    _own(found, own, sources)
    _twice(found, sources)
    for source in sources.values() if into is not None else ():
        with found.gather("output"):
            refuse_overwriting(into or "", source)
    if into is not None and part is None and (parts := sorted(Path(into).glob("part-*-of-*"))):
        found.warn(
            f"{into} holds parts of another merge ({parts[0].name})", "output",
            "they stay beside the result; join them first, or delete them",
        )  # fmt: skip
    matched = None
    if "" in sources and len(sources) > 1:
        with found.gather("models"):
            others = {w: s for w, s in sources.items() if w}
            matched = match(sources[""], others, own, vocabulary=vocabulary, unread=opener is open_headers)
    for who, text in matched.taken if matched else ():
        found.warn(text, f"expert '{who}'", "merging compares the two, and stops where they differ")
    if matched is not None and stored == "delta":
        _can_be_added(found, matched, sources[""])
    known = matched.base if matched else sources.get("", {})
    merged = matched.names if matched else [name for name in known if not matches(name, own)]
    names = [name for name in merged if is_float(known, name)]
    varied = Where(where, known)
    if sentence is None:
        for pattern in varied.patterns if names else ():
            with found.gather("where"):
                fitting(pattern, names)
        return Examined(found, sources, None, None)
    extra: dict[str, Ingredient] = {}
    with found.gather("ingredients"):
        extra = open_ingredients(ingredients, sentence, tuple(wanted))
        _same_names(extra, names, known, sentence)
    if names:
        _try_where(found, sentence, varied, names, tuple(wanted))
    if found.ok and matched is not None and not names:
        found.warn(
            "no tensor is merged: all are left out by --own, or are no floating point" if known else "the base has no tensor",
            "models", "the result is the base itself; look at --own (own=)",
        )  # fmt: skip
    if found.ok and not varied.patterns and wanted and gives_nothing(sentence, tuple(wanted)):
        found.warn(
            f"'{sentence}' takes nothing from {len(wanted)} expert{'s' * (len(wanted) > 1)}", "sentence",
            "the result is the base itself; look at the knobs (merganser show STEP)",
        )  # fmt: skip
    if not found.ok or matched is None:
        return Examined(found, sources, sentence, None)
    job = Job(matched.base, matched.experts, sentence, names, seed, extra, varied, matched.alike)
    if stored == "adapter":
        with found.gather("--as-adapter"):
            return Examined(found, sources, sentence, Ready(job, matched, target, Plan(job, rank)))
        return Examined(found, sources, sentence, None)
    return Examined(found, sources, sentence, Ready(job, matched, target))


def _check_kinds(experts: Any, how: Any, seed: Any, into: Any) -> None:
    """Raise SentenceError for arguments of another kind than `merge` takes."""
    if isinstance(experts, str | Path):
        raise SentenceError(f"experts is one path ({experts}); give a list of them, or a mapping from name to model")
    if not isinstance(how, str | Sentence | Iterable):
        raise SentenceError(f"the sentence is text, such as 'ties | scale(by=0.8)', got {how!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SentenceError(f"seed must be a whole number, got {seed!r}")
    if into is not None and not isinstance(into, str | Path):
        raise SentenceError(f"into is the folder for the result, got {into!r}")
    if into is not None and not str(into):
        raise SentenceError("no folder is given for the result; name one")


def _check_more(own: Any, where: Any, ingredients: Any, vocabulary: Any, part: Any) -> None:
    """The same for arguments that may be left out."""
    if not isinstance(own, str) and not (isinstance(own, Iterable) and all(isinstance(one, str) for one in own)):
        raise SentenceError(f"own is a list of patterns such as ['head.*'], got {own!r}")
    steps = where.values() if isinstance(where, Mapping) else () if where is None else [None]
    knobs = [one for some in steps for one in (some.values() if isinstance(some, Mapping) else [None])]
    if not all(isinstance(one, Mapping) for one in knobs):
        raise SentenceError(
            f"where gives patterns their steps' knobs: {{'*.mlp.*': {{'ties': {{'density': 0.4}}}}}}, got {where!r}"
        )
    if ingredients is not None and not isinstance(ingredients, Mapping):
        raise SentenceError(f"ingredients maps names to folders or tensors, got {ingredients!r}")
    if vocabulary is not None and not isinstance(vocabulary, str):
        raise SentenceError(f"vocabulary is 'union', 'base' or an expert's name, got {vocabulary!r}")
    if part is not None and not (isinstance(part, Sequence) and not isinstance(part, str)):
        raise SentenceError(f"part is (k, n), such as (2, 8), got {part!r}")


def _can_be_added(found: Findings, matched: Matched, base: Weights) -> None:
    """Take down a tensor that would have other rows than the base's: nobody could add a delta of it."""
    grown = [n for n in matched.base if n in base and shape_of(matched.base, n) != shape_of(base, n)]
    if grown:
        found.error(
            f"with this vocabulary '{grown[0]}' has other rows than the base's, so a delta could not be added to it",
            "--delta", "store the model (in float32, if bf16 would round), or give the vocabulary of the base",
        )  # fmt: skip


def _twice(found: Findings, sources: Mapping[str, Weights]) -> None:
    """Warn of a model that is there twice, by its files or as the very same object."""
    seen: dict[Any, str] = {}
    for who, weights in sources.items():
        shards = getattr(weights, "shards", None)
        what = tuple(path.resolve() for path in shards) if shards else id(weights)
        if what in seen:
            other = f"expert '{seen[what]}'" if seen[what] else "the base"
            found.warn(
                f"is the same model as {other}",
                f"expert '{who}'",
                "give each model once, with a weight if it counts more",
            )
        seen.setdefault(what, who)


def _own(found: Findings, own: Sequence[str], sources: Mapping[str, Weights]) -> None:
    """Take down the patterns of tensors to be left alone that no model has."""
    names = sorted({name for weights in sources.values() for name in weights})
    for pattern in own if names else ():
        if not any(matches(name, [pattern]) for name in names):
            found.error(
                f"'{pattern}': no tensor has such a name{did_you_mean(pattern, names)}", "own", kind=SentenceError
            )


def _same_names(extra: Mapping[str, Ingredient], names: Sequence[str], base: Weights, sentence: Sentence) -> None:
    """Raise SentenceError where extra tensors are none of the merged ones', or have shapes that cannot be."""
    entrywise = {word for step in sentence.steps for word in step.entrywise}
    inward = {word for step in sentence.steps for word in step.inward}
    for word, ingredient in extra.items():
        sets = [ingredient.shared] if ingredient.shared is not None else list(ingredient.each.values())
        known = [name for name in names if all(name in one for one in sets)]
        if names and not known:
            raise SentenceError(f"ingredient '{word}' has none of the merged tensors' names; it is of other models")
        for name in known:
            shapes = {tuple(shape_of(one, name)) for one in sets}
            if len(shapes) > 1:
                told = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
                raise SentenceError(
                    f"ingredient '{word}': '{name}' is {told} for different experts; learn it for all anew"
                )
            if word in entrywise and shapes != {tuple(shape_of(base, name))}:
                raise SentenceError(
                    f"ingredient '{word}': '{name}' is {[*shapes.pop()]}, the tensor is {[*shape_of(base, name)]}; it "
                    f"needs an entry for each of the tensor's, so it is of another model"
                )
            wide, entering = shapes.pop(), tuple(shape_of(base, name))[1:]
            if word in inward and len(entering) in (1, 3) and wide[-1:] != (math.prod(entering),):
                raise SentenceError(
                    f"ingredient '{word}': '{name}' is {[*wide]}, what enters the layer is {math.prod(entering)} wide; it is "
                    f"of another model"
                )


def _no_base(sources: Mapping[str, Weights], stored: str) -> Weights:
    """Return what stands for a base where there is none: adapters can be merged into an adapter without it."""
    if stored != "adapter":
        raise WeightsError("without a base only an adapter can be written; give the base, or --as-adapter")
    if other := [who for who, weights in sources.items() if not isinstance(weights, Adapter)]:
        raise WeightsError(f"expert '{other[0]}' is no adapter, so it has to be compared with a base; give the base")
    return Bare(weights for weights in sources.values() if isinstance(weights, Adapter))


def _plain(found: Findings, base: Weights, experts: Sequence[Weights], stored: str, dtype: str | None) -> Weights:
    """Return the base; where it is quantised and all experts are what is added to it, as a plain one.

    Merged into an adapter, those that change nothing but by LoRA need no base at all.
    """
    adapters = [one for one in experts if isinstance(one, Adapter)]
    added = all(isinstance(one, Adapter) or is_delta(one) for one in experts)
    if not experts or not added or isinstance(base, Adapter) or not (whole := quantised(base)):
        return base
    if stored == "adapter" and adapters and all(one.is_bare for one in adapters):
        found.warn(
            f"'{whole}' is quantised, so the base is not read", "base",
            "adapters are merged into one without it; that they fit it is not checked",
        )  # fmt: skip
        return Bare(adapters)
    plain = Dequantised(base, None if dtype is None or stored != "model" else KIND[dtype], _shapes(base, adapters))
    found.note(f"the base is {say(plain.told())}", "base", "tensor by tensor, while it is read")
    return plain


def _shapes(base: Weights, adapters: Iterable[Adapter]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's tensors that adapters tell: all that is known of packed ones before a download."""
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters if isinstance(base, Headers) else ():
        shapes |= {adapter.seen_in(base)(f"{module}.weight"): adapter.shape(module) for module in adapter.modules}
    return shapes


def _adapters(found: Findings, base: Source | None, sources: Mapping[str, Weights]) -> None:
    """Take down an adapter in the base's place, and warn of adapters that name another base than this one."""
    if isinstance(sources.get(""), Adapter):
        found.error(f"{base} is an adapter", "base", "give the model it was trained on as the base")
        return
    known = base_names(base, sources.get("", {}))
    for who, weights in sources.items():
        said = str(weights.config.get("base_model_name_or_path") or "") if isinstance(weights, Adapter) else ""
        if said and known and Path(said).name.lower() not in known:
            found.warn(
                f"the adapter says its base is '{said}'", f"expert '{who}'",
                f"if that is not the model in {base}, the merge is none",
            )  # fmt: skip


def base_names(base: Source | None, weights: Weights) -> set[str]:
    """Return the names under which an adapter may know a base, without the organisation; none for one in memory."""
    folder = folder_of(weights) or (folder_of(base) if isinstance(base, str | Path) else None)
    if folder is None:
        return set()
    told = sound_config(folder).get("_name_or_path") or ""
    known = (base if isinstance(base, str | Path) else folder, folder.resolve(), hub_name(folder) or "", told)
    return {Path(str(name).partition("@")[0]).name.lower() for name in known if str(name)}


def _sentence(found: Findings, how: How, experts: Sequence[str]) -> Sentence | None:
    """Return the sentence, parsed and tried out; where it cannot be, take down what is wrong with each of its words."""
    wrong = Findings()
    with wrong.gather("sentence"):
        sentence = merging_only(parse(how))
        if experts:
            try_out(sentence, experts)
        return sentence
    each = Findings()
    steps: list[Step] = []
    if isinstance(how, str):
        with each.gather("sentence"):
            for word in words_of(how):
                with each.gather("sentence"):
                    steps.append(step_of(word, how))
    for step in steps if experts else ():
        alone = {"combine": (step,), "adapt": ()}.get(step.kind, (step, Step("average", *find("average"))))
        if alone:
            with each.gather("sentence"):
                try_out(Sentence(alone), experts)
    found.add(each if each.errors else wrong)
    try:
        return merging_only(parse(how))  # what stands beside a knob out of range can still be checked
    except MerganserError:
        return None


def _try_where(found: Findings, sentence: Sentence, where: Where, names: Sequence[str], experts: Sequence[str]) -> None:
    """Check patterns and the knobs they give; where something is wrong, each pattern alone."""
    wrong = Findings()
    with wrong.gather("where"):
        where.check(sentence, names)
        for told in {str(s): s for s in (where.resolve(sentence, name) for name in names)}.values():
            if where.patterns and experts and str(told) != str(sentence):
                try_out(told, experts)
        return
    each = Findings()
    for pattern, steps in where.patterns.items():
        with each.gather("where"):
            alone = Where({pattern: steps})
            alone.layers = where.layers
            alone.check(sentence, names)
            fits = fitting(pattern, names)
            for told in {str(s): s for s in (alone.resolve(sentence, name) for name in fits)}.values():
                try_out(told, experts)
    found.add(each if each.errors else wrong)


def open_ingredients(
    ingredients: Ingredients | None, sentence: Sentence, experts: Sequence[str], *, later: Collection[str] = ()
) -> dict[str, Ingredient]:
    """Open the extra tensors; those that come ``later`` may lack.

    Raises SentenceError if a step lacks its ingredient, or one is given that none asks for.
    """
    found = Findings()
    given = dict(ingredients or {})
    asked = {name: step for step in sentence.steps for name in step.ingredients}
    opened: dict[str, Ingredient] = {}
    for name, step in asked.items():
        if name not in given and name not in later:
            with found.gather("ingredients"):
                raise SentenceError(
                    f"{step} needs the ingredient '{name}' (tensors under the model's names): give it with "
                    f"--ingredient {name}=FOLDER (ingredients={{'{name}': ...}})"
                )
    for name, source in given.items():
        with found.gather("ingredients"):
            if name not in asked:
                raise SentenceError(f"no step of '{sentence}' takes an ingredient '{name}'{did_you_mean(name, asked)}")
            opened[name] = _ingredient(name, source, experts)
    found.tell()
    return opened


def asked_by(sentence: Sentence, ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """Return those ingredients that a step of the sentence takes."""
    asked = {name for step in sentence.steps for name in step.ingredients}
    return {name: source for name, source in ingredients.items() if name in asked}


def _ingredient(name: str, source: Source | Mapping[str, Source], experts: Sequence[str]) -> Ingredient:
    if isinstance(source, str | Path):
        root = Path(source)
        if not all((root / expert).is_dir() for expert in experts):
            return Ingredient(shared=open_weights(source))
        source = {expert: root / expert for expert in experts}
    told: dict[str, Any] = dict(source)
    if all(isinstance(value, Tensor) for value in told.values()):
        return Ingredient(shared=told)
    if missing := [expert for expert in experts if expert not in told]:
        raise SentenceError(f"ingredient '{name}' has nothing for expert '{missing[0]}'; it has {', '.join(told)}")
    return Ingredient(each={expert: open_weights(told[expert]) for expert in experts})


def merging_only(sentence: Sentence) -> Sentence:
    """Return ``sentence``, or raise SentenceError if it has adapt words: those need encoder, heads and inputs."""
    if sentence.adapt:
        raise SentenceError(
            f"'{sentence.adapt[0].name}' adapts experts and needs encoder, heads and inputs: use adapt() first, or "
            f"run() with a recipe; merge() takes '{sentence.merging}'"
        )
    return sentence


def check_output(dtype: str | None, stored: str, rank: int | str | None = None) -> torch.dtype | None:
    """Return the output's dtype, None for the base's own. Raises SentenceError for an unknown word."""
    if stored not in ("model", "delta", "adapter"):
        raise SentenceError(f"stored must be 'model', 'delta' or 'adapter', got {stored!r}")
    if rank is not None and stored != "adapter":
        raise SentenceError("a rank is that of an adapter: give --as-adapter (stored='adapter') too, or no rank")
    if dtype is not None and dtype not in OUTPUTS:
        raise SentenceError(f"unknown dtype {dtype!r}{did_you_mean(str(dtype), OUTPUTS)}; known: {', '.join(OUTPUTS)}")
    return None if dtype is None else OUTPUTS[dtype]


def gives_nothing(sentence: Sentence, experts: Sequence[str]) -> bool:
    """Tell whether a sentence leaves the base as it is, whatever the experts add: tried on numbers of all sizes."""
    if any(step.ingredients or not step.elementwise for step in sentence.steps):
        return False
    # as good as random, without torch's generators, which take long to import
    values = torch.arange(len(experts) * 48 * 48.0).mul(12.9898).sin().mul(43758.5453).frac().reshape(-1, 48, 48)
    rows = {expert: {"": row} for expert, row in zip(experts, values, strict=True)}
    seen: list[bool] = []
    job = Job({"": torch.zeros(48, 48)}, rows, sentence, [""])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_each(
            job, survey(job), lambda name, piece: seen.append(piece.value is not None and bool(piece.value.any()))
        )
    return not any(seen)


def check_shards(shard_size: int | str | None, into: str | Path | None, stored: str) -> None:
    """Raise WeightsError for what is no size, SentenceError where nothing is written that is cut into shards."""
    shard_bytes(shard_size)
    if shard_size is not None and (into is None or stored == "adapter"):
        why = "needs --to (into=FOLDER)" if into is None else "is of no use with an adapter, which is one file"
        raise SentenceError(f"a shard size {why}")


def try_out(sentence: Sentence, experts: Sequence[str]) -> None:
    """Run the steps once on a tiny tensor, so that a knob out of range is told before any work starts."""
    values = torch.linspace(-1, 1, len(experts) * 16).reshape(-1, 4, 4)
    rows = {expert: {"": row} for expert, row in zip(experts, values, strict=True)}
    job = Job({"": torch.zeros(4, 4)}, rows, sentence, [""])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merge_each(job, survey(job), lambda name, piece: None)
        except (RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
            raise SentenceError(f"'{sentence}' fails on a tensor of 4 x 4: {type(error).__name__}: {error}") from error
