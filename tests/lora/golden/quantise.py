"""Make the quantised checkpoints in this folder: transformers and bitsandbytes write them, bitsandbytes reads them back.

    python tests/lora/golden/quantise.py        (needs transformers, accelerate and bitsandbytes; processor only)

`llama-*`: a Llama of one layer as `save_pretrained` leaves it. `tensors`: single matrices of shapes and block sizes that
models seldom have. `dequantised.json`: the SHA-256 of what bitsandbytes makes of each tensor, in each dtype. Rows are a
multiple of the block, or odd: elsewhere bitsandbytes 0.50.2 reads wrong scales on a processor.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LLAMA = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TENSORS = {  # name: shape, type, block, double
    "odd": ((7, 33), "nf4", 64, False),
    "wide": ((5, 256), "nf4", 128, True),
    "many": ((300, 64), "fp4", 32, True),  # more than 256 blocks, so the scales have scales
}


def hashed(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def models() -> None:
    """Write the quantised Llamas."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(plain)
        for name, told in KINDS.items():
            model = AutoModelForCausalLM.from_pretrained(
                plain, quantization_config=BitsAndBytesConfig(**told), device_map="cpu"
            )
            folder = HERE / f"llama-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)


def tensors() -> None:
    """Write the single matrices."""
    from bitsandbytes import functional

    made = {}
    rng = torch.Generator().manual_seed(0)
    for name, (shape, kind, block, double) in TENSORS.items():
        dense = torch.randn(shape, generator=rng).half()
        data, state = functional.quantize_4bit(dense, blocksize=block, quant_type=kind, compress_statistics=double)
        made[f"{name}.weight"] = data
        made |= {f"{name}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
    (HERE / "tensors").mkdir(exist_ok=True)
    save_file(made, HERE / "tensors" / "model.safetensors")


def dequantised(weights: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return what bitsandbytes makes of a packed tensor."""
    from bitsandbytes import functional

    if weights[name].dtype == torch.int8:
        scales = weights[f"{name.removesuffix('.weight')}.SCB"]
        return functional.int8_vectorwise_dequant(weights[name], scales).to(dtype)
    parts = {n.removeprefix(f"{name}."): t.clone() for n, t in weights.items() if n.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = dtype
    return functional.dequantize_4bit(weights[name].clone(), state)


def main() -> None:
    """Write everything."""
    models()
    tensors()
    told: dict[str, dict[str, dict[str, str]]] = {}
    for folder in sorted(p.parent for p in HERE.glob("*/model.safetensors")):
        weights = load_file(folder / "model.safetensors")
        packed = [n for n, t in weights.items() if n.endswith(".weight") and not t.is_floating_point()]
        told[folder.name] = {
            n: {d: hashed(dequantised(weights, n, kind)) for d, kind in DTYPES.items()} for n in sorted(packed)
        }
    (HERE / "dequantised.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
