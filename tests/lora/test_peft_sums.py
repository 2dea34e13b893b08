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
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties
from merganser.steps.edit.trim import trim
from merganser.weights.adapter import Factors

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from cases import described, tensors

CASES = described("mergers_peft")
LAYERS = ("q", "o")
COMPARED = ("cat", "svd", "svd_rank5", "svd_clamp", "ties_svd", "dare_ties_svd", "magnitude_prune_svd")
CROSSED = ("linear", "linear_neg", "ties", "dare_linear", "magnitude_prune")


def adapters(name: str, layer: str) -> tuple[list[Factors], Tensor, Tensor]:
    """Return the scaled factors of each adapter, the weights, and PEFT's merged change."""
    inputs, outputs = tensors("mergers_peft", f"peft/awa_{name}")
    params = CASES[f"peft/awa_{name}"]["params"]
    scales = [alpha / rank for alpha, rank in zip(params["alphas"], params["ranks"], strict=True)]
    low = [Factors(s * inputs[f"ad{k}.{layer}.B"], inputs[f"ad{k}.{layer}.A"]) for k, s in enumerate(scales)]
    return low, torch.tensor(params["weights"]), outputs[f"{layer}.delta"]


def masks(name: str, layer: str) -> list[Tensor]:
    """Return which entries of each adapter's change PEFT kept; it went layer by layer, in the order of ``LAYERS``."""
    inputs, each = tensors("mergers_peft", f"peft/awa_{name}")[0], len(CASES[f"peft/awa_{name}"]["params"]["ranks"])
    return [inputs[f"mask{each * LAYERS.index(layer) + k}"] for k in range(each)]


def clamped(made: Factors, quantile: float, like: Tensor) -> Tensor:
    """Cut the entries of U S and V^T at a quantile of both, as PEFT does with ``svd_clamp``; no option of ours.

    That quantile depends on which way singular vectors point, so they point as those of PEFT's B, ``like``.
    """
    u, s, v = torch.linalg.svd(made.left @ made.right, full_matrices=False)
    k = made.left.shape[1]
    signs = (u[:, :k] * like).sum(0).sign()
    left, right = u[:, :k] * s[:k] * signs, v[:k] * signs[:, None]
    most = torch.quantile(torch.cat([left.flatten(), right.flatten()]), quantile)
    return left.clamp(-most, most) @ right.clamp(-most, most)


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
    elif name == "dare_ties_svd":
        kept = [one * mask / params["density"] for one, mask in zip(deltas, masks(name, layer), strict=True)]
        value = ties(torch.stack(kept), density=1, weights=weights.tolist(), weights_vote=False)
    elif name == "magnitude_prune_svd":
        kept = [trim(one, density=params["density"], scope="tensor", equal="first") for one in deltas]
        value = sum(w * one for w, one in zip(weights, kept, strict=True))  # type: ignore[assignment]
    made, left, total = shortened(value, rank, exact=name == "cat")
    ours = made.left @ made.right
    if name == "svd_clamp":
        ours = clamped(made, params["svd_clamp"], tensors("mergers_peft", "peft/awa_svd_clamp")[1][f"{layer}.B"])
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
    whole = value.left @ value.right if isinstance(value, Factors) else value
    assert math.sqrt(left / total) == pytest.approx(float((whole - ours).norm() / whole.norm()), abs=1e-5)


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("layer", LAYERS)
def test_our_steps_on_a_and_on_b_apart(name: str, layer: str) -> None:
    """Each side has the root of an adapter's weight and scale; a negative weight's sign goes to A."""
    inputs, outputs = tensors("mergers_peft", f"peft/awa_{name}")
    params = CASES[f"peft/awa_{name}"]["params"]
    factors = [w * a / r for w, a, r in zip(params["weights"], params["alphas"], params["ranks"], strict=True)]
    density, layers = params.get("density"), [f"mask{k}" for k in range(12)][6 * LAYERS.index(layer) :]
    for side, drawn in (("A", layers[:3]), ("B", layers[3:6])):
        each = torch.stack([inputs[f"ad{k}.{layer}.{side}"] for k in range(3)])
        roots = [math.copysign(math.sqrt(abs(f)), f if side == "A" else 1) for f in factors]
        if name == "ties":
            merged = ties(each, density=density, weights=roots, weights_vote=False, scope="tensor", equal="first")
        else:
            if name == "dare_linear":
                each = torch.stack([one * inputs[m] / density for one, m in zip(each, drawn, strict=True)])
            elif name == "magnitude_prune":
                each = torch.stack([trim(one, density=density, scope="tensor", equal="first") for one in each])
            merged = task_arithmetic(each, weights=roots)
        torch.testing.assert_close(merged, outputs[f"{layer}.{side}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("layer", LAYERS)
def test_combining_a_and_b_apart_is_not_the_sum(name: str, layer: str) -> None:
    low, weights, theirs = adapters(name, layer)
    exact = sum(w * one.left @ one.right for w, one in zip(weights, low, strict=True))
    assert (theirs - exact).norm() / exact.norm() > 0.3


def test_every_case_is_compared_or_known() -> None:
    names = {case.removeprefix("peft/awa_") for case in CASES if "awa_" in case}
    assert names == {*COMPARED, *CROSSED}


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
