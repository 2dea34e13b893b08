"""Average, task arithmetic, TIES and DARE against mergekit 0.1.5.

mergekit works per tensor, lets weights vote, elects + for zero sums: our `scope="tensor"`, `weights`, `rule="exact"`.
Not expressible, hence not compared: ties with `rescale` (an l1 rescale of mergekit's own); DARE with it is compared
through the masks and that factor, since it multiplies by |delta|_1 / |m delta|_1 where the paper divides by the share.
"""

import pytest
import torch
from cases import described, experts, tensors
from torch import Tensor

from merganser.steps.combine.average import average
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties

CASES = described("mergers_mergekit")


def named(*methods: str) -> list[str]:
    return [n for n, c in CASES.items() if c["params"]["method"] in methods]


def deltas_of(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return base, deltas and the merged model."""
    inputs, outputs = tensors("mergers_mergekit", case)
    models = experts(inputs, sum(name[0] == "t" for name in inputs))
    base = inputs.get("base", torch.zeros_like(models[0]))
    return base, models - base, outputs["merged"]


def close(ours: Tensor, theirs: Tensor) -> None:
    half = theirs.dtype == torch.bfloat16  # theirs rounds each intermediate result, ours only the last
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if half else 2e-6, atol=1e-2 if half else 1e-6)


@pytest.mark.parametrize("case", named("linear"))
def test_average(case: str) -> None:
    _, models, merged = deltas_of(case)
    params = CASES[case]["params"]
    step = average if params.get("normalize", True) else task_arithmetic
    close(step(models, weights=params["weight"]), merged)


@pytest.mark.parametrize("case", named("task_arithmetic"))
def test_task_arithmetic(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params = CASES[case]["params"]
    step = average if params.get("normalize") else task_arithmetic
    close(base + params.get("lambda", 1) * step(deltas, weights=params["weight"]), merged)


@pytest.mark.parametrize("case", [n for n in named("ties") if not CASES[n]["params"].get("rescale")])
def test_ties(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params = CASES[case]["params"]
    close(base + ties(deltas, scope="tensor", density=params["density"], weights=params["weight"]), merged)


@pytest.mark.parametrize("case", named("dare_linear", "dare_ties"))
def test_dare(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params, (inputs, _) = CASES[case]["params"], tensors("mergers_mergekit", case)
    kept = deltas * torch.stack([inputs[f"mask{i}"] for i in range(len(deltas))])
    if params.get("rescale", True):
        axes = tuple(range(1, deltas.ndim))
        kept = kept * (deltas.abs().sum(axes, keepdim=True) / kept.abs().sum(axes, keepdim=True))
    if params["method"] == "dare_linear":
        close(base + task_arithmetic(kept, weights=params["weight"]), merged)
    else:
        how = "mean" if params.get("normalize") else "sum"
        close(base + ties(kept, density=1, merge=how, weights=params["weight"]), merged)
