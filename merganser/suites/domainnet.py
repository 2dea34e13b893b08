"""DomainNet: two CLIP ViT-B/32 experts of photographs, each of one half of the 345 classes, scored on five unseen domains.

    DATA/real/aircraft_carrier/*.jpg, DATA/real_train.txt, clipart_test.txt ...    DomainNet as it is published
    DATA/aux/* or --inputs                                                         unlabeled pictures

A line of a list is "real/aircraft_carrier/real_001_000001.jpg 0". Experts are fine-tuned here, once: none are published, and
the paper does not say how its own were made. Source: Resolving Interference (arXiv 2603.13467), table 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..card import read_json
from ..errors import DataError
from ..evaluate.task import Task, read_task
from ..evaluate.unlabeled import is_no_path
from ..progress import Progress, silent
from ..recipe import HeadsPart, LimitPart
from ..train import Plan
from . import published, sources
from . import suite as suites
from .cache import cache_folder
from .clip import ADAPT, PACKAGES
from .suite import Suite, with_and_without

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "sketch")
TEMPLATE = ["a photo of a {}."]
MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c", "iso_cts")


@dataclass(frozen=True)
class DomainNet(Suite):
    """The suite; ``models``: a folder with openai/clip-vit-base-patch32, where the Hub is not to be asked."""

    unlabeled: Sequence[Path] = ()

    @property
    def PACKAGES(self) -> dict[str, str]:
        return PACKAGES

    @property
    def SUITE(self) -> "DomainNet":
        return self

    @property
    def SENTENCES(self) -> Sequence[str]:
        return self.sentences

    @property
    def NAMES(self) -> list[str]:
        return ["real_s0", "real_s1"]

    def tasks(self, data: str | Path) -> dict[str, Task]:
        """Return the two halves. Raises DataError where DomainNet's lists are not in ``data``."""
        return {name: read_task(folder) for name, folder in _halves(Path(data), "real").items()}

    def folders(self, data: str | Path, tasks: Mapping[str, Task]) -> dict[str, Path]:
        """Return the task folders of the two halves, which name the files of ``data``."""
        return _halves(Path(data), "real")

    def domains(self, data: str | Path) -> dict[str, Path]:
        """Return the same halves in the five other domains (those that ``data`` has)."""
        there = [domain for domain in DOMAINS if (Path(data) / f"{domain}_test.txt").is_file()]
        if not there:
            raise DataError(f"{data}: none of {', '.join(f'{domain}_test.txt' for domain in DOMAINS)}")
        return {name: folder for domain in there for name, folder in _halves(Path(data), domain).items()}

    def files(self, data: str | Path) -> list[Path]:
        """Return unlabeled pictures: those given, else all that lies in ``data/aux``."""
        found = list(self.unlabeled) or sorted((Path(data) / "aux").glob("*"))
        if not found:
            raise DataError("ri needs unlabeled pictures: --inputs FOLDER, or FOLDER/aux in --data")
        return [place if is_no_path(place) else place.resolve() for place in found]

    def bench(
        self,
        data: Path | None,
        to: Path,
        *,
        how: Sequence[str] | None = None,
        seeds: int = 1,
        experts_only: bool = False,
        progress: Progress = silent,
    ) -> Path:
        """Fine-tune the two experts once, merge, score on the photographs and on the five domains; return the report."""
        if data is None:
            raise DataError("domainnet needs --data: the folder of DomainNet's pictures and lists")
        more: Any = {"how": how, "seeds": seeds, "experts_only": experts_only, "progress": progress}
        report = suites.bench(self, data, to, domains=self.domains(data), **more)
        scores = None if experts_only else read_json(report.parent / "scores.json")
        if scores is not None and "domains" in scores:
            published.write(report, published.compare_domains(scores))
        return report


def suite(
    *, models: Path | None = None, inputs: Sequence[Path] = (), rows: int | None = None, **_others: Any
) -> DomainNet:
    """Return the suite with models and unlabeled pictures from folders, and at most ``rows`` test rows a task."""
    return DomainNet(
        name="domainnet",
        kind="image",
        network="ViT-B/32",
        base=lambda: sources.model(models, "openai/clip-vit-base-patch32"),
        encoder="image",
        options={"pooling": "projection"},
        heads=HeadsPart(kind="zero-shot"),
        plan=Plan(2000, 1e-5, weight_decay=0.1),
        batch=128,
        scales=(0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
        sentences=with_and_without(MERGERS, ADAPT),
        inputs=320_000,
        limits=LimitPart(val=2000, test=rows),
        frozen=("text_model.*", "text_projection*", "visual_projection*", "logit_scale"),
        unlabeled=tuple(inputs),
    )


def _halves(data: Path, domain: str) -> dict[str, Path]:
    """Return ``{DOMAIN_s0, DOMAIN_s1: task folder}``."""
    lists = {split: data / f"{domain}_{split}.txt" for split in ("train", "test")}
    named = data / "real_train.txt"
    if missing := [path for path in (named, lists["test"]) if not path.is_file()]:
        raise DataError(f"{missing[0]} is missing: give the folder with DomainNet's pictures and lists")
    classes = _classes(named)
    middle = (len(classes) + 1) // 2
    found = {}
    for half, (first, last) in enumerate(((0, middle), (middle, len(classes)))):
        told: dict[str, Any] = {"name": f"{domain}_s{half}", "kind": "image", "template": TEMPLATE}
        told["classes"] = classes[first:last]
        files: dict[str, Any] = {"test": str(lists["test"].resolve()), "labels": [first, last]}
        if domain == "real":
            files |= {"train": str(lists["train"].resolve()), "held_out": 2000}
        else:
            told["shift_of"] = f"real_s{half}"
        found[told["name"]] = sources.write_toml(cache_folder() / "domainnet" / "tasks", told, files)
    return found


def _classes(listed: Path) -> list[str]:
    """Return the classes in the order of their labels, from the folders of a list's pictures."""
    names: dict[int, str] = {}
    for k, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        parts = path.split("/")
        if len(parts) < 3 or not label.isdigit():
            raise DataError(f'{listed}, line {k}: not "DOMAIN/CLASS/FILE LABEL"')
        names[int(label)] = parts[-2].replace("_", " ").lower()
    if lacking := [k for k in range(len(names)) if k not in names]:
        raise DataError(f"{listed}: no picture with label {lacking[0]}, though there are {len(names)} classes")
    return [names[k] for k in range(len(names))]
