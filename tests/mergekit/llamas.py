"""Tiny Llamas, and T5s of an encoder and a decoder, in Hub layout, written without transformers, alike on every machine."""

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

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def t5_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a T5's tensors."""
    found: dict[str, tuple[int, ...]] = {"shared.weight": (16, 8), "lm_head.weight": (16, 8)}
    for side, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for i in range(2):
            at = f"{side}.block.{i}.layer."
            for k, part in enumerate(parts):
                found |= {f"{at}{k}.{part}.{x}.weight": (8, 8) for x in "qkvo"} | {f"{at}{k}.layer_norm.weight": (8,)}
            k = len(parts)
            found |= {f"{at}{k}.DenseReluDense.{x}.weight": (12, 8) for x in ("wi_0", "wi_1")}
            found |= {f"{at}{k}.DenseReluDense.wo.weight": (8, 12), f"{at}{k}.layer_norm.weight": (8,)}
        found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 2)
        found[f"{side}.final_layer_norm.weight"] = (8,)
    return found


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
    return _near(shapes(layers, rows), experts, dtype)


def _near(
    spec: Mapping[str, tuple[int, ...]], experts: Sequence[str], dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(7)
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
    """Return all models that the configs name: base, a, b, c; plain, more, other, third with words of their own; T5s."""
    models = family("a", "b", "c")
    rng = torch.Generator().manual_seed(11)
    for who, like in (("plain", "base"), ("more", "a"), ("other", "b"), ("third", "c")):
        extra = len(WORDS[who])
        models[who] = dict(models[like])
        for name in ("model.embed_tokens.weight", "lm_head.weight") if extra else ():
            models[who][name] = torch.cat([models[like][name], 0.3 * torch.randn(extra, 8, generator=rng)])
    near = _near(t5_shapes(), ("t5-a", "t5-b"), torch.float32)
    return {**models, "t5": near.pop("base"), **near}


def write_all(root: Path, models: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write all models into folders of ``root``, those with words with their tokenizers."""
    for who, weights in models.items():
        config = T5 if who.startswith("t5") else CONFIG
        folder = write(root / who, weights, config, vocab_size=len(weights["lm_head.weight"]))
        if who in WORDS:
            wordy(folder, WORDS[who])
    return root


def write(folder: Path, weights: Mapping[str, Tensor], like: Mapping[str, object] = CONFIG, **config: object) -> Path:
    """Write one model into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**like, **config}))
    return folder
