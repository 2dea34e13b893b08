"""A small network with every kind of layer that LoRA changes, and adapters for it written by PEFT or by hand."""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A linear layer with a weight [in, out]; transformers' own class where it is there, as PEFT knows that one."""

    def __new__(cls, out: int, inner: int):
        from transformers.pytorch_utils import Conv1D

        return Conv1D(out, inner)


class Block(nn.Module):
    def __init__(self, square: int = 8):
        super().__init__()
        self.q_proj = nn.Linear(square, 6)
        self.v_proj = nn.Linear(6, square, bias=False)
        self.square = nn.Linear(square, square)
        self.norm = nn.LayerNorm(square)


class Net(nn.Module):
    def __init__(self, conv1d: bool = False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 6, 3)
        self.line = nn.Conv1d(4, 5, 2)
        self.point = nn.Conv2d(4, 6, 1)
        self.group = nn.Conv2d(4, 6, 3, groups=2)
        if conv1d:
            self.c_fc = Conv1D(10, 8)
            self.c_proj = Conv1D(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


def base(folder: Path, seed: int = 0, **kind: bool) -> Net:
    """Make a network of random weights and write it into ``folder``."""
    torch.manual_seed(seed)
    net = Net(**kind)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


def random(seed: int, model: nn.Module) -> None:
    """Give every trainable parameter random values: a fresh adapter changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 1.0 if "magnitude" in name else 0.3
            parameter.data = (torch.randn(parameter.shape, generator=rng) * size).to(parameter.dtype)


def by_hand(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 2, seed: int = 0, **config: object) -> Path:
    """Write an adapter of linear modules ``{path: (out, in)}`` without PEFT."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out, inner) in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, inner, generator=rng)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, rank, generator=rng)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [*modules], **config}
    return write(folder, tensors, told)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


LINEAR = {"layers.0.q_proj": (6, 8), "layers.1.q_proj": (6, 8), "layers.1.square": (8, 8)}

TARGETS = ["q_proj", "v_proj", "square"]
KINDS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": TARGETS},
    "dora": {"r": 4, "use_dora": True, "target_modules": TARGETS},
    "modules_to_save": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier", "norm"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": TARGETS,
        "rank_pattern": {"layers.0.q_proj": 3, "v_proj": 1},
        "alpha_pattern": {"1.q_proj": 10, "square": 1},
    },
    "patterns of rslora": {"r": 2, "use_rslora": True, "target_modules": TARGETS, "rank_pattern": {"v_proj": 5}},
    "bias all": {"r": 2, "bias": "all", "target_modules": ["q_proj"]},
    "bias lora_only": {"r": 2, "bias": "lora_only", "target_modules": ["square"]},
    "lora_bias": {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q_proj"]},
    "regex": {"r": 2, "target_modules": r".*1\.(q|v)_proj"},
    "layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed", "v_proj"]},
    "embedding dora": {"r": 3, "use_dora": True, "target_modules": ["embed"]},
    "convolution": {"r": 2, "lora_alpha": 5, "target_modules": ["conv", "point", "line"]},
    "convolution dora": {"r": 2, "use_dora": True, "target_modules": ["conv", "point", "line"]},
    "conv1d": {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]},
    "conv1d dora": {"r": 2, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]},
    "conv1d among linear": {"r": 2, "target_modules": ["q_proj", "c_fc"]},
}


def written(folder: Path, net: Net, config: dict, seed: int = 1, **how: object) -> dict[str, torch.Tensor]:
    """Write an adapter of random values with PEFT; return the weights that PEFT itself merges."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, peft.LoraConfig(**config))
        random(seed, model)
        model.save_pretrained(folder, **how)
        return {n: t.detach().clone() for n, t in model.merge_and_unload().state_dict().items()}
