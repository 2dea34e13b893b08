"""Core Space merging of LoRA factors against the numbers of the published code (apanariello4/core-space-merging).

core/knots_ties_K40 is that code base's KnOTS, which trims V without singular values; the published one is in test_knots.py.
_core_dare and _full_tsv_lora are remarks.
"""

from collections.abc import Callable

import pytest
import torch
from cases import described, tensors
from torch import Tensor

from merganser.steps.align.core import core, core_factors
from merganser.steps.align.knots import knots
from merganser.steps.combine.average import average
from merganser.steps.combine.cart import cart
from merganser.steps.combine.iso_c import iso_c
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties
from merganser.steps.combine.tsv import tsv

CASES = described("mergers_core")


def trimmed(density: float) -> Callable[[Tensor], Tensor]:
    return lambda coords: ties(coords, density=density, rule="reference")


MERGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "core/ta": task_arithmetic,
    "core/mean": average,
    "core/tsv": tsv,
    "core/wide_Tr_gt_m": tsv,
    "core/sum_iso": iso_c,
    "core/tsv_iso": lambda coords: iso_c(tsv(coords)[None]),
    "core/ties_K20": trimmed(0.2),
    "core/ties_K40": trimmed(0.4),
    "core/cart": lambda coords: cart(coords, share=0.3, by=0.5),
}
FULL = {"core/full_ties_K40": trimmed(0.4)}
KNOTS = {"core/knots_ties_K40"}


def layers(case: str) -> dict[str, tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Return weight and factors (B, A) of each layer."""
    inputs = tensors("mergers_core", case)[0]
    experts = range(len({key.split(".")[0] for key in inputs if key.startswith("t")}))
    names = [key.removeprefix("W0.") for key in inputs if key.startswith("W0.")]
    return {n: (inputs[f"W0.{n}"], [(inputs[f"t{i}.{n}.B"], inputs[f"t{i}.{n}.A"]) for i in experts]) for n in names}


@pytest.mark.parametrize("case", list(MERGERS))
def test_merged(case: str) -> None:
    outputs, scaling = tensors("mergers_core", case)[1], CASES[case]["params"]["scaling"]
    for name, (weight, factors) in layers(case).items():
        coords, restore = core_factors(factors, weight.shape) or pytest.fail("no form for factors")
        left, right = restore(MERGERS[case](coords))
        merged = weight + scaling * left @ right
        torch.testing.assert_close(merged, outputs[f"merged.{name}"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", list(MERGERS))
def test_cores_are_the_published_ones_but_for_signs(case: str) -> None:
    outputs = tensors("mergers_core", case)[1]
    for name, (weight, factors) in layers(case).items():
        coords, _ = core_factors(factors, weight.shape) or pytest.fail("no form for factors")
        assert [*coords.shape[1:]] == outputs[f"core_dims.{name}"].tolist()
        theirs = torch.stack([outputs[f"core.t{i}.{name}"] for i in range(len(factors))]).float()
        torch.testing.assert_close(coords.abs(), theirs.abs(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", ["core/ta", "core/mean", "core/tsv", "core/sum_iso", "core/tsv_iso", "core/cart"])
def test_what_does_not_depend_on_the_basis_needs_no_factors(case: str) -> None:
    outputs, scaling = tensors("mergers_core", case)[1], CASES[case]["params"]["scaling"]
    for name, (weight, factors) in layers(case).items():
        coords, restore = core(torch.stack([b @ a for b, a in factors]))
        merged = weight + scaling * restore(MERGERS[case](coords))
        torch.testing.assert_close(merged, outputs[f"merged.{name}"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", list(FULL))
def test_the_same_in_full(case: str) -> None:
    outputs, scaling = tensors("mergers_core", case)[1], CASES[case]["params"]["scaling"]
    for name, (weight, factors) in layers(case).items():
        merged = weight + scaling * FULL[case](torch.stack([b @ a for b, a in factors]))
        torch.testing.assert_close(merged, outputs[f"merged.{name}"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", list(KNOTS))
def test_knots_that_trims_without_singular_values(case: str) -> None:
    outputs, scaling = tensors("mergers_core", case)[1], CASES[case]["params"]["scaling"]
    for name, (weight, factors) in layers(case).items():
        coords, restore = knots(torch.stack([b @ a for b, a in factors]))
        lengths = coords.square().sum(dim=(0, 2)).sqrt()[:, None]  # of the rows: the singular values
        merged = weight + scaling * restore(lengths * trimmed(0.4)(coords / lengths))
        torch.testing.assert_close(merged, outputs[f"merged.{name}"], rtol=1e-4, atol=2e-6)


def test_every_case_is_compared() -> None:
    assert {c for c in CASES if c.startswith("core/")} == {*MERGERS, *FULL, *KNOTS}
