"""Distil a merged model: teach it, on unlabeled inputs, what every expert says under its own head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..card import digest, is_done, key_of, read_card
from ..errors import HeadError, RecipeError
from ..models.device import home
from ..models.heads import AnyHead
from ..models.inputs import inputs_digest
from ..models.targets import Targets
from ..progress import Progress, silent
from ..steps.knobs import check_training
from ..steps.moving import Moving
from ..steps.student import Split, Student, targets_told, trainable
from ..steps.together import Everyone
from ..train import Checkpoint, Plan
from ..weights.delta import over
from ..weights.open import open_weights
from ..weights.save import carry, refuse_overwriting, save, write_readme

Weights = Mapping[str, Tensor]


def distil(
    model: Weights,
    experts: Mapping[str, Weights],
    base: Weights,
    *,
    encoder: nn.Module,
    heads: Mapping[str, AnyHead],
    inputs: Any,
    steps: int = 400,
    lr: float = 5e-5,
    batch: int = 32,
    weight_decay: float = 1e-4,
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    kind: str = "auto",
    targets: Path | None = None,
    checkpoint: Checkpoint | None = None,
    log: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return ``model`` trained to say under every head what that head's expert says, on unlabeled ``inputs`` alone.

        L(theta) = 1/N sum_i E_x [ KL( h_i(f(x; expert_i)) || h_i(f(x; theta)) ) ]

    ``model`` is where it begins: what a merger made, or the base, from which it takes far longer. A step is one forward
    and one backward pass, for all heads at once; every expert is asked once (``targets``: where that is kept, see
    `models.targets`). Tensors that no expert moved stay; a share ``held_out`` of the inputs tells when it stops helping.
    It leaves one model where `ri` leaves experts; no label is used.

    Raises HeadError for an expert without a head; ValueError at a knob out of range.
    Source: knowledge distillation (Hinton et al., arXiv 1503.02531) of several teachers, after merging.
    """
    check_training(steps=steps, lr=lr, batch=batch, held_out=held_out)
    if missing := [name for name in experts if name not in heads]:
        raise HeadError(f"expert '{missing[0]}' has no head of that name; heads: {', '.join(heads)}")
    split, asked = Split(inputs, steps, batch, held_out, seed), Targets(encoder, inputs, kind, targets)
    at, mine = split.everything, {name: heads[name] for name in experts}
    with progress("distil", steps) as tick:
        said = {n: asked(w, at, keep=False, progress=targets_told(tick)) for n, w in experts.items()}
        terms = Everyone(mine, next(iter(mine)), alpha=len(mine) - 1.0)
        terms.remember_all(at, len(inputs), said)
        names = dict.fromkeys(n for w in experts.values() for n in trainable(w, base, encoder))
        student = Student(model, encoder, inputs, Moving({n: model[n] for n in names}), kind)

        def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, told = terms(at, student(at))
            return value / len(mine), told

        plan = Plan(steps, lr, weight_decay, patience=patience)
        best = student.train(loss, split, plan, checkpoint=checkpoint, log=log, tick=tick)
    trained = home(best)
    return {n: trained[n].to(t.dtype) if n in trained else t for n, t in model.items()}


def distil_model(
    recipe: Any, model: str | Path, to: str | Path, *, steps: int = 400, progress: Progress = silent, **knobs: Any
) -> Path:
    """Distil a merged model of a recipe into a folder that its own library loads; interrupted, it goes on.

    ``knobs`` are further ones of `distil`. Raises RecipeError without unlabeled inputs; the errors of `prepare`, and
    WeightsError where ``model`` is none of this base or ``to`` holds it.
    """
    from ..prepare import prepare

    check_inputs(recipe)
    to = Path(to)
    refuse_overwriting(to, model, recipe.model.base, *recipe.experts.values())
    ready = prepare(recipe.model_copy(update={"sentences": ["average"], "where": {}}), progress=progress)
    weights = ready.opened(model)
    told = {"steps": steps, "seed": recipe.seed, **knobs}
    card = {"kind": "distil", "sentence": _sentence(model, steps), **told, "precision": ready.kind}
    card |= {"inputs": ready.digests, "model": digest(weights), "unlabeled": inputs_digest(ready.inputs)}
    card["key"] = key_of({**card, "heads": ready.heads_key, "statistics": ready.resets})
    if not is_done(to, card["key"]):
        whole = over(ready.whole, open_weights(model))
        held = to.parent / f".{to.name}.checkpoint.safetensors"
        made = distil(
            weights, ready.experts, ready.base, encoder=ready.encoder, heads=ready.heads, inputs=ready.inputs,
            kind=ready.kind, checkpoint=Checkpoint(held, card["key"]), progress=progress, **told,
        )  # fmt: skip
        made = dict(ready.finished(made))
        save({n: made[n].to(whole[n].dtype) if n in made else whole[n] for n in whole}, to, card)
        held.unlink(missing_ok=True)
    place = Path(model)
    carry(place if (place / "config.json").is_file() else Path(recipe.model.base), to)  # again, if a kill came before
    write_readme(to, card)
    return to


def check_inputs(recipe: Any) -> None:
    """Raise RecipeError for a recipe without unlabeled inputs."""
    if recipe.inputs is None:
        raise RecipeError("distilling needs unlabeled inputs: add [inputs] files = [...]")


def _sentence(model: str | Path, steps: int) -> str:
    """Return how the result came to be, in a line."""
    card = read_card(Path(model)) if Path(model).is_dir() else None
    return f"{(card or {}).get('sentence') or Path(model).name}, then distil(steps={steps})"
