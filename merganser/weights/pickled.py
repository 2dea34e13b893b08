"""Checkpoints that torch.save wrote: `.bin`, `.pt`, `.pth`, `.ckpt`, `.pkl`, one file or sharded, read without running code.

A pickle is a program. torch's reader for ``weights_only=True`` runs none of it: it builds tensors and plain containers
and refuses everything else, before anything is called (https://pytorch.org/docs/stable/generated/torch.load.html).
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .named import Named
from .stored import PICKLES, Stored, parts_of

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_INDEX = "pytorch_model.bin.index.json"
WRAPPERS = ("state_dict", "model", "module")
# what trainers leave beside a model; none of it is one
LEFTOVERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w-]*\.\w+")


class Pickled(Named):
    """A checkpoint of torch.save: a file, or a folder with one (sharded or not); tensors are mapped, read on touch.

    A state dict that lies under "state_dict", "model" or "module" is taken out of it. Numbers and strings beside
    tensors are left out, and so is training state beside a wrapped state dict (optimizer, callbacks) unless it
    holds tensors by name too: then it cannot be told which of them is the model. Names are as they are in the file, a
    prefix "module." too. Modules of sentence-transformers are read with the model (``2_Dense/linear.weight``). Files
    of the format before torch 1.6 cannot be mapped and are read whole.

    Raises WeightsError if a file is damaged, holds no tensors by name, or wants anything else than tensors.
    """

    NAMES = "tensors"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shards = [self.path] if self.path.is_file() else find_pickles(self.path)
        if not self.shards:
            raise WeightsError(f"{self.path}: no checkpoint of torch.save in this folder")
        self.tensors: dict[str, Tensor] = {}
        for part in parts_of(self.path):
            place = self.path / part
            held = Stored(place) if any(place.glob("*.safetensors")) else Pickled(place)
            self.tensors |= {f"{part}/{name}": held[name] for name in held}
        for shard in self.shards:
            found = _state_dict(_load(shard), shard)
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise WeightsError(f"{self.path}: tensor '{twice[0]}' is in two shards, one of them {shard.name}")
            self.tensors |= found

    def __getitem__(self, name: str) -> "Tensor":
        return self.tensors[name]

    def __repr__(self) -> str:
        return f"Pickled({str(self.path)!r}: {len(self)} tensors)"


def find_pickles(folder: Path) -> list[Path]:
    """Return the files of the model that a folder holds as pickles; an empty list where there is none.

    In this order: the shards of pytorch_model.bin.index.json, pytorch_model.bin, the only pickle there is. What
    trainers leave (optimizer.pt, training_args.bin, rng_state.pth, ...) does not count.
    """
    if (index := folder / PICKLE_INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise WeightsError(f"{index}: not a shard index (no 'weight_map')") from None
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise WeightsError(
                f"{folder}: {index.name} names {missing[0]}, which is missing; copy or download it again"
            )
        return [folder / n for n in names]
    if (single := folder / "pytorch_model.bin").is_file():
        return [single]
    found = sorted(p for p in folder.iterdir() if p.suffix in PICKLES and not LEFTOVERS.fullmatch(p.name))
    if len(found) > 1:
        names = sorted(p.name for p in found)
        raise WeightsError(f"{folder}: several pickles ({', '.join(names[:3])}): give the file itself")
    return found


def _load(path: Path) -> Any:
    import torch

    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # the zip format of torch 1.6 and later
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if found := re.search(r"GLOBAL ([\w.]+)|type (?:of )?<class '([\w.]+)'>", str(error)):
            raise WeightsError(
                f"{path}: refused, and nothing in it was run: this pickle wants '{found[1] or found[2]}', which is not "
                f"a tensor, and a pickle can run code when it is read; ask for safetensors, or for its state dict alone"
            ) from None
        if "Weights only load failed" in str(error):
            raise WeightsError(
                f"{path}: refused, and nothing in it was run: this is not a checkpoint of torch.save that holds "
                f"tensors only; ask for safetensors, or for its state dict alone"
            ) from None
        raise WeightsError(
            f"{path}: not a checkpoint of torch.save, or one that is cut short; copy or download it again"
        ) from None


def _state_dict(value: Any, path: Path) -> "dict[str, Tensor]":
    from torch import Tensor, strided

    if not isinstance(value, Mapping):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not tensors by name")
    if not any(isinstance(v, Tensor) for v in value.values()):
        inside = [k for k in WRAPPERS if isinstance(value.get(k), Mapping)]
        rivals = [k for k, v in value.items() if k not in inside[:1] and _by_name(v)]
        if not inside:
            keys = ", ".join(f"'{k}'" for k in list(value)[:5])
            raise WeightsError(f"{path}: holds no tensors by name, only {keys or 'nothing'}")
        if rivals:
            raise WeightsError(
                f"{path}: holds tensors under '{inside[0]}' and under '{rivals[0]}': which is the model? Save one of "
                f"them alone"
            )
        return _state_dict(value[inside[0]], path)
    tensors = {}
    for name, entry in value.items():
        if isinstance(entry, Tensor) and isinstance(name, str):
            if entry.layout != strided or entry.is_quantized:
                raise WeightsError(f"{path}: tensor '{name}' is {'quantised' if entry.is_quantized else 'sparse'}")
            tensors[name] = entry.detach()
        elif not (entry is None or isinstance(entry, bool | int | float | str)):
            raise WeightsError(
                f"{path}: '{name}' is a {type(entry).__name__} beside tensors; save the state dict alone"
            )
    return tensors


def _by_name(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Mapping) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
