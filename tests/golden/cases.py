"""Read the golden cases: `{case: {params, inputs, outputs, note}}` in JSON, their numbers in safetensors beside it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


@cache
def described(file: str) -> dict[str, Any]:
    """Return the cases of a file; keys with a leading underscore are remarks and left out."""
    cases = json.loads((HERE / f"{file}.json").read_text())
    return {name: case for name, case in cases.items() if not name.startswith("_")}


@cache
def _numbers(file: str) -> dict[str, Tensor]:
    return load_file(HERE / f"{file}.safetensors")


def tensors(file: str, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs and outputs of one case by name."""
    sides: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}}
    for key, value in _numbers(file).items():
        if key.startswith(f"{case}/"):
            side, name = key.removeprefix(f"{case}/").split(".", 1)
            sides[side][name] = value
    return sides["in"], sides["out"]


def experts(inputs: dict[str, Tensor], count: int, key: str = "") -> Tensor:
    """Stack tensor ``key`` of experts t0, t1, ..."""
    return torch.stack([inputs[f"t{i}.{key}" if key else f"t{i}"] for i in range(count)])
