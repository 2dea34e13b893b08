"""Adapt experts before they are merged: each one through the adapt words of a sentence, resumable, with a card."""

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .card import digest, is_done, key_of
from .errors import HeadError, SentenceError
from .models.encoder import features
from .models.heads import AnyHead, Head, Span, check_width
from .models.inputs import Prompts, Subset, inputs_digest
from .models.targets import Targets
from .progress import Progress, silent
from .sentence import Step, knobs_of, parse_words
from .steps.tokens import TopTokens, top_tokens
from .steps.twins import overlapping
from .train import Checkpoint
from .weights.adapter import Adapter, is_adapter
from .weights.match import match
from .weights.open import Source, named, open_weights
from .weights.own_rank import adapter_in, again, save_adapter
from .weights.save import refuse_overwriting, save
from .weights.stored import Stored


def adapt(
    base: Source,
    experts: Mapping[str, Source] | Sequence[Source],
    *,
    encoder: nn.Module,
    heads: Mapping[str, AnyHead],
    inputs: Any,
    how: str = "ri",
    into: str | Path | None = None,
    own: Sequence[str] = (),
    seed: int = 0,
    kind: str = "auto",
    heads_key: str | None = None,
    progress: Progress = silent,
    _place: Callable[[str], Path] | None = None,
    _targets: Path | None = None,
) -> dict[str, Mapping[str, Tensor]]:
    """Return every expert's adapted weights, on unlabeled ``inputs`` alone.

    ``heads``: one an expert, under the expert's name; a language model has none, its ``inputs`` are `Prompts` of every
    expert's kind and generic text. ``how``: adapt steps, such as ``"ri(steps=300)"``. ``into``: a
    folder; each expert gets its own in it, one that its card proves done is read back, and one that was interrupted
    goes on from its last checkpoint to the same result; one that a step keeps an adapter (`ri`) is written as one. What
    base and experts say is kept there too, in ``.targets`` (see `models.targets`), for the next words on the same inputs.
    ``kind``: "fp32", "bf16" or "auto" (see `models.encoder`).
    ``heads_key``: what the heads were made from, where that is known; their own numbers may differ in the last bit from
    one number of threads to another, and would have everything done again.

    Raises HeadError (a head missing or of another width), WeightsError (keys, shapes), SentenceError (steps, knobs).
    """
    theta0 = open_weights(base)
    sources = {name: open_weights(source) for name, source in named(experts).items()}
    thetas: dict[str, Mapping[str, Tensor]] = dict(match(theta0, sources, own).experts)
    steps = adapt_steps(how)
    speaks = isinstance(inputs, Prompts)
    known = inputs.names if isinstance(inputs, Prompts) else tuple(heads)
    if missing := [name for name in thetas if name not in known]:
        what = ("prompts", "prompts of") if speaks else ("head", "heads")
        raise HeadError(f"expert '{missing[0]}' has no {what[0]} of that name; {what[1]}: {', '.join(known)}")
    for name in thetas if into is not None else ():
        refuse_overwriting(Path(into or ".") / name, theta0, *sources.values())
    if not speaks:
        check_fit(encoder, theta0, heads, inputs)
    same = {"base": digest(theta0), "heads": heads_key or heads_digest(heads), "inputs": inputs_digest(inputs)}
    given: dict[str, Any] = {"encoder": encoder, "_precision": kind}
    originals = dict(thetas)
    together: dict[str, Any] = {"_originals": originals}
    if isinstance(inputs, Prompts):
        given["_base_tokens"] = remembered_tokens(encoder, theta0, inputs, kind, key_of([same, kind]), into)
        together["_expert_tokens"] = _by_expert(encoder, originals, inputs, kind)
    else:
        shared = _targets or (into and Path(into) / ".targets")
        given["_targets"] = Targets(encoder, inputs, kind, Path(shared) if shared else None)

    def place(told: str) -> Path | None:
        return _place(told) if _place else _within(into, told, how_text(steps))

    for part, before in stages(steps):
        told = how_text([*before, *part])
        card = {"kind": "adapt", "sentence": told, "seed": seed, "precision": kind}
        card["encoder"] = [type(encoder).__qualname__, getattr(encoder, "pooling", None)]
        joint = is_joint(part[0])
        all_of_them = {n: [digest(originals[n]), digest(theta)] for n, theta in thetas.items()} if joint else None
        for name, theta in thetas.items():
            mine: dict[str, Any] = {**card, "own": name, "inputs": {**same, "expert": digest(theta)}}
            if all_of_them is not None:
                mine["inputs"]["experts"] = all_of_them
            adapted_as = _Expert(name, theta, theta0, heads, inputs, part, place(told))
            more = {**together, "others": {n: t for n, t in thetas.items() if n != name}} if joint else {}
            thetas[name] = adapted_as.adapted(mine, {**given, **more}, seed, progress)
    return thetas


