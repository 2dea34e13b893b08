"""What PEFT's ways of combining adapters come to, from its published numbers and from PEFT itself.

`linear`, `ties`, `dare_linear`, `magnitude_prune` work on A and B apart, so that B_i of one adapter meets A_j of another: not
a sum of changes, and no sentence here. Their kin with `svd` and `cat` are sentences written as an adapter.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from nets import by_hand
from torch import Tensor

from merganser.as_adapter import shortened
from merganser.steps.combine.ties import ties
from merganser.steps.edit.trim import trim
from merganser.weights.adapter import Factors

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from cases import described, tensors

CASES = described("mergers_peft")
LAYERS = ("q", "o")
COMPARED = ("cat", "svd", "svd_rank5", "ties_svd", "magnitude_prune_svd")
CROSSED = ("linear", "linear_neg", "ties", "dare_linear", "magnitude_prune")


def adapters(name: str, layer: str) -> tuple[list[Factors], Tensor, Tensor]:
    """Return the scaled factors of each adapter, the weights, and PEFT's merged change."""
    inputs, outputs = tensors("mergers_peft", f"peft/awa_{name}")
    params = CASES[f"peft/awa_{name}"]["params"]
    scales = [alpha / rank for alpha, rank in zip(params["alphas"], params["ranks"], strict=True)]
    low = [Factors(s * inputs[f"ad{k}.{layer}.B"], inputs[f"ad{k}.{layer}.A"]) for k, s in enumerate(scales)]
    return low, torch.tensor(params["weights"]), outputs[f"{layer}.delta"]


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_published_numbers(name: str, layer: str) -> None:
    low, weights, theirs = adapters(name, layer)
    params = CASES[f"peft/awa_{name}"]["params"]
    deltas, rank = torch.stack([one.left @ one.right for one in low]), params.get("svd_rank", max(params["ranks"]))
    value: Factors | Tensor = Factors.sum(low, weights)
    if name == "ties_svd":
        knobs = {"scope": "tensor", "equal": "first", "weights_vote": False}
        value = ties(deltas, density=params["density"], weights=weights.tolist(), **knobs)
    elif name == "magnitude_prune_svd":
        kept = [trim(one, density=params["density"], scope="tensor", equal="first") for one in deltas]
        value = sum(w * one for w, one in zip(weights, kept, strict=True))  # type: ignore[assignment]
    made, left, total = shortened(value, rank, exact=name == "cat")
    ours = made.left @ made.right
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
    whole = value.left @ value.right if isinstance(value, Factors) else value
    assert math.sqrt(left / total) == pytest.approx(float((whole - ours).norm() / whole.norm()), abs=1e-5)


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("layer", LAYERS)
def test_combining_a_and_b_apart_is_not_the_sum(name: str, layer: str) -> None:
    low, weights, theirs = adapters(name, layer)
    exact = sum(w * one.left @ one.right for w, one in zip(weights, low, strict=True))
    assert (theirs - exact).norm() / exact.norm() > 0.3


def test_every_case_is_compared_or_known() -> None:
    names = {case.removeprefix("peft/awa_") for case in CASES if "awa_" in case}
    # clamped values are PEFT's own; dare_ties_svd is dare and ties, compared in golden/test_peft.py, and an svd as above
    assert names == {*COMPARED, *CROSSED, "svd_clamp", "dare_ties_svd"}


def test_how_far_peft_is_from_the_sum_of_unrelated_adapters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Four random adapters of rank 16 at weight 1/4: returning nothing at all would be 1.0 away."""
    peft = pytest.importorskip("peft", reason="PEFT is measured here")
    size, names = 256, [f"e{k}" for k in range(4)]
    for k, name in enumerate(names):
        by_hand(tmp_path / name, {"w": (size, size)}, 16, seed=k, lora_alpha=16)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Linear(size, size, bias=False)

    model = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "e0"), adapter_name="e0")
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    layer = model.base_model.model.w
    exact = sum(layer.get_delta_weight(name) for name in names) / 4
    ways = {"linear": {}, "ties": {"density": 1.0}, "svd": {"svd_rank": 16}, "cat": {}}
    away = {}
    for how, more in ways.items():
        model.add_weighted_adapter(names, [0.25] * 4, how, combination_type=how, **more)
        away[how] = float((layer.get_delta_weight(how) - exact).norm() / exact.norm())
    low = [Factors(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach()) for n in names]
    for rank in (16, 64):
        _, left, total = shortened(Factors.sum(low, torch.full((4,), 0.25)), rank)
        away[f"ours, rank {rank}"] = math.sqrt(left / total)
    with capsys.disabled():
        print("\ndistance from the weighted sum:", {how: round(one, 3) for how, one in away.items()})
    assert away["linear"] > 1.5
    assert away["ties"] > 0.9
    assert away["cat"] < 1e-5
    assert away["ours, rank 16"] == pytest.approx(away["svd"], abs=1e-3)
    assert away["ours, rank 64"] < 1e-5
