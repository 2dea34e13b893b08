"""Everything that will go wrong with a merge, told at once, from headers and configs: before a download or a tensor.

What `merge` itself insists on is `examine`; this adds what can be foreseen beyond that: configs that differ, the output
folder, disk, memory and time. Values (NaN, bytes that rotted) are seen only when they are read: merging names them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import read_card
from .examine import How, Ingredients, check_shards, examine
from .findings import Findings
from .forecast import existing, free_disk, nbytes, numbers, writable
from .weights.header import WHOLE, Head, Headers, Weights, folder_of, header, matches
from .weights.open import Source, named, open_headers
from .weights.quantised import as_stored
from .weights.save import refuse_overwriting
from .weights.settle import LOCK, NEW, PARTIAL, busy
from .weights.stored import first, weight_files
from .weights.tokenizer import read_config, vocab_size
from .where import Patterns

if TYPE_CHECKING:
    from .job import Job

# settings of a config.json that shapes do not show, and that make the same numbers mean something else
MEANING = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "hidden_act",
    "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings", "sliding_window", "position_embedding_type",
)  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "architectures")


def check(
    base: Source | None,
    experts: Mapping[str, Source] | Sequence[Source] = (),
    how: How = "",
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
) -> Findings:
    """Return all that will go wrong with ``merge(...)`` of the same arguments, and what it will do and need.

    ``base`` alone may be a recipe.toml, or a mergekit config (.yml, .yaml). Reads headers, configs and tokenizers; of a
    Hub name too, without its weights. Raises nothing that a merge would: what is wrong is in ``errors``.
    """
    if not experts and not how and isinstance(base, str | Path):
        if Path(base).suffix == ".toml":
            from .dry_run import check_recipe

            return check_recipe(base, into)
        if Path(base).suffix in (".yml", ".yaml"):
            return check_config(base, into, shard_size)
    experts = experts if isinstance(experts, Mapping | Sequence | Path) else list(experts)
    told = examine(
        base, experts, how, into=into, own=own, seed=seed, ingredients=ingredients, part=part, where=where,
        vocabulary=vocabulary, dtype=dtype, stored=stored, rank=rank, shard_size=shard_size, opener=open_headers,
    )  # fmt: skip
    found = told.found
    compare(found, told.sources, own)
    found.plan = {
        "sentence": str(told.sentence or how),
        "base": str(base),
        "experts": [] if isinstance(experts, str | Path) else list(named(experts)),
    }
    found.plan |= {"into": None if into is None else str(into), "part": part, "dtype": dtype, "stored": stored}
    if told.ready is not None:
        from .merge import Output

        job, target = told.ready.job, told.ready.target
        found.plan["steps"] = [
            {"step": str(s), "kind": s.kind, "elementwise": s.elementwise} for s in job.sentence.steps
        ]
        plan = told.ready.adapter
        written = plan.spec if plan is not None else Output(job.base, job.names, target, stored).spec
        foresee(found, [job], written, told.sources, part)
        if plan is not None:
            found.plan["kept"] = []
            found.numbers |= {"tensors": len(plan.slots) + len(plan.full), "merged": len(plan.slots) + len(plan.full)}
    stored_as = {who: as_stored(w) for who, w in told.sources.items()}
    remote = {who: w for who, w in stored_as.items() if isinstance(w, Headers)}
    for who, weights in remote.items():
        size = sum(nbytes(header(weights, name)) for name in weights)
        found.note(
            f"{weights.source} is on the Hub: {size / 1e9:.2f} GB", titled(who), "downloaded unless it is cached"
        )
    if isinstance(into, str | Path):  # of anything else it is told
        check_folder(found, Path(into), found.numbers.get("bytes_written"))
    return found


def compare(found: Findings, sources: Mapping[str, Weights], own: Sequence[str] = ()) -> None:
    """Compare configs and dtypes of the experts (by name) with the base's (``""``), and each config with its weights."""
    configs: dict[str, dict[str, Any]] = {}
    for who, weights in sources.items():
        with found.gather(titled(who)):
            configs[who] = read_config(folder_of(weights))
        _rows(found, who, weights, vocab_size(configs.get(who, {})))
    base = sources.get("")
    for who, weights in sources.items():
        if base is None or not who:
            continue
        mine, theirs = configs.get("", {}), configs.get(who, {})
        for key in (*MEANING, *SIZES) if mine and theirs else ():
            if mine.get(key) != theirs.get(key):
                text = f"config.json: {key} is {theirs.get(key)!r}, the base's is {mine.get(key)!r}"
                if key in MEANING:
                    found.warn(
                        text, titled(who), "the same tensors mean something else there; merge models of one base"
                    )
                else:
                    found.note(text, titled(who), "the result gets the base's config")
        kinds = {(header(base, n)[0], header(weights, n)[0]) for n in base if n in weights and not matches(n, own)}
        if other := sorted(f"{b} there, {a} in the base" for a, b in kinds if a != b):
            found.note(f"dtypes differ: {', '.join(other)}", titled(who), "deltas are fp32, the result has the base's")


