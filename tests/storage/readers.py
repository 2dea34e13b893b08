"""Readers of model folders that are not ours, and models that can be told apart, for the tests of what a crash leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def model(seed, names="abcdef"):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 7, generator=rng) for name in names}


def write_as_others_do(folder, weights, shards):
    """Write ``weights`` as transformers' save_pretrained does."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(weights, folder / SINGLE, {"format": "pt"})
        return
    names = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    weight_map = {name: names[k % shards] for k, name in enumerate(weights)}
    for shard in names:
        save_file({n: t for n, t in weights.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_transformers(folder: Path, index_first=False):
    """Return what a reader finds that looks for model.safetensors, then for the index; None if it finds no model."""
    single = folder / SINGLE
    for file in (folder / INDEX, single) if index_first else (single, folder / INDEX):
        if file.exists() and file == single:
            return load_file(single)
        if file.exists():
            weight_map = json.loads(file.read_text())["weight_map"]
            if not all((folder / shard).exists() for shard in weight_map.values()):
                return None
            shards = {shard: load_file(folder / shard) for shard in set(weight_map.values())}
            return {name: shards[shard].get(name) for name, shard in weight_map.items()}
    return None


def same(found, told):
    return found.keys() == told.keys() and all(
        found[n] is not None and found[n].dtype == told[n].dtype and torch.equal(found[n], told[n]) for n in told
    )


def which(found, **known):
    """Return under which name in ``known`` the tensors found are known: "none", or "a mixture" of several."""
    if found is None:
        return "none"
    return next((name for name, told in known.items() if same(found, told)), "a mixture")
