"""Tables for people, in the terminal."""

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BOLD, DIM = "1", "2"
KINDS = {
    "adapt": "model in, model out, before anything else",
    "edit": "one delta in, one out: each expert's left of the combining step, the merged one right of it",
    "align": "the experts' deltas into common coordinates and back",
    "combine": "the experts' deltas into one; every sentence has exactly one",
}


def _console() -> "Console":
    from rich.console import Console  # rich takes longer to import than `ls` to run

    return Console()


def _table(**settings: Any) -> "Table":
    from rich.table import Table

    return Table(**settings)


def bytes_text(n: float | None) -> str:
    """Return a number of bytes for people: 353 MB."""
    if n is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if n >= 100 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def show_published(told: Mapping[str, Any]) -> None:
    """Print what papers report beside what a run found, in percent."""
    title = (
        f"{told['tasks']} tasks, {told['network']}, {told['family']}: published beside ours, mean accuracy in percent"
    )
    table = _table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("scale")
    for name in ("ours", "published", "difference"):
        table.add_column(name, justify="right")
    for row in told["rows"]:
        value, gap = row["published"], row["difference"]
        shown = ("-", "-") if value is None else (f"{value:.1f}", f"{gap:+.1f}")
        table.add_row(row["row"], row["scale"], f"{row['ours']:.1f}", *shown)
    console = _console()
    console.print(table)
    console.print(f"published: {told['source']}", highlight=False, markup=False, soft_wrap=True)


def show_study(path: Path, as_json: bool) -> None:
    """Print a study: for each variation and merger the score with adapting and what it gained."""
    from .card import read_json

    told = read_json(path) or {}
    if as_json:
        print(json.dumps({"study": str(path), "found": told}))
        return
    if "rows" in told:
        return _show_rows(told, path)
    console = _console()
    if not console.is_terminal:
        console.width = max(console.width, 24 + 30 * (1 + len(told["mergers"])))
    _show_variations(
        console, told, f"{told['title']} Percent with adapting (gain, 95 % interval), scale chosen on validation"
    )
    _show_variations(console, told, "The same, scale as written", "written")
    console.print(f"figure: {path.with_suffix('.svg')}", highlight=False, markup=False, soft_wrap=True)


def _show_variations(console: Any, told: Mapping[str, Any], title: str, part: str | None = None) -> None:
    """Print a line a variation; ``part``: what stands under this word with each merger."""
    table = _table(title=f"{title}, {told['seeds']} seeds", title_justify="left")
    table.add_column(told["axis"], no_wrap=True)
    for merger in told["mergers"]:
        table.add_column(merger, justify="right")
    table.add_column("seconds an expert", justify="right")
    for one in told["variations"]:
        cells = [one["mergers"][merger] for merger in told["mergers"]]
        shown = [study_cell(cell[part] if part else cell) for cell in cells]
        table.add_row(one["label"], *shown, f"{one['seconds']:.0f}")
    console.print(table)


def _show_rows(told: Mapping[str, Any], path: Path) -> None:
    """Print a study that has a table of its own."""
    console = _console()
    table = _table(title=f"{told['title']} {told['seeds']} seeds", title_justify="left")
    for k, name in enumerate(told["head"]):
        table.add_column(name, justify="right" if k else "left", no_wrap=not k)
    for row in told["rows"]:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = max(console.width, 60 + 24 * len(told["head"]))
    console.print(table)
    console.print(f"figure: {path.with_suffix('.svg')}", highlight=False, markup=False, soft_wrap=True)


def study_cell(cell: Mapping[str, Any]) -> str:
    """Return what one variation gave with one merger, in points."""
    gain = cell["gain"]
    span = f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
    return f"{percent(cell['with'])} ({100 * gain['score']:+.1f} {span})"


