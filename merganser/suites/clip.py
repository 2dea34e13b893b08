"""The published CLIP benchmarks: 8, 14 and 20 image tasks with ViT-B/32, B/16 and L/14, in the papers' order.

Families of experts, whose numbers must never be mixed (RI's table uses the first):

    tall-masks    MODELS/ViT-B-32/CarsVal/nonlinear_finetuned.pt, nonlinear_zeroshot.pt       open_clip's names
    task-vectors  MODELS/ViT-B-32/Cars/finetuned.pt, MODELS/ViT-B-32/zeroshot.pt              (8 tasks; state dicts)
    fusionbench   tanganke/clip-vit-base-patch32_sun397 on the Hub                            transformers' names

Data sets are read in the Hub's layout (``tanganke/sun397/data/test-*.parquet``), from --data or from the Hub itself.
Class phrases and prompt templates are those published with CLIP (arXiv 2103.00020), as all these experts use them.
Source: TALL-masks (arXiv 2405.07813), Task Arithmetic (arXiv 2212.04089), FusionBench (arXiv 2406.03280).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..card import read_json
from ..errors import DataError, did_you_mean
from ..evaluate.task import Task, read_task
from ..evaluate.unlabeled import is_no_path
from ..progress import Progress, silent
from ..recipe import InputsPart, LimitPart, ModelPart, Recipe
from ..sentence import parse
from . import published, sources
from .cache import cache_folder
from .suite import run_seeds, with_and_without

EIGHT = ("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SVHN", "SUN397")
SIX = ("STL10", "OxfordIIITPet", "Flowers102", "CIFAR100", "PCAM", "FER2013")
TASKS = (*EIGHT, *SIX, "CIFAR10", "Food101", "FashionMNIST", "RenderedSST2", "EMNIST", "KMNIST")
NETWORKS = {
    "ViT-B/32": "clip-vit-base-patch32",
    "ViT-B/16": "clip-vit-base-patch16",
    "ViT-L/14": "clip-vit-large-patch14",
}
FAMILIES = ("tall-masks", "task-vectors", "fusionbench")
PROTOCOLS = {"default": [], "tuned": [*(k / 10 for k in range(1, 11)), *(k / 10 for k in range(12, 31, 2))]}
HELD_OUT = 5000  # validation rows: a tenth of train, at most so many (TALL-masks)
PACKAGES = {"transformers": "hf", "pyarrow": "hf", "PIL": "demo"}
ADAPT = "ri(steps=2500, lr=0.000001, batch=128)"
MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "knots | ties", "wudi", "tsv", "iso_c", "iso_cts")
OF_FUSIONBENCH = {"ties": 'ties(merge="sum") | scale(by=0.3)'}  # the form its published number is of


@dataclass(frozen=True)
class Clip:
    """The suite of the first ``count`` tasks. ``models``, ``inputs``: folders; without them the Hub is asked.

    ``rows``: at most so many test rows a task. ``protocol``: "tuned" also chooses a scale on validation rows.
    """

    count: int
    network: str = "ViT-B/32"
    family: str = "tall-masks"
    models: Path | None = None
    inputs: Sequence[Path] = ()
    rows: int | None = None
    protocol: str = "tuned"

    def __post_init__(self) -> None:
        for given, known, what in (
            (self.network, NETWORKS, "network"),
            (self.family, FAMILIES, "family"),
            (self.protocol, PROTOCOLS, "protocol"),
        ):
            if given not in known:
                raise DataError(f"unknown {what} '{given}'{did_you_mean(given, known)}; known: {', '.join(known)}")
        if self.family == "task-vectors" and self.count > 8:
            raise DataError("the family task-vectors has 8 tasks; use clip-8, or --family tall-masks or fusionbench")

    @property
    def PACKAGES(self) -> dict[str, str]:
        return PACKAGES

    @property
    def SUITE(self) -> "Clip":
        return self

    @property
    def NAMES(self) -> list[str]:
        names = list(TASKS[: self.count])
        return ["EMNIST-letters" if n == "EMNIST" and self.family == "fusionbench" else n for n in names]

    @property
    def SENTENCES(self) -> list[str]:
        mergers = [OF_FUSIONBENCH.get(m, m) if self.family == "fusionbench" else m for m in MERGERS]
        return with_and_without(mergers, ADAPT)

    @property
    def sentences(self) -> list[str]:
        return self.SENTENCES

    def of(self, _data: Path | None) -> "Clip":
        return self

    def folders(self, data: Path | None) -> dict[str, Path]:
        """Return a task folder for every task, written into the cache, that names the data set's files."""
        into = cache_folder() / "clip" / "tasks"
        found = {}
        for name in self.NAMES:
            told = facts()[name]
            says = {"name": name, "kind": "image", "classes": told["classes"], "template": told["template"]}
            place = sources.dataset(data, told["dataset"])
            found[name] = sources.write_task(into, says, place, held_out=HELD_OUT)
        return found

    def tasks(self, data: Path | None) -> dict[str, Task]:
        """Return the tasks, with the splits of ``data``. Raises DataError at one that is not there."""
        return {name: read_task(folder) for name, folder in self.folders(data).items()}

    def files(self, data: Path | None) -> list[Path]:
        """Return unlabeled pictures: ``inputs``, else all that lies in ``data/aux``. Raises DataError at none."""
        found = list(self.inputs) or (sorted((data / "aux").glob("*")) if data else [])
        if not found:
            raise DataError(
                "ri needs unlabeled pictures: --inputs FOLDER (ImageNet in the paper), or FOLDER/aux in --data"
            )
        return [place if is_no_path(place) else place.resolve() for place in found]

    def clip(self) -> Path:
        """Return the folder of OpenAI's CLIP, whose text tower makes the heads."""
        return sources.model(self.models, f"openai/{NETWORKS[self.network]}")

    def checkpoints(self) -> tuple[Path, dict[str, Path]]:
        """Return the base's and every expert's checkpoint. Raises DataError, naming the first that is missing."""
        if self.family == "fusionbench":
            name = f"tanganke/{NETWORKS[self.network]}"
            return self.clip(), {n: sources.model(self.models, f"{name}_{facts()[n]['expert']}") for n in self.NAMES}
        if self.models is None:
            raise DataError(
                f"the experts of {self.family} are not on the Hub as they are: download them, give --models"
            )
        root, tall = self.models / self.network.replace("/", "-"), self.family == "tall-masks"
        experts = {n: root / (f"{n}Val/nonlinear_finetuned.pt" if tall else f"{n}/finetuned.pt") for n in self.NAMES}
        base = root / (f"{self.NAMES[0]}Val/nonlinear_zeroshot.pt" if tall else "zeroshot.pt")
        if missing := [path for path in (base, *experts.values()) if not path.is_file()]:
            raise DataError(f"{missing[0]} is missing: {self.family} experts of {self.network} lie there")
        return base, experts

    def recipe(self, data: Path | None, how: Sequence[str] | None) -> Recipe:
        """Return the recipe of the run. Raises DataError where a model, a data set or unlabeled pictures are missing."""
        sentences = list(how or self.SENTENCES)
        base, experts = self.checkpoints()
        if self.family == "fusionbench":
            encoder, options = "merganser.suites.clip:vision_tower", {}
        else:
            encoder, options = "merganser.models.openclip:openclip_encoder", {"clip": str(self.clip().resolve())}
        adapts = any(parse(text).adapt for text in sentences)
        return Recipe(
            title=f"clip-{self.count}: {self.network}, {self.family}",
            command=f"merganser bench clip-{self.count} --network {self.network} --family {self.family}",
            sentences=sentences,
            scales=PROTOCOLS[self.protocol],
            model=ModelPart(base=base.resolve(), encoder=encoder, options=options),
            experts={name: path.resolve() for name, path in experts.items()},
            tasks=self.folders(data),
            inputs=InputsPart(files=self.files(data), limit=None) if adapts else None,
            limits=LimitPart(val=HELD_OUT, test=self.rows, ensemble=False),
        )

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
        """Score sentences as the papers do and put their numbers beside ours; return the report."""
        if experts_only:
            return next(iter(self.checkpoints()[1].values())).parent
        report = run_seeds(self.recipe(data, how), Path(to), seeds, progress)
        scores = read_json(report.parent / "scores.json")
        if scores is not None and self.family in published.tables():
            published.write(report, published.compare(scores, self.family, self.network, self.count))
        return report


@cache
def facts() -> dict[str, Any]:
    """Return what is known of every task: data set, expert's name, class phrases, prompt templates."""
    return json.loads(Path(__file__).with_name("clip_tasks.json").read_text(encoding="utf-8"))


def vision_tower(base: str | Path) -> Any:
    """Return the encoder of FusionBench's experts: CLIP's vision tower under the base's projection, which stays put."""
    from ..models.hf import image_encoder

    encoder = image_encoder(base, pooling="projection")
    stored: Any = encoder.stored
    del stored.visual_projection
    return encoder


def suite(count: int, **settings: Any) -> Clip:
    """Return the suite of the first ``count`` tasks; ``settings`` that are None are left at their defaults."""
    return replace(Clip(count), **{key: value for key, value in settings.items() if value is not None})
