"""Resolving Interference: adapt an expert so that it keeps its own head's outputs and leaves every other head alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import HeadError
from ...models.heads import AnyHead, Span
from ...models.inputs import Prompts, Subset
from ...models.targets import Targets
from ...progress import Tick
from ...train import Checkpoint, Plan
from ..guard import Guard
from ..knobs import check_training
from ..moving import chosen, last_blocks
from ..rank import Ranked
from ..student import Halves, Split, Student, targets_told, trainable
from ..tokens import ByKind, NextTokens, TopTokens, top_tokens
from ..twins import FORMS, Twins, overlapping


def ri(
    expert: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    heads: Mapping[str, AnyHead],
    inputs: Any,
    *,
    own: str,
    encoder: nn.Module,
    steps: int = 300,
    lr: float = 5e-5,
    alpha: float = 1.0,
    ramp: float = 0.0,
    batch: int = 32,
    micro: int = 0,
    weight_decay: float = 1e-4,
    distance: str = "kl",
    temperature: float = 1.0,
    form: str = "heads",
    sample: int = 0,
    overlap: float = 0.95,
    only: str = "*",
    blocks: int = 0,
    rank: int | str = "own",
    within: int | str = 0,
    pull: float = 0.0,
    guard: float = 0.0,
    top: int = 64,
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    _precision: str = "auto",
    _base_tokens: Callable[[int], TopTokens] | None = None,
    _targets: Targets | None = None,
    _checkpoint: Checkpoint | None = None,
    _log: Path | None = None,
    _tick: Tick = lambda _advance=1, **_terms: None,
) -> Mapping[str, Tensor]:
    """Adapt ``expert`` by twin distillation on unlabeled ``inputs`` and return its new weights.

        L(theta) = E_x [ d(h_own(f(x; expert)), h_own(f(x; theta)))
                         + alpha/(N-1) sum_{j != own} d(h_j(f(x; base)), h_j(f(x; theta))) ]

    ``d``: "kl" is KL(target || student), "reverse" KL(student || target), "js" Jensen-Shannon; "ce" is cross-entropy
    against the target's most likely class (against its probabilities it would have KL's gradient); "mse" and "cosine"
    compare logits. ``temperature`` divides the logits; the distance is multiplied by its square. Only tensors that
    fine-tuning moved are trained, so frozen embeddings stay frozen; batch norms keep the expert's running statistics.

    ramp     over this share of the steps ``alpha`` rises from 0 along a line (0: it is constant)
    overlap  classes of other heads whose row is nearly one of the own head's (cosine at least this, all heads' mean row
             taken off) take no part in the other term: both terms cannot have them. Above 1: never
    form     the other term without knowing all heads: "rows" keeps the base's normalised features in the span of the
             other heads' rows (or of a `Span` among the heads), "features" keeps them altogether; both times the own
             head's row norm, squared, halved
    micro    so many inputs of a batch at a time, their gradients added up (0: all at once): less memory, the same step
    sample   this many other heads a step, drawn anew, instead of all (0)
    only     patterns of the tensors that are trained, with commas
    blocks   train the last so many blocks (layers) alone (0: all). What lies below the first trained tensor is run once
             for every input, not at every step
    rank     a change B A of this rank of each matrix instead of itself (0). "own": where the expert is a LoRA adapter, its
             own B and A are trained on, and what is returned is an adapter again; other experts as with 0
    within   the whole task vector of each matrix is held at this rank, which a merger that cuts to it does not touch:
             its leading singular triplets are where training begins, the expert's outputs what it learns back. "tsv": as
             many as TSV-M keeps of each of N experts, min(out, in) // N. 0: not. Adapters keep their own
    pull     adds ``pull |theta - expert|^2 / |expert - base|^2``
    guard    adds ``guard`` times the change in the directions that the own task's inputs lie in (see `steps.guard`)
    top      language models: so many of the most likely next tokens are kept of a target, and one bin for all others

    A language model (``inputs`` are `Prompts`, ``encoder`` gives logits of next tokens) has no heads: it keeps the
    expert's next tokens on the expert's own prompts and the base's on generic text and on other experts' prompts, at
    every place; half of a batch is of the own kind (see `steps.tokens`). ``temperature``, ``form`` and ``sample`` are
    refused, ``overlap`` does not apply.

    The targets are computed once: a step costs one forward and one backward of the student. A share ``held_out`` of
    the inputs (at most 256) is kept to tell when it has stopped helping: training ends after ``patience`` checks without
    a new best, and the best weights are returned.

    The paper's recipe for CLIP ViT-B/32 on ImageNet is steps=2500, lr=1e-6, batch=128, alpha=1, weight_decay=1e-4.
    Our defaults suit small text encoders; the grid we tried there: steps {100, 300}, lr {5e-5, 1e-4, 2e-4}.

    Raises HeadError if ``own`` is not among the heads, a head does not fit or is a `Span` that this form does not ask
    for; ValueError at a knob out of range.
    Source: Resolving Interference (arXiv 2603.13467), section 5, algorithm 1.
    """
    check(steps=steps, lr=lr, alpha=alpha, ramp=ramp, batch=batch, distance=distance, held_out=held_out, micro=micro)
    check(
        temperature=temperature, form=form, sample=sample, overlap=overlap, rank=rank, within=within, pull=pull,
        guard=guard, top=top, blocks=blocks,
    )  # fmt: skip
    known_as = inputs.names if isinstance(inputs, Prompts) else tuple(heads)
    if own not in known_as:
        what = "prompts" if isinstance(inputs, Prompts) else "head"
        raise HeadError(f"expert '{own}' has no {what} of that name; there are: {', '.join(known_as)}")
    how: dict[str, Any] = {"alpha": alpha, "distance": distance}
    split: Any
    terms: Any
    if isinstance(inputs, Prompts):
        if (temperature, form, sample) != (1, "heads", 0):
            raise ValueError("temperature, form and sample are about heads, which a language model has not")
        split = Halves(inputs, own, steps, batch, held_out, seed)
        terms = _spoken(expert, base, inputs, own, encoder, top, _base_tokens, _precision, _tick, how)
    else:
        if form != "rows" and (spans := [name for name, head in heads.items() if isinstance(head, Span)]):
            raise HeadError(f"'{spans[0]}' is a span, which only ri(form='rows') keeps; this is form='{form}'")
        split = Split(inputs, steps, batch, held_out, seed)
        hidden = {name: same for name, (same, _) in overlapping(heads, own, overlap).items()} if form == "heads" else {}
        terms = Twins(heads, own, hidden=hidden, temperature=temperature, form=form, sample=sample, **how)
        at = split.everything
        said = _targets or Targets(encoder, inputs, _precision)
        mine = said(expert, at, keep=False, progress=targets_told(_tick))
        terms.remember(at, len(inputs), said(base, at), mine)
    names = chosen(trainable(expert, base, encoder), only)
    if blocks:
        last = set(last_blocks(list(base), blocks))
        names = [name for name in names if name in last]
        if not names:
            raise ValueError(f"blocks={blocks}: fine-tuning moved nothing in the last blocks")
    trained = Ranked(expert, names, rank, seed, base=base, within=within, experts=len(known_as))
    moving = trained.moving
    moves = {n: expert[n] - base[n] for n in moving.names} if pull else {}
    guarded = Guard(expert, base, names) if guard else None
    student = Student(expert, encoder, inputs, moving, _precision)
    student.remember_lower(split.everything)

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, told = terms(at, student(at))
        if pull:
            value = value + pull * moving.pull(moving.params, moves).to(value.device)
        if guarded is not None:
            value = value + guard * guarded(moving.weights(moving.params)).to(value.device)
        return value, told

    def rising(step: int) -> None:
        terms.risen = min(1.0, (step + 1) / (ramp * steps)) if ramp else 1.0

    plan = Plan(steps, lr, weight_decay, patience=patience)
    best = student.train(loss, split, plan, micro=micro, before=rising, checkpoint=_checkpoint, log=_log, tick=_tick)
    return trained.result(best)


def _spoken(
    expert: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    inputs: Prompts,
    own: str,
    encoder: nn.Module,
    top: int,
    base_tokens: Callable[[int], TopTokens] | None,
    kind: str,
    tick: Tick,
    how: Mapping[str, Any],
) -> NextTokens:
    """Return the terms of a language model, with the expert's targets on its own prompts and the base's on all texts."""
    mine = top_tokens(encoder, expert, Subset(inputs, inputs.of(own)), top, kind=kind, tick=tick)
    theirs = base_tokens(top) if base_tokens else top_tokens(encoder, base, inputs, top, kind=kind, tick=tick)
    return NextTokens(inputs, own, wanted=ByKind(inputs, {own: mine}, theirs), **how)


def check(**knobs: Any) -> None:
    """Raise ValueError at a knob out of range, before any work."""
    check_training(**knobs)
    if knobs.get("form", "heads") not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got '{knobs['form']}'")
