"""The domains suite: experts of one domain, scored on the same classes in others (the ``shift`` folders of the data).

    FOLDER/TASK/       the tasks of the text or of the vision suite, whichever the folder holds
    FOLDER/shift/NAME/ test sets from elsewhere; shift_of in their task.toml names the task whose head applies

Experts are those of the text or vision suite. Scales are chosen on the tasks' own validation splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluate.task import Task, read_task, read_tasks
from ..progress import Progress, silent
from . import suite as suites
from . import text, vision
from .suite import Suite

SENTENCES = text.SENTENCES
NEAR = {"sst2_products": ("pros_cons",)}  # adapting on it would be adapting on that domain
PACKAGES = text.PACKAGES


@dataclass(frozen=True)
class _Either:
    """The text suite or the vision suite (with a network of its own), whichever reads the tasks of a folder."""

    network: str | None = None

    def of(self, data: str | Path) -> Suite:
        if {task.kind for task in read_tasks(data).values()} == {"image"}:
            return vision.SUITE if self.network is None else vision.suite(network=self.network).SUITE
        if self.network is not None:
            raise DataError(f"{data}: the network is the pictures' to choose, and these tasks are of text")
        return text.SUITE

    def tasks(self, data: str | Path) -> Mapping[str, Task]:
        """Return the tasks in ``data``; raise DataError where there are no other domains of them."""
        tasks = self.of(data).tasks(data)
        domains_of(data, tasks)
        return tasks

    def files(self, data: str | Path) -> list[Path]:
        """Return the files of unlabeled inputs, without those that are close to a domain that is scored."""
        chosen = self.of(data)
        near = {file for domain in domains_of(data, chosen.tasks(data)) for file in NEAR.get(domain, ())}
        kept = [file for file in chosen.files(data) if file.name.split(".")[0] not in near]
        if not kept:
            raise DataError(f"{data}: all unlabeled inputs are close to a domain that is scored; add others to aux/")
        return kept


def domains_of(data: str | Path, tasks: Mapping[str, Task]) -> dict[str, Path]:
    """Return the folders of other domains of ``tasks``. Raises DataError if there are none."""
    folders = sorted(path.parent for path in Path(data).glob("shift/*/task.toml"))
    shifts = {folder: read_task(folder) for folder in folders}
    names = {task.name: folder for folder, task in shifts.items() if task.shift_of in tasks}
    if not names:
        raise DataError(
            f"{data}: no test set of another domain: shift/NAME/task.toml with shift_of = one of {', '.join(tasks)}"
        )
    return names


@dataclass(frozen=True)
class Domains:
    """The suite with the pictures' network chosen, or not."""

    SUITE: _Either = _Either()
    SENTENCES: tuple[str, ...] = tuple(SENTENCES)

    @property
    def PACKAGES(self) -> dict[str, str]:
        return PACKAGES if self.SUITE.network is None else vision.suite(network=self.SUITE.network).PACKAGES

    def bench(
        self,
        data: str | Path,
        to: str | Path,
        *,
        how: Sequence[str] | None = None,
        seeds: int = 1,
        experts_only: bool = False,
        progress: Progress = silent,
    ) -> Path:
        """Run sentences on the tasks in ``data`` that have other domains and on the others; score them there too."""
        chosen = self.SUITE.of(data)
        domains = domains_of(data, chosen.tasks(data))
        how_given: Any = {"how": how, "seeds": seeds, "experts_only": experts_only, "progress": progress}
        return suites.bench(chosen, data, to, domains=domains, files=self.SUITE.files(data), **how_given)


SUITE = _Either()
bench = Domains().bench


def suite(*, network: str | None = None) -> Domains:
    """Return the suite with ``network`` for pictures. Raises DataError for one that the vision suite does not have."""
    if network is not None:
        vision.suite(network=network)
    return Domains(_Either(network))
