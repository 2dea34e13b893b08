"""Model Stock, SLERP and its kin, Karcher means, NearSwap, RAM and Arcee Fusion against mergekit 0.1.5.

Not compared: mergekit/karcher_antipodal, where mergekit's result is rounding noise (ours, the mean, has its own law).
"""

from collections.abc import Callable

import pytest
import torch
from cases import described, experts, tensors
from torch import Tensor

from merganser.steps.combine.arcee_fusion import arcee_fusion
from merganser.steps.combine.karcher import karcher
from merganser.steps.combine.model_stock import model_stock
from merganser.steps.combine.multislerp import multislerp
from merganser.steps.combine.nearswap import nearswap
from merganser.steps.combine.nuslerp import nuslerp
from merganser.steps.combine.ram import ram
from merganser.steps.combine.slerp import slerp

CASES = described("mergers_mergekit")
KNOBS = {  # mergekit's word for a parameter: ours
    "max_iter": "steps",
    "weight": "weights",
    "normalize_weights": "normalize",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
}
STEPS: dict[str, Callable[..., Tensor]] = {
    "model_stock": lambda deltas, **knobs: model_stock(deltas, floor=1e-6, **knobs),
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "nearswap": nearswap,
    "ram": ram,
    "ramplus_tl": lambda deltas, **knobs: ram(deltas, plus=True, **knobs),
    "arcee_fusion": arcee_fusion,
}
WITH_BASE = ("slerp", "arcee_fusion")
OURS = [n for n, c in CASES.items() if c["params"]["method"] in STEPS and n != "mergekit/karcher_antipodal"]


@pytest.mark.parametrize("case", OURS)
def test_the_merged_model_is_mergekits(case: str) -> None:
    params, (inputs, outputs) = CASES[case]["params"], tensors("mergers_mergekit", case)
    method = params["method"]
    knobs = {KNOBS.get(k, k): v for k, v in params.items() if k != "method"}
    models = experts(inputs, sum(name[0] == "t" for name in inputs))
    base = inputs.get("base", torch.zeros_like(models[0]))
    given = {"base": base} if method in WITH_BASE else {}
    merged = base + STEPS[method](models - base, **knobs, **given)
    torch.testing.assert_close(merged, outputs["merged"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", [n for n in OURS if CASES[n]["params"]["method"] in ("karcher", "slerp")])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_weights_in_two_pieces_give_the_same_model(case: str, scale: float) -> None:
    """theta = base + delta: whatever part of the weights is called the base, angles are those of the weights."""
    params, (inputs, outputs) = CASES[case]["params"], tensors("mergers_mergekit", case)
    models = experts({"t0": inputs["base"], "t1": inputs["t0"]}, 2) if params["method"] == "slerp" else None
    models = models if models is not None else experts(inputs, sum(name[0] == "t" for name in inputs))
    knobs = {KNOBS.get(k, k): v for k, v in params.items() if k != "method"}
    base = scale * torch.randn(models[0].shape, generator=torch.Generator().manual_seed(0))
    merged = base + STEPS[params["method"]](models - base, base=base, **knobs)
    torch.testing.assert_close(merged, outputs["merged"], rtol=2e-6, atol=1e-6 * max(1, 10 * scale))


@pytest.mark.parametrize("method", ["model_stock", "nuslerp"])
def test_the_knobs_by_row_matter(method: str) -> None:
    """The cases by row would pass by a step that ignores the knob only if rows agreed."""
    inputs, _ = tensors("mergers_mergekit", f"mergekit/{method}_8x12")
    deltas = experts(inputs, 2) - inputs["base"]
    knob = {"filter_wise": True} if method == "model_stock" else {"flatten": False}
    assert not torch.allclose(STEPS[method](deltas), STEPS[method](deltas, **knob), rtol=1e-3)


def test_every_case_of_these_methods_is_compared_or_named_above() -> None:
    left = {n for n, c in CASES.items() if c["params"]["method"] in STEPS} - set(OURS)
    assert left == {"mergekit/karcher_antipodal"}
    assert {CASES[n]["params"]["method"] for n in OURS} == set(STEPS)
