"""The door to merging: weights and a sentence in, one model out, in memory, streamed to a folder, or one part of it.

What happens to each tensor is `loop`; this file checks what it is given, says where the result goes, and writes down
how it came to be.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import as_adapter
from .card import digest, key_of, write_card
from .errors import WeightsError
from .examine import How, Ingredients, examine
from .fingerprint import Seen
from .job import Job
from .loop import Piece, is_float, merge_each
from .progress import Progress, silent
from .read import all_finite, not_finite
from .survey import survey
from .weights.adapter import Adapted
from .weights.header import View, folder_of, header
from .weights.hub import name_of
from .weights.open import Source
from .weights.parts import Share, inputs_of
from .weights.quantised import Dequantised, as_stored, write_plain
from .weights.renamed import Renamed
from .weights.save import carry, short, write_readme
from .weights.sink import DTYPES, Sink, shard_bytes, spec_of
from .weights.stored import Stored
from .weights.tied import sample
from .weights.tokenizer import write_dtype
from .where import Patterns

TORCH = {name: dtype for dtype, name in DTYPES.items()}
WIDE = ("F64", "F32")  # bf16 reaches nearly as far as fp32, not quite
NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)  # a sum of finite numbers may not fit


def merge(
    base: Source | None,
    experts: Mapping[str, Source] | Sequence[Source],
    how: How,
    *,
    into: str | Path | None = None,
    own: Sequence[str] = (),
    seed: int = 0,
    ingredients: Ingredients | None = None,
    part: tuple[int, int] | None = None,
    where: Patterns | None = None,
    vocabulary: str | None = None,
    dtype: str | None = None,
    stored: str = "model",
    rank: int | str | None = None,
    shard_size: int | str | None = None,
    progress: Progress = silent,
    about: Mapping[str, Any] | None = None,
) -> Mapping[str, Tensor]:
    """Merge ``experts`` of one ``base`` as the sentence ``how`` says: ``theta = base + edit(combine(edit(delta_t)))``.

    ``base`` and ``experts`` are mappings from name to tensor, paths of checkpoints, or Hub names. The same seed gives
    the same bytes, in memory, streamed and in parts.

    into         a folder to stream to; the result is then read lazily from it, and config and tokenizer are carried over
    own          glob patterns of tensors left out (each expert's own head)
    ingredients  extra tensors that a step needs, by the keyword: one set for all experts, or ``{expert: weights}``
    part         ``(k, n)``: only the k-th of n parts, written below ``into``; `join` makes the whole of them
    where        knobs that differ by tensor: ``{"*.mlp.*": {"ties": {"density": 0.4}}}`` (see `where`)
    vocabulary   where vocabularies differ: "base", "union" or an expert's name (see `weights.match`)
    dtype        of the result's floating point tensors, "float32" for one; default: the base's, tensor by tensor
    stored       "model", or "delta": only what is added to the base, in fp32, which bf16 would round away; "adapter":
                 one LoRA adapter that PEFT loads, where the experts are adapters (``base`` may then be None)
    rank         of that adapter: a number, "exact" (the ranks' sum, where the merge is a product of that rank), or None:
                 the experts' largest
    shard_size   of the files in ``into``, at most: bytes, or such as "2GB"; default: 5 GB, as the Hub has them
    about        more for the card of the result

    Raises WeightsError (keys, shapes, non-finite values), SentenceError (grammar, steps, knobs; adapt words belong to
    `merganser.adapt` and `merganser.run`).
    """
    found, sources, sentence, ready = examine(
        base, experts, how, into=into, own=own, seed=seed, ingredients=ingredients, part=part, where=where,
        vocabulary=vocabulary, dtype=dtype, stored=stored, rank=rank, shard_size=shard_size,
    )  # fmt: skip
    found.tell()
    for one in found.warnings:
        warnings.warn(str(one), stacklevel=2)
    assert ready is not None
    job = ready.job
    card = {
        "kind": "merge" if stored == "model" else stored,
        "sentence": str(sentence),
        "seed": seed,
        "own": list(own),
        **({"where": where} if where else {}),
        **({"dtype": dtype} if dtype else {}),
        **({"rank": rank} if rank is not None else {}),
        **({"vocabulary": vocabulary} if vocabulary else {}),
        **({"shard_size": shard_size} if shard_size is not None else {}),
        **({"dequantised": told.told()} if isinstance(told := sources[""], Dequantised) else {}),
        **(about or {}),
    }
    if ready.adapter is not None:
        target = ready.target or torch.float32
        if into is None:
            return as_adapter.in_memory(ready.adapter, target, progress)
        return as_adapter.streamed(ready.adapter, Path(into), card, target, job_key(card, [job]), progress)
    output = Output(job.base, job.names, ready.target, stored)
    if into is None:
        return output.in_memory([job], progress)
    return output.streamed([job], Path(into), card, part=part, carried=ready.matched.write_tokenizer, progress=progress)


class Output:
    """Where merged tensors go, and as what: the model's or the delta's tensors, in the base's or a given dtype.

    ``origin`` holds every tensor of the result by name, as it is where nothing is merged; ``names`` are the merged ones.
    """

    def __init__(
        self,
        origin: Mapping[str, Tensor],
        names: Iterable[str],
        target: torch.dtype | None = None,
        stored: str = "model",
    ):
        self.origin, self.stored = origin, stored
        merged = set(names)
        spec = spec_of(origin)
        if stored == "delta":
            self.spec = {n: (DTYPES[target or torch.float32], spec[n][1]) for n in spec if n in merged}
        else:
            kinds = {n: DTYPES[target] if target and is_float(origin, n) else spec[n][0] for n in spec}
            self.spec = {n: (kinds[n], spec[n][1]) for n in spec}
        self.dtypes = {n: TORCH[kind] for n, (kind, _) in self.spec.items()}
        self.wide = {
            n: spec[n][0] for n, (kind, _) in self.spec.items() if kind != spec[n][0]
        }  # what narrower ones were

    def cast(self, name: str, piece: Piece) -> Tensor:
        """Return what is stored for a piece. Raises WeightsError if a merged number does not fit its dtype."""
        kind = self.dtypes[name]
        if self.stored == "delta":
            return self._fits(name, (torch.zeros_like(piece.base) if piece.value is None else piece.value).to(kind))
        if piece.value is None:
            return self._fits(name, piece.origin.to(kind))
        return self._fits(name, (piece.base + piece.value).to(kind))

    def copied(self, name: str) -> Tensor:
        """Return a tensor that nothing merges, as it is stored.

        NaN in it is said where it is the base's, which was told to leave it as it is; where it is an expert's
        (a mergekit config that passes it through), it raises WeightsError as in a merge.
        """
        tensor = self.origin[name].detach()
        if tensor.is_floating_point() and not all_finite(tensor):
            if (whose := getattr(self.origin, "whose", {}).get(name)) is not None:
                raise not_finite(f"'{whose}'", name)
            warnings.warn(f"tensor '{name}' has NaN or inf in the base, and is copied as it is", stacklevel=2)
            return tensor.to(self.dtypes[name])
        return self._fits(name, tensor.to(self.dtypes[name]))

    def _fits(self, name: str, out: Tensor) -> Tensor:
        """Return what is stored. Raises WeightsError if a finite number became infinite in its dtype."""
        if not out.is_floating_point() or (out.dtype not in NARROW and self.wide.get(name) not in WIDE):
            return out
        if not all_finite(out):
            raise WeightsError(
                f"tensor '{name}': a number does not fit {out.dtype}; store it with --dtype float32 (dtype='float32')"
            )
        return out

    def in_memory(self, jobs: Sequence[Job], progress: Progress) -> dict[str, Tensor]:
        """Return the result as tensors; those that no job merges are the origin's own."""
        made: dict[str, Tensor] = {}

        def put(name: str, piece: Piece) -> None:
            if name not in made:
                made[name] = torch.empty(self.spec[name][1], dtype=self.dtypes[name])
            out = self.cast(name, piece).reshape(-1)
            made[name].view(-1)[piece.at : piece.at + len(out)] = out

        for job in jobs:
            merge_each(job, survey(job, progress=progress), put, progress=progress)
        return {n: made[n] if n in made else self.copied(n) for n in self.spec}

    def streamed(
        self,
        jobs: Sequence[Job],
        folder: Path,
        card: dict[str, Any],
        *,
        part: tuple[int, int] | None = None,
        carried: Callable[[Path], None] | None = None,
        progress: Progress = silent,
    ) -> Stored:
        """Write the result, or one part of it, into ``folder``, and return it read lazily. All or nothing."""
        started = time.monotonic()
        key = job_key(card, jobs, identity if part is None else sampled)
        share = None if part is None else Share(folder, key, part, self.spec)
        spec = self.spec if share is None else {n: self.spec[n] for n in self.spec if n in share.mine}
        size = shard_bytes(card.get("shard_size"))
        sink = Sink(folder if share is None else share.place, spec, metadata=short(card), shard_size=size, key=key)
        seen = Seen()

        def put(name: str, piece: Piece) -> None:
            sink.put(name, self.cast(name, piece), piece.at)

        try:
            for job in jobs:
                job = replace(job, seen=seen.piece)
                surveys = survey(job, share=share, progress=progress)
                todo = [name for name in job.names if name in sink.missing]
                merge_each(job, surveys, put, only=todo, done=sink.done, progress=progress)
            for name in sorted(sink.missing):
                sink.put(name, self.copied(name))
            found = hashes(jobs, seen, share)
            told = {**card, **({"hashes": found} if share else inputs_of([found]))}
            if share is not None:
                told |= {"kind": "part", "of": card["kind"], "job": key, "part": list(share.part)}
            told |= {"key": key_of(told), "seconds": round(time.monotonic() - started, 3)}
            with sink.told():
                finish(sink.staging, self.origin, told, carried)
        except KeyboardInterrupt:
            sink.leave()
            raise
        except BaseException:
            sink.abandon()
            raise
        return sink.close()


def hashes(jobs: Sequence[Job], seen: Seen, share: Share | None = None) -> dict[str, dict[str, str]]:
    """Return the fingerprint of every tensor of every input; in a part, of its own tensors."""
    found: dict[str, dict[str, str]] = {}
    for job in jobs:
        for who, weights in {"base": job.base, **job.experts}.items():
            if not getattr(weights, "made_up", False):  # a base of zeros is nobody's input
                weights = weights.adapter if isinstance(weights, Adapted) else weights  # what it adds is what was read
                own = Seen() if isinstance(weights, Dequantised) else seen  # what came by is not what lies on disk
                weights = as_stored(weights)
                mine = {n: own.of(who, n, weights[n]) for n in weights if share is None or share.holds(n)}
                found.setdefault(who, {}).update(mine)
    return found


def finish(
    folder: Path, base: Mapping[str, Tensor], card: Mapping[str, Any], carried: Callable[[Path], None] | None = None
) -> None:
    """Put beside the weights what their own library needs, the card and the model card."""
    origin = folder_of(base)
    if origin is not None:
        carry(origin, folder)
        if "dequantised" in card:
            write_plain(folder, card["dequantised"]["dtype"])
        if "dtype" in card:
            write_dtype(folder, card["dtype"])
        card = {"base": name_of(origin) or str(origin), **card}
    if carried is not None:
        carried(folder)
    write_card(folder, card)
    write_readme(folder, card)


def job_key(
    card: Mapping[str, Any], jobs: Sequence[Job], of: Callable[[Mapping[str, Tensor]], Any] | None = None
) -> str:
    """Return what tells a job from others: the card so far, the names, and what its weights are (`identity`)."""
    of = of or identity
    return key_of([dict(card), [[of(job.base), *map(of, job.experts.values()), sorted(job.names)] for job in jobs]])


def identity(weights: Mapping[str, Tensor]) -> Any:
    """Return what tells weights from others: of files their sizes and times, of all else every byte."""
    if isinstance(weights, Stored):
        files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in weights.shards]
        return [files, {n: [e.dtype, *e.shape] for n, e in weights.entries.items()}]
    if isinstance(weights, Renamed):
        return [identity(weights.weights), dict(weights.names)]
    if isinstance(weights, View) and (told := weights.identity(identity)) is not None:
        return [type(weights).__name__, told]
    return digest(weights)


def sampled(weights: Mapping[str, Tensor]) -> Any:
    """Return what tells weights from others wherever they lie: of every tensor dtype, shape and a few of its bytes.

    Parts of a merge are made on several machines, of copies of the files with times of their own.
    """
    if isinstance(weights, Renamed):
        return [sampled(weights.weights), dict(weights.names)]
    if isinstance(weights, View) and (told := weights.identity(sampled)) is not None:
        return [type(weights).__name__, told]
    return key_of({name: [*header(weights, name), sample(weights, name).hex()] for name in weights})
