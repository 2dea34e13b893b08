"""Everything that will go wrong with a merge, told at once, from headers and configs: before a download or a tensor.

What `merge` itself insists on is `examine`; this adds what can be foreseen beyond that: configs that differ, the output
folder, disk, memory and time. Values (NaN, bytes that rotted) are seen only when they are read: merging names them.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import read_card
from .errors import DataError, RecipeError, WeightsError, did_you_mean
from .examine import How, Ingredients, asked_by, examine, open_ingredients, try_out
from .findings import Findings
from .forecast import existing, free_disk, nbytes, numbers, writable
from .sentence import parse
from .synthetic import is_source, known_source
from .weights.delta import over
from .weights.header import WHOLE, Head, Headers, Weights, folder_of, header, matches
from .weights.open import Source, named, open_headers
from .weights.quantised import as_stored
from .weights.save import refuse_overwriting
from .weights.settle import LOCK, NEW, PARTIAL, busy
from .weights.stored import Stored, first, weight_files
from .weights.tokenizer import read_config, vocab_size
from .where import Patterns

if TYPE_CHECKING:
    from .loop import Job

# settings of a config.json that shapes do not show, and that make the same numbers mean something else
MEANING = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "hidden_act",
    "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings", "sliding_window", "position_embedding_type",
)  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "architectures")


def check(
    base: Source | None,
    experts: Mapping[str, Source] | Sequence[Source] = (),
    how: How = "",
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
) -> Findings:
    """Return all that will go wrong with ``merge(...)`` of the same arguments, and what it will do and need.

    ``base`` alone may be a recipe.toml, or a mergekit config (.yml, .yaml). Reads headers, configs and tokenizers; of a
    Hub name too, without its weights. Raises nothing that a merge would: what is wrong is in ``errors``.
    """
    if not experts and not how and isinstance(base, str | Path):
        if Path(base).suffix == ".toml":
            return check_recipe(base, into)
        if Path(base).suffix in (".yml", ".yaml"):
            return check_config(base, into)
    told = examine(
        base, experts, how, into=into, own=own, seed=seed, ingredients=ingredients, part=part, where=where,
        vocabulary=vocabulary, dtype=dtype, stored=stored, rank=rank, opener=open_headers,
    )  # fmt: skip
    found = told.found
    compare(found, told.sources, own)
    found.plan = {"sentence": str(told.sentence or how), "base": str(base), "experts": list(named(experts))}
    found.plan |= {"into": None if into is None else str(into), "part": part, "dtype": dtype, "stored": stored}
    if told.ready is not None:
        from .merge import Output

        job, target = told.ready.job, told.ready.target
        found.plan["steps"] = [
            {"step": str(s), "kind": s.kind, "elementwise": s.elementwise} for s in job.sentence.steps
        ]
        plan = told.ready.adapter
        written = plan.spec if plan is not None else Output(job.base, job.names, target, stored).spec
        foresee(found, [job], written, told.sources, part)
        if plan is not None:
            found.plan["kept"] = []
            found.numbers |= {"tensors": len(plan.slots) + len(plan.full), "merged": len(plan.slots) + len(plan.full)}
    stored_as = {who: as_stored(w) for who, w in told.sources.items()}
    remote = {who: w for who, w in stored_as.items() if isinstance(w, Headers)}
    for who, weights in remote.items():
        size = sum(nbytes(header(weights, name)) for name in weights)
        found.note(f"{weights.source} is on the Hub: {size / 1e9:.2f} GB", _who(who), "downloaded unless it is cached")
    if into is not None:
        check_folder(found, Path(into), found.numbers.get("bytes_written"))
    return found


def compare(found: Findings, sources: Mapping[str, Weights], own: Sequence[str] = ()) -> None:
    """Compare configs and dtypes of the experts (by name) with the base's (``""``), and each config with its weights."""
    configs: dict[str, dict[str, Any]] = {}
    for who, weights in sources.items():
        with found.gather(_who(who)):
            configs[who] = read_config(folder_of(weights))
        _rows(found, who, weights, vocab_size(configs.get(who, {})))
    base = sources.get("")
    for who, weights in sources.items():
        if base is None or not who:
            continue
        mine, theirs = configs.get("", {}), configs.get(who, {})
        for key in (*MEANING, *SIZES) if mine and theirs else ():
            if mine.get(key) != theirs.get(key):
                text = f"config.json: {key} is {theirs.get(key)!r}, the base's is {mine.get(key)!r}"
                if key in MEANING:
                    found.warn(text, _who(who), "the same tensors mean something else there; merge models of one base")
                else:
                    found.note(text, _who(who), "the result gets the base's config")
        kinds = {(header(base, n)[0], header(weights, n)[0]) for n in base if n in weights and not matches(n, own)}
        if other := sorted(f"{b} there, {a} in the base" for a, b in kinds if a != b):
            found.note(f"dtypes differ: {', '.join(other)}", _who(who), "deltas are fp32, the result has the base's")


