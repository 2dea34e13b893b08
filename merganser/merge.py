"""The loop: for each tensor, read the deltas in fp32, edit, align, combine, edit, add to the base, cast, put away.

One loop serves all storage: a tensor's result depends on that tensor, the surveys and seeds named after it, never on
where the bytes are or in which order they are read, so a result in memory and one streamed to disk are bit-equal.

Rules: tensors that are not floating point (position ids, counters) are the base's; tensors left out with ``own`` are
the base's where it has them; a tensor that no expert has moved is the base's, bit by bit, and does not count where a
step looks at the whole model (TIES trims among what fine-tuning moved); others come out in the base's dtype.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .card import digest, key_of
from .errors import SentenceError, WeightsError
from .progress import Progress, silent
from .sentence import Sentence, Step, parse
from .weights.open import Source, check_match, named, open_weights
from .weights.save import carry, refuse_overwriting, short, write_readme
from .weights.sink import Sink, spec_of
from .weights.stored import Stored

How = str | Sentence | Iterable[Callable[..., Any] | str]


def merge(
    base: Source,
    experts: Mapping[str, Source] | Sequence[Source],
    how: How,
    *,
    into: str | Path | None = None,
    own: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = silent,
    about: Mapping[str, Any] | None = None,
) -> Mapping[str, Tensor]:
    """Merge ``experts`` of one ``base`` as the sentence ``how`` says: ``theta = base + edit(combine(edit(delta_t)))``.

    ``base`` and ``experts`` are mappings from name to tensor or paths of safetensors checkpoints. ``into`` is a folder
    to stream to; the result is then read lazily from it, and config and tokenizer files are carried over from the base.
    ``own``: glob patterns of tensors left out (each expert's own head). ``about``: more for the card of the result.
    The same seed gives the same bytes.

    Raises WeightsError (keys, shapes, non-finite values), SentenceError (grammar, steps, knobs; adapt words belong to
    `merganser.adapt` and `merganser.run`).
    """
    sentence = merging_only(parse(how))
    theta0 = open_weights(base)
    thetas = {name: open_weights(source) for name, source in named(experts).items()}
    names = check_match(theta0, thetas, own)
    try_out(sentence, len(thetas))
    if into is not None:
        refuse_overwriting(into, theta0, *thetas.values())
    started = time.monotonic()
    results = (
        (name, applied(theta0[name], delta))
        for name, delta in merged_deltas(theta0, thetas, sentence, names, seed=seed, progress=progress)
    )
    if into is None:
        moved = dict(results)
        return {name: moved[name] if name in moved else theta0[name] for name in theta0}
    folder = Path(into)
    card = {
        "kind": "merge",
        "sentence": str(sentence),
        "seed": seed,
        "own": list(own),
        "inputs": {"base": digest(theta0), **{name: digest(w) for name, w in thetas.items()}},
        **(about or {}),
    }
    card["key"] = key_of(card)
    sink = Sink(folder, spec_of(theta0), metadata=short(card))
    try:
        for name, tensor in results:
            sink.put(name, tensor)
        for name in sink.missing.copy():
            sink.put(name, theta0[name])
    except BaseException:
        sink.abandon()
        raise
    merged = sink.close()
    finish(folder, theta0, {**card, "seconds": round(time.monotonic() - started, 3)})
    return merged


def finish(folder: Path, base: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Put beside the weights what their own library needs, the card and the model card."""
    from .card import write_card

    origin = base.path if isinstance(base, Stored) else None
    if origin is not None:
        carry(origin, folder)
    write_card(folder, card)
    write_readme(folder, card, str(origin) if origin is not None else None)


def merging_only(sentence: Sentence) -> Sentence:
    """Return ``sentence``, or raise SentenceError if it has adapt words: those need encoder, heads and inputs."""
    if sentence.adapt:
        raise SentenceError(
            f"'{sentence.adapt[0].name}' adapts experts and needs encoder, heads and inputs: use adapt() first, or "
            f"run() with a recipe; merge() takes '{sentence.merging}'"
        )
    return sentence


def merged_deltas(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    sentence: Sentence,
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    """Yield name and merged delta (fp32) of every tensor that an expert has moved."""

    def prepared(name: str) -> Tensor | None:
        deltas = deltas_of(base, experts, name)
        if deltas is None:
            return None
        for step in sentence.before:
            deltas = _edited(step, deltas, name, list(experts), seed)
        return deltas

    with progress(f"merge {sentence}", len(names)) as tick:
        survey = _survey(sentence.combine, prepared, names)
        for name in names:
            deltas = prepared(name)
            if deltas is not None:
                delta = _named(sentence.combine, name, deltas, survey=survey, name=name)
                for step in sentence.after:
                    delta = _named(step, name, delta, rng=generator(seed, name, "merged"), name=name)
                yield name, delta
            tick(1)


def deltas_of(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], name: str
) -> Float[Tensor, "experts *shape"] | None:
    """Return the experts' deltas of one tensor in fp32, stacked; None if it is not floating point or nobody moved it.

    Raises WeightsError, naming tensor and expert, at a value that is not finite.
    """
    origin = base[name]
    if not origin.is_floating_point():
        return None
    origin = origin.float()
    deltas = torch.empty(len(experts), *origin.shape)
    for row, weights in zip(deltas, experts.values(), strict=True):
        torch.sub(weights[name].float(), origin, out=row)
    if not torch.isfinite(deltas.sum()) and not torch.isfinite(deltas).all():
        who = next((e for e, w in experts.items() if not torch.isfinite(w[name]).all()), "the base")
        where = who if who == "the base" else f"expert '{who}'"
        raise WeightsError(f"{where} has NaN or inf in tensor '{name}': repair or leave out that checkpoint")
    return deltas if deltas.any() else None


def applied(base: Tensor, delta: Float[Tensor, "*shape"]) -> Tensor:
    """Return ``base + delta``, added in fp32 and cast to the base's dtype."""
    return (base.float() + delta).to(base.dtype)


def generator(seed: int, tensor: str, expert: str) -> torch.Generator:
    """Return a generator seeded from names, so neither the order of work nor the machine changes what is drawn."""
    named_seed = hashlib.sha256(f"{seed}|{tensor}|{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(named_seed[:8], "little") >> 1)


def try_out(sentence: Sentence, experts: int) -> None:
    """Run the steps once on a tiny tensor, so that a knob out of range is told before any work starts."""
    deltas = torch.linspace(-1, 1, experts * 16).reshape(experts, 4, 4)
    for step in sentence.before:
        deltas = _edited(step, deltas, "", [str(k) for k in range(experts)], 0)
    delta = _named(sentence.combine, "", deltas, survey=None, name="")
    for step in sentence.after:
        delta = _named(step, "", delta, rng=generator(0, "", ""), name="")


def _edited(step: Step, deltas: Tensor, name: str, experts: Sequence[str], seed: int) -> Tensor:
    rows = zip(deltas, experts, strict=True)
    return torch.stack([_named(step, name, row, rng=generator(seed, name, e), name=name) for row, e in rows])


def _survey(step: Step, prepared: Callable[[str], Tensor | None], names: Sequence[str]) -> list[Any] | None:
    passes = getattr(step.module(), "passes", None)
    if passes is None:
        return None
    learned: list[Any] = []
    for look in passes(**step.knobs):
        total: Any = None
        for name in names:
            deltas = prepared(name)
            if deltas is not None:
                seen = look(deltas, learned)
                total = seen if total is None else total + seen
        learned.append(total)
    return learned


def _named(step: Step, tensor: str, *args: Any, **given: Any) -> Any:
    """Call a step; its own terse error gets sentence word and tensor added, once."""
    try:
        return step.call(*args, **given)
    except (ValueError, TypeError) as error:
        where = f" (tensor '{tensor}')" if tensor else ""
        raise SentenceError(f"{step}: {error}{where}") from None
