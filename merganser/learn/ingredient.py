"""From a recipe to what is learned for it, on disk: Fisher information, Gram matrices, layers' inputs, AdaMerging's
coefficients; Surgery's corrections of a merged model.
"""

from pathlib import Path
from typing import Any

from ..card import digest
from ..errors import DataError, did_you_mean
from ..progress import Progress, silent

WHAT = ("fisher", "gram", "inputs", "coefficients", "surgery")
ON = ("tasks", "inputs")


def learn_ingredient(
    recipe: Any,
    what: str,
    to: Path,
    *,
    rows: int = 256,
    on: str = "tasks",
    steps: int = 1000,
    model: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Learn an ingredient for a recipe's experts without labels; return its folders by name.

    "fisher", "gram" and "inputs" (what enters each layer, for `esm`) are measured for every expert on inputs of its own
    task: the first ``rows`` of the validation split (test where there is none); a folder an expert. "coefficients" are
    learned by AdaMerging in ``steps`` steps ``on`` the same "tasks" inputs or on the recipe's unlabeled "inputs", one set
    for all; interrupted, it goes on. "surgery": the corrections of a merged ``model``'s features (`surgery.surgeries`), on
    either inputs.

    Raises DataError for another word, or where the recipe has no unlabeled inputs; and the errors of `prepare`.
    """
    from ..prepare import prepare
    from ..weights.save import save
    from .coefficients import adamerging
    from .supply import measure, own_inputs
    from .surgery import surgeries, tensors

    check_what(recipe, what, on, model)
    # its sentences may need what is learned here
    ready = prepare(recipe.model_copy(update={"sentences": ["average"], "where": {}}), progress=progress)
    few = {name: own_inputs(ready, name, rows) for name in ready.experts}
    to = Path(to)
    how: dict[str, Any] = {"kind": ready.kind, "progress": progress}
    if what == "coefficients":
        held = to / ".checkpoint.safetensors"
        found = adamerging(
            ready.base, ready.experts, encoder=ready.encoder, heads=ready.heads,
            inputs=ready.inputs if on == "inputs" else few, steps=steps, seed=recipe.seed, checkpoint=held, **how,
        )  # fmt: skip
        save(found, to, {"kind": what, "experts": list(ready.experts), "on": on, "steps": steps, "seed": recipe.seed})
        held.unlink(missing_ok=True)
        return {what: to}
    if what == "surgery":
        assert model is not None
        weights = ready.opened(model)
        asked = dict.fromkeys(ready.experts, ready.inputs) if on == "inputs" else few
        corrections = surgeries(
            weights, ready.experts, encoder=ready.encoder, inputs=asked, steps=steps, seed=recipe.seed, **how
        )
        card = {"kind": what, "model": digest(weights), "on": on, "steps": steps, "seed": recipe.seed}
        save(tensors(corrections), to, card)
        return {what: to}
    folders = {}
    for name, weights in ready.experts.items():
        measured = measure(ready, what, name, weights, rows, progress)
        folders[name] = to / name
        save(measured, folders[name], {"kind": what, "expert": name, "rows": len(few[name]), "seed": recipe.seed})
    return folders


def check_what(recipe: Any, what: str, on: str = "tasks", model: Path | None = None) -> None:
    """Raise DataError for an unknown ingredient or inputs, where the recipe has no unlabeled ones, or a model lacks."""
    if what not in WHAT:
        raise DataError(f"unknown ingredient '{what}'{did_you_mean(what, WHAT)}; known: {', '.join(WHAT)}")
    if on not in ON:
        raise DataError(f"unknown inputs '{on}'{did_you_mean(on, ON)}; known: {', '.join(ON)}")
    if (what == "surgery") != (model is not None):
        raise DataError(
            "surgery corrects a merged model: give it with --model (model=FOLDER)" if model is None
            else f"--model is for surgery; {what} is learned for the recipe's experts"
        )  # fmt: skip
    if on == "inputs" and recipe.inputs is None:
        raise DataError("the recipe has no unlabeled inputs; add [inputs] files = [...], or learn on the tasks' own")