@dataclass(frozen=True)
class _Expert:
    """One expert, and what is done to it."""

    name: str
    theta: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    heads: Mapping[str, AnyHead]
    inputs: Any
    steps: Sequence[Step]
    place: Path | None

    def adapted(
        self, card: dict[str, Any], given: Mapping[str, Any], seed: int, progress: Progress
    ) -> Mapping[str, Tensor]:
        """Return its weights behind the steps: read back where its card proves them done."""
        name, theta = self.name, self.theta
        if adapter_in(theta) is not None:
            card["expert"] = "adapter"  # which it may stay, unlike a full model of the same numbers
        if shared := _shared(self.steps, self.heads, name):
            card["overlap"] = shared
        card["key"] = key_of(card)
        folder = self.place / name if self.place is not None else None
        if folder is not None and is_done(folder, card["key"]):
            return _read_back(folder, theta)
        started = time.monotonic()
        for k, step in enumerate(self.steps):
            knobs = {"seed": seed, **step.knobs}
            files: dict[str, Any] = {}
            if folder is not None:
                files["_checkpoint"] = Checkpoint(folder / f"checkpoint-{k}.safetensors", card["key"])
                files["_log"] = folder / ("log.jsonl" if k == 0 else f"log-{k}.jsonl")
            total = knobs.get("steps", knobs_of(step.function).get("steps", 1))
            said = f"{step.name} {name}" + (f" (without classes it shares with {', '.join(shared)})" if shared else "")
            with progress(said, total) as tick:
                call = {"own": name, **knobs, **_taken(step, {**given, **files, "_tick": tick})}
                theta = step.function(theta, self.base, self.heads, self.inputs, **call)
        if folder is None:
            return theta
        card["seconds"] = round(time.monotonic() - started, 3)
        written = _write(theta, folder, card)
        for leftover in folder.glob("checkpoint-*.safetensors"):
            leftover.unlink()
        return written


def _by_expert(encoder: nn.Module, experts: Mapping[str, Mapping[str, Tensor]], inputs: Prompts, kind: str) -> Any:
    """Return a function from the name of a language model to what it says on its own prompts."""
    own = {name: Subset(inputs, inputs.of(name)) for name in experts}
    known = {name: remembered_tokens(encoder, w, own[name], kind) for name, w in experts.items()}
    return lambda name, k: known[name](k)


