"""EMR and MagMax, whole models streamed tensor by tensor, against the numbers of the published code."""

from functools import reduce
from operator import add

import pytest
import torch
from cases import described, experts, tensors
from torch import Tensor

from merganser.steps.combine.emr import emr, passes
from merganser.steps.combine.magmax import magmax

CASES = described("mergers_flat")
EMR = [n for n in CASES if n.startswith("emr/")]
MAGMAX = [n for n in CASES if n.startswith("magmax/")]


def model(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the stacked deltas of every tensor, and the outputs."""
    inputs, outputs = tensors("mergers_flat", case)
    names = sorted(k.removeprefix("t0.") for k in inputs if k.startswith("t0."))
    return {n: experts(inputs, CASES[case]["params"]["T"], n) for n in names}, outputs


@pytest.mark.parametrize("case", EMR)
def test_emr(case: str) -> None:
    deltas, outputs = model(case)
    (look,) = passes(expert=0)
    survey = [reduce(add, [look(d, []) for d in deltas.values()])]
    lengths, masked = survey[0]
    torch.testing.assert_close((lengths / masked).float(), outputs["rescalers"], rtol=1e-6, atol=0)
    for name, tau in deltas.items():
        torch.testing.assert_close(emr(tau), outputs[f"unified.{name}"], rtol=0, atol=0)
        for t in range(len(tau)):
            ours = emr(tau, expert=t, survey=survey)
            assert torch.equal(ours != 0, outputs[f"mask.t{t}.{name}"].bool())
            torch.testing.assert_close(ours, outputs[f"task_delta.t{t}.{name}"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", MAGMAX)
def test_magmax(case: str) -> None:
    deltas, outputs = model(case)
    for name, tau in deltas.items():
        assert torch.equal(magmax(tau), outputs[f"merged.{name}"])
    assert not torch.equal(magmax(deltas["tie"].flip(0)), outputs["merged.tie"]), "the case has equal magnitudes"


def test_every_case_of_the_two_methods_is_compared() -> None:
    assert EMR == ["emr/T3", "emr/T4"]
    assert MAGMAX == ["magmax/T2", "magmax/T4"]
