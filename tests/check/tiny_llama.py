"""Writes a tiny Llama with a tokenizer, as its own library does."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")


def write_model(folder: Path, seed: int, *, vocab: int = 64, shard: str = "5GB") -> Path:
    """Write a model whose weights are a base's plus noise of its own."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for value in model.parameters() if seed else ():
            value += 0.02 * torch.randn_like(value)
    model.save_pretrained(folder, max_shard_size=shard)
    words = {"[UNK]": 0, **{f"w{k}": k for k in range(1, 64)}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": row, "content": f"<more{row}>", **flags} for row in range(64, vocab)]
    kind = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": kind}))
    return folder
