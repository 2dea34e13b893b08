"""What people see while work is long: one bar a job, with its terms. Functions take a `Progress` and stay silent by default.

with progress("adapt digits", steps) as tick:
    tick(1, own=0.1, others=0.2)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[..., None]
Progress = Callable[[str, int], AbstractContextManager[Tick]]


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Tick]:
    """Show nothing."""
    yield lambda _advance=1, **_terms: None


@contextmanager
def bars(label: str, total: int) -> Iterator[Tick]:
    """Show a bar on standard error, which vanishes when done; plain silence where that is not a terminal."""
    if not sys.stderr.isatty():  # without rich, which is a fiftieth of a short merge
        with silent(label, total) as tick:
            yield tick
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        job = shown.add_task(label[:40], total=total, terms="")

        def tick(advance: int = 1, **terms: float) -> None:
            text = "  ".join(f"{k} {v:.4f}" for k, v in terms.items())
            shown.update(job, advance=advance)
            if terms:
                shown.update(job, terms=text)

        yield tick
