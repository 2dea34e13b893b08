"""Git Re-Basin: renumber each expert's hidden units so that they match those of another model."""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.random import Generator
from torch import Tensor

SPECS = Path(__file__).with_name("permutations.toml")
SWEEPS = 100
GAIN = 1e-12

Group = dict[str, int]  # tensor name -> axis along which the group's units are numbered
Read = Callable[[str], tuple[Tensor | None, Tensor]]
Survey = Mapping[str, Mapping[int, Int[Tensor, "experts units"]]]


def permute(
    deltas: Float[Tensor, "experts *shape"],
    *,
    to: str = "first",
    spec: str = "auto",
    base: Float[Tensor, "*shape"] | None = None,
    name: str = "",
    survey: Survey | None = None,
) -> tuple[Float[Tensor, "experts *shape"], Callable[[Tensor], Tensor]]:
    """Renumber the hidden units of experts so that their weights agree best with those of a reference.

        P_g = argmax_P sum over (tensor, axis) of group g of <A, P B>,    A, B: reference's and expert's weights,
                                                            the unit axis first, B's other axes permuted as they stand

    one group after the other (a linear assignment each) until a sweep over the groups gains nothing. The experts'
    networks compute what they did; their weights, base + delta, are permuted. What `restore` gets stays as it is.

    to     "first": the other experts onto the first one; "base": all of them onto the base
    spec   which axes belong together: "auto" (transformers' feed-forward layers), the name of a table of
           ``permutations.toml`` beside this file ("mlp": numbered linear layers one after the other), or the path of
           a .toml file of the same form
    base   the base's tensor; without one the deltas are the weights

    ``survey`` is what `prepare` found; without it, or for tensors of no group, the deltas pass unchanged. The order in
    which groups of one chain are visited is drawn from `prepare`'s rng, and decides which local optimum is found.
    Needs scipy (extra "align"). Raises ValueError for an unknown word.
    Source: Ainsworth et al., Git Re-Basin (arXiv 2209.04836).
    """
    _check(to)
    _tables(spec)
    axes = {} if survey is None else survey.get(name, {})
    rows = []
    for expert, delta in enumerate(deltas):
        orders = [(axis, order[expert]) for axis, order in axes.items() if not _identity(order[expert])]
        rows.append(_weights(base, _taken(_weights(base, delta, 1), orders), -1) if orders else delta)
    return torch.stack(rows) if axes else deltas, lambda merged: merged


def prepare(
    read: Read, names: Sequence[str], *, to: str = "first", spec: str = "auto", rng: Generator | None = None
) -> Survey:
    """Return for each tensor of a group, by axis, every expert's order of units.

    ``read(name)`` gives the base's tensor, or None, and the deltas ``[experts, *shape]``; it is called for the tensors
    of one chain of groups at a time. Raises ValueError where no group is found, or scipy is missing.
    """
    _check(to)
    _assignment()
    groups = _groups(_tables(spec), names, cache(lambda name: read(name)[1].shape[1:]))
    if not groups and any(names):  # a tensor without a name only tries out the knobs
        raise ValueError(f"spec {spec!r} finds no units to permute in these tensors; name a table or a .toml file")
    found: dict[str, dict[int, Tensor]] = {}
    for chain in _chains(groups):
        tensors = {name: read(name) for group in chain for name in group}
        for group, orders in zip(chain, _orders(tensors, chain, to, rng), strict=True):
            for name, axis in group.items():
                found.setdefault(name, {})[axis] = orders
    return found


def _orders(
    tensors: Mapping[str, tuple[Tensor | None, Tensor]], chain: Sequence[Group], to: str, rng: Generator | None
) -> list[Int[Tensor, "experts units"]]:
    """Return for each group of a chain every expert's order of units."""
    first: dict[str, Tensor] = {}
    by_expert = []
    for expert in range(len(next(iter(tensors.values()))[1])):
        model = {name: _weights(base, deltas[expert], 1) for name, (base, deltas) in tensors.items()}
        if expert == 0:
            first = _bases(tensors) if to == "base" else model
        if model is first:  # the reference keeps its order
            by_expert.append([torch.arange(model[name].shape[axis]) for name, axis in map(_member, chain)])
        else:
            by_expert.append(match(first, model, chain, visits(len(chain), deepcopy(rng))))  # for each the same
    return [torch.stack(orders) for orders in zip(*by_expert, strict=True)]


def _bases(tensors: Mapping[str, tuple[Tensor | None, Tensor]]) -> dict[str, Tensor]:
    bases = {name: base for name, (base, _) in tensors.items() if base is not None}
    if len(bases) < len(tensors):
        raise ValueError("to='base' needs a base")
    return bases


