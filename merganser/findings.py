"""What a check finds: errors that prevent a merge, warnings, notes and numbers, each told in one line."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import DataError, HeadError, MerganserError, RecipeError, SentenceError, WeightsError

KINDS = (WeightsError, SentenceError, RecipeError, DataError, HeadError)


@dataclass(frozen=True)
class Finding:
    """One thing: what it is, where, and what to do about it."""

    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where and self.where not in self.what else ""
        return f"{place}{self.what}{f'; {self.remedy}' if self.remedy else ''}"


@dataclass
class Findings:
    """All that a check found, and what would be done. ``ok`` tells that nothing prevents the merge."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    raised: list[MerganserError] = field(default_factory=list, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing prevents the merge."""
        return not self.errors

    @contextmanager
    def gather(self, where: str) -> Iterator[None]:
        """Take down the merganser error that the block raises, each of its parts, and go on behind the block."""
        try:
            yield
        except MerganserError as error:
            self.raised.append(error)
            for text in error.parts or (str(error),):
                what, _, remedy = text.rpartition("; ")
                one = Finding(what, where, remedy) if what else Finding(text, where)
                self.errors += [one] if one not in self.errors else []

    def error(self, what: str, where: str, remedy: str = "", kind: type[MerganserError] = WeightsError) -> None:
        """Add an error."""
        self.errors.append(Finding(what, where, remedy))
        self.raised.append(kind(str(self.errors[-1])))

    def warn(self, what: str, where: str, remedy: str = "") -> None:
        """Add a warning."""
        self.warnings.append(Finding(what, where, remedy))

    def note(self, what: str, where: str, remedy: str = "") -> None:
        """Add a note."""
        self.notes.append(Finding(what, where, remedy))

    def add(self, other: "Findings", where: str = "") -> None:
        """Add what another check found, each thing once."""
        for name in ("errors", "warnings", "notes"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine += [f for f in (_within(f, where) for f in theirs) if f not in mine]
        self.raised += other.raised

    def tell(self) -> None:
        """Raise what was found: one error as it is, several together, one a line."""
        if len(self.raised) == 1:
            raise self.raised[0]
        if self.raised:
            kind = next((kind for kind in KINDS if isinstance(self.raised[0], kind)), MerganserError)
            lines = list(dict.fromkeys(map(str, self.raised)))
            if len(lines) == 1:
                raise self.raised[0]
            raise kind(f"{len(lines)} things are wrong:\n  " + "\n  ".join(lines), lines)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        told: Mapping[str, Iterable[Finding]] = {"errors": self.errors, "warnings": self.warnings, "notes": self.notes}
        lists = {name: [asdict(one) for one in some] for name, some in told.items()}
        return {"ok": self.ok, **lists, "numbers": self.numbers, "plan": self.plan}


def _within(one: Finding, where: str) -> Finding:
    return Finding(one.what, f"{where}, {one.where}" if where and one.where else where or one.where, one.remedy)
