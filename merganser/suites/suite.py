"""What suites over a folder of tasks have in common: fine-tune an expert a task, once, then run a recipe.

    FOLDER/TASK/task.toml, train|val|test      the tasks (at least two)
    FOLDER/aux/*                               unlabeled inputs: .txt.gz with a text a line, or .npz with pictures

Experts are trained by cross-entropy through their frozen head and kept in the cache: a second run spends nothing on them.
With ``lora`` they are adapters of the base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapt import inputs_digest
from ..card import digest, is_done, key_of
from ..errors import DataError
from ..evaluate.run import Labelled
from ..evaluate.task import Task, read_tasks
from ..models.heads import AnyHead
from ..models.open import open_encoder
from ..prepare import make_heads
from ..progress import Progress, silent
from ..recipe import HeadsPart, InputsPart, LimitPart, ModelPart, Recipe
from ..run import run
from ..sentence import parse
from ..train import Checkpoint, Plan
from ..weights.own_rank import save_adapter
from ..weights.save import save
from ..weights.stored import Stored
from .cache import cache_folder
from .finetune import Lora, finetune, finetune_lora

AUX = {"text": "aux/*.txt*", "image": "aux/*"}
INPUTS = {"text": "unlabeled sentences (aux/*.txt.gz)", "image": "unlabeled pictures (aux/*.npz)"}


@dataclass(frozen=True)
class Suite:
    """A suite: what its tasks are, the network, and how experts are made and merged.

    ``base`` writes the pretrained weights into a folder of the cache and returns it. ``names``: the tasks that are taken
    where a folder has them all; otherwise all it has.
    """

    name: str
    kind: str
    network: str
    base: Callable[[], Path]
    encoder: str
    options: Mapping[str, Any]
    heads: HeadsPart
    plan: Plan
    batch: int
    scales: Sequence[float]
    sentences: Sequence[str]
    inputs: int
    limits: LimitPart
    frozen: Sequence[str] = ()
    names: Sequence[str] = ()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    lora: Lora | None = None

    def of(self, _data: str | Path) -> "Suite":
        """Return the suite that reads a folder: this one."""
        return self

    def tasks(self, data: str | Path) -> dict[str, Task]:
        """Return the tasks in ``data`` that the suite takes. Raises DataError for fewer than two, or another kind."""
        tasks = read_tasks(data)
        if self.names and set(self.names) <= set(tasks):
            tasks = {name: tasks[name] for name in self.names}
        if wrong := [t.name for t in tasks.values() if t.kind != self.kind]:
            raise DataError(f"{data}: task '{wrong[0]}' is not {'a text' if self.kind == 'text' else 'an image'} task")
        if len(tasks) < 2:
            raise DataError(f"{data}: merging needs at least two tasks, found {len(tasks)}")
        return tasks

    def folders(self, data: str | Path, tasks: Mapping[str, Task]) -> dict[str, Path]:
        """Return the folder of every task."""
        return {name: Path(data).resolve() / name for name in tasks}

    def files(self, data: str | Path) -> list[Path]:
        """Return the files of unlabeled inputs. Raises DataError if there are none."""
        files = sorted(Path(data).glob(AUX[self.kind]))
        if not files:
            raise DataError(f"{data}: no {INPUTS[self.kind]}")
        return [file.resolve() for file in files]


def bench(
    suite: Suite,
    data: str | Path,
    to: str | Path,
    *,
    how: Sequence[str] | None = None,
    seeds: int = 1,
    experts_only: bool = False,
    domains: Mapping[str, Path] | None = None,
    files: Sequence[Path] | None = None,
    progress: Progress = silent,
) -> Path:
    """Run sentences with and without adapting on the tasks in ``data``; return the report (or the experts' folder).

    ``domains``: folders of test sets of the same tasks in other domains, by name. ``files``: unlabeled inputs, where not
    all that lie in the folder are to be used.

    Raises DataError if the folder holds fewer than two tasks of the suite's kind or no unlabeled inputs.
    """
    sentences = list(how) if how else list(suite.sentences)
    recipe = recipe_for(suite, data, sentences, domains=domains, files=files, progress=progress)
    if experts_only:
        return next(iter(recipe.experts.values())).parent.parent
    return run_seeds(recipe, Path(to), seeds, progress)


def recipe_for(
    suite: Suite,
    data: str | Path,
    sentences: Sequence[str],
    *,
    domains: Mapping[str, Path] | None = None,
    files: Sequence[Path] | None = None,
    progress: Progress = silent,
) -> Recipe:
    """Return the recipe of a suite on the tasks in ``data``, its experts made or found in the cache."""
    tasks = suite.tasks(data)
    recipe = drafted(suite, data, sentences, tasks, domains=domains, files=files)
    experts = make_experts(suite, recipe, tasks, cache_folder() / suite.name, progress)
    return recipe.model_copy(update={"experts": experts})


def drafted(
    suite: Suite,
    data: str | Path,
    sentences: Sequence[str],
    tasks: Mapping[str, Task],
    *,
    domains: Mapping[str, Path] | None = None,
    files: Sequence[Path] | None = None,
) -> Recipe:
    """Return the same recipe before any expert is made: in place of each stands the base."""
    for text in sentences:
        parse(text)
    files, base = files or suite.files(data), suite.base()
    name = "domains" if domains and suite.name != "domainnet" else suite.name
    return Recipe(
        title=f"{name} suite: {len(tasks)} tasks, {suite.network}",
        command=f"merganser bench {name} --data {Path(data).name}" + (" --network conv" * (suite.network == "conv")),
        sentences=list(sentences),
        scales=list(suite.scales),
        model=ModelPart(base=base, encoder=suite.encoder, options=dict(suite.options), precision=suite.precision),
        experts=dict.fromkeys(tasks, base),
        tasks=suite.folders(data, tasks),
        domains={name: folder.resolve() for name, folder in (domains or {}).items()},
        heads=suite.heads,
        inputs=InputsPart(files=list(files), limit=suite.inputs),
        limits=suite.limits,
    )


def run_seeds(recipe: Recipe, to: Path, seeds: int, progress: Progress) -> Path:
    """Run a recipe once, or once a seed into ``seed-K`` folders with one report over all."""
    from ..report.page import report

    if seeds == 1:
        return run(recipe, to, progress=progress)
    folders = []
    for seed in range(seeds):
        folders.append(to / f"seed-{seed}")
        run(recipe.model_copy(update={"seed": seed}), folders[-1], progress=progress)
    return report(*folders, to=to / "report.html")


def make_experts(
    suite: Suite, recipe: Recipe, tasks: Mapping[str, Task], into: Path, progress: Progress
) -> dict[str, Path]:
    """Return a folder with an expert for every task; one that its card proves done is not trained again."""
    encoder: Any = open_encoder(suite.encoder, recipe.model.base, **suite.options)
    theta0 = Stored(recipe.model.base)
    heads = make_heads(recipe, encoder, theta0, tasks)
    origin = digest(theta0)
    return {
        name: _expert(suite, encoder, theta0, heads[name], task, origin, into, progress) for name, task in tasks.items()
    }


def _expert(
    suite: Suite,
    encoder: Any,
    theta0: Stored,
    head: AnyHead,
    task: Task,
    origin: str,
    into: Path,
    progress: Progress,
) -> Path:
    rows = task.split("train")
    inputs = encoder.prepare(rows.raw)
    made_from = task.prompts() if suite.heads.kind == "zero-shot" else suite.heads.kind
    settings = {
        "kind": "expert",
        "plan": suite.plan.__dict__,
        "batch": suite.batch,
        "frozen": suite.frozen,
        "inputs": {
            "base": origin,
            "prompts": key_of([made_from, suite.heads.scale]),
            "train": inputs_digest(inputs),
        },
        "labels": digest({"y": torch.from_numpy(rows.labels)}),
    }
    if suite.precision != "auto":
        settings["precision"] = suite.precision
    if suite.lora is not None:
        settings["lora"] = suite.lora.__dict__
    key = key_of(settings)
    folder = into / f"{task.name}-{key[:8]}" / task.name
    if is_done(folder, key):
        return folder
    with progress(f"fine-tune {task.name}", suite.plan.steps) as tick:
        checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
        how: dict[str, Any] = {"batch": suite.batch, "kind": suite.precision, "checkpoint": checkpoint, "tick": tick}
        given = (theta0, encoder, head, Labelled(inputs, rows.labels, task.metric), suite.plan)
        card = {**settings, "key": key}
        if suite.lora is None:
            save(finetune(*given, frozen=suite.frozen, **how), folder, card)
        else:  # another A for every task, as adapters that are trained apart have
            start = int(key_of({"task": task.name})[:8], 16)
            tensors = finetune_lora(*given, suite.lora, start=start, **how)
            save_adapter(tensors, suite.lora.config(theta0.path.name), folder, card)
    checkpoint.path.unlink(missing_ok=True)
    return folder


def with_and_without(mergers: Sequence[str], adapt: str = "ri") -> list[str]:
    """Return every merger without and with adapting."""
    return [f"{how}{merger}" for merger in mergers for how in ("", f"{adapt} | ")]


def shortened(suite: Suite, **settings: Any) -> Suite:
    """Return a suite with other settings; ``steps`` are those of its plan."""
    if "steps" in settings:
        settings["plan"] = replace(suite.plan, steps=settings.pop("steps"))
    return replace(suite, **settings)