def show_table(scores: Mapping[str, Any]) -> None:
    """Print the accuracy of base, experts and every sentence, then what adapting gained.

    Where the terminal is too narrow for all tasks, the table keeps the means; the report has the rest.
    """
    rows = scores["rows"]
    shown = [r for r in rows if r["tuned"] or not any(o["tuned"] and _pair(o) == _pair(r) for o in rows)]
    console = _console()
    tasks = [task["name"] for task in scores["tasks"]]
    width = max(len(label(row)) for row in shown) + sum(len(t) + 3 for t in tasks) + 28
    if console.is_terminal and width > console.width:
        tasks = []
    chosen = scores.get("chosen", "on validation data")
    table = _table(title=f"{scores['title']}: accuracy in percent, scale chosen {chosen}", title_justify="left")
    table.add_column("model", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("joint", justify="right")
    table.add_column("xi", justify="right")
    joint = scores.get("joint") or {}
    for name in ("base", "experts"):
        part = scores[name]
        each = (percent(part["tasks"][t]["score"]) for t in tasks)
        table.add_row(name, *each, percent(part["mean"]["score"]), first_hit(joint.get(name)), "")
    for name, heads in (("ensemble_own", "own heads"), ("ensemble_all", "all heads")):
        if name in joint:
            table.add_row(f"experts side by side, {heads}", *("" for _ in tasks), "", first_hit(joint[name]), "")
    table.add_section()
    for row in shown:
        each = (percent(row["tasks"][t]["score"]) for t in tasks)
        xi = "" if row["xi"] is None else f"{row['xi']:.2f}"
        told = (*each, percent(row["mean"]["score"]), first_hit(row), xi)
        table.add_row(label(row), *told, style="green" if row["adapt"] else None)
    if not console.is_terminal:
        console.width = max(console.width, width)
    console.print(table)
    if joint:
        said = f"joint: hits@1 among the {joint['classes']} classes of all tasks, the task not told, mean over tasks"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    for how in dict.fromkeys(row["adapt"] for row in shown if row["adapt"]):
        console.print(f"{short(how)}: {how}", highlight=False, markup=False, soft_wrap=True)
    for curve in filter(at_the_edge, scores["curves"]):
        words = " | ".join(filter(None, (curve["adapt"] and short(curve["adapt"]), curve["merge"])))
        console.print(f"{words}: the best scale is at the edge of those tried; try further ones", style="yellow")
    for gain in scores["gains"]:
        if gain["tuned"] or not any(g["tuned"] and g["merge"] == gain["merge"] for g in scores["gains"]):
            console.print(_gain(gain, rows), highlight=False, markup=False, soft_wrap=True)
    if domains := scores.get("domains"):
        title = f"{scores['title']}, other domains"
        show_table({**domains, "title": title})
    if overall := scores.get("overall", {}).get("tuned"):
        console.print(f"mean gain at tuned scales: {points(overall)}", highlight=False, markup=False, soft_wrap=True)
    if overall := scores.get("overall", {}).get("default"):
        console.print(
            f"mean gain at the scales as written: {points(overall)}", highlight=False, markup=False, soft_wrap=True
        )


def first_hit(told: Mapping[str, Any] | None) -> str:
    """Return hits@1 over the classes of all tasks (mean over tasks) in percent, nothing where it was not measured."""
    return percent(told["hits"]["1"]["macro"]) if told and told.get("hits") else ""


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
    """Print scores of models by task with the interval of the mean; what there is more of, tasks or models, goes down."""
    rows = [[*(percent(told["tasks"][t]["score"]) for t in tasks), *_mean(told["mean"])] for told in found.values()]
    names, models = [*tasks, "mean", "95 % interval"], [*found]
    corner, heads, lines = "model", names, list(zip(models, rows, strict=True))
    if len(models) < len(tasks):
        corner, heads, lines = "task", models, list(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    table = _table()
    table.add_column(corner, overflow="fold")
    for name in heads:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in lines:
        table.add_row(name, *cells)
    _console().print(table)


def _mean(mean: Mapping[str, float]) -> tuple[str, str]:
    return percent(mean["score"]), f"{percent(mean['low'])} to {percent(mean['high'])}"


def show_matrix(title: str, tasks: Sequence[str], matrix: Sequence[Sequence[float]]) -> None:
    """Print a matrix over tasks."""
    table = _table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for task in tasks:
        table.add_column(task, justify="right", overflow="fold")
    for task, row in zip(tasks, matrix, strict=True):
        table.add_row(task, *(f"{value:.3f}" for value in row))
    _console().print(table)


def show_sources(found: Sequence[Any]) -> None:
    """Print sources of unlabeled inputs, the best first."""
    table = _table(title="unlabeled inputs, those first that cover the classes best", title_justify="left")
    table.add_column("source", overflow="fold")
    for column in ("inputs", "cover", "near"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(one.source, f"{one.inputs:,}", f"{one.cover:.3f}", f"{one.near:.3f}")
    console = _console()
    if not console.is_terminal:
        console.width = 200  # paths in one piece
    console.print(table)


def show_findings(found: Any) -> None:
    """Print what would be done, what it needs, and everything found: errors first."""
    console = _console()
    if not console.is_terminal:
        console.width = 200
    plan, numbers = found.plan, found.numbers
    table = _table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="yellow", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in {**_planned(plan), **_needs(numbers)}.items():
        table.add_row(key, value)
    console.print(table)
    rows = [(kind, one) for kind in ("errors", "warnings", "notes") for one in getattr(found, kind)]
    if rows:
        table = _table(box=None, pad_edge=False, header_style="bold")
        for name in ("", "where", "what", "what to do"):
            table.add_column(name, overflow="fold")
        colours = {"errors": "red", "warnings": "yellow", "notes": "dim"}
        for kind, one in rows:
            table.add_row(
                kind[:-1], *(_escaped(text) for text in (one.where, one.what, one.remedy)), style=colours[kind]
            )
        console.print()
        console.print(table)
    errors = len(found.errors)
    console.print(
        "\nnothing prevents it" if found.ok else f"\n{errors} error{'s' if errors > 1 else ''}", highlight=False
    )


def _planned(plan: Mapping[str, Any]) -> dict[str, str]:
    told = {key: str(plan[key]) for key in ("recipe", "config", "suite", "study", "ri", "sentence") if plan.get(key)}
    if plan.get("steps"):
        cut = {True: "", False: " (whole tensors)"}
        told["steps"] = ", ".join(f"{s['kind']} {s['step']}{cut[s['elementwise']]}" for s in plan["steps"])
    if plan.get("sentences"):
        told["sentences"] = "\n".join(plan["sentences"])
    if plan.get("base"):
        told["base"] = plan["base"]
    if plan.get("experts"):
        told["experts"] = f"{len(plan['experts'])}: {', '.join(plan['experts'])}"
    if plan.get("part"):
        told["part"] = "/".join(map(str, plan["part"]))
    if plan.get("into"):
        told["into"] = plan["into"]
    if plan.get("stages"):
        told["stages"] = "\n".join(f"{'done   ' if s['done'] else 'to do  '}{s['stage']}" for s in plan["stages"])
        if any(s["done"] for s in plan["stages"]):
            told[""] = "what is done is done again where its inputs have changed since"
    return {key: _escaped(text) for key, text in told.items()}


def _needs(numbers: Mapping[str, Any]) -> dict[str, str]:
    told = {}
    if "merged" in numbers:
        told["tensors"] = f"{numbers['merged']} merged, {numbers['tensors'] - numbers['merged']} copied"
    if "bytes_read" in numbers:
        passes = f" in {numbers['passes']} passes" if numbers.get("passes", 1) > 1 else ""
        told["reads"] = f"{bytes_text(numbers['bytes_read'])}{passes}"
    if "bytes_written" in numbers:
        free = f" ({bytes_text(numbers['disk_free'])} free)" if numbers.get("disk_free") else ""
        told["writes"] = f"{bytes_text(numbers['bytes_written'])}{free}"
    if "memory" in numbers:
        free = f" ({bytes_text(numbers['memory_free'])} free)" if numbers.get("memory_free") else ""
        how = f"{numbers['whole_tensors']} tensors whole" if numbers["whole_tensors"] else "in cuts"
        told["memory"] = f"about {bytes_text(numbers['memory'])}{free}, {how}"
        told["time"] = f"roughly {numbers['seconds']:.0f} s on {numbers['threads']} cores, if nothing else runs"
    return told


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# Plain text, without rich: what `ls` and `show` print


def show_steps(steps: Sequence[Any], suites: Mapping[str, str]) -> None:
    """Print every step by its kind, with knobs and needs, and the suites."""
    width = max(len(name) for name in [*suites, *(step.name for step in steps)]) + 4

    def line(name: str, text: str, mark: str = "") -> None:
        print(_wrapped(f"  {name}".ljust(width), text, mark))

    for kind, about in KINDS.items():
        print(_marked(f"{kind}: {about}", BOLD))
        for step in (step for step in steps if step.kind == kind):
            knobs = [f"{k}={v!r}" for k, v in step.knobs.items()]
            line(step.name, step.summary if step.origin == "merganser" else f"{step.summary} ({step.origin})")
            if knobs or step.needs:
                needs = [f"needs {' and '.join(step.needs)}"] if step.needs else []
                line("", "; ".join(filter(None, [", ".join(knobs), *needs])), DIM)
        print()
    print(_marked("suites: merganser bench NAME, merganser demo", BOLD))
    for name, about in suites.items():
        line(name, about)
    print()
    print(
        _wrapped(
            "",
            "merganser show STEP tells its formula. A step of your own is written ./file.py:function in a sentence, or "
            "comes as an entry point in the group merganser.steps.",
        )
    )


def show_step(step: Any, means: str) -> None:
    """Print one step: its formula and words, knobs, needs, how it streams, where it is."""
    print(_marked(step.name, BOLD) + f": {step.kind} step\n\n{step.doc}\n")
    told = {"write": step.signature, "needs": ", ".join(step.needs) or "nothing but base and experts"}
    if step.scope:
        over = {
            "model": "the whole model",
            "tensor": "each tensor",
            "by knob": "the whole model or each tensor, by scope",
        }
        told["learns"] = f"from {over.get(step.scope, step.scope)} first, in passes of its own"
    if "rng" in step.takes:
        told["random"] = "yes, and the same for the same seed"
    _fields({**told, "cost": means, "file": step.source})


def show_found(found: Sequence[Any]) -> None:
    """Print models and runs with their sentence, size and date."""
    rows = [
        [f.path, f.kind, f.sentence, "" if f.tensors is None else str(f.tensors), bytes_text(f.nbytes), f.date]
        for f in found
    ]
    _columns(["path", "kind", "sentence", "tensors", "size", "date"], rows, right=(3, 4))
    for one in found:
        if one.wrong:
            print(f"damaged: {one.wrong}")


def show_model(model: Any) -> None:
    """Print a model's card, tensors by pattern, dtypes, ties and vocabulary."""
    _fields(_told(model))
    print()
    rows = [
        [g.pattern, str(g.count), g.dtype, " x ".join(map(str, g.shape)) or "scalar", bytes_text(g.nbytes)]
        for g in model.groups
    ]
    _columns(["tensors", "count", "dtype", "shape", "size"], rows, right=(1, 3, 4))


def _told(model: Any) -> dict[str, str]:
    card = model.card or {}
    told = {"model": model.path}
    told |= {key: str(card[key]) for key in ("kind", "sentence", "seed", "written", "seconds") if key in card}
    if isinstance(card.get("inputs"), Mapping):
        told["inputs"] = "\n".join(f"{name}  {str(sha)[:16]}" for name, sha in card["inputs"].items())
    if model.config:
        told["config"] = ", ".join(f"{key} {_plain(value)}" for key, value in model.config.items())
    if model.adapter:
        parts = (f"{key} {_plain(value)}" for key, value in model.adapter.items() if key != "full")
        told["adapter"] = ", ".join(parts)
        if model.adapter["full"]:
            told["in full"] = "\n".join(model.adapter["full"][:4])
    files = list(model.files.items())
    told["files"] = "\n".join(f"{name}  {bytes_text(size)}" for name, size in files[:4])
    told["files"] += f"\n... {len(files) - 4} more" if len(files) > 4 else ""
    told["tensors"] = f"{model.tensors}, {model.parameters:,} numbers, {bytes_text(model.nbytes)}"
    told["dtypes"] = ", ".join(
        f"{t['tensors']} {dtype} ({bytes_text(t['bytes'])})" for dtype, t in model.dtypes.items()
    )
    if model.tied:
        told["tied"] = "\n".join(f"{one} = {other}" for one, other in model.tied)
    words = model.vocabulary
    tables = f" (of {', '.join(words['tables'][:3])})" if words.get("tables") else ""
    said = [f"{words['vocab_size']} rows{tables}"] if "vocab_size" in words else []
    said += [f"{words['tokens']} tokens"] if words.get("tokens") else []
    return told | ({"vocabulary": ", ".join(said)} if said else {})


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _marked(text: str, mark: str) -> str:
    return f"\033[{mark}m{text}\033[0m" if mark and sys.stdout.isatty() else text


def _wrapped(first: str, text: str, mark: str = "") -> str:
    """Return ``text`` behind ``first``, broken to the terminal's width; whole where nobody watches."""
    if not sys.stdout.isatty():
        return (first + text).rstrip()
    width = max(40, shutil.get_terminal_size().columns - len(first))
    lines = textwrap.wrap(text, width, break_long_words=False) or [""]
    return "\n".join((first if k == 0 else " " * len(first)) + _marked(line, mark) for k, line in enumerate(lines))


def _fields(told: Mapping[str, str]) -> None:
    width = max(map(len, told)) + 2
    for key, value in told.items():
        for k, line in enumerate(value.split("\n")):
            print(_wrapped((key if k == 0 else "").ljust(width), line))


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        told = [c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(told).rstrip()

    print(_marked(line(names), BOLD))
    for row in rows:
        print(line(row))
