"""What a command that goes by a recipe, a suite or parts would do, and what prevents it, from files and headers alone."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .check import check_folder, compare, titled
from .errors import DataError, RecipeError, WeightsError, did_you_mean
from .evaluate.unlabeled import check_unlabeled
from .examine import try_out
from .findings import Findings
from .forecast import nbytes, writable
from .sentence import parse
from .weights.delta import over
from .weights.header import Weights, header, matches
from .weights.open import open_headers
from .weights.stored import Stored


def check_recipe(path: str | Path, into: str | Path | None = None) -> Findings:
    """Return all that will go wrong with `run` of a recipe, as far as headers and files tell.

    Whether heads and encoder fit is seen by `run` itself, which loads them before any long work.
    """
    found, recipe = _read(path, into)
    if recipe is None:
        return found
    found.plan |= {"sentences": recipe.sentences, "scales": recipe.scales}
    for text in recipe.sentences:
        with found.gather("sentences"):
            _sentence(text, recipe)
    if into is not None:
        _goes_on(found, into)
    if into is not None and found.ok:
        diagnosed = recipe.limits.diagnose > 0
        found.plan["stages"] = stages(recipe.sentences, list(recipe.experts), Path(into), diagnosed=diagnosed)
    return found


def _read(path: str | Path, into: str | Path | None = None) -> tuple[Findings, Any]:
    """Return a recipe, None if it cannot be read, and what is wrong with its tasks and models; not with its sentences."""
    from .recipe import read_recipe

    found = Findings(plan={"recipe": str(path), "into": None if into is None else str(into)})
    recipe = None
    with found.gather("recipe"):
        recipe = read_recipe(path)
        found.plan["experts"] = list(recipe.experts)
        _tasks(found, recipe)
        _models(found, recipe)
    return found, recipe


def _goes_on(found: Findings, into: str | Path) -> None:
    """Take down what is wrong with a folder that work goes on in: that something lies there is not."""
    check_folder(found, Path(into))
    found.warnings = [one for one in found.warnings if one.where != "output"]


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
    _goes_on(found, into)
    done = {name: (Path(into) / name / "card.json").is_file() for name in found.plan.get("experts", ())}
    stage = [{"stage": f"adapt {name} by {how}", "done": ready} for name, ready in done.items()]
    found.plan |= {"into": str(into), "sentences": [how], "stages": stage}
    return found


def check_learn(
    path: str | Path, what: str, into: str | Path, on: str = "tasks", model: Path | None = None
) -> Findings:
    """Return all that will go wrong with `learn`."""
    from .learn.ingredient import check_what

    found, recipe = _read(path, into)
    if recipe is None:
        return found
    with found.gather("what"):
        check_what(recipe, what, on, model)
    if model is not None:
        with found.gather("--model"):
            base = open_headers(recipe.model.base)
            _fits(found, base, over(base, open_headers(model)), recipe.own, f"model '{model}'")
    one = what in ("coefficients", "surgery")
    for folder in [Path(into)] if one else [Path(into) / name for name in recipe.experts]:
        check_folder(found, folder)
    todo = [f"learn {what}"] if one else [f"measure {what} of {name}" for name in recipe.experts]
    found.plan["stages"] = [{"stage": stage, "done": False} for stage in todo]
    return found


def check_distil(path: str | Path, model: str | Path, into: str | Path) -> Findings:
    """Return all that will go wrong with `distil`."""
    from .learn.distil import check_inputs
    from .weights.save import refuse_overwriting

    found, recipe = _read(path, into)
    if recipe is None:
        return found
    with found.gather("inputs"):
        check_inputs(recipe)
    with found.gather(f"model '{model}'"):
        refuse_overwriting(into, model, recipe.model.base, *recipe.experts.values())
        base = open_headers(recipe.model.base)
        _fits(found, base, over(base, open_headers(model)), recipe.own, f"model '{model}'")
    check_folder(found, Path(into))
    found.plan["stages"] = [{"stage": f"distil {model}", "done": False}]
    return found


def check_models(path: str | Path, models: Sequence[str | Path], verb: str, surgery: Path | None = None) -> Findings:
    """Return all that will go wrong with `eval` or `diagnose`; ``surgery``: corrections of the one model's features."""
    found, recipe = _read(path)
    if surgery is not None:
        from .learn.surgery import check_one, read_surgery

        with found.gather("--surgery"):
            check_one(models)
            read_surgery(surgery)
    if recipe is None:
        return found
    for model in models if found.ok else ():
        with found.gather(who := f"model '{model}'"):
            base = open_headers(recipe.model.base)
            _fits(found, base, over(base, open_headers(model)), recipe.own, who)
    found.plan["stages"] = [{"stage": f"{verb} {model}", "done": False} for model in models]
    return found


def check_sources(path: str | Path, files: Sequence[str | Path]) -> Findings:
    """Return all that will go wrong with `sources`."""
    found, recipe = _read(path)
    if recipe is None:
        return found
    _inputs(found, [Path(file) for file in files])
    every = [*(recipe.inputs.files if recipe.inputs else ()), *files]
    if not every:
        found.error("no unlabeled inputs", "inputs", "name files, or give the recipe [inputs] files = [...]", DataError)
    found.plan["stages"] = [{"stage": f"look at {file}", "done": False} for file in every]
    return found


def check_join(folder: str | Path) -> Findings:
    """Return all that will go wrong with `join`."""
    from .weights.parts import parts_in

    found = Findings(plan={"into": str(folder)})
    with found.gather("parts"):
        cards = parts_in(folder)
        found.plan["stages"] = [{"stage": f"join {path.name}", "done": False} for path in cards]
        found.plan["sentence"] = next(iter(cards.values())).get("sentence")
        found.numbers["bytes_written"] = sum(Stored(path).nbytes for path in cards)
        check_folder(found, Path(folder), found.numbers["bytes_written"])
    return found


