"""One offline HTML file about one or more runs.

The page asks nothing of the network: style, script and drawings are in it, and its content security policy forbids
everything else (so a name that smuggles markup in could not load anything either).
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import DataError
from . import view
from .folder import Run, read_run

PAGE = "report.html"


def report(*folders: str | os.PathLike[str], to: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML page about the run ``folders`` and return its path (``report.html`` in the first, or ``to``).

    Several folders are compared on one page. Raises ``DataError`` for a folder that is no run, ``MissingExtra``
    without matplotlib.
    """
    if not folders:
        raise DataError("report needs at least one folder that 'merganser run' wrote")
    runs = [read_run(Path(folder)) for folder in folders]
    target = Path(to) if to is not None else Path(folders[0]) / PAGE
    if target.is_dir():
        target = target / PAGE
    html = page(runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(target)  # a reader sees the old page or the new one, never half
    return target


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML; the same runs give the same bytes."""
    environment = Environment(
        loader=PackageLoader("merganser.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["columns_for"] = view.columns_for
    own = {name: environment.get_template(name).render() for name in ("page.css", "page.js")}
    digest = base64.b64encode(hashlib.sha256(own["page.js"].encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        runs=[view.run_view(run, f"r{number}") for number, run in enumerate(runs, start=1)],
        comparison=view.comparison(runs) if len(runs) > 1 else None,
        css=Markup(own["page.css"]),
        js=Markup(own["page.js"]),
        js_digest=digest,
    )
