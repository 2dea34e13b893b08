"""PEFT's merge_utils, per tensor, against our steps.

PEFT keeps exactly int(density d) entries, elects signs before the weights join in and divides by the number of agreeing
experts: `scope="tensor"`, `equal="first"`, `weights_vote=False`; its "frequency" is `elect="count"`.
Not compared here: peft/awa_*, which merge LoRA factors: lora/test_peft_sums.py does.
"""

import numpy as np
import pytest
import torch
from cases import described, experts, tensors
from torch import Tensor

from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties
from merganser.steps.edit import dare as room_of_dare
from merganser.steps.edit.dare import dare
from merganser.steps.edit.trim import trim

CASES = described("mergers_peft")


def named(*starts: str) -> list[str]:
    return [n for n in CASES if n.removeprefix("peft/").startswith(starts)]


def given(case: str) -> tuple[Tensor, list[float], Tensor, float]:
    """Return deltas, weights, the merged delta and the density."""
    inputs, outputs = tensors("mergers_peft", case)
    return experts(inputs, 3), inputs["weights"].tolist(), outputs["merged"], CASES[case]["params"].get("density", 1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", named("task_arithmetic"))
def test_task_arithmetic(case: str) -> None:
    deltas, weights, merged, _ = given(case)
    close(task_arithmetic(deltas, weights=weights), merged)


@pytest.mark.parametrize("case", named("magnitude_prune"))
def test_magnitude_prune(case: str) -> None:
    deltas, weights, merged, density = given(case)
    sparse = torch.stack([trim(d, density=density, scope="tensor", equal="first") for d in deltas])
    close(task_arithmetic(sparse, weights=weights), merged)


@pytest.mark.parametrize("case", named("ties_"))
def test_ties(case: str) -> None:
    deltas, weights, merged, density = given(case)
    elect = "count" if "frequency" in case else "mass"
    knobs = {"scope": "tensor", "equal": "first", "elect": elect}
    close(ties(deltas, density=density, weights=weights, weights_vote=False, **knobs), merged)


@pytest.mark.parametrize("case", named("dare_"))
def test_dare(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weights, merged, density = given(case)
    masks = iter([tensors("mergers_peft", case)[0][f"mask{i}"] for i in range(3)])
    monkeypatch.setattr(room_of_dare, "_thrown", lambda *_: next(masks).float().clone())  # 1 is kept, 0 not
    really = round(density * 65536) / 65536  # the share that is kept and divided by
    sparse = torch.stack([dare(d, keep=density, rng=np.random.default_rng()) for d in deltas]) * (really / density)
    if "linear" in case:
        close(task_arithmetic(sparse, weights=weights), merged)
    else:
        close(ties(sparse, density=1, weights=weights, weights_vote=False), merged)


def test_every_case_is_compared_or_named_above() -> None:
    assert {*CASES} == {*named("task_arithmetic", "magnitude_prune", "ties_", "dare_", "awa_")}
