"""The command line: every verb reads its arguments, imports what it needs, and calls one function.

Exit status: 0 done, 1 the work failed (the message says what, where and what to do), 2 usage, 130 stopped by Ctrl-C.
"""

import contextlib
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import DataError, MerganserError, RecipeError, WeightsError
from .heap import freed_goes_back


class _Quick:
    """A help option that is False where it is not asked for: unset, typer imports pydantic to find that out."""

    def get_help_option(self, context: Any) -> Any:
        """Return the help option."""
        option = super().get_help_option(context)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Group(_Quick, TyperGroup):
    pass


class _Command(_Quick, TyperCommand):
    pass


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge fine-tuned models without interference: adapt, merge, diagnose, evaluate, report.",
)


def place(text: str | Path) -> Path:
    """Return a path; an empty one, mostly a shell variable that is not set, would mean the folder one is in."""
    if not str(text).strip():
        raise typer.BadParameter("is empty: name a folder, or . for this one")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of a table.")]
Recipe = Annotated[Path, typer.Argument(help="A recipe.toml: base, experts, tasks, inputs, sentences.")]
To = Annotated[
    Path,
    typer.Option(
        "--to", parser=place, metavar="PATH", help="The folder to write into; what is done there is not done again."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, say what would be done, and write nothing.")]
Experts = Annotated[list[str] | None, typer.Argument(help="Models fine-tuned from the base, or LoRA adapters for it.")]
How = Annotated[str, typer.Option(help='The sentence, such as "ties(density=0.2) | scale(by=0.8)".')]
Own = Annotated[list[str] | None, typer.Option(help="Glob pattern of tensors left out; may be repeated.")]
Patterns = Annotated[
    list[str] | None, typer.Option(help='Knobs for some tensors, such as "*.mlp.*: ties(density=0.4)"; repeatable.')
]
Ingredients = Annotated[
    list[str] | None, typer.Option(help="NAME=FOLDER of extra tensors that a step needs; may be repeated.")
]
Vocabulary = Annotated[str | None, typer.Option(help="Where vocabularies differ: base, union, or an expert's name.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the base's own.")]
Delta = Annotated[bool, typer.Option("--delta", help="Store what is added to the base (fp32), not the model.")]
AsAdapter = Annotated[
    bool, typer.Option("--as-adapter", help="Write one LoRA adapter, which PEFT loads; the experts are adapters.")
]
Rank = Annotated[
    str | None, typer.Option(help="That adapter's rank: a number, or exact; default: the experts' largest.")
]
ShardSize = Annotated[str | None, typer.Option(help="Of the result's files, at most: 2GB, 500MB; default: 5GB.")]
Part = Annotated[str | None, typer.Option(help="K/N: only the K-th of N parts; then `join` the folder.")]


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn merganser's errors into one line and exit status 1, and Ctrl-C into a word on how to go on."""

    @wraps(verb)
    def guard(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings_as_lines():
                verb(*args, **kwargs)
        except MerganserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130) from None

    return guard


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show what `warnings.warn` tells people as one line on standard error, once each."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_place: Any) -> None:
        text = f"warning: {' '.join(str(message).split())}"
        if text not in said:
            said.add(text)
            typer.echo(text, err=True)

    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # libraries' words to their programmers, not to people
            warnings.simplefilter("ignore", kind)
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@app.command()
@guarded
def run(recipe: Recipe, to: To = Path("run"), dry_run: DryRun = False, as_json: Json = False) -> None:
    """Adapt, merge, evaluate, diagnose and report as a recipe says; a second run does only what is missing."""
    if dry_run:
        from .dry_run import check_recipe

        return tell(check_recipe(recipe, to), as_json)
    from .progress import bars
    from .run import run

    finish(run(recipe, to, progress=bars), as_json)


@app.command()
@guarded
def adapt(
    recipe: Recipe,
    how: Annotated[str, typer.Option(help='Adapt steps, such as "ri(steps=300)".')] = "ri",
    to: To = Path("adapted"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Adapt a recipe's experts on its unlabeled inputs, one folder an expert; resumes where it was stopped."""
    if dry_run:
        from .dry_run import check_adapt

        return tell(check_adapt(recipe, how, to), as_json)
    from .adapt import adapt
    from .prepare import prepare
    from .progress import bars
    from .recipe import read_recipe

    told = read_recipe(recipe)
    ready = prepare(told, progress=bars)
    if ready.inputs is None:
        raise RecipeError(f"{recipe}: adapting needs unlabeled inputs: add [inputs] files = [...]")
    adapted = adapt(
        ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs, how=how, into=to,
        seed=told.seed, kind=ready.kind, heads_key=ready.heads_key, progress=bars,
    )  # fmt: skip
    say({"adapted": {name: str(to / name) for name in adapted}}, as_json, f"adapted {len(adapted)} experts into {to}")


@app.command()
@guarded
def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="The base: a folder, a weights file, a Hub name, none (with --as-adapter); or a mergekit YAML."
        ),
    ],
    experts: Experts = None,
    how: How = "",
    to: Annotated[
        Path, typer.Option("--to", parser=place, metavar="PATH", help="The folder for the merged model.")
    ] = Path("merged"),
    own: Own = None,
    where: Patterns = None,
    ingredient: Ingredients = None,
    vocabulary: Vocabulary = None,
    dtype: Dtype = None,
    delta: Delta = False,
    as_adapter: AsAdapter = False,
    rank: Rank = None,
    shard_size: ShardSize = None,
    part: Part = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge experts of one base into a folder that the model's own library loads."""
    stored = stored_as(delta, as_adapter)
    told = (own, where, ingredient, vocabulary, dtype, stored, read_rank(rank), shard_size, part)
    if dry_run:
        return tell(checked(base, experts, how, to, *told, seed), as_json)
    from .late import import_torch

    import_torch()
    from .merge import merge
    from .progress import bars
    from .where import read_where

    if base.endswith((".yml", ".yaml")):
        from .mergekit import merge_config

        says_all(base, experts, how, own, where, ingredient, vocabulary, dtype, delta, as_adapter, rank, part)
        merge_config(
            base, into=to, seed=seed, shard_size=shard_size, progress=bars,
            say=lambda line: typer.echo(f"note: {line}", err=True),
        )  # fmt: skip
        return say({"merged": str(to), "config": base}, as_json, f"merged {base} into {to}")
    if not experts or not how:
        raise typer.BadParameter("give BASE, one or more EXPERT and --how SENTENCE, or a mergekit YAML alone")
    try:
        patterns = read_where(where or ())
    except MerganserError:
        checked(base, experts, how, to, *told, seed).tell()  # with all else that is wrong
        raise
    if size := 64 if as_adapter else _free_pieces(how):
        freed_goes_back(size << 20, size << 20)
    merge(
        read_base(base), experts, how, into=to, own=own or (), seed=seed, ingredients=pairs(ingredient, "--ingredient"),
        part=read_part(part), where=patterns, vocabulary=vocabulary, dtype=dtype, stored=stored,
        rank=read_rank(rank), shard_size=shard_size, progress=bars,
    )  # fmt: skip
    if as_adapter:
        return tell_adapter(to, len(experts), how, as_json)
    what = f"part {part} of {len(experts)} experts" if part else f"{len(experts)} experts"
    say({"merged": str(to), "sentence": how, "part": part}, as_json, f"merged {what} into {to}")


@app.command("check")
@guarded
def check_all(
    base: Annotated[str, typer.Argument(help="The base as for `merge`; or a recipe.toml, or a mergekit YAML, alone.")],
    experts: Experts = None,
    how: How = "",
    to: Annotated[
        Path | None, typer.Option("--to", parser=place, metavar="PATH", help="The folder for the result.")
    ] = None,
    own: Own = None,
    where: Patterns = None,
    ingredient: Ingredients = None,
    vocabulary: Vocabulary = None,
    dtype: Dtype = None,
    delta: Delta = False,
    as_adapter: AsAdapter = False,
    rank: Rank = None,
    shard_size: ShardSize = None,
    part: Part = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say all that will go wrong, before a download or a tensor; exit status 1 if something prevents the merge."""
    told = (own, where, ingredient, vocabulary, dtype, stored_as(delta, as_adapter), read_rank(rank), shard_size, part)
    tell(checked(base, experts, how, to, *told, seed), as_json)


def checked(
    base: str, experts: list[str] | None, how: str, to: Path | None, own: list[str] | None, where: list[str] | None,
    ingredient: list[str] | None, vocabulary: str | None, dtype: str | None, stored: str, rank: int | str | None,
    shard_size: str | None, part: str | None, seed: int,
) -> Any:  # fmt: skip
    """Check what `merge` would be given."""
    from .check import check
    from .findings import Findings
    from .where import read_where

    if base.endswith((".toml", ".yml", ".yaml")):
        says_all(base, experts, how, own, where, ingredient, vocabulary, dtype, stored != "model", False, rank, part)
    elif not experts or not how:
        raise typer.BadParameter("give BASE, one or more EXPERT and --how SENTENCE; or a recipe or mergekit YAML alone")
    unread = Findings()
    patterns: dict[str, dict[str, dict[str, Any]]] = {}
    for line in where or ():
        with unread.gather("--where"):
            read_where([line], patterns)
    found = check(
        read_base(base), experts or (), how, into=to, own=own or (), seed=seed,
        ingredients=pairs(ingredient, "--ingredient"), part=read_part(part), where=patterns,
        vocabulary=vocabulary, dtype=dtype, stored=stored, rank=rank, shard_size=shard_size,
    )  # fmt: skip
    found.add(unread)
    return found


def says_all(file: str, *others: Any) -> None:
    """Refuse whatever else is told beside a file that says all itself: it would not be heard."""
    if any(others):
        raise typer.BadParameter(
            f"{file} says all itself, so BASE stands alone: no EXPERT, --how, --own, --where, --ingredient, --vocabulary, "
            "--dtype, --delta, --as-adapter, --rank or --part"
        )


def tell(found: Any, as_json: bool) -> None:
    """Print what a check found; exit with status 1 if something prevents the work."""
    if as_json:
        say(found.as_json(), True, "")
    else:
        from .show import show_findings

        show_findings(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
@guarded
def join(
    folder: Annotated[Path, typer.Argument(help="The folder that `merge --part` wrote its parts into.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make one model of the parts that `merge --part K/N` wrote."""
    if dry_run:
        from .dry_run import check_join

        return tell(check_join(folder), as_json)
    from .progress import bars
    from .weights.parts import join

    joined = join(folder, progress=bars)
    say({"merged": str(folder), "tensors": len(joined)}, as_json, f"joined {len(joined)} tensors into {folder}")


def pairs(told: list[str] | None, option: str) -> dict[str, str]:
    """Read ``NAME=VALUE`` options."""
    if wrong := [text for text in told or () if "=" not in text]:
        raise typer.BadParameter(f"{option} is NAME=FOLDER, got '{wrong[0]}'")
    given = [text.split("=", 1) for text in told or ()]
    if empty := [name for name, folder in given if not name or not folder]:
        raise typer.BadParameter(f"{option} is NAME=FOLDER, one of them is empty ('{empty[0]}')")
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise typer.BadParameter(f"{option} {twice[0]} is given twice; give it once")
    return dict(given)


def stored_as(delta: bool, as_adapter: bool) -> str:
    """Return as what the result is stored."""
    if delta and as_adapter:
        raise typer.BadParameter("--delta and --as-adapter: give one of them")
    return "delta" if delta else "adapter" if as_adapter else "model"


def read_rank(text: str | None) -> int | str | None:
    """Read a rank: a number, or a word that is judged where the rest is."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def read_base(text: str) -> str | None:
    """Read BASE, which is ``none`` where adapters are merged into one without it."""
    return None if text == "none" and not Path(text).exists() else text


def tell_adapter(folder: Path, experts: int, how: str, as_json: bool) -> None:
    """Say what a rank left out of a merge."""
    from .card import read_card

    told = (read_card(folder) or {})["adapter"]
    error = told["error"]
    text = (
        f"merged {experts} experts into {folder}: one adapter of rank {told['rank']}, {told['modules']} modules\n"
        f"relative error: {error['all']:.3g} in all, {error['median']:.3g} in the median module, {error['worst'][1]:.3g} "
        f"at most ({error['worst'][0]})"
    )
    say({"merged": str(folder), "sentence": how, "adapter": told}, as_json, text)


def read_part(text: str | None) -> tuple[int, int] | None:
    """Read ``K/N``."""
    if text is None:
        return None
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise typer.BadParameter(f"--part is K/N, such as 2/8, got '{text}'")
    return int(numbers[0]), int(numbers[1])


# `ls` and `show` take their arguments as they come: typer reads declared ones through pydantic, whose import takes
# longer than all they do
AS_THEY_COME: dict[str, Any] = {"cls": _Command, "context_settings": {"allow_extra_args": True}}


@app.command("ls", options_metavar="[FOLDER]... [OPTIONS]", **AS_THEY_COME)
@guarded
def list_what_there_is(context: typer.Context, as_json: Json = False) -> None:
    """Name the steps and suites there are; or the models and runs in and below FOLDERs."""
    if context.args:
        from dataclasses import asdict

        from .inventory import found_in

        found = found_in(context.args)
        if as_json:
            return say([asdict(one) for one in found], True, "")
        from .show import show_found

        return show_found(found)
    from . import catalog

    steps, suites = catalog.steps(), catalog.suites()
    if as_json:
        return say({"steps": [step.as_json() for step in steps], "suites": suites}, True, "")
    from .show import show_steps

    show_steps(steps, suites)


@app.command("show", options_metavar="STEP|FOLDER|FILE [OPTIONS]", **AS_THEY_COME)
@guarded
def show_one(context: typer.Context, as_json: Json = False) -> None:
    """Tell a STEP's formula, knobs, needs and cost; or a model's card, tensors, sizes and dtypes."""
    from . import catalog

    if len(context.args) != 1:
        raise typer.BadParameter("give one thing to show: a step, a folder or a .safetensors file")
    what = context.args[0]
    if os.sep in what and ":" not in what and not Path(what).exists():
        raise WeightsError(f"{what}: no such file or folder")
    if catalog.is_step(what) or not Path(what).exists():
        step = catalog.step(what)
        if as_json:
            return say(step.as_json(), True, "")
        from .show import show_step

        return show_step(step, catalog.COSTS[step.cost])
    from .inventory import model

    told = model(what)
    if as_json:
        return say(told.as_json(), True, "")
    from .show import show_model

    show_model(told)


@app.command()
@guarded
def learn(
    what: Annotated[
        str,
        typer.Argument(
            help="fisher, gram, inputs (of layers, for esm), coefficients (AdaMerging) or surgery (of a merged model)."
        ),
    ],
    recipe: Recipe,
    to: To = Path("ingredients"),
    rows: Annotated[
        int, typer.Option(min=1, help="How many inputs an expert, from its task's validation split.")
    ] = 256,
    on: Annotated[
        str,
        typer.Option(
            help="Coefficients and surgery are learned on the tasks' own inputs (tasks) or the recipe's (inputs)."
        ),
    ] = "tasks",
    steps: Annotated[int, typer.Option(min=1, help="Coefficients and surgery: how many steps.")] = 1000,
    model: Annotated[Path | None, typer.Option(help="Surgery: the merged model whose features are corrected.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Learn an ingredient (Fisher information, Gram matrices, layers' inputs, AdaMerging's coefficients) for a recipe's
    experts, or Surgery's corrections of a merged model's features; no label is used.
    """
    if dry_run:
        from .dry_run import check_learn

        return tell(check_learn(recipe, what, to, on, model), as_json)
    from .learn.ingredient import learn_ingredient
    from .progress import bars
    from .recipe import read_recipe

    folders = learn_ingredient(read_recipe(recipe), what, to, rows=rows, on=on, steps=steps, model=model, progress=bars)
    told = {name: str(folder) for name, folder in folders.items()}
    use = f'[ingredients] {what} = "{to}"' if model is None else f"merganser eval {recipe} {model} --surgery {to}"
    say({what: told}, as_json, f"{what} learned into {to}; use: {use}")


@app.command()
@guarded
def distil(
    recipe: Recipe,
    model: Annotated[Path, typer.Argument(help="The merged model to begin at.")],
    to: To = Path("distilled"),
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 400,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option(min=1, help="Inputs a step.")] = 32,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Teach a merged model what a recipe's experts say, on the recipe's unlabeled inputs; resumes where it was stopped."""
    if dry_run:
        from .dry_run import check_distil

        return tell(check_distil(recipe, model, to), as_json)
    from .learn.distil import distil_model
    from .progress import bars
    from .recipe import read_recipe

    distil_model(read_recipe(recipe), model, to, steps=steps, lr=lr, batch=batch, progress=bars)
    say({"distilled": str(to)}, as_json, f"distilled into {to}; score it: merganser eval {recipe} {model} {to}")


@app.command("eval")
@guarded
def evaluate(
    recipe: Recipe,
    models: Annotated[list[Path], typer.Argument(help="Models to score on the recipe's tasks.")],
    surgery: Annotated[
        Path | None, typer.Option(help="Corrections of the one model's features, from learn surgery: scored beside it.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score models on a recipe's tasks, each task with its own head."""
    if dry_run:
        from .dry_run import check_models

        return tell(check_models(recipe, models, "score", surgery), as_json)
    from .card import digest
    from .evaluate.run import Model, evaluate
    from .evaluate.table import summary
    from .learn.surgery import check_one, corrected, read_surgery
    from .prepare import prepare
    from .recipe import read_recipe

    if surgery is not None:
        check_one(models)
        read_surgery(surgery)
    ready = prepare(read_recipe(recipe))
    found = {}
    for path in models:
        weights = ready.opened(path)
        found[str(path)] = summary(evaluate(Model(ready.encoder, weights, ready.heads, ready.kind), ready.test))
        if surgery is not None:
            heads = corrected(ready.heads, read_surgery(surgery, digest(weights)))
            model = Model(ready.encoder, weights, heads, ready.kind)
            found[f"{path}, corrected"] = summary(evaluate(model, ready.test))
    if as_json:
        return say(found, True, "")
    from .show import show_scores

    show_scores(found, list(ready.tasks))


@app.command()
@guarded
def diagnose(
    recipe: Recipe,
    models: Annotated[list[Path], typer.Argument(help="Merged models to diagnose.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure cross-task interference of merged models and the drift of each expert under every other head."""
    if dry_run:
        from .dry_run import check_models

        return tell(check_models(recipe, models, "diagnose"), as_json)
    from .diagnose.interference import diagnose
    from .models.inputs import Subset, torch
    from .prepare import prepare
    from .progress import bars
    from .recipe import LimitPart, read_recipe

    ready = prepare(read_recipe(recipe))
    few = ready.recipe.limits.diagnose or LimitPart().diagnose  # 0: none in a run, but here it is asked for
    inputs = {n: Subset(t.inputs, torch.arange(min(few, len(t)))) for n, t in ready.test.items()}
    merged = {str(path): ready.opened(path) for path in models}
    result = diagnose(
        ready.base, ready.experts, merged, encoder=ready.encoder, heads=ready.heads, inputs=inputs, kind=ready.kind,
        progress=bars,
    )  # fmt: skip
    if as_json:
        return say({**result.__dict__, "sums": {name: result.total(name) for name in result.xi}}, True, "")
    from .show import show_matrix

    show_matrix("drift of expert (row) under head (column), nats", result.tasks, result.drift)
    for name, matrix in result.xi.items():
        show_matrix(f"interference of {name}: xi = {result.total(name):.4f}", result.tasks, matrix)


@app.command()
@guarded
def sources(
    recipe: Recipe,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="More files, data sets of the Hub (hub:org/name), or what needs neither (dead-leaves:1000)."
        ),
    ] = None,
    few: Annotated[int, typer.Option(min=1, help="How many inputs of each to look at.")] = 1000,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rank unlabeled inputs by how well they cover the heads' classes: seconds, no label, no training."""
    if dry_run:
        from .dry_run import check_sources

        return tell(check_sources(recipe, files or []), as_json)
    from .diagnose.sources import sources_of
    from .progress import bars
    from .recipe import read_recipe

    found = sources_of(read_recipe(recipe), files or [], few=few, progress=bars)
    if as_json:
        return say([one.__dict__ for one in found], True, "")
    from .show import show_sources

    show_sources(found)


@app.command()
@guarded
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `run`, `demo` or `bench` wrote.")],
    to: Annotated[
        Path | None, typer.Option("--to", parser=place, metavar="PATH", help="The HTML file to write.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also an SVG of what adapting gained in the first run.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write one offline HTML page about a run, or comparing several."""
    if dry_run:
        from .dry_run import check_report

        return tell(check_report(folders, to), as_json)
    from .report.page import report

    path = report(*folders, to=to)
    found = {"report": str(path)}
    if figure is not None:
        from .report.figure import gains_figure

        figure.write_text(gains_figure(json.loads((folders[0] / "scores.json").read_text("utf-8"))), encoding="utf-8")
        found["figure"] = str(figure)
    say(found, as_json, "\n".join(f"{what}: {where}" for what, where in found.items()))


@app.command()
@guarded
def demo(to: To = Path("merganser-demo"), seed: Seed = 0, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Train, adapt, merge and report on real small data, offline, in a few minutes: start here."""
    if dry_run:
        from .dry_run import check_suite

        return tell(check_suite("demo", None, None, to), as_json)
    from .progress import bars
    from .suites.demo import demo

    finish(demo(to, seed=seed, progress=bars), as_json)


@app.command()
@guarded
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="The suite: text, lora, vision, domains, lm, lora-lm, clip-8, clip-14, clip-20 or domainnet."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of tasks (and aux/ with unlabeled inputs); without it, the Hub's."),
    ] = None,
    how: Annotated[list[str] | None, typer.Option(help="A sentence to run; may be repeated.")] = None,
    to: To = Path("bench"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1,
    experts_only: Annotated[bool, typer.Option(help="Fine-tune and cache the experts, then stop.")] = False,
    network: Annotated[
        str | None,
        typer.Option(
            help="clip-*: ViT-B/32, ViT-B/16 or ViT-L/14; vision, domains of pictures: EfficientNet-Lite0 or conv."
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="clip-*: whose experts: tall-masks, task-vectors or fusionbench.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="clip-*, domainnet: a folder of models in the Hub's layout.")
    ] = None,
    inputs: Annotated[
        list[Path] | None, typer.Option(help="clip-*, domainnet: unlabeled pictures (a folder, .parquet, .tar, .npz).")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="clip-*, domainnet: at most so many test rows a task.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="clip-*: default (scales as written) or tuned (also chosen on validation).")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="text, lora, vision: a question over several seeds, with table and figure: alpha, amount, aware, "
            "baselines, distance, form, knobs, lr, mergers, part, proxy, sources, steps, tasks, together or transfer. "
            "--how then replaces its mergers."
        ),
    ] = None,
    ri: Annotated[
        str | None, typer.Option(help="With --study: knobs of the suite's own ri to change, such as 'ri(steps=100)'.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="With --study: one of its variations, such as 50 of steps; may be repeated."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a suite of real tasks: fine-tune the experts once, then score sentences with and without adapting."""
    from .progress import bars
    from .suites import ON_THE_HUB, open_suite

    settings: dict[str, Any] = {"network": network, "family": family, "models": models}
    settings |= {"inputs": inputs, "rows": rows, "protocol": protocol}
    if ri is not None and study is None:
        raise DataError("--ri changes what a study adapts with: give --study too")
    if only and study is None:
        raise DataError("--only chooses among the variations of a study: give --study too")
    suite = open_suite(name, **settings)
    if data is None and name in ("domains", "domainnet"):
        raise DataError(f"suite '{name}' needs --data FOLDER")
    if dry_run:
        from .dry_run import check_suite

        return tell(check_suite(name, data, how, to, seeds, study=study, ri=ri, only=only or (), **settings), as_json)
    if name in ON_THE_HUB:
        from .suites.hub import located

        data = located(ON_THE_HUB[name], data)
    if study is not None:
        from .show import show_study
        from .suites import studies

        chosen = studies.suite_of(name, suite)
        assert data is not None, "suites with studies are on the Hub, so there is a folder now"
        found = studies.bench(chosen, data, to, study, seeds=seeds, how=how, ri=ri, only=only or (), progress=bars)
        return show_study(found, as_json)
    path = suite.bench(data, to, how=how or None, seeds=seeds, experts_only=experts_only, progress=bars)
    if experts_only:
        return say({"experts": str(path)}, as_json, f"experts: {path}")
    finish(path, as_json)


def say(value: Any, as_json: bool, text: str) -> None:
    """Print a result for a machine or for a person."""
    typer.echo(json.dumps(value) if as_json else text)


def finish(report: Path, as_json: bool) -> None:
    """Print what a run found: its table for people, scores.json for machines."""
    from .card import read_json

    scores = read_json(report.parent / "scores.json")
    published = read_json(report.parent / "published.json")
    if as_json or scores is None:
        found = {"report": str(report), "scores": scores}
        return say(found if published is None else {**found, "published": published}, as_json, f"report: {report}")
    from .show import show_published, show_table

    show_table(scores)
    if published is not None:
        show_published(published)
    typer.echo(f"\nreport: {report}")


def _free_pieces(how: str) -> int | None:
    """Return from how many MiB on a sentence's freed memory had better go back; None: as usual, or a wrong sentence."""
    from .sentence import parse

    with contextlib.suppress(MerganserError):
        steps = parse(how).merging.steps
        if all(step.elementwise for step in steps):
            return 64
        return 1 if steps[0].kind == "align" else None
    return None


def main() -> None:
    """Run the command line."""
    freed_goes_back(10 << 20, 16 << 20)
    # importing torch makes many objects and no rubbish: looking through them again and again is a tenth of it
    gc.set_threshold(100_000)
    try:
        app()
    except SystemExit as done:
        if "torch" not in sys.modules or not isinstance(done.code, int):
            raise
        # taking torch down module by module costs a quarter of what importing it does, and everything is written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code)


if __name__ == "__main__":
    main()