def match(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Sequence[Group], order: Iterable[Sequence[int]]
) -> list[Int[Tensor, " units"]]:
    """Return for each group the order of b's units that fits a's best, visiting groups sweep by sweep as ``order`` says."""
    assign = _assignment()
    perms = [torch.arange(a[name].shape[axis]) for name, axis in map(_member, groups)]
    for _, sweep in zip(range(SWEEPS), order, strict=False):
        gained = False
        for g in sweep:
            others = [(group, perm) for k, (group, perm) in enumerate(zip(groups, perms, strict=True)) if k != g]
            score: Any = 0
            for name, axis in groups[g].items():
                other = [(group[name], perm) for group, perm in others if name in group]
                score = score + _units(a[name], axis) @ _units(_taken(b[name], other), axis).mT
            columns = torch.as_tensor(assign(score.numpy(), maximize=True)[1])
            here = torch.arange(len(columns))
            gained |= bool((score[here, columns].double() - score[here, perms[g]].double()).sum() > GAIN)
            perms[g] = columns
        if not gained:
            break
    return perms


def visits(groups: int, rng: Generator | None) -> Iterator[list[int]]:
    """Yield the order of groups sweep by sweep: drawn from ``rng``, or as they stand."""
    if rng is None:
        return repeat(list(range(groups)))
    return (rng.permutation(groups).tolist() for _ in count())


def _check(to: str) -> None:
    if to not in ("first", "base"):
        raise ValueError(f"to must be 'first' or 'base', got {to!r}")


def _tables(spec: str) -> list[dict[str, Any]]:
    """Return the tables that ``spec`` names."""
    path = Path(spec) if isinstance(spec, str) and spec.endswith(".toml") else None
    if path is not None and not path.is_file():
        raise ValueError(f"spec: there is no file '{path}'")
    tables = tomllib.loads((path or SPECS).read_text())
    if path is not None:
        return list(tables.values())
    if spec == "auto":
        return [table for table in tables.values() if not table.get("named")]
    if spec not in tables:
        raise ValueError(f"spec must be 'auto', a .toml file or one of {', '.join(tables)}, got {spec!r}")
    return [tables[spec]]


def _groups(tables: Sequence[Mapping[str, Any]], names: Sequence[str], shape: Callable[[str], Any]) -> list[Group]:
    """Return every group of units in these tensors whose sizes agree; the first table to claim an axis has it."""
    groups: list[Group] = []
    known = set(names)
    taken: set[tuple[str, int]] = set()
    for table in tables:
        for star, number, after in _places(table["all"], names):
            fill = _filled(table["all"], star, number, after)
            if not known.issuperset(fill) or taken & set(fill.items()):
                continue
            extra = _filled(table.get("if_present", {}), star, number, after)
            group = fill | {name: axis for name, axis in extra.items() if name in known}
            shapes = {name: shape(name) for name in group}
            if all(len(shapes[n]) > axis for n, axis in group.items()) and (
                len({shapes[n][axis] for n, axis in group.items()}) == 1
            ):
                groups.append(group)
                taken |= set(group.items())
    return groups


def _places(patterns: Mapping[str, int], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return what `*`, `#` and `#+` stand for wherever the first pattern matches."""
    first = re.escape(next(iter(patterns))).replace(r"\*", "(?P<star>.*?)").replace(r"\#", r"(?P<number>\d+)")
    found = [(m["star"], m.groupdict().get("number") or "") for name in names if (m := re.fullmatch(first, name))]
    places = []
    for star, number in found:
        later = sorted((n for s, n in found if s == star and n and int(n) > int(number)), key=int)
        places.append((star, number, later[0] if later else ""))
    return places


def _filled(patterns: Mapping[str, int], star: str, number: str, after: str) -> Group:
    return {p.replace("*", star).replace("#+", after or "-").replace("#", number): axis for p, axis in patterns.items()}


def _chains(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups put together that have tensors in common."""
    chains: list[list[Group]] = []
    for group in groups:
        near = [chain for chain in chains if any(group.keys() & other.keys() for other in chain)]
        chains = [chain for chain in chains if chain not in near]
        chains.append([other for chain in near for other in chain] + [group])
    return chains


def _member(group: Group) -> tuple[str, int]:
    return next(iter(group.items()))


def _weights(base: Tensor | None, x: Tensor, sign: int) -> Tensor:
    """Return ``x + base`` or ``x - base``."""
    return x if base is None else x + sign * base


def _units(x: Tensor, axis: int) -> Float[Tensor, "units rest"]:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).movedim(axis, 0).reshape(x.shape[axis], -1)


def _taken(x: Tensor, orders: Iterable[tuple[int, Tensor]]) -> Tensor:
    for axis, order in orders:
        x = x.index_select(axis, order.to(x.device))
    return x


def _identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


def _assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError("permute needs the 'align' extra: pip install 'merganser[align]'") from None
    return linear_sum_assignment
