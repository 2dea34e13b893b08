"""A merge in parts: each process takes its share of the tensors, and the parts are joined into one model.

    merge(..., into=F, part=(2, 8))     writes F/part-00002-of-00008; runs anywhere that sees F, in any order
    join(F)                             checks that all parts are of one job and writes the model they make, byte by
                                        byte the one that a single process writes

What a step has to learn from the whole model is summed over parts: each part leaves its sums in F. A part that does not
find another's works them out itself, so parts may run one after the other or all at once.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..card import key_of, read_card, write_card
from ..errors import WeightsError
from ..fingerprint import combine
from ..progress import Progress, silent
from .save import carry, short, write_readme
from .sink import Sink, Spec, nbytes, shard_bytes
from .stored import Stored

if TYPE_CHECKING:
    from ..survey import Sums


def name_of(part: tuple[int, int]) -> str:
    """Return the folder name of a part."""
    return f"part-{part[0]:05d}-of-{part[1]:05d}"


def check_part(part: Sequence[int]) -> tuple[int, int]:
    """Return ``(k, n)``; raise WeightsError unless 1 <= k <= n."""
    if len(part) != 2 or not all(isinstance(x, int) for x in part) or not 1 <= part[0] <= part[1]:
        raise WeightsError(f"part must be (k, n) with 1 <= k <= n, such as (2, 8), got {part!r}")
    return part[0], part[1]


def split(sizes: Mapping[str, int], count: int) -> list[set[str]]:
    """Return ``count`` sets of names of nearly equal size: the largest first, each to the lightest set."""
    sets: list[set[str]] = [set() for _ in range(count)]
    filled = [0] * count
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        k = filled.index(min(filled))
        sets[k].add(name)
        filled[k] += sizes[name] + 1
    return sets


class Share:
    """One part's share of a job, and the sums of all parts."""

    def __init__(self, folder: Path, key: str, part: Sequence[int], spec: Spec):
        self.part = check_part(part)
        self.folder, self.key = folder, key
        self.place = folder / name_of(self.part)
        self.sets = split({name: nbytes(*entry) for name, entry in spec.items()}, self.part[1])
        self.mine = self.sets[self.part[0] - 1]
        self._all = set(spec)

    def holds(self, name: str) -> bool:
        """Tell whether this part answers for a tensor; the first answers for those that are not merged at all."""
        return name in self.mine or (self.part[0] == 1 and name not in self._all)

    def sums(self, what: Any, names: Sequence[str], of: "Callable[[Sequence[str]], Sums]") -> "Sums":
        """Return the sums over ``names`` of all parts: this one's worked out, the others' read where they lie ready."""
        first = self.part[0] - 1
        order = [(first + k) % self.part[1] for k in range(self.part[1])]
        found = {k: self._sums(what, k, [n for n in names if n in self.sets[k]], of) for k in order}
        total = found[0]
        for k in range(1, self.part[1]):
            total = total + found[k]
        return total

    def _sums(self, what: Any, k: int, names: Sequence[str], of: "Callable[[Sequence[str]], Sums]") -> "Sums":
        import torch

        from ..survey import Sums

        path = self.folder / f".survey-{key_of([self.key, what])[:16]}-{name_of((k + 1, self.part[1]))}.pt"
        if path.is_file():
            told = torch.load(path, weights_only=True)
            return Sums(told["whole"], told["each"])
        sums = of(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save({"whole": sums.whole, "each": sums.each}, partial)
        partial.replace(path)
        return sums


def inputs_of(hashes: Sequence[Mapping[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Return the card's ``inputs``: each model's fingerprint, from those of its tensors, part by part."""
    models: dict[str, dict[str, str]] = {}
    for part in hashes:
        for who, tensors in part.items():
            models.setdefault(who, {}).update(tensors)
    return {"inputs": {who: combine(tensors) for who, tensors in models.items()}}


def join(folder: str | Path, *, progress: Progress = silent) -> Stored:
    """Make one model of the parts in ``folder`` and remove them. All or nothing.

    Raises WeightsError if parts are missing, or belong to different jobs.
    """
    cards = parts_in(folder)
    return _joined(Path(folder), [Stored(path) for path in cards], list(cards.values()), progress)


def parts_in(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Return the parts of one job that lie in ``folder``, in order, with their cards.

    Raises WeightsError if parts are missing or not finished, or belong to different jobs.
    """
    root = Path(folder)
    cards = {path.name: (path, read_card(path)) for path in sorted(root.glob("part-*-of-*")) if path.is_dir()}
    if not cards:
        raise WeightsError(f"{root}: no parts here; merge with --part K/N (part=(k, n)) first, k from 1 to n")
    if unfinished := [name for name, (_, card) in cards.items() if card is None]:
        raise WeightsError(f"{root}: {unfinished[0]} is not finished; run that part again")
    told = {name: card for name, (_, card) in cards.items() if card is not None}
    if len({card["job"] for card in told.values()}) > 1:
        names = {card["job"]: name for name, card in told.items()}
        raise WeightsError(
            f"{root}: {' and '.join(list(names.values())[:2])} are parts of different jobs (other sentence, inputs or "
            f"number of parts); delete those you do not want and run the missing ones again"
        )
    count = next(iter(told.values()))["part"][1]
    if missing := [name_of((k + 1, count)) for k in range(count) if name_of((k + 1, count)) not in told]:
        raise WeightsError(f"{root}: {len(missing)} of {count} parts are missing, first {missing[0]}")
    return {cards[name][0]: told[name] for name in sorted(told)}


def _joined(root: Path, parts: Sequence[Stored], cards: Sequence[dict[str, Any]], progress: Progress) -> Stored:
    spec = {name: (entry.dtype, entry.shape) for part in parts for name, entry in part.entries.items()}
    left = ("of", "job", "part", "hashes", "key", "seconds", "written", "versions", "files")
    card = {k: v for k, v in cards[0].items() if k not in left} | {"kind": cards[0]["of"]}
    card |= inputs_of([one["hashes"] for one in cards])
    key = key_of({k: v for k, v in card.items() if k != "base"})
    card |= {"key": key, "parts": len(parts), "seconds": sum(one["seconds"] for one in cards)}
    size = shard_bytes(card.get("shard_size"))
    sink = Sink(root, spec, metadata=short(card), shard_size=size, key=cards[0]["job"])
    try:
        with progress("join", len(spec)) as tick:
            for part in parts:
                for name in part:
                    sink.put(name, part[name])
                    tick(1)
        with sink.told():
            carry(parts[0].path, sink.staging)
            write_card(sink.staging, card)
            write_readme(sink.staging, card)
    except BaseException:
        sink.abandon()
        raise
    joined = sink.close()
    for part in parts:
        shutil.rmtree(part.path)
    for sums in root.glob(".survey-*"):
        sums.unlink()
    return joined
