"""The text suite: one MiniLM encoder, an expert for every task of a folder, zero-shot heads, unlabeled sentences.

    FOLDER/TASK/task.toml, train|val|test.jsonl.gz     the tasks (any number, at least two)
    FOLDER/aux/*.txt.gz                                unlabeled sentences, one a line

Experts are fine-tuned once (cross-entropy through the frozen zero-shot head, embeddings frozen) and cached.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapt import inputs_digest
from ..card import digest, is_done, key_of
from ..errors import DataError
from ..evaluate.run import Labelled
from ..evaluate.task import Task, read_tasks
from ..models.open import open_encoder
from ..prepare import prompt_head
from ..progress import Progress, silent
from ..recipe import HeadsPart, InputsPart, LimitPart, ModelPart, Recipe
from ..run import run
from ..sentence import parse
from ..train import Checkpoint, Plan
from ..weights.save import save
from ..weights.stored import Stored
from .cache import cache_folder
from .finetune import finetune
from .minilm import write_minilm

SCALE = 20.0
OPTIONS = {"pooling": "mean", "length": 64}
FROZEN = ("embeddings.*",)
STEPS, BATCH, LR = 300, 32, 1e-4
INPUTS = 12_000
ADAPT = "ri"
MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c")
SENTENCES = [f"{adapt}{merger}" for merger in MERGERS for adapt in ("", f"{ADAPT} | ")]
PACKAGES = {"transformers": "bench", "all_minilm_l6_v2": "bench"}
SCALES = [0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]


def bench(
    data: str | Path,
    to: str | Path,
    *,
    how: Sequence[str] | None = None,
    seeds: int = 1,
    experts_only: bool = False,
    progress: Progress = silent,
) -> Path:
    """Run sentences with and without adapting on the tasks in ``data``; return the report (or the experts' folder).

    Raises DataError if the folder holds fewer than two text tasks or no unlabeled sentences.
    """
    sentences = list(how) if how else SENTENCES
    for text in sentences:
        parse(text)
    tasks = read_tasks(data)
    if wrong := [t.name for t in tasks.values() if t.kind != "text"]:
        raise DataError(f"{data}: task '{wrong[0]}' is not a text task")
    if len(tasks) < 2:
        raise DataError(f"{data}: merging needs at least two tasks, found {len(tasks)}")
    files = sorted(Path(data).glob("aux/*.txt*"))
    if not files:
        raise DataError(f"{data}: no unlabeled sentences (aux/*.txt.gz)")
    base = write_minilm(cache_folder() / "minilm")
    experts = make_experts(base, tasks, cache_folder() / "text", progress)
    if experts_only:
        return next(iter(experts.values())).parent.parent
    recipe = Recipe(
        title=f"text suite: {len(tasks)} tasks, MiniLM",
        command=f"merganser bench text --data {Path(data).name}",
        sentences=sentences,
        scales=SCALES,
        model=ModelPart(base=base, encoder="text", options=OPTIONS),
        experts=experts,
        tasks={name: Path(data).resolve() / name for name in tasks},
        heads=HeadsPart(kind="zero-shot", scale=SCALE),
        inputs=InputsPart(files=[f.resolve() for f in files], limit=INPUTS),
        limits=LimitPart(val=200, test=800, diagnose=150),
    )
    return run_seeds(recipe, Path(to), seeds, progress)


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


def make_experts(base: Path, tasks: Mapping[str, Task], into: Path, progress: Progress) -> dict[str, Path]:
    """Return a folder with an expert for every task; one that its card proves done is not trained again."""
    encoder: Any = open_encoder("text", base, **OPTIONS)
    theta0 = Stored(base)
    heads = {name: prompt_head(encoder, task, {"scale": SCALE}) for name, task in tasks.items()}
    origin = digest(theta0)
    folders = {}
    for name, task in tasks.items():
        train = task.split("train")
        inputs = encoder.prepare(train.raw)
        plan = Plan(STEPS, LR, weight_decay=0.01)
        settings = {
            "kind": "expert",
            "plan": plan.__dict__,
            "batch": BATCH,
            "frozen": FROZEN,
            "inputs": {"base": origin, "prompts": key_of([task.prompts(), SCALE]), "train": inputs_digest(inputs)},
            "labels": digest({"y": torch.from_numpy(train.labels)}),
        }
        key = key_of(settings)
        folder = folders[name] = into / f"{name}-{key[:8]}" / name
        if is_done(folder, key):
            continue
        with progress(f"fine-tune {name}", plan.steps) as tick:
            labelled = Labelled(inputs, train.labels, task.metric)
            checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
            how: dict[str, Any] = {"batch": BATCH, "frozen": FROZEN, "checkpoint": checkpoint, "tick": tick}
            weights = finetune(theta0, encoder, heads[name], labelled, plan, **how)
        save(weights, folder, {**settings, "key": key})
        checkpoint.path.unlink(missing_ok=True)
    return folders
