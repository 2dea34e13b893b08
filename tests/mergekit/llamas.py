"""Tiny Llamas in Hub layout, written without transformers, the same on every machine."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WORDS = {"plain": [], "more": ["<x>", "<y>"], "other": ["<y>"], "third": ["<x>"]}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(layers: int = 4, rows: int = 16) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, 8)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,)}
        found |= {f"{at}self_attn.{x}_proj.weight": (8 if x in "qo" else 4, 8) for x in "qkvo"}
        found |= {f"{at}mlp.{x}_proj.weight": (12, 8) for x in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (8, 12)}
    return found | {"model.norm.weight": (8,), "lm_head.weight": (rows, 8)}


def family(
    *experts: str, layers: int = 4, rows: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Tensor]]:
    """Return a base and experts a small step away from it."""
    rng = torch.Generator().manual_seed(7)
    spec = shapes(layers, rows)
    base = {name: torch.randn(shape, generator=rng) * 0.3 for name, shape in spec.items()}
    models = {"base": base}
    for who in experts:
        models[who] = {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in base.items()}
    return {who: {n: t.to(dtype) for n, t in weights.items()} for who, weights in models.items()}


def wordy(folder: Path, added: Sequence[str]) -> None:
    """Give a model in ``folder`` a tokenizer of sixteen words and ``added`` ones."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    told = {
        "version": "1.0",
        "added_tokens": [{"id": 16 + k, "content": word, **flags, "special": True} for k, word in enumerate(added)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {f"t{k}": k for k in range(16)}, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(told))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tokens_of(folder: Path) -> dict[str, int]:
    """Return the rows by token that a folder's tokenizer.json tells."""
    told = json.loads((folder / "tokenizer.json").read_text())
    return told["model"]["vocab"] | {one["content"]: one["id"] for one in told["added_tokens"]}


def families() -> dict[str, dict[str, Tensor]]:
    """Return all models that the configs name: base, a, b, c; and plain, more, other, third with words of their own."""
    models = family("a", "b", "c")
    rng = torch.Generator().manual_seed(11)
    for who, like in (("plain", "base"), ("more", "a"), ("other", "b"), ("third", "c")):
        extra = len(WORDS[who])
        models[who] = dict(models[like])
        for name in ("model.embed_tokens.weight", "lm_head.weight") if extra else ():
            models[who][name] = torch.cat([models[like][name], 0.3 * torch.randn(extra, 8, generator=rng)])
    return models


def write_all(root: Path, models: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write all models into folders of ``root``, those with words with their tokenizers."""
    for who, weights in models.items():
        folder = write(root / who, weights, vocab_size=len(weights["lm_head.weight"]))
        if who in WORDS:
            wordy(folder, WORDS[who])
    return root


def write(folder: Path, weights: Mapping[str, Tensor], **config: object) -> Path:
    """Write one model into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