def _rows(found: Findings, who: str, weights: Weights, rows: int | None) -> None:
    """Warn where config.json has another size of vocabulary than any table of the weights has rows."""
    tables = {header(weights, n)[1][0]: n for n in weights if len(header(weights, n)[1]) == 2}
    if rows is not None and tables and rows not in tables:
        near = min(tables, key=lambda n: abs(n - rows))
        found.warn(
            f"config.json says vocab_size {rows}, no tensor has as many rows ('{tables[near]}' has {near})", _who(who),
            "its own library may refuse to load it; correct the config or the checkpoint",
        )  # fmt: skip


def foresee(
    found: Findings, jobs: "Sequence[Job]", written: Mapping[str, Head], sources: Mapping[str, Weights],
    part: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Add the numbers of a merge that nothing prevents so far, and what the machine lacks for it."""
    told = numbers(jobs, sources, written, part)
    found.numbers |= told
    moved = {name for job in jobs for name in job.names}
    found.plan["kept"] = [name for name in written if name not in moved]
    if told["memory_free"] is not None and told["memory"] > told["memory_free"]:
        found.warn(
            f"needs about {told['memory'] >> 20} MiB, {told['memory_free'] >> 20} MiB are free (largest tensor "
            f"'{told['largest']['tensor']}')", "memory",
            "free memory, set OMP_NUM_THREADS=1, or take steps that are element-wise",
        )  # fmt: skip
    for name, other in {name: other for job in jobs for name, other in job.alike.items()}.items():
        found.note(f"'{name}' is tied to '{other}' in every model", "tensors", "both are merged alike and stay equal")
    whole = [name for name in found.plan["kept"] if written[name][0] in WHOLE]
    if whole:
        found.note(f"not floating point: {first(whole)}", "tensors", "the result has the base's")


def check_folder(found: Findings, folder: Path, needed: int | None = None) -> None:
    """Take down what is wrong with an output folder, and what will be replaced there."""
    if not (place := existing(folder)).is_dir():
        return found.error(f"{place} is a file", "output", "give a folder for the result")
    if not writable(folder):
        return found.error(f"{folder} cannot be written", "output", "give another folder, or change its permissions")
    lock = folder / PARTIAL / LOCK
    if lock.exists():
        with found.gather("output"):
            if _locked(lock):
                raise busy(folder)
        if (folder / PARTIAL / NEW).exists():
            found.note(f"{folder} holds an interrupted merge", "output", "the same merge goes on, another begins anew")
    if folder.is_dir() and (old := weight_files(folder)):
        card = read_card(folder) or {}
        what = f"the model of '{card['sentence']}'" if card.get("sentence") else "a model"
        found.warn(f"{folder} holds {what} ({len(old)} files)", "output", "it is replaced, when all is done")
    free = free_disk(folder)
    found.numbers["disk_free"] = free
    if needed is not None and free is not None and needed > free:
        found.error(
            f"{folder}: the result has {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", "disk",
            "free some space or give a folder on another disk",
        )  # fmt: skip


def _locked(lock: Path) -> bool:
    import fcntl

    try:
        file = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def check_config(path: str | Path, into: str | Path | None = None) -> Findings:
    """Return all that will go wrong with a mergekit config."""
    from .mergekit import plan

    found = Findings(plan={"config": str(path), "into": None if into is None else str(into)})
    with found.gather("config"):
        told = plan(path)
        found.plan |= {"sentence": told.sentence, "experts": list(told.models)}
        for text in told.notes:
            found.note(text, "config")
        foresee(found, told.jobs, told.spec, told.models)
        with found.gather("output"):
            for source in told.models.values() if into is not None else ():
                refuse_overwriting(into or "", source)
    if into is not None:
        check_folder(found, Path(into), found.numbers.get("bytes_written"))
    return found


def check_recipe(path: str | Path, into: str | Path | None = None) -> Findings:
    """Return all that will go wrong with `run` of a recipe, as far as headers and files tell.

    Whether heads and encoder fit is seen by `run` itself, which loads them before any long work.
    """
    from .recipe import read_recipe

    found = Findings(plan={"recipe": str(path), "into": None if into is None else str(into)})
    with found.gather("recipe"):
        recipe = read_recipe(path)
    if not found.ok:
        return found
    found.plan |= {"sentences": recipe.sentences, "experts": list(recipe.experts), "scales": recipe.scales}
    for text in recipe.sentences:
        with found.gather("sentences"):
            _sentence(text, recipe)
    _tasks(found, recipe)
    _models(found, recipe)
    if into is not None:
        check_folder(found, Path(into))
        found.warnings = [one for one in found.warnings if one.where != "output"]  # a run goes on in its folder
    if into is not None and found.ok:
        diagnosed = recipe.limits.diagnose > 0
        found.plan["stages"] = stages(recipe.sentences, list(recipe.experts), Path(into), diagnosed=diagnosed)
    return found


def stages(
    sentences: Sequence[str], experts: Sequence[str], folder: Path, *, diagnosed: bool = True
) -> list[dict[str, Any]]:
    """Return what a run does, in order, and whether its folder has it already.

    A stage whose inputs have changed since is done again all the same; only `run` itself, which reads them, knows.
    """
    from .adapt import how_text, slug
    from .adapt import stages as adapt_stages

    parsed = [parse(text) for text in sentences]
    parts = [how_text([*before, *part]) for s in parsed for part, before in adapt_stages(s.adapt)]
    todo = [
        (f"adapt {expert} by {how}", Path("adapted") / slug(how) / expert / "card.json")
        for how in dict.fromkeys(parts)
        for expert in experts
    ]
    todo += [(f"score {s}", Path("rows") / f"{slug(str(s))}.json") for s in parsed]
    todo += [("score base and experts", Path("rows") / f"{slug('base and experts')}.json")]
    todo += [("diagnose", Path("diagnosis.json"))] if diagnosed else []
    todo += [("write the best model", Path("merged") / "card.json")]
    todo += [("report", Path("report.html"))]
    return [{"stage": stage, "done": (folder / file).is_file()} for stage, file in todo]


def check_adapt(path: str | Path, how: str, into: str | Path) -> Findings:
    """Return all that will go wrong with `adapt` of a recipe."""
    from .adapt import adapt_steps

    found = check_recipe(path)
    with found.gather("--how"):
        adapt_steps(how)
    check_folder(found, Path(into))
    found.warnings = [one for one in found.warnings if one.where != "output"]
    done = {name: (Path(into) / name / "card.json").is_file() for name in found.plan.get("experts", ())}
    stage = [{"stage": f"adapt {name} by {how}", "done": ready} for name, ready in done.items()]
    found.plan |= {"into": str(into), "sentences": [how], "stages": stage}
    return found


def check_suite(
    name: str,
    data: str | Path | None,
    how: Sequence[str] | None,
    into: str | Path,
    seeds: int = 1,
    study: str | None = None,
    ri: str | None = None,
    **settings: Any,
) -> Findings:
    """Return all that will go wrong with `bench` of a suite, or of a study on it, or with `demo`."""
    from .errors import MissingExtra
    from .suites import ON_THE_HUB, open_suite

    found = Findings(plan={"suite": name, "into": str(into)})
    suite: Any = None
    with found.gather("suite"):
        suite = open_suite(name, **settings)
        for package, extra in {"matplotlib": "report", **getattr(suite, "PACKAGES", {})}.items():
            with found.gather("packages"):
                if find_spec(package) is None:
                    raise MissingExtra(f"suite '{name}' ({package})", extra)
        if study is not None:
            from .suites import studies

            studies.words_of(studies.suite_of(name, suite), ri)
            studies.open_study(study)
    experts: list[str] = []
    written: Sequence[str] = suite.SENTENCES if suite is not None else []
    if settings.get("models") is not None and hasattr(suite, "checkpoints"):  # without folders it would ask the Hub
        with found.gather("--models"):
            suite.checkpoints()
    if data is not None and suite is not None and name in ON_THE_HUB:
        from .suites.hub import located

        with found.gather("--data"):
            data = located(ON_THE_HUB[name], Path(data))
    if data is not None and suite is not None and not hasattr(suite, "SUITE"):
        with found.gather("--data"):
            raise DataError(f"suite '{name}' makes its own data: leave out --data")
    elif data is not None and suite is not None:
        with found.gather("--data"):
            written = suite.SUITE.of(data).sentences
            experts = list(suite.SUITE.tasks(data))
        with found.gather("--data"):
            if not how or any("|" in text and parse(text).adapt for text in how):
                suite.SUITE.files(data)
    elif suite is not None:
        experts = list(getattr(suite, "NAMES", ()))
    sentences = list(how or written)
    for text in sentences:
        with found.gather("--how"):
            try_out(parse(text).merging, experts or ["a", "b"])
    check_folder(found, Path(into))
    found.warnings = [one for one in found.warnings if one.where != "output"]
    places = [Path(into)] if seeds == 1 else [Path(into) / f"seed-{seed}" for seed in range(seeds)]
    found.plan |= {"sentences": sentences, "experts": experts}
    if found.ok:
        found.plan["stages"] = [
            {**one, "stage": one["stage"] if seeds == 1 else f"{place.name}: {one['stage']}"}
            for place in places
            for one in stages(sentences, experts, place)
        ]
    return found


def _sentence(text: str, recipe: Any) -> None:
    from .adapt import adapt_steps, how_text

    sentence = parse(text)
    if sentence.adapt:
        adapt_steps(how_text(sentence.adapt))
        if recipe.inputs is None:
            raise RecipeError(
                f"'{sentence}' adapts on unlabeled inputs, but the recipe has none; add [inputs] files = [...]"
            )
    try_out(sentence.merging, list(recipe.experts))
    open_ingredients(asked_by(sentence, recipe.ingredients), sentence.merging, list(recipe.experts))


def _tasks(found: Findings, recipe: Any) -> None:
    from .evaluate.task import read_task
    from .models.device import device
    from .prepare import check_statistics, open_domains

    for name in recipe.experts:
        with found.gather(f"task '{name}'"):
            if name not in recipe.tasks:
                raise RecipeError(
                    f"expert '{name}' has no task of that name{did_you_mean(name, recipe.tasks)}; name it under [tasks]"
                )
            task = read_task(recipe.tasks[name])
            for split in ("test", *(["val"] if recipe.scales else [])):
                if split not in task.splits:
                    raise DataError(
                        f"task '{name}' has no {split} split; add {recipe.tasks[name] / split}.jsonl.gz or .npz"
                    )
    with found.gather("domains"):
        open_domains(recipe)
    with found.gather("device"):
        device()
    with found.gather("model.statistics"):
        check_statistics(recipe)
    for file in recipe.inputs.files if recipe.inputs else ():
        if is_source(file):
            with found.gather("inputs"):
                known_source(file)
        elif not file.exists():
            found.error(f"{file}: no such file of unlabeled inputs", "inputs", "correct [inputs] files", DataError)


def _models(found: Findings, recipe: Any) -> None:
    """Open base and experts and compare the tensors that all have; heads and the like are the encoder's affair."""
    sources: dict[str, Weights] = {}
    for who, path in {"": recipe.model.base, **recipe.experts}.items():
        with found.gather(_who(who)):
            opened = open_headers(path)
            sources[who] = over(sources[""], opened) if who and "" in sources else opened
    compare(found, sources, recipe.own)
    if "" not in sources or len(sources) < 2:
        return
    base, experts = sources[""], {who: weights for who, weights in sources.items() if who}
    size = 0
    for who, weights in sources.items():
        size += weights.nbytes if isinstance(weights, Stored) else sum(nbytes(header(weights, n)) for n in weights)
        shared = [n for n in base if n in weights and not matches(n, recipe.own)]
        if who and not shared:
            found.error("has no tensor of the base's names", _who(who), "give a model fine-tuned from this base")
        for name in shared if who else ():
            if header(weights, name)[1] != header(base, name)[1]:
                found.error(
                    f"'{name}' is {list(header(weights, name)[1])} instead of {list(header(base, name)[1])}", _who(who),
                    f'leave it out with own = ["{name}"], or give a model of the same base', WeightsError,
                )  # fmt: skip
    found.numbers |= {"experts": len(experts), "tensors": len(base), "bytes_read": size}


def _who(name: str) -> str:
    return f"expert '{name}'" if name else "base"
