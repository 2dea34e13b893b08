"""Do these experts belong to this base, and if they nearly do: the views that make them match."""

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WeightsError
from .delta import over
from .header import FLOATS, WHOLE, Picked, Weights, header, matches, shape_of
from .stored import DTYPES, first
from .tied import canonical, canonical_by_config, tied_by_config, tied_copy
from .vocabulary import Difference, difference, fitted

QUANTISED = 4096  # entries: an integer matrix that large is weights, not a buffer, where integers are most of the model


class Matched(NamedTuple):
    """What a merge works on: mappings with the same names and shapes, whatever the checkpoints were like."""

    names: list[str]  # the tensors merged, in the base's order
    base: Weights
    experts: dict[str, Weights]
    alike: dict[str, str]  # tied tensors: the name whose random numbers they share
    write_tokenizer: Callable[[Path], None] | None  # to be called with the output folder, after the base's files
    taken: Sequence[tuple[str, str]] = ()  # by expert: what is taken for tied without being read


def match(
    base: Weights,
    experts: Mapping[str, Weights],
    own: Sequence[str] = (),
    *,
    vocabulary: str | None = None,
    sources: Mapping[str, Any] | None = None,
    unread: bool = False,
) -> Matched:
    """Return base and experts under the same names and shapes.

    - ``own`` patterns are left out; any other tensor that an expert lacks or has beyond the base's is an error, but for:
    - tied copies. X, which only one of the two has, is bit-equal there to Y, which both have: the expert's X is left
      out, or is its Y (`tied.tied_copy`). Tensors tied in every model share random numbers (``alike``).
    - tensors that are not floating point (position ids, ``num_batches_tracked``). They are never merged, so they may be
      missing, be more, or have another shape; the base's are kept. If they are most of a model it is quantised: error.
    - dtypes may differ (deltas are fp32, the result has the base's); fp8, complex and unknown ones are an error.
    - a stored delta (`delta.over`) is the base plus it.
    - vocabularies may differ where ``vocabulary`` says what to do (`vocabulary.match_vocabularies`; ``sources`` are
      folders of tokenizers by model for weights in memory). Other shapes must be equal.

    Only headers are read, the bytes of candidates for a tie (not with ``unread``: ``taken`` tells what is taken for
    tied), and tokenizer files. Raises one WeightsError for all that is wrong with all experts; three names are given of each
    kind.
    """
    experts = {who: over(base, weights) for who, weights in experts.items()}
    wrong = _Wrong()
    for who, weights in {"": base, **experts}.items():
        wrong.dtypes(who, weights, own)
    taken: list[tuple[str, str]] = []
    views = {
        who: _completed(base, weights, own, wrong, who, taken if unread else None) for who, weights in experts.items()
    }
    names = [n for n in base if not matches(n, own)]
    found: Difference | None = None
    try:
        found = difference(base, views, sources, own)
        if found is not None and vocabulary is None:
            wrong.add("", str(found))
    except WeightsError as error:
        wrong.add("", str(error))
    tables = frozenset(found.names) if found else frozenset()
    for who, weights in views.items():
        wrong.shapes(who, base, weights, names, tables)
    wrong.tell()
    alike = (canonical_by_config if unread else canonical)(base, views)
    matched, others, writer = fitted(found, base, views, vocabulary)
    return Matched(names, matched, others, alike, writer, taken)


def check_match(base: Weights, experts: Mapping[str, Weights], own: Sequence[str] = ()) -> list[str]:
    """Return the names merged: the base's, less those that ``own`` patterns leave to each expert.

    Raises WeightsError as `match` does, whose views a merge works on where an expert lacks a tied copy.
    """
    return match(base, experts, own).names


def _completed(
    base: Weights, expert: Weights, own: Sequence[str], wrong: "_Wrong", who: str, taken: list | None
) -> Weights:
    """Return the expert with the base's names, as far as rules allow; what they do not allow goes to ``wrong``.

    ``taken``: a list for what is taken for tied without reading it; None where it may be read.
    """
    unread = taken is not None
    wanted = [n for n in base if not matches(n, own)]
    lacks = [n for n in wanted if n not in expert]
    more = [n for n in expert if n not in base and not matches(n, own)]
    both = [n for n in wanted if n in expert]
    given: dict[str, tuple[Weights, str]] = {}
    missing = []
    for name in lacks:
        if not _merged(base, name):
            given[name] = (base, name)
        elif other := tied_by_config(expert, name, header(base, name)[1], both):
            given[name] = (expert, other)
        elif other := tied_copy(base, name, both, unread=unread):
            given[name] = (expert, other)
            if taken is not None:
                taken.append((who, f"lacks {_copy_of(name, other)}"))
        else:
            missing.append(name)
    beyond = []
    for name in more:
        if _merged(expert, name):
            other = tied_copy(expert, name, both, unread=unread)
            if other is None:
                beyond.append(name)
            elif taken is not None:
                taken.append((who, f"has, and the base lacks, {_copy_of(name, other)}"))
    wrong.names(who, missing, beyond, both)
    if not given:
        return expert
    return Picked({n: (expert, n) for n in expert} | given, expert)


