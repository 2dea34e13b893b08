"""Average, task arithmetic, TIES, DARE, DELLA, Breadcrumbs and SCE against mergekit 0.1.5.

mergekit works per tensor, keeps exactly k, lets weights vote, elects + for zero sums: our `scope="tensor"`,
`equal="first"`, `weights`, `rule="exact"`. Its `rescale` is our `rescale="l1"` of the step that makes a delta sparse.
Random masks are those that it drew: a generator stands in that throws what leads to them.
The methods in OTHERS are compared in test_mergekit_interpolation.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from cases import described, experts, tensors
from torch import Tensor

from merganser.steps.combine.average import average
from merganser.steps.combine.sce import sce
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties
from merganser.steps.edit import dare as room_of_dare
from merganser.steps.edit.breadcrumbs import breadcrumbs
from merganser.steps.edit.dare import dare
from merganser.steps.edit.della import della
from merganser.steps.edit.trim import trim

CASES = described("mergers_mergekit")
OTHERS = {"model_stock", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "ram", "ramplus_tl", "arcee_fusion"}


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


def merged_by(params: dict[str, Any], sparse: Tensor, *, elects: bool, normalized: bool) -> Tensor:
    """Merge deltas that are sparse already as mergekit does: with or without an election, divided or not."""
    weights, factor = params["weight"], params.get("lambda", 1)
    if elects:
        how = "mean" if params.get("normalize", normalized) else "sum"
        return factor * ties(sparse, density=1, merge=how, weights=weights)
    return factor * (average if params.get("normalize", normalized) else task_arithmetic)(sparse, weights=weights)


@pytest.mark.parametrize("case", [n for n in named("ties") if not CASES[n]["params"].get("rescale")])
@pytest.mark.parametrize("equal", ["all", "first"])
def test_ties(case: str, equal: str) -> None:
    """Only in bf16 are there equal magnitudes, and then another k-th largest is as good as mergekit's."""
    base, deltas, merged = deltas_of(case)
    params = CASES[case]["params"]
    how = "mean" if params.get("normalize", True) else "sum"
    knobs = {"density": params["density"], "weights": params["weight"], "merge": how, "equal": equal}
    close(base + params.get("lambda", 1) * ties(deltas, scope="tensor", **knobs), merged)


@pytest.mark.parametrize("case", named("ties"))
def test_ties_in_two_words(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params = CASES[case]["params"]
    rescale = "l1" if params.get("rescale") else None
    knobs = {"scope": "tensor", "equal": "first", "rescale": rescale}
    sparse = torch.stack([trim(d, density=x, **knobs) for d, x in zip(deltas, params["density"], strict=True)])
    if "sparse" in (outputs := tensors("mergers_mergekit", case)[1]):
        close(sparse, outputs["sparse"])
    close(base + merged_by(params, sparse, elects=True, normalized=True), merged)


@pytest.mark.parametrize("case", named("dare_linear", "dare_ties"))
def test_dare(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, deltas, merged = deltas_of(case)
    params, (inputs, _) = CASES[case]["params"], tensors("mergers_mergekit", case)
    masks = iter([inputs[f"mask{i}"] for i in range(len(deltas))])
    monkeypatch.setattr(room_of_dare, "_thrown", lambda *_: next(masks).float().clone())  # 1 is kept, 0 not
    rescale = "l1" if params.get("rescale", True) else False
    rows = zip(deltas, params["density"], strict=True)
    sparse = torch.stack([dare(d, keep=x, rescale=rescale, rng=np.random.default_rng()) for d, x in rows])
    close(base + merged_by(params, sparse, elects=params["method"] == "dare_ties", normalized=False), merged)


class Thrown(np.random.Generator):
    """Dice that show what they are told to."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__(np.random.SFC64(0))
        self.numbers = numbers

    def random(self, *_: object, **__: object) -> np.ndarray:
        return self.numbers.numpy()


@pytest.mark.parametrize("case", named("della", "della_linear"))
def test_della(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params, (inputs, outputs) = CASES[case]["params"], tensors("mergers_mergekit", case)
    sparse = []
    for i, delta in enumerate(deltas):
        mask, rows = inputs[f"mask{i}"].reshape(delta.shape), delta.reshape(-1, delta.shape[-1])
        # what is thrown is in order of rank: 0 is kept, 1 is not
        thrown = 1 - mask.reshape(rows.shape).gather(1, rows.abs().argsort(dim=1)).float()
        dice = Thrown(thrown)
        knobs = {"density": params["density"][i], "epsilon": params["epsilon"][i]}
        sparse.append(della(delta, **knobs, rescale="l1", rng=dice))
        assert torch.equal(sparse[-1] != 0, mask.bool() & (delta != 0))
        paper = della(delta, **knobs, rng=dice)
        torch.testing.assert_close(
            paper, delta * mask / outputs[f"keep_prob{i}"].reshape(delta.shape), rtol=1e-5, atol=1e-7
        )
    elects = params["method"] == "della"
    close(base + merged_by(params, torch.stack(sparse), elects=elects, normalized=elects), merged)


@pytest.mark.parametrize("case", named("breadcrumbs", "breadcrumbs_ties"))
def test_breadcrumbs(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    params, (_, outputs) = CASES[case]["params"], tensors("mergers_mergekit", case)
    rescale = "l1" if params.get("rescale") else None
    rows = zip(deltas, params["density"], params["gamma"], strict=True)
    sparse = torch.stack([breadcrumbs(d, density=x, gamma=y, rescale=rescale) for d, x, y in rows])
    if "sparse" in outputs:
        close(sparse, outputs["sparse"])
    close(base + merged_by(params, sparse, elects="ties" in params["method"], normalized=False), merged)


@pytest.mark.parametrize("case", named("sce"))
def test_sce(case: str) -> None:
    base, deltas, merged = deltas_of(case)
    close(base + sce(deltas, density=CASES[case]["params"]["select_topk"], floor=1e-6), merged)


def test_every_case_is_compared_here_or_is_of_another_method() -> None:
    here = named("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear")
    here += named("breadcrumbs", "breadcrumbs_ties", "sce")
    assert {CASES[n]["params"]["method"] for n in CASES if n not in here} == OTHERS