def _rows(found: Findings, who: str, weights: Weights, rows: int | None) -> None:
    """Warn where config.json has another size of vocabulary than any table of the weights has rows."""
    tables = {header(weights, n)[1][0]: n for n in weights if len(header(weights, n)[1]) == 2}
    if rows is not None and tables and rows not in tables:
        near = min(tables, key=lambda n: abs(n - rows))
        found.warn(
            f"config.json says vocab_size {rows}, no tensor has as many rows ('{tables[near]}' has {near})", titled(who),
            "its own library may refuse to load it; correct the config or the checkpoint",
        )  # fmt: skip


def foresee(
    found: Findings, jobs: "Sequence[Job]", written: Mapping[str, Head], sources: Mapping[str, Weights],
    part: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Add the numbers of a merge that nothing prevents so far, and what the machine lacks for it."""
    told = numbers(jobs, sources, written, part)
    found.numbers |= told
    moved = {name for job in jobs for name in job.names}
    found.plan["kept"] = [name for name in written if name not in moved]
    if told["memory_free"] is not None and told["memory"] > told["memory_free"]:
        found.warn(
            f"needs about {told['memory'] >> 20} MiB, {told['memory_free'] >> 20} MiB are free (largest tensor "
            f"'{told['largest']['tensor']}')", "memory",
            "free memory, set OMP_NUM_THREADS=1, or take steps that are element-wise",
        )  # fmt: skip
    for name, other in {name: other for job in jobs for name, other in job.alike.items()}.items():
        found.note(
            f"'{name}' is tied to '{other}' in every model, as their config.json says",
            "tensors",
            "both are merged alike and stay equal",
        )
    whole = [name for name in found.plan["kept"] if written[name][0] in WHOLE]
    if whole:
        found.note(f"not floating point: {first(whole)}", "tensors", "the result has the base's")


def check_folder(found: Findings, folder: Path, needed: int | None = None) -> None:
    """Take down what is wrong with an output folder, and what will be replaced there."""
    if not (place := existing(folder)).is_dir():
        return found.error(f"{place} is a file", "output", "give a folder for the result")
    if not writable(folder):
        return found.error(f"{folder} cannot be written", "output", "give another folder, or change its permissions")
    lock = folder / PARTIAL / LOCK
    if lock.exists():
        with found.gather("output"):
            if _locked(lock):
                raise busy(folder)
        if (folder / PARTIAL / NEW).exists():
            found.note(f"{folder} holds an interrupted merge", "output", "the same merge goes on, another begins anew")
    if folder.is_dir() and (old := weight_files(folder)):
        card = read_card(folder) or {}
        what = f"the model of '{card['sentence']}'" if card.get("sentence") else "a model"
        found.warn(f"{folder} holds {what} ({len(old)} files)", "output", "it is replaced, when all is done")
    free = free_disk(folder)
    found.numbers["disk_free"] = free
    if needed is not None and free is not None and needed > free:
        found.error(
            f"{folder}: the result has {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", "disk",
            "free some space or give a folder on another disk",
        )  # fmt: skip


def _locked(lock: Path) -> bool:
    import fcntl

    try:
        file = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def check_config(path: str | Path, into: str | Path | None = None, shard_size: int | str | None = None) -> Findings:
    """Return all that will go wrong with a mergekit config."""
    from .mergekit import plans

    found = Findings(plan={"config": str(path), "into": None if into is None else str(into)})
    with found.gather("output"):
        check_shards(shard_size, into, "model")
    with found.gather("config"):
        told = plans(path, into)
        several = len(told) > 1
        for one, folder in told:
            where = (f"config '{one.config.name}'" if one.config.name else "the last config") if several else "config"
            alone = Findings(plan={"sentence": one.sentence, "experts": list(one.models)})
            for text in one.notes:
                alone.note(text, where)
            foresee(alone, one.jobs, one.spec, one.models)
            if folder is not None:
                with alone.gather("output"):
                    refuse_overwriting(folder, *one.inputs)
                if several and one.config.name:
                    check_folder(alone, folder)
            found.add(alone)
            found.numbers = _summed(found.numbers, alone.numbers)
            found.plan |= {"configs": [*found.plan.get("configs", []), alone.plan]} if several else alone.plan
    if into is not None:
        check_folder(found, Path(into), found.numbers.get("bytes_written"))
    return found


def _summed(numbers: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of merges one after the other."""
    added = ("tensors", "merged", "bytes_read", "bytes_written", "passes", "whole_tensors", "seconds")
    if not numbers:
        return dict(more)
    largest = max((numbers["largest"], more["largest"]), key=lambda one: one["bytes_fp32"])
    total = {key: numbers[key] + more[key] for key in added}
    return {**more, **total, "memory": max(numbers["memory"], more["memory"]), "largest": largest}


def titled(name: str) -> str:
    """Return where a finding of this expert is ("": of the base)."""
    return f"expert '{name}'" if name else "base"
