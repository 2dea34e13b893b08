"""Tables for people, in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def show_table(scores: Mapping[str, Any]) -> None:
    """Print the accuracy of base, experts and every sentence, then what adapting gained."""
    tasks = [task["name"] for task in scores["tasks"]]
    rows = scores["rows"]
    shown = [r for r in rows if r["tuned"] or not any(o["tuned"] and _pair(o) == _pair(r) for o in rows)]
    table = Table(title=f"{scores['title']}: accuracy in percent, scale chosen on validation", title_justify="left")
    table.add_column("model", overflow="fold")
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("xi", justify="right")
    for name in ("base", "experts"):
        part = scores[name]
        table.add_row(name, *(percent(part["tasks"][t]["score"]) for t in tasks), percent(part["mean"]["score"]), "")
    table.add_section()
    for row in shown:
        table.add_row(
            row["sentence"],
            *(percent(row["tasks"][t]["score"]) for t in tasks),
            percent(row["mean"]["score"]),
            "" if row["xi"] is None else f"{row['xi']:.2f}",
            style="green" if row["adapt"] else None,
        )
    console = Console(width=None)
    console.print(table)
    for gain in scores["gains"]:
        if gain["tuned"] or not any(g["tuned"] and g["merge"] == gain["merge"] for g in scores["gains"]):
            console.print(_gain(gain, rows), highlight=False, markup=False)


def _pair(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["merge"], row["adapt"]


def _gain(gain: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    before, after, g = rows[gain["without"]]["mean"]["score"], rows[gain["with"]]["mean"]["score"], gain["gain"]
    sure = "" if g["low"] > 0 else "  (not significant)" if g["high"] >= 0 else "  (a loss)"
    back = f", {percent(gain['recovered'], 0)} % of the loss recovered" if gain["recovered"] is not None else ""
    name = gain["adapt"].split("(")[0]
    return (
        f"{name} | {gain['merge']}: {percent(before)} -> {percent(after)}  "
        f"{100 * g['score']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}]{back}{sure}"
    )


def show_scores(found: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Print scores of models by task with the interval of the mean."""
    table = Table()
    table.add_column("model", overflow="fold")
    for name in (*tasks, "mean", "95 % interval"):
        table.add_column(name, justify="right")
    for model, told in found.items():
        mean = told["mean"]
        scores = [percent(told["tasks"][t]["score"]) for t in tasks]
        table.add_row(model, *scores, percent(mean["score"]), f"{percent(mean['low'])} to {percent(mean['high'])}")
    Console().print(table)


def show_matrix(title: str, tasks: Sequence[str], matrix: Sequence[Sequence[float]]) -> None:
    """Print a matrix over tasks."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for task in tasks:
        table.add_column(task, justify="right")
    for task, row in zip(tasks, matrix, strict=True):
        table.add_row(task, *(f"{value:.4f}" for value in row))
    Console().print(table)
