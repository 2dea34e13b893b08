"""Co-adapt: train an expert inside merges with the others, until every head says there what its own expert says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import HeadError, RecipeError
from ...models.encoder import features
from ...models.heads import AnyHead
from ...models.inputs import Prompts, Subset
from ...progress import Tick
from ...train import Checkpoint, Plan
from ..moving import chosen
from ..rank import Ranked, check_rank
from ..student import Split, targets_told, trainable
from ..together import Everyone, Inside
from ..twins import DISTANCES, overlapping

Weights = Mapping[str, Tensor]


def coadapt(
    expert: Weights,
    base: Weights,
    heads: Mapping[str, AnyHead],
    inputs: Any,
    *,
    own: str,
    encoder: nn.Module,
    others: Mapping[str, Weights],
    steps: int = 300,
    lr: float = 5e-5,
    low: float = 0.4,
    high: float = 1.0,
    alpha: float = 1.0,
    batch: int = 32,
    weight_decay: float = 1e-4,
    distance: str = "kl",
    temperature: float = 1.0,
    overlap: float = 0.95,
    only: str = "*",
    rank: int | str = "own",
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    _originals: Mapping[str, Weights] | None = None,
    _precision: str = "auto",
    _expert_features: Callable[[str, Tensor], Tensor] | None = None,
    _checkpoint: Checkpoint | None = None,
    _log: Path | None = None,
    _tick: Tick = lambda _advance=1, **_terms: None,
) -> Weights:
    """Train ``expert`` inside merges with ``others`` on unlabeled ``inputs`` and return its new weights.

        theta(b) = base + b (theta - base + sum_j (theta_j - base)),    b ~ U(low, high) anew for each batch
        L(theta) = E_x,b [ d(h_own(f(x; expert_own)), h_own(f(x; theta(b))))
                           + alpha/(N-1) sum_{j != own} d(h_j(f(x; expert_j)), h_j(f(x; theta(b)))) ]

    `ri` makes each expert harmless to the other heads when it is added to the base alone. What is left when several are
    added is that a network is not linear in its weights, and no expert can see that without the others. Here each one
    sees it: experts are trained one after another, each inside merges with those before it as they are now and those
    behind it as they were, so that a shared fault is mended once. Trained all at once, each would mend it in full.

    others     the other experts' weights at this time, by name. `merganser.adapt` gives them, and takes for targets what the
               experts said before any adapting (a direct call: what ``expert`` and ``others`` say)
    low, high  the scales of the merges trained in. Sentences whose best scale is another still gain
    overlap    as in `ri`: classes of other heads that the own head has too take no part in the second term
    only, rank, distance, temperature, held_out, patience   as in `ri`

    A step costs one forward and one backward pass; targets are one forward pass of every expert on the inputs used, once
    for all. ``ri | coadapt | ties`` is a sentence; ``coadapt | coadapt`` goes round twice.

    Raises HeadError if ``own`` is not among the heads, or another expert has none; RecipeError for language models;
    ValueError at a knob out of range.
    Source: ours; block-coordinate descent on merging after Resolving Interference (arXiv 2603.13467).
    """
    check(
        steps=steps, lr=lr, low=low, high=high, alpha=alpha, batch=batch, distance=distance, temperature=temperature,
        overlap=overlap, rank=rank, held_out=held_out,
    )  # fmt: skip
    if isinstance(inputs, Prompts):
        raise RecipeError("coadapt works through heads, which a language model has not; use ri")
    if missing := [name for name in (own, *others) if name not in heads]:
        raise HeadError(f"expert '{missing[0]}' has no head of that name; heads: {', '.join(heads)}")
    everyone = {name: head for name, head in heads.items() if name == own or name in others}
    wanted = _originals or {own: expert, **others}
    split = Split(inputs, steps, batch, held_out, seed)
    hidden = {name: same for name, (same, _) in overlapping(everyone, own, overlap).items()}
    terms = Everyone(everyone, own, hidden=hidden, temperature=temperature, alpha=alpha, distance=distance)

    def said(name: str, at: Tensor) -> Tensor:
        return features(encoder, wanted[name], Subset(inputs, at), kind=_precision, progress=targets_told(_tick))

    at = split.everything
    terms.remember_all(at, len(inputs), {name: (_expert_features or said)(name, at) for name in everyone})
    trained = Ranked(expert, chosen(trainable(expert, base, encoder), only), rank, seed)
    student = Inside(expert, base, others, encoder, inputs, trained, _precision, (low, high), seed)

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return terms(at, student(at))

    plan = Plan(steps, lr, weight_decay, patience=patience)
    return trained.result(student.train(loss, split, plan, checkpoint=_checkpoint, log=_log, tick=_tick))


def check(**knobs: Any) -> None:
    """Raise ValueError at a knob out of range, before any work."""
    for name in ("steps", "batch", "lr", "temperature", "overlap"):
        if name in knobs and not knobs[name] > 0:
            raise ValueError(f"{name} must be positive, got {knobs[name]}")
    if knobs.get("alpha", 1) < 0:
        raise ValueError(f"alpha must not be negative, got {knobs['alpha']}")
    low, high = knobs.get("low", 0.4), knobs.get("high", 1.0)
    if not 0 < low <= high:
        raise ValueError(f"scales must be 0 < low <= high, got low={low}, high={high}")
    if knobs.get("distance", "kl") not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got '{knobs['distance']}'")
    check_rank(knobs.get("rank", "own"))
    if not 0 <= knobs.get("held_out", 0) < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {knobs['held_out']}")
