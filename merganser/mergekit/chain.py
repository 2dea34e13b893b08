"""Several merges in one file, as mergekit-multi has them: each a config, which may name others as its models.

One with a ``name`` is written to INTO/name, the one without a name to INTO itself; each after those that it names.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..weights.header import Headers, Weights
from ..weights.open import Source as Place
from ..weights.open import open_headers
from ..weights.stored import PART
from .config import Told, read_configs
from .jobs import Plan, plan_one

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def plans(
    path: str | Path,
    into: str | Path | None = None,
    *,
    seed: int = 0,
    opened: Callable[[Place], Weights] = open_headers,
) -> list[tuple[Plan, Path | None]]:
    """Return what the mergekit YAML at ``path`` asks for, merge by merge in order, each with its folder.

    No tensor is read; what an earlier merge will write is known by its headers.
    Raises one error for all that is wrong: RecipeError (the YAML) or WeightsError (the models).
    """
    path = Path(path)
    told = read_configs(path)
    if len(told) == 1:
        return [(plan_one(path, told[0], seed, opened), None if into is None else Path(into))]
    made: dict[str, Weights] = {}
    found = []
    for one in in_order(path, told):
        planned = plan_one(path, one, seed, opened, made, f"'{one.name}'" if one.name else "the one without a name")
        if one.name:
            made[one.name] = Headers(planned.spec, one.name, planned.origin.path)
        found.append((planned, None if into is None else place_of(one, into)))
    return found


def place_of(told: Told, into: str | Path) -> Path:
    """Return where a merge of several is written."""
    return Path(into) / (told.name or "")


def in_order(path: Path, told: Sequence[Told]) -> Iterator[Told]:
    """Return the merges, each behind those that it names. Raises RecipeError for names that say no order."""
    names = [one.name for one in told]
    wrong = [f"two configs are called '{name}'" for name in sorted({n for n in names if n and names.count(n) > 1})]
    if names.count(None) > 1:
        wrong.append(
            f"{names.count(None)} of {len(told)} configs have no name; one may, and it is the last to be merged"
        )
    for name in filter(None, names):
        if not NAME.fullmatch(name) or PART.fullmatch(name):
            wrong.append(f"'{name}' is written to a folder of that name: letters, digits, dots, - and _ alone")
    if wrong:
        raise RecipeError(f"{path}: {'; '.join(wrong)}", wrong)
    by_name = dict(zip(names, told, strict=True))
    try:
        order = TopologicalSorter({one.name: named_in(one.said) & set(filter(None, names)) for one in told})
        return iter([by_name[name] for name in order.static_order()])
    except CycleError as error:
        circle = " needs ".join(f"'{name}'" for name in reversed(error.args[1]))
        raise RecipeError(f"{path}: {circle}: a circle") from None


def named_in(said: Any) -> set[str]:
    """Return the models that a config names, by name alone."""
    found: set[str] = set()
    if isinstance(said, Mapping):
        for key, value in said.items():
            if key in ("model", "base_model", "path") and isinstance(value, str):
                found.add(value.partition("+")[0].partition("@")[0])
            else:
                found |= named_in(value)
    elif isinstance(said, list):
        found = found.union(*map(named_in, said))
    return found
