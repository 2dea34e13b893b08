"""The door to weights: whatever holds them, as one mapping from name to tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import WeightsError
from . import hub
from .adapter import CONFIG, Adapter, is_adapter
from .header import Weights as Weights
from .header import header as header
from .header import matches as matches
from .header import shape_of as shape_of
from .match import check_match as check_match
from .match import match as match
from .pickled import Pickled, find_pickles
from .stored import PICKLES, Stored

Source = Weights | str | Path


def open_weights(source: Source) -> Weights:
    """Return the weights at ``source`` as a mapping from name to tensor, read when touched.

    A mapping is returned as it is. Otherwise, in this order:

    adapter       a folder with adapter_config.json and adapter_model.safetensors or .bin and no model, or that file: a
                  LoRA as PEFT writes it (`adapter.Adapter`), which is an expert where there is a base
    folder        model.safetensors.index.json and its shards, model.safetensors, any other .safetensors (`Stored`);
                  where there are none pytorch_model.bin.index.json and its shards, pytorch_model.bin, the only
                  .bin, .pt, .pth, .ckpt or .pkl that is not a trainer's (`Pickled`)
    file          .safetensors; .bin, .pt, .pth, .ckpt and .pkl through ``torch.load(weights_only=True)``: a
                  pickle that holds anything but tensors is refused, and no code in it is run
    "org/name"    where nothing of that name is here, a model on the Hub, "org/name@revision" too (extra 'hf')

    Raises WeightsError if nothing is there, or if what is there is damaged, unsafe or not weights; MissingExtra.
    """
    if isinstance(source, Mapping):
        if isinstance(source, dict) and (odd := [n for n, value in source.items() if not hasattr(value, "dtype")]):
            raise WeightsError(f"'{odd[0]}' is no tensor but {source[odd[0]]!r}; weights map names to tensors")
        if isinstance(source, dict):
            _check_dense(source)
        return source
    if not str(source):
        raise WeightsError("a model's name is empty; give a folder, a file or a name on the Hub")
    if hub.is_name(source):
        source = hub.download(str(source))
    path = Path(source)
    if is_adapter(path):
        return Adapter(path)
    if path.is_dir():
        return Pickled(path) if not any(path.glob("*.safetensors*")) and find_pickles(path) else Stored(path)
    return Pickled(path) if path.is_file() and path.suffix in PICKLES else Stored(path)


def _check_dense(weights: Weights) -> None:
    """Raise WeightsError for names that are no text, and for tensors that hold no numbers in rows."""
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise WeightsError(f"{name!r} is no name of a tensor; names are text")
        kind = "on the meta device" if getattr(tensor, "is_meta", False) else "sparse"
        if kind != "sparse" or "strided" not in str(getattr(tensor, "layout", "strided")):
            raise WeightsError(f"tensor '{name}' is {kind}: give its numbers, as a dense tensor")


def open_headers(source: Source) -> Weights:
    """Return weights of which names, dtypes and shapes are known without a download: for `check`.

    A Hub model becomes `header.Headers` (config and tokenizer files are fetched, tensors cannot be touched); anything
    else is opened as `open_weights` does, which reads headers only.
    """
    if not hub.is_name(source):
        return open_weights(source)
    headers = hub.remote_headers(str(source))
    return Adapter(headers.path, headers) if headers.path and (headers.path / CONFIG).is_file() else headers


def named(experts: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Return experts by name; a sequence of paths is named by folders or files, others ``expert0, expert1, ...``."""
    if isinstance(experts, Mapping):
        if "base" in experts:
            raise WeightsError("an expert cannot be called 'base': cards and errors call the base so; rename it")
        if "" in experts:
            raise WeightsError("an expert has an empty name; give it one")
        return dict(experts)
    names = [_name(e) if isinstance(e, str | Path) else f"expert{k}" for k, e in enumerate(experts)]
    names = ["base-model" if name == "base" else name for name in names]
    if len(set(names)) < len(names):
        names = [f"{name}-{k}" if names.count(name) > 1 else name for k, name in enumerate(names)]
    return dict(zip(names, experts, strict=True))


def _name(source: str | Path) -> str:
    path = Path(str(source).partition("@")[0]) if hub.is_name(source) else Path(source)
    return path.stem if path.suffix in (".safetensors", *PICKLES) else path.name
