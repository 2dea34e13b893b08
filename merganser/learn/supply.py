"""What a run measures by itself: ingredients that a sentence's steps need and the recipe does not give."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..card import key_of, read_card
from ..models.inputs import Subset
from ..progress import Progress, silent
from ..sentence import Sentence
from ..weights.save import save
from .entering import entering
from .measure import fisher, gram

if TYPE_CHECKING:
    from ..prepare import Prepared

MEASURED = ("fisher", "gram", "inputs")
ROWS = 256  # inputs of an expert's own task, as `learn` takes by default


def lacking(sentence: Sentence, given: Mapping[str, Any]) -> list[str]:
    """Return the ingredients that a sentence needs, that nobody gives and that can be measured."""
    needed = {name for step in sentence.merging.steps for name in step.ingredients}
    return [name for name in MEASURED if name in needed and name not in given]


def supplied(
    ready: "Prepared",
    sentence: Sentence,
    experts: Mapping[str, Mapping[str, Tensor]],
    keys: Mapping[str, Any],
    place: Path,
    progress: Progress = silent,
) -> "Prepared":
    """Return ``ready`` with what ``sentence`` lacks, measured for these experts and kept in ``PLACE/WHAT/EXPERT``.

    Each expert, adapted or not, is measured on inputs of its own task, the first 256 of the validation split (of the test
    split where there is none); no label is used. ``keys`` tell experts apart: what was measured for them is not again.
    """
    wanted = lacking(sentence, ready.recipe.ingredients)
    for what in wanted:
        for name, weights in experts.items():
            folder, key = place / what / name, key_of([what, keys, name, ready.scored_on, ROWS])
            if (read_card(folder) or {}).get("key") != key:
                measured = measure(ready, what, name, weights, ROWS, progress)
                save(measured, folder, {"kind": what, "expert": name, "rows": ROWS, "key": key})
    return ready.given({what: place / what for what in wanted}) if wanted else ready


def own_inputs(ready: "Prepared", name: str, rows: int) -> Subset:
    """Return the first inputs of an expert's own task: of the validation split, of the test split where there is none."""
    task = ready.val.get(name) or ready.test[name]
    return Subset(task.inputs, torch.arange(min(rows, len(task))))


def measure(
    ready: "Prepared", what: str, name: str, weights: Mapping[str, Tensor], rows: int, progress: Progress = silent
) -> dict[str, Tensor]:
    """Return one expert's Fisher information, Gram matrices or layers' inputs, from inputs of its own task."""
    some = own_inputs(ready, name, rows)
    if what == "fisher":
        return fisher(ready.encoder, weights, ready.heads[name], some, kind=ready.kind, progress=progress)
    by = gram if what == "gram" else entering
    return by(ready.encoder, weights, some, kind=ready.kind, progress=progress)