def _taken(step: Step, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` without the private words that the step does not know."""
    known = inspect.signature(step.function).parameters
    return {name: value for name, value in given.items() if name in known or not name.startswith("_")}


def is_joint(step: Step) -> bool:
    """Tell whether a step sees the other experts, so that all of them must have come as far first."""
    return "others" in inspect.signature(step.function).parameters


def stages(steps: Sequence[Step]) -> list[tuple[list[Step], list[Step]]]:
    """Return the parts of ``steps`` that all experts pass through before any goes on, each with the steps before it."""
    parts: list[tuple[list[Step], list[Step]]] = []
    for k, step in enumerate(steps):
        if parts and not is_joint(step) and not is_joint(parts[-1][0][0]):
            parts[-1][0].append(step)
        else:
            parts.append(([step], list(steps[:k])))
    return parts


def slug(text: str) -> str:
    """Return ``text`` as a file name; long texts end in a part of their digest."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"
    return name if len(name) <= 80 else f"{name[:71]}-{key_of(text)[:8]}"


def _within(into: str | Path | None, part: str, whole: str) -> Path | None:
    """Return where experts lie behind ``part`` of the steps: in ``into`` at the end, before that in a hidden folder."""
    return None if into is None else Path(into) if part == whole else Path(into) / f".{slug(part)}"


def _write(theta: Mapping[str, Tensor], folder: Path, card: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Write an adapted expert as it was adapted: an adapter as an adapter, another as whole weights."""
    if (found := adapter_in(theta)) is None:
        return save(theta, folder, card)
    return again(theta, found, save_adapter(found.adapter, found.adapter.config, folder, card))


def _read_back(folder: Path, theta: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    found = adapter_in(theta) if is_adapter(folder) else None
    return Stored(folder) if found is None else again(theta, found, Adapter(folder))


def _shared(steps: Sequence[Step], heads: Mapping[str, AnyHead], own: str) -> dict[str, list[list[float]]]:
    """Return the classes that other heads have in common with ``own`` and the steps leave out: [own, other, cosine]."""
    found: dict[str, list[list[float]]] = {}
    for step in steps:
        knobs = {**knobs_of(step.function), **step.knobs}
        if "overlap" in knobs and knobs.get("form", "heads") == "heads":
            for name, (_, pairs) in overlapping(heads, own, knobs["overlap"]).items():
                found[name] = [[i, j, round(cos, 4)] for i, j, cos in pairs]
    return found


def adapt_steps(how: str) -> list[Step]:
    """Return the adapt steps of ``how``. Raises SentenceError at another kind of step or a knob out of range."""
    steps = parse_words(how)
    for step in steps:
        if step.kind != "adapt":
            raise SentenceError(f"'{step.name}' is a {step.kind} step; adapt() takes adapt steps such as ri(steps=300)")
        try:
            step.hook("check")(**step.knobs)
        except (ValueError, TypeError) as error:
            raise SentenceError(f"{step}: {error}") from None
    return steps


def how_text(steps: Sequence[Step]) -> str:
    """Return the canonical text of adapt steps."""
    return " | ".join(map(str, steps))


@torch.no_grad()
def check_fit(encoder: nn.Module, base: Mapping[str, Tensor], heads: Mapping[str, AnyHead], inputs: Any) -> None:
    """Run one input through encoder and heads. Raises HeadError at the first head that does not fit."""
    x = features(encoder, base, Subset(inputs, torch.arange(1)), kind="fp32")
    check_width(heads, x.shape[1])
    for name, head in heads.items():
        try:
            logits = head(x)
        except Exception as error:
            raise HeadError(f"head '{name}' does not take features of width {x.shape[1]}: {error}") from None
        if logits.ndim != 2 or len(logits) != 1:
            raise HeadError(f"head '{name}' must give logits [batch, classes], gave {list(logits.shape)} for one input")


def remembered_tokens(
    encoder: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Any,
    kind: str,
    key: str = "",
    into: str | Path | None = None,
) -> Any:
    """Return a function from k to the k most likely next tokens on all inputs: once for all experts, ``into`` a folder."""

    @cache
    def compute(k: int) -> TopTokens:
        folder = None if into is None else Path(into) / f".targets-{k}"
        return top_tokens(encoder, weights, inputs, k, kind=kind, folder=folder, key=key)

    return compute


def heads_digest(heads: Mapping[str, AnyHead]) -> str:
    """Return a digest of all heads: a linear head's numbers, a module's tensors, another function's name."""
    parts: dict[str, Any] = {}
    for name, head in heads.items():
        if isinstance(head, Head):
            tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
            parts[name] = [digest(tensors), head.normalize, *(["span"] if isinstance(head, Span) else [])]
        elif isinstance(head, nn.Module):
            parts[name] = [digest(head.state_dict()), type(head).__qualname__]
        else:
            parts[name] = getattr(head, "__qualname__", type(head).__qualname__)
    return key_of(parts)
