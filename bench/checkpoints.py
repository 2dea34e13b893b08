"""Checkpoints to time mergers with: one base and its experts, random but of real shapes, in the Hub's layout.

    python bench/checkpoints.py --to DATA                    every set but the 4 GB one
    python bench/checkpoints.py --to DATA m-bf16 clip        these sets

Weights are normal with standard deviation 0.02 (norms: around 1); an expert is the base plus a delta of 2 % of that,
half of it of rank 8, half of it dense. Every tensor's numbers follow from its name and its expert's name. The files of
a set are written side by side, tensor by tensor, in a folder that gets its name when it is complete; a set that is
there is left alone.
"""

import argparse
import hashlib
import json
import math
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

GB = 10**9


class Set(NamedTuple):
    """Shapes by name, the experts' number, the dtype, the shard size and the config of a set of checkpoints."""

    shapes: dict[str, tuple[int, ...]]
    experts: int
    dtype: torch.dtype
    shard: int
    config: dict


def llama(width: int, inner: int, layers: int, vocabulary: int = 32000) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for k in range(layers):
        layer = f"model.layers.{k}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def llama_config(width: int, inner: int, layers: int, dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip


def vit(width: int = 768, inner: int = 3072, layers: int = 12, patch: int = 32) -> dict[str, tuple[int, ...]]:
    root = "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.class_embedding": (width,),
        f"{root}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{root}embeddings.position_embedding.weight": ((224 // patch) ** 2 + 1, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]  # the first is misspelt in the published checkpoints
    for k in range(layers):
        layer = f"encoder.layers.{k}."
        norms += [f"{layer}layer_norm{j}" for j in (1, 2)]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{root}{layer}self_attn.{part}.weight"] = (width, width)
            shapes[f"{root}{layer}self_attn.{part}.bias"] = (width,)
        for part, shape in (("fc1", (inner, width)), ("fc2", (width, inner))):
            shapes[f"{root}{layer}mlp.{part}.weight"] = shape
            shapes[f"{root}{layer}mlp.{part}.bias"] = shape[:1]
    return shapes | {f"{root}{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


VIT_CONFIG = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32, "image_size": 224,
    "projection_dim": 512, "hidden_act": "quick_gelu", "torch_dtype": "float32",
}  # fmt: skip
M, L, XL = (768, 2048, 18), (1024, 2816, 18), (2048, 5632, 17)
SETS = {
    "m-bf16": Set(llama(*M), 4, torch.bfloat16, 5 * GB, llama_config(*M, "bfloat16")),
    "m-fp32": Set(llama(*M), 4, torch.float32, 5 * GB, llama_config(*M, "float32")),
    "l-fp32": Set(llama(*L), 4, torch.float32, GB // 2, llama_config(*L, "float32")),
    "clip": Set(vit(), 8, torch.float32, 5 * GB, VIT_CONFIG),
    "xl-fp32": Set(llama(*XL), 4, torch.float32, GB, llama_config(*XL, "float32")),
}


def numbers(shape: tuple[int, ...], *names: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256("|".join(names).encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.Generator(np.random.SFC64(seed)).standard_normal(shape, dtype=np.float32))


def base_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return numbers(shape, name).mul_(0.02).add_(centre)


def expert_tensor(base: torch.Tensor, name: str, expert: str) -> torch.Tensor:
    size = 0.02 * 0.02
    if base.dim() < 2:
        return numbers(base.shape, name, expert).mul_(size).add_(base)
    rows, columns = base.shape[0], base.numel() // base.shape[0]
    left, right = numbers((rows, 8), name, expert, "left"), numbers((8, columns), name, expert, "right")
    delta = numbers((rows, columns), name, expert, "dense").mul_(size * math.sqrt(0.5))
    return delta.addmm_(left, right, alpha=size * math.sqrt(0.5 / 8)).add_(base.view(rows, columns)).view(base.shape)


class Writer:
    """One model's shards, filled in the order of their headers."""

    def __init__(self, folder: Path, told: Set):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(told.config, indent=1))
        groups: list[list[str]] = [[]]
        width, filled = told.dtype.itemsize, 0
        for name, shape in told.shapes.items():
            if groups[-1] and filled + width * math.prod(shape) > told.shard:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += width * math.prod(shape)
        places = {}
        for k, group in enumerate(groups):
            shard = f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
            header, at = {"__metadata__": {"format": "pt"}}, 0
            for name in group:
                end = at + width * math.prod(told.shapes[name])
                kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[told.dtype]
                header[name] = {"dtype": kind, "shape": list(told.shapes[name]), "data_offsets": [at, end]}
                at = end
                places[name] = folder / shard
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text)
        if len(groups) > 1:
            size = width * sum(map(math.prod, told.shapes.values()))
            index = {"metadata": {"total_size": size}, "weight_map": {n: p.name for n, p in places.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        self.places, self.dtype = places, told.dtype

    def put(self, name: str, tensor: torch.Tensor) -> None:
        with self.places[name].open("ab") as file:
            file.write(tensor.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def experts_of(name: str) -> list[str]:
    return [f"e{k + 1}" for k in range(SETS[name].experts)]


def write(name: str, to: Path) -> Path:
    """Write the set ``name`` into ``to`` unless it is there; return its folder, with base, e1, e2, ... in it."""
    folder, told = to / name, SETS[name]
    if folder.is_dir():
        return folder
    partial = to / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    base = Writer(partial / "base", told)
    experts = {expert: Writer(partial / expert, told) for expert in experts_of(name)}
    for tensor, shape in told.shapes.items():
        origin = base_tensor(tensor, shape).to(told.dtype).float()  # experts start from what the base's file holds
        base.put(tensor, origin)
        for expert, writer in experts.items():
            writer.put(tensor, expert_tensor(origin, tensor, expert))
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=[n for n in SETS if n != "xl-fp32"], help=", ".join(SETS))
    parser.add_argument("--to", type=Path, required=True)
    told = parser.parse_args()
    for name in told.sets:
        folder = write(name, told.to)
        size = sum(p.stat().st_size for p in (folder / "base").iterdir())
        print(f"{folder}: base + {SETS[name].experts} experts of {size / 1e6:.0f} MB each")


if __name__ == "__main__":
    main()
