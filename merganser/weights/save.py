"""Save a model so that its own library loads it: weights, the base's config and tokenizer, a card."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..card import write_card
from ..errors import WeightsError
from .quantised import say
from .settle import TAGS
from .stored import INDEX, PART, PICKLES, Stored

if TYPE_CHECKING:
    from torch import Tensor

HEAVY = (".safetensors", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", *PICKLES)
NOT_CARRIED = {INDEX, "README.md", "card.json", "model.safetensors", ".gitattributes"}
OTHER_FORMS = re.compile(r"onnx|openvino|coreml|checkpoint-\d+")  # folders with the base's weights once more


def save(weights: "Mapping[str, Tensor]", folder: str | Path, card: Mapping[str, Any] | None = None) -> Stored:
    """Write ``weights`` into ``folder`` as safetensors (Hub conventions) with ``card`` beside them, all or nothing.

    The card goes to ``card.json`` and, in short, into the safetensors metadata; it never stands beside other weights.
    """
    from .sink import Sink, spec_of

    sink = Sink(folder, spec_of(weights), metadata=short(card))
    try:
        for name in weights:
            sink.put(name, weights[name])
        if card is not None:
            with sink.told():
                write_card(sink.staging, card)
        return sink.close()
    except BaseException:
        sink.abandon()
        raise


def refuse_overwriting(folder: str | Path, *sources: Any) -> None:
    """Raise WeightsError if ``folder`` is where one of the ``sources`` lies: writing would destroy what is read."""
    target = Path(folder).resolve()
    for source in sources:
        for file in _files(source):
            if target in _holders(file.resolve().parent):
                raise WeightsError(f"{folder} holds an input ({file}); give another folder for the result")
        path = getattr(source, "path", source)
        if isinstance(path, str | Path) and target in _holders(Path(path).resolve()):
            raise WeightsError(f"{folder} holds an input ({path}); give another folder for the result")


def _files(source: Any) -> list[Path]:
    """Return the files that weights are read from, through whatever they are seen as."""
    below = (getattr(source, name, None) for name in ("weights", "base", "adapter"))
    return [*getattr(source, "shards", ()), *(file for one in below if one is not None for file in _files(one))]


def _holders(path: Path) -> tuple[Path, ...]:
    """Return the folders whose model ``path`` is, or belongs to."""
    return (path, path.parent) if path.is_file() or PART.fullmatch(path.name) else (path,)


def short(card: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the part of a card that fits safetensors metadata: strings only."""
    keep = {k: card[k] for k in ("kind", "sentence", "seed") if k in card} if card else {}
    return {f"merganser.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in keep.items()}


def carry(base: Path, folder: Path) -> list[str]:
    """Copy what a model's own library needs beside the weights (config, tokenizer, pooling) from ``base``."""
    carried = []
    for path in sorted(p for p in base.rglob("*") if p.is_file()) if base.is_dir() else []:
        inside = path.relative_to(base)
        left_out = any(part.startswith(".") or OTHER_FORMS.fullmatch(part) for part in inside.parts)
        left_out = left_out or any(
            (base / above / "card.json").is_file() for above in [*inside.parents][:-1]
        )  # our own
        if left_out or path.suffix in HEAVY or path.name in NOT_CARRIED or path.stat().st_size > 50_000_000:
            continue
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.resolve() != target.resolve():
            shutil.copyfile(path, target)
        carried.append(str(inside))
    return carried


def write_readme(folder: Path, card: Mapping[str, Any]) -> None:
    """Write the model card the Hub reads: base model, relation, the sentence and where each input came from."""
    front = ["---", TAGS]
    if "base" in card:
        relation = "adapter" if "adapter" in card else "merge"
        front += [f"base_model: {json.dumps(card['base'])}", f"base_model_relation: {relation}"]
    if "adapter" in card:
        front += ["library_name: peft"]
    experts = [name for name in card.get("inputs", {}) if name != "base"]
    kit = card.get("mergekit")
    body = [
        "---",
        "",
        f"# Merge of {len(kit['models'])} models" if kit else f"# Merge of {len(experts)} experts",
        "",
        *([_of_rank(card["adapter"]), ""] if "adapter" in card else []),
        *([f"The base is {say(card['dequantised'])}.", ""] if "dequantised" in card else []),
        *([f"mergekit's `{kit['method']}`; the config is mergekit_config.yml beside the weights.", ""] if kit else []),
        "Made by [merganser](https://pypi.org/project/merganser/) with",
        "",
        f"    {card.get('sentence', '')}",
        "",
        "| input | fingerprint |",
        "|---|---|",
        *(f"| {name} | `{told}` |" for name, told in card.get("inputs", {}).items()),
        "",
    ]
    (folder / "README.md").write_text("\n".join(front + body))


def _of_rank(told: Mapping[str, Any]) -> str:
    """Return the sentence on an adapter's rank and what it leaves out."""
    error = told["error"]
    return (
        f"One LoRA adapter of rank {told['rank']}, {told['modules']} modules. Relative error of the merged change: "
        f"{error['all']:.2g} in all, {error['median']:.2g} in the median module, {error['worst'][1]:.2g} at most "
        f"({error['worst'][0]})."
    )
