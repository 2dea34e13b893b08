"""The command line: every verb reads its arguments, imports what it needs, and calls one function.

Exit status: 0 done, 1 the work failed (the message says what, where and what to do), 2 usage, 130 stopped by Ctrl-C.
"""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import MerganserError, RecipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge fine-tuned models without interference: adapt, merge, diagnose, evaluate, report.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of a table.")]
Recipe = Annotated[Path, typer.Argument(help="A recipe.toml: base, experts, tasks, inputs, sentences.")]
To = Annotated[Path, typer.Option("--to", help="The folder to write into; what is done there is not done again.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn merganser's errors into one line and exit status 1, and Ctrl-C into a word on how to go on."""

    @wraps(verb)
    def guard(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except MerganserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130) from None

    return guard


@app.command()
@guarded
def run(recipe: Recipe, to: To = Path("run"), as_json: Json = False) -> None:
    """Adapt, merge, evaluate, diagnose and report as a recipe says; a second run does only what is missing."""
    from .progress import bars
    from .run import run

    finish(run(recipe, to, progress=bars), as_json)


@app.command()
@guarded
def adapt(
    recipe: Recipe,
    how: Annotated[str, typer.Option(help='Adapt steps, such as "ri(steps=300)".')] = "ri",
    to: To = Path("adapted"),
    as_json: Json = False,
) -> None:
    """Adapt a recipe's experts on its unlabeled inputs, one folder an expert; resumes where it was stopped."""
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
    base: Annotated[Path, typer.Argument(help="The base: a folder with safetensors, or a .safetensors file.")],
    experts: Annotated[list[Path], typer.Argument(help="Models fine-tuned from the base.")],
    how: Annotated[str, typer.Option(help='The sentence, such as "ties(density=0.2) | scale(by=0.8)".')],
    to: Annotated[Path, typer.Option("--to", help="The folder for the merged model.")],
    own: Annotated[list[str] | None, typer.Option(help="Glob pattern of tensors left out; may be repeated.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge experts of one base into a folder that the model's own library loads."""
    from .merge import merge
    from .progress import bars

    merge(base, experts, how, into=to, own=own or (), seed=seed, progress=bars)
    say({"merged": str(to), "sentence": how}, as_json, f"merged {len(experts)} experts into {to}")


@app.command("eval")
@guarded
def evaluate(
    recipe: Recipe,
    models: Annotated[list[Path], typer.Argument(help="Models to score on the recipe's tasks.")],
    as_json: Json = False,
) -> None:
    """Score models on a recipe's tasks, each task with its own head."""
    from .evaluate.run import Model, evaluate
    from .evaluate.table import summary
    from .prepare import prepare
    from .recipe import read_recipe
    from .weights.open import check_match, open_weights

    ready = prepare(read_recipe(recipe))
    found = {}
    for path in models:
        weights = open_weights(path)
        check_match(ready.base, {str(path): weights}, ready.recipe.own)
        found[str(path)] = summary(evaluate(Model(ready.encoder, weights, ready.heads, ready.kind), ready.test))
    if as_json:
        return say(found, True, "")
    from .show import show_scores

    show_scores(found, list(ready.tasks))


@app.command()
@guarded
def diagnose(
    recipe: Recipe,
    models: Annotated[list[Path], typer.Argument(help="Merged models to diagnose.")],
    as_json: Json = False,
) -> None:
    """Measure cross-task interference of merged models and the drift of each expert under every other head."""
    from .diagnose.interference import diagnose
    from .models.inputs import Subset, torch
    from .prepare import prepare
    from .progress import bars
    from .recipe import read_recipe
    from .weights.open import open_weights

    ready = prepare(read_recipe(recipe))
    few = ready.recipe.limits.diagnose
    inputs = {n: Subset(t.inputs, torch.arange(min(few, len(t)))) for n, t in ready.test.items()}
    merged = {str(path): open_weights(path) for path in models}
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
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `run`, `demo` or `bench` wrote.")],
    to: Annotated[Path | None, typer.Option("--to", help="The HTML file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Write one offline HTML page about a run, or comparing several."""
    from .report.page import report

    path = report(*folders, to=to)
    say({"report": str(path)}, as_json, f"report: {path}")


@app.command()
@guarded
def demo(to: To = Path("merganser-demo"), seed: Seed = 0, as_json: Json = False) -> None:
    """Train, adapt, merge and report on real small data, offline, in a few minutes: start here."""
    from .progress import bars
    from .suites.demo import demo

    finish(demo(to, seed=seed, progress=bars), as_json)


@app.command()
@guarded
def bench(
    name: Annotated[str, typer.Argument(help="The suite: text.")],
    data: Annotated[Path, typer.Option(help="A folder of tasks (and aux/ with unlabeled inputs).")],
    how: Annotated[list[str] | None, typer.Option(help="A sentence to run; may be repeated.")] = None,
    to: To = Path("bench"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1,
    experts_only: Annotated[bool, typer.Option(help="Fine-tune and cache the experts, then stop.")] = False,
    as_json: Json = False,
) -> None:
    """Run a suite of real tasks: fine-tune the experts once, then score sentences with and without adapting."""
    from .errors import DataError, did_you_mean
    from .progress import bars
    from .suites import SUITES

    if name not in SUITES:
        raise DataError(f"unknown suite '{name}'{did_you_mean(name, SUITES)}; known: {', '.join(SUITES)}")
    from importlib import import_module

    suite = import_module(f"merganser.suites.{name}")
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
    if as_json or scores is None:
        return say({"report": str(report), "scores": scores}, as_json, f"report: {report}")
    from .show import show_table

    show_table(scores)
    typer.echo(f"\nreport: {report}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