def _copy_of(name: str, other: str) -> str:
    return f"'{name}', by its shape a tied copy of '{other}'"


def _merged(weights: Weights, name: str) -> bool:
    return header(weights, name)[0] not in WHOLE


class _Wrong:
    """All that is wrong, experts with the same fault together."""

    def __init__(self) -> None:
        self.faults: dict[str, list[str]] = {}
        self.leave_out: list[str] = []
        self.fixed = False

    def add(self, who: str, what: str) -> None:
        """Note one fault of a model (``""``: the base, or all)."""
        self.faults.setdefault(what, []).append(who)

    def names(self, who: str, missing: list[str], beyond: list[str], both: list[str]) -> None:
        """Note tensors that an expert lacks or has beyond the base's."""
        for what, names in (("lacks", missing), ("has, and the base lacks,", beyond)):
            if names:
                self.add(who, f"{what} {first(names)}")
                self.leave_out += _patterns(names, both)

    def shapes(self, who: str, base: Weights, expert: Weights, names: Iterable[str], tables: frozenset[str]) -> None:
        """Note tensors of other shapes; of ``tables`` the rows may differ."""
        said = []
        for name in names:
            if name in expert and _merged(base, name):
                has, wants, skip = shape_of(expert, name), shape_of(base, name), int(name in tables)
                if has[skip:] != wants[skip:]:
                    said.append(f"'{name}' {list(has)} instead of {list(wants)}")
        if said:
            self.add(who, f"has other shapes: {_three(said)}")
            self.fixed = True

    def dtypes(self, who: str, weights: Weights, own: Sequence[str]) -> None:
        """Note dtypes that cannot be merged, and models whose weights are integers."""
        heads = {n: header(weights, n) for n in weights if not matches(n, own)}
        unknown = [n for n, (dtype, _) in heads.items() if dtype not in (*FLOATS, *WHOLE)]
        if unknown:
            self.add(who, f"has tensors of dtype {heads[unknown[0]][0]}, which cannot be merged: {first(unknown)}")
        whole = [_nbytes(h) for h in heads.values() if h[0] in WHOLE]
        largest = max((_nbytes(h) for h in heads.values() if h[0] in WHOLE and len(h[1]) > 1), default=0)
        if largest >= QUANTISED and 2 * sum(whole) > sum(map(_nbytes, heads.values())):
            self.add(who, "stores most of its weights as integers (quantised): merge the model it was made from")

    def tell(self) -> None:
        """Raise WeightsError with everything noted, if anything was."""
        if not self.faults:
            return
        said = [f"{_who(models, what)}{what}" for what, models in self.faults.items()]
        hints = []
        if self.leave_out:
            few = list(dict.fromkeys(self.leave_out))[:3]
            options, patterns = " ".join(f"--own '{p}'" for p in few), ", ".join(f'"{p}"' for p in few)
            hints.append(
                f"tensors that belong to an expert alone (its head) are left out with {options} (own=[{patterns}])"
            )
        if self.fixed:
            hints.append("a tensor that should not be merged is left out with --own NAME (own=[NAME])")
        parts = [fault + _hint(what, hints) for fault, what in zip(said, self.faults, strict=True)]
        raise WeightsError("; ".join(said + hints), parts)


def _hint(what: str, hints: Sequence[str]) -> str:
    """Return the hint that goes with one fault."""
    if what.startswith("has other shapes"):
        return f"; {hints[-1]}"
    return f"; {hints[0]}" if what.startswith(("lacks ", "has, and")) else ""


def _who(models: list[str], what: str) -> str:
    if models == [""]:
        return "" if what.startswith(("the ", "expert ")) else "the base "
    quoted = [f"'{m}'" if m else "the base" for m in models]
    return f"expert {quoted[0]} " if len(quoted) == 1 else f"each of {', '.join(quoted)} "


def _nbytes(head: tuple[str, tuple[int, ...]]) -> int:
    return DTYPES.get(head[0], ("", 1))[1] * prod(head[1])


def _three(said: list[str]) -> str:
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def _patterns(names: list[str], kept: Sequence[str]) -> list[str]:
    """Return patterns that fit ``names`` and none of ``kept``: the shortest stems that only the former have."""
    stems = {".".join(parts[:k]) for n in kept for parts in [n.split(".")] for k in range(1, len(parts) + 1)}
    found = []
    for name in names:
        parts = name.split(".")
        stem = next((s for k in range(1, len(parts)) if (s := ".".join(parts[:k])) not in stems), None)
        found.append(f"{glob.escape(stem)}.*" if stem else name)
    return list(dict.fromkeys(found))
