"""TALL masks, Consensus and PCB against the published code.

Magnitude masking, a baseline of the TALL paper, is no step but two: the entries that TIES' trim keeps of one expert, as
a mask on the sum. The reference forms masks from weights, we from deltas: entries within rounding of the threshold may
differ, in these cases none does.
AdaMerging++ learns coefficients on what TIES leaves of each expert: the sum of TIES with weights that join after the vote.
emr/* and magmax/* are compared in test_flat_interpolation.py.
"""

import pytest
import torch
from cases import described, tensors
from torch import Tensor

from merganser.steps.combine.consensus import consensus
from merganser.steps.combine.pcb import pcb
from merganser.steps.combine.ties import ties

CASES = described("mergers_flat")
TALL = [n for n in CASES if n.startswith("tall/")]
PCB = [n for n in CASES if n.startswith("pcb/")]
MAGNITUDE = [n for n in CASES if n.startswith("mag_masking/")]

ADAMERGINGPP = [n for n in CASES if n.startswith("adamergingpp/")]


def flat_deltas(case: str) -> Tensor:
    """Return the experts' deltas as the reference flattens them: over sorted keys."""
    inputs, _ = tensors("mergers_flat", case)
    keys = sorted(name.removeprefix("ptm.") for name in inputs if name.startswith("ptm."))
    rows = [
        torch.cat([(inputs[f"ft{t}.{key}"] - inputs[f"ptm.{key}"]).flatten() for key in keys])
        for t in range(CASES[case]["params"]["T"])
    ]
    return torch.stack(rows)


def of(case: str) -> dict:
    plain = CASES[case]["params"]["multi_task_vector"] == "sum"
    return {"of": "sum"} if plain else {"of": "ties", "rule": "reference"}


@pytest.mark.parametrize("case", TALL)
def test_consensus(case: str) -> None:
    deltas, (_, outputs) = flat_deltas(case), tensors("mergers_flat", case)
    lambdas = CASES[case]["params"]["chosen_lambda_per_task"]
    for k in (0, 1, 2, 3, len(deltas) + 1):
        ours = consensus(deltas, threshold=lambdas, agree=k, **of(case))
        theirs = outputs["merged_tv"] * outputs[f"consensus_mask.k{k}"]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        if k in (1, 2):
            torch.testing.assert_close(ours, outputs[f"consensus_tv.k{k}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", TALL)
def test_tall_masks(case: str) -> None:
    deltas, (_, outputs) = flat_deltas(case), tensors("mergers_flat", case)
    for limit in CASES[case]["params"]["lambdas"]:
        for t, mask in enumerate(outputs[f"tall_mask.{limit}"]):
            ours = consensus(deltas, threshold=limit, expert=t, **of(case))
            torch.testing.assert_close(ours, outputs["merged_tv"] * mask, rtol=1e-6, atol=1e-7)
    lambdas = CASES[case]["params"]["chosen_lambda_per_task"]
    for t, delta in enumerate(outputs["tall_task_delta"]):
        ours = consensus(deltas, threshold=lambdas, expert=f"e{t}", experts=[f"e{k}" for k in range(9)], **of(case))
        torch.testing.assert_close(ours, delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", MAGNITUDE)
def test_magnitude_masks(case: str) -> None:
    inputs, outputs = tensors("mergers_flat", case)
    k = CASES[case]["params"]["K"]
    for t, delta in enumerate(inputs["tv"]):
        kept = ties(delta[None], density=k / 100 if k >= 1 else k, merge="sum", rule="reference") != 0
        assert torch.equal(kept, outputs["mask"][t].bool())
        torch.testing.assert_close(inputs["tv"].sum(0) * kept, outputs["task_delta"][t], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", PCB)
def test_pcb(case: str) -> None:
    """The vision script has its factor built in; of the other one both results are there."""
    inputs, outputs = tensors("mergers_flat", case)
    params = CASES[case]["params"]
    rule, name = ("vision", "merged_tv") if "vision" in case else ("paper", f"merged_lam{params['lam']}")
    ours = pcb(inputs["tv"], density=params["pcb_ratio"], rule=rule)
    torch.testing.assert_close(params["lam"] * ours, outputs[name], rtol=2e-5, atol=1e-7)
    assert torch.equal(ours == 0, outputs[name] == 0)
    weighted = pcb(inputs["tv"], density=params["pcb_ratio"], rule=rule, weights=[params["lam"]] * len(inputs["tv"]))
    torch.testing.assert_close(weighted, outputs[name], rtol=2e-5, atol=1e-7)
    if rule == "paper":
        torch.testing.assert_close(ours, outputs["merged_tv"], rtol=2e-5, atol=1e-7)


def test_every_case_is_compared_or_named_above() -> None:
    assert {*CASES} - {*TALL, *PCB, *MAGNITUDE} == {
        n for n in CASES if n.startswith(("emr/", "magmax/", "adamergingpp/"))
    }


@pytest.mark.parametrize("case", ADAMERGINGPP)
def test_coefficients_on_what_ties_leaves_of_each_expert(case: str) -> None:
    share, (inputs, outputs) = CASES[case]["params"]["K"] / 100, tensors("mergers_flat", case)

    def summed(weights: list[float]) -> Tensor:
        knobs = {"density": share, "merge": "sum", "rule": "reference", "weights_vote": False}
        return ties(inputs["tv"], weights=weights, **knobs)

    count = len(inputs["tv"])
    for t, selected in enumerate(outputs["selected"]):
        torch.testing.assert_close(summed([float(k == t) for k in range(count)]), selected, rtol=0, atol=0)
    torch.testing.assert_close(summed([1.0] * count), outputs["merged_tv"], rtol=1e-6, atol=1e-7)
    clamped = inputs["lambda_raw"].clamp(0, 1).tolist()
    torch.testing.assert_close(summed(clamped), outputs["delta_at_lambda"], rtol=1e-6, atol=1e-7)
