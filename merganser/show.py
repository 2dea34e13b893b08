"""Tables for people, in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def show_table(scores: Mapping[str, Any]) -> None:
    """Print the accuracy of base, experts and every sentence, then what adapting gained.

    Where the terminal is too narrow for all tasks, the table keeps the means; the report has the rest.
    """
    rows = scores["rows"]
    shown = [r for r in rows if r["tuned"] or not any(o["tuned"] and _pair(o) == _pair(r) for o in rows)]
    console = Console()
    tasks = [task["name"] for task in scores["tasks"]]
    width = max(len(label(row)) for row in shown) + sum(len(t) + 3 for t in tasks) + 20
    if console.is_terminal and width > console.width:
        tasks = []
    table = Table(title=f"{scores['title']}: accuracy in percent, scale chosen on validation", title_justify="left")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("xi", justify="right")
    for name in ("base", "experts"):
        part = scores[name]
        table.add_row(name, *(percent(part["tasks"][t]["score"]) for t in tasks), percent(part["mean"]["score"]), "")
    table.add_section()
    for row in shown:
        each = (percent(row["tasks"][t]["score"]) for t in tasks)
        xi = "" if row["xi"] is None else f"{row['xi']:.2f}"
        table.add_row(label(row), *each, percent(row["mean"]["score"]), xi, style="green" if row["adapt"] else None)
    if not console.is_terminal:
        console.width = max(console.width, width)
    console.print(table)
    for how in dict.fromkeys(row["adapt"] for row in shown if row["adapt"]):
        console.print(f"{short(how)}: {how}", highlight=False, markup=False, soft_wrap=True)
    for curve in filter(at_the_edge, scores["curves"]):
        words = " | ".join(filter(None, (curve["adapt"] and short(curve["adapt"]), curve["merge"])))
        console.print(f"{words}: the best scale is at the edge of those tried; try further ones", style="yellow")
    for gain in scores["gains"]:
        if gain["tuned"] or not any(g["tuned"] and g["merge"] == gain["merge"] for g in scores["gains"]):
            console.print(_gain(gain, rows), highlight=False, markup=False, soft_wrap=True)
    if overall := scores.get("overall", {}).get("tuned"):
        console.print(f"mean gain at tuned scales: {points(overall)}", highlight=False, markup=False, soft_wrap=True)
    if overall := scores.get("overall", {}).get("default"):
        console.print(
            f"mean gain at the scales as written: {points(overall)}", highlight=False, markup=False, soft_wrap=True
        )


def short(how: str) -> str:
    """Return the names of adapt words without their knobs."""
    return " | ".join(word.split("(")[0] for word in how.split(" | "))


def label(row: Mapping[str, Any]) -> str:
    """Return a row's sentence with its adapt words cut to their names."""
    return row["sentence"].replace(row["adapt"], short(row["adapt"]), 1) if row["adapt"] else row["sentence"]


def points(gain: Mapping[str, float]) -> str:
    """Return a gain in points with its interval."""
    return f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


def at_the_edge(curve: Mapping[str, Any]) -> bool:
    """Tell whether the best scale is the first or the last that was tried, so that a better one may lie outside."""
    values = [point["val"] for point in curve["points"]]
    return max(values) in (values[0], values[-1])


def _pair(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["merge"], row["adapt"]


def _gain(gain: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    before, after, g = rows[gain["without"]]["mean"]["score"], rows[gain["with"]]["mean"]["score"], gain["gain"]
    sure = "" if g["low"] > 0 else "  (not significant)" if g["high"] >= 0 else "  (a loss)"
    back = f", {percent(gain['recovered'], 0)} % of the loss recovered" if gain["recovered"] is not None else ""
    name = short(gain["adapt"])
    return f"{name} | {gain['merge']}: {percent(before)} -> {percent(after)}  {points(g)}{back}{sure}"


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
