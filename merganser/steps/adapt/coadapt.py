"""Co-adapt: train an expert inside merges with the others, until every head says there what its own expert says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import HeadError
from ...models.heads import AnyHead
from ...models.inputs import Prompts, Subset
from ...models.targets import Targets
from ...progress import Tick
from ...sentence import parse
from ...train import Checkpoint, Plan
from ..guard import Guard
from ..knobs import check_training
from ..moving import chosen
from ..rank import Ranked
from ..student import Halves, Split, targets_told, trainable
from ..together import SUM, Everyone, Inside
from ..tokens import ByKind, NextTokens, TopTokens, top_tokens
from ..twins import overlapping

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
    merger: str = "task_arithmetic",
    low: float = 0.4,
    high: float = 1.0,
    refresh: int = 50,
    alpha: float = 1.0,
    batch: int = 32,
    micro: int = 0,
    weight_decay: float = 1e-4,
    distance: str = "kl",
    temperature: float = 1.0,
    overlap: float = 0.95,
    only: str = "*",
    rank: int | str = "own",
    within: int | str = 0,
    guard: float = 0.0,
    top: int = 64,
    held_out: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    _originals: Mapping[str, Weights] | None = None,
    _precision: str = "auto",
    _base_tokens: Callable[[int], TopTokens] | None = None,
    _expert_tokens: Callable[[str, int], TopTokens] | None = None,
    _targets: Targets | None = None,
    _checkpoint: Checkpoint | None = None,
    _log: Path | None = None,
    _tick: Tick = lambda _advance=1, **_terms: None,
) -> Weights:
    """Train ``expert`` inside merges with ``others`` on unlabeled ``inputs`` and return its new weights.

        theta(b) = base + b (delta + theta - expert),   delta = sum_j (theta_j - base),   b ~ U(low, high) for each batch
        L(theta) = E_x,b [ d(h_own(f(x; expert_own)), h_own(f(x; theta(b))))
                           + alpha/(N-1) sum_{j != own} d(h_j(f(x; expert_j)), h_j(f(x; theta(b)))) ]

    `ri` makes each expert harmless to the other heads when it is added to the base alone. What is left when several are
    added is that a network is not linear in its weights, and no expert can see that without the others. Here each one
    sees it: experts are trained one after another, each inside merges with those before it as they are now and those
    behind it as they were, so that a shared fault is mended once. Trained all at once, each would mend it in full.

    others     the other experts' weights at this time, by name. `merganser.adapt` gives them, and takes for targets what the
               experts said before any adapting (a direct call: what ``expert`` and ``others`` say)
    merger     what makes delta of all experts. For another merging sentence than a sum, such as "tsv", what the student
               changes is added times the share of its task vector that arrives in the merge, tensor by tensor
    refresh    such a merge is worked out again every so many steps (0: never); a sum needs none
    low, high  the scales of the merges trained in. Sentences whose best scale is another still gain
    overlap    as in `ri`: classes of other heads that the own head has too take no part in the second term
    only, rank, within, guard, micro, distance, temperature, top, held_out, patience   as in `ri`

    A language model (see `ri`) is to say in the merges what each expert says on its own prompts, and what the base says on
    generic text; half of a batch is of the own kind.

    A step costs one forward and one backward pass; targets are one forward pass of every expert on the inputs used, once
    for all. ``ri | coadapt | ties`` is a sentence; ``coadapt | coadapt`` goes round twice.

    Raises HeadError if ``own`` is not among the heads, or another expert has none; ValueError at a knob out of range.
    Source: ours; block-coordinate descent on merging after Resolving Interference (arXiv 2603.13467).
    """
    check(
        merger=merger, steps=steps, lr=lr, low=low, high=high, alpha=alpha, batch=batch, micro=micro, distance=distance,
        temperature=temperature, overlap=overlap, rank=rank, within=within, guard=guard, refresh=refresh, top=top,
        held_out=held_out,
    )  # fmt: skip
    known_as = inputs.names if isinstance(inputs, Prompts) else tuple(heads)
    if missing := [name for name in (own, *others) if name not in known_as]:
        what = "prompts" if isinstance(inputs, Prompts) else "head"
        raise HeadError(f"expert '{missing[0]}' has no {what} of that name; there are: {', '.join(known_as)}")
    if isinstance(inputs, Prompts) and temperature != 1:
        raise ValueError("temperature is about heads, which a language model has not")
    how: dict[str, Any] = {"alpha": alpha, "distance": distance}
    originals = _originals or {own: expert, **others}
    split: Any
    terms: Any
    if isinstance(inputs, Prompts):
        split = Halves(inputs, own, steps, batch, held_out, seed)
        theirs = _base_tokens(top) if _base_tokens else top_tokens(encoder, base, inputs, top, kind=_precision)
        ask = _Ask(encoder, originals, inputs, _precision, _tick)
        mine = {name: (_expert_tokens or ask.tokens)(name, top) for name in inputs.names if name in ask.experts}
        terms = NextTokens(inputs, own, wanted=ByKind(inputs, mine, theirs), **how)
    else:
        split = Split(inputs, steps, batch, held_out, seed)
        everyone = {name: head for name, head in heads.items() if name == own or name in others}
        hidden = {name: same for name, (same, _) in overlapping(everyone, own, overlap).items()}
        terms = Everyone(everyone, own, hidden=hidden, temperature=temperature, **how)
        at = split.everything
        said = _targets or Targets(encoder, inputs, _precision)
        told = targets_told(_tick)
        terms.remember_all(at, len(inputs), {n: said(originals[n], at, progress=told) for n in everyone})
    names = chosen(trainable(expert, base, encoder), only)
    trained = Ranked(expert, names, rank, seed, base=base, within=within, experts=1 + len(others))
    student = Inside(expert, base, others, encoder, inputs, trained, _precision, (low, high), seed, merger)
    guarded = Guard(expert, base, names) if guard else None

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, told = terms(at, student(at))
        if guarded is not None:
            value = value + guard * guarded(trained.moving.weights(trained.moving.params)).to(value.device)
        return value, told

    plan = Plan(steps, lr, weight_decay, patience=patience)
    often = 0 if merger == SUM else refresh
    best = student.train(loss, split, plan, micro=micro, refresh=often, checkpoint=_checkpoint, log=_log, tick=_tick)
    return trained.result(best)


class _Ask:
    """What the experts say, where nobody has remembered it."""

    def __init__(self, encoder: nn.Module, experts: Mapping[str, Weights], inputs: Any, kind: str, tick: Tick):
        self.encoder, self.experts, self.inputs, self.kind, self.tick = encoder, experts, inputs, kind, tick

    def tokens(self, name: str, top: int) -> TopTokens:
        """An expert's most likely next tokens on its own prompts."""
        mine = Subset(self.inputs, self.inputs.of(name))
        return top_tokens(self.encoder, self.experts[name], mine, top, kind=self.kind, tick=self.tick)


def check(**knobs: Any) -> None:
    """Raise ValueError at a knob out of range, before any work."""
    check_training(**knobs)
    merging = parse(knobs.get("merger", "task_arithmetic"))
    if merging.adapt or any(step.ingredients for step in merging.steps):
        raise ValueError(f"merger must be a merging sentence without ingredients, got '{merging}'")
    low, high = knobs.get("low", 0.4), knobs.get("high", 1.0)
    if not 0 < low <= high:
        raise ValueError(f"scales must be 0 < low <= high, got low={low}, high={high}")