def check_report(folders: Sequence[Path], to: str | Path | None = None) -> Findings:
    """Return all that will go wrong with `report` of some runs."""
    from .errors import MissingExtra
    from .report.folder import read_run

    page = Path(to) if to is not None else Path(folders[0]) / "report.html"
    found = Findings(plan={"into": str(page / "report.html" if page.is_dir() else page), "stages": []})
    with found.gather("packages"):
        if find_spec("matplotlib") is None:
            raise MissingExtra("a report", "report")
    for folder in folders:
        with found.gather("folders"):
            run = read_run(folder)
            found.plan["stages"].append({"stage": f"report on {folder}: {len(run.scores.rows)} rows", "done": False})
    with found.gather("output"):
        if not writable(page if page.is_dir() else page.parent):
            raise WeightsError(f"{page} cannot be written; give another file with --to")
    return found


def check_suite(
    name: str,
    data: str | Path | None,
    how: Sequence[str] | None,
    into: str | Path,
    seeds: int = 1,
    study: str | None = None,
    ri: str | None = None,
    only: Sequence[str] = (),
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

            asked = studies.open_study(study)
            found.plan |= {
                "study": f"{study}: {asked.question}",
                "ri": studies.words_of(studies.suite_of(name, suite), ri)(),
            }
            how = list(studies.mergers_of(asked, how))
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
            if study is not None or not how or any("|" in text and parse(text).adapt for text in how):
                suite.SUITE.files(data)
        with found.gather("--only"):
            if study is not None:
                from .suites import studies

                studies.check_only(suite.SUITE, data, study, studies.words_of(suite.SUITE, ri), only)
    elif suite is not None:
        experts = list(getattr(suite, "NAMES", ()))
    sentences = list(how or written)
    for text in sentences:
        with found.gather("--how"):
            try_out(parse(text).merging, experts or ["a", "b"])
    _goes_on(found, into)
    places = [Path(into)] if seeds == 1 else [Path(into) / f"seed-{seed}" for seed in range(seeds)]
    found.plan |= {"sentences": sentences, "experts": experts}
    if found.ok and study is None:  # what a study asks for is known with its experts
        found.plan["stages"] = [
            {**one, "stage": one["stage"] if seeds == 1 else f"{place.name}: {one['stage']}"}
            for place in places
            for one in stages(sentences, experts, place)
        ]
    return found


def _sentence(text: str, recipe: Any) -> None:
    from .adapt import adapt_steps, how_text
    from .prepare import check_ingredients

    sentence = parse(text)
    if sentence.adapt:
        adapt_steps(how_text(sentence.adapt))
        if recipe.inputs is None:
            raise RecipeError(
                f"'{sentence}' adapts on unlabeled inputs, but the recipe has none; add [inputs] files = [...]"
            )
    try_out(sentence.merging, list(recipe.experts))
    check_ingredients(recipe, sentence)


def _tasks(found: Findings, recipe: Any) -> None:
    from .evaluate.task import read_task
    from .models.device import device
    from .prepare import check_choice, check_statistics, open_domains

    for name in recipe.experts:
        with found.gather(f"task '{name}'"):
            if name not in recipe.tasks:
                raise RecipeError(
                    f"expert '{name}' has no task of that name{did_you_mean(name, recipe.tasks)}; name it under [tasks]"
                )
            task = read_task(recipe.tasks[name])
            for split in ("test", *(["val"] if recipe.scales and recipe.choose == "labels" else [])):
                if split not in task.splits:
                    raise DataError(
                        f"task '{name}' has no {split} split; add {recipe.tasks[name] / split}.jsonl.gz or .npz"
                    )
    with found.gather("domains"):
        open_domains(recipe)
    with found.gather("choose"):
        check_choice(recipe)
    with found.gather("device"):
        device()
    with found.gather("model.statistics"):
        check_statistics(recipe)
    _inputs(found, recipe.inputs.files if recipe.inputs else ())


def _inputs(found: Findings, files: Sequence[Path]) -> None:
    for file in files:
        with found.gather("inputs"):
            check_unlabeled(file)


def _models(found: Findings, recipe: Any) -> None:
    """Open base and experts and compare the tensors that all have; heads and the like are the encoder's affair."""
    sources: dict[str, Weights] = {}
    for who, path in {"": recipe.model.base, **recipe.experts}.items():
        with found.gather(titled(who)):
            opened = open_headers(path)
            sources[who] = over(sources[""], opened) if who and "" in sources else opened
    compare(found, sources, recipe.own)
    if "" not in sources or len(sources) < 2:
        return
    base, experts = sources[""], {who: weights for who, weights in sources.items() if who}
    size = 0
    for who, weights in sources.items():
        size += weights.nbytes if isinstance(weights, Stored) else sum(nbytes(header(weights, n)) for n in weights)
        if who:
            _fits(found, base, weights, recipe.own, titled(who))
    found.numbers |= {"experts": len(experts), "tensors": len(base), "bytes_read": size}


def _fits(found: Findings, base: Weights, weights: Weights, own: Sequence[str], who: str) -> None:
    """Take down where weights are not those of a model of this base."""
    shared = [n for n in base if n in weights and not matches(n, own)]
    if not shared:
        found.error("has no tensor of the base's names", who, "give a model fine-tuned from this base")
    for name in shared:
        if header(weights, name)[1] != header(base, name)[1]:
            found.error(
                f"'{name}' is {list(header(weights, name)[1])} instead of {list(header(base, name)[1])}", who,
                f'leave it out with own = ["{name}"], or give a model of the same base', WeightsError,
            )  # fmt: skip
