"""TIES, task arithmetic and DARE against the numbers of the published code.

Not offered: ties/rand_normfrac and _normmass elect signs by other rules, in the code but not in the paper's method: the test
elects them, ours trims and merges; dare/mergelm_random_p1 keeps nothing, which is refused: our `keep` lies in (0, 1].
"""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from cases import described, tensors

from merganser.steps.combine.ram import ram
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import passes, ties
from merganser.steps.edit import dare as room_of_dare
from merganser.steps.edit.dare import dare
from merganser.steps.edit.trim import trim

CASES = described("ties_dare")
FLAT = [
    n for n, c in CASES.items() if n.startswith("ties/") and c["params"].get("resolve") == "mass" and "/sd_" not in n
]
WHOLE = [n for n in CASES if n.startswith("ties/sd_")]
DICE = [n for n in CASES if n.startswith("dare/") and "magnitude" not in n and not n.endswith("_p1")]
MAGNITUDE = [n for n in CASES if n.startswith("dare/mergelm_magnitude")]
UNELECTED = "ties/rand_noelect_K20_dis-mean"
ELECTED = ["ties/rand_normfrac_K20_dis-mean", "ties/rand_normmass_K20_dis-mean"]
NOTHING = "dare/mergelm_random_p1"


def knobs(case: str) -> dict:
    params = CASES[case]["params"]
    share = params["K"] / 100 if params["K"] > 1 else params["K"]
    return {"density": share, "merge": params["merge_func"].removeprefix("dis-"), "rule": "reference"}


@pytest.mark.parametrize("case", FLAT)
def test_ties(case: str) -> None:
    inputs, outputs = tensors("ties_dare", case)
    torch.testing.assert_close(ties(inputs["tv"], **knobs(case)), outputs["merged_tv"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", FLAT)
def test_ties_trims_what_the_reference_trims(case: str) -> None:
    """One expert alone at merge="sum" shows which of its entries survive the trim."""
    inputs, outputs = tensors("ties_dare", case)
    alone = {**knobs(case), "merge": "sum"}
    for delta, mask in zip(inputs["tv"], outputs["trim_mask"], strict=True):
        assert torch.equal(ties(delta[None], **alone), delta * mask)


@pytest.mark.parametrize("case", [c for c in FLAT if "rand" in c])
def test_our_rule_keeps_one_entry_less(case: str) -> None:
    inputs, _ = tensors("ties_dare", case)
    for delta in inputs["tv"]:
        kept = [int((ties(delta[None], **{**knobs(case), "rule": rule}) != 0).sum()) for rule in ("exact", "reference")]
        assert kept == [int(knobs(case)["density"] * len(delta)), int(knobs(case)["density"] * len(delta)) + 1]


@pytest.mark.parametrize("case", WHOLE)
def test_ties_of_a_whole_model_streamed(case: str) -> None:
    """Threshold and majority sign are the model's, though each tensor is seen alone."""
    inputs, outputs = tensors("ties_dare", case)
    names = sorted(k.removeprefix("ptm.") for k in inputs if k.startswith("ptm."))
    deltas = {n: torch.stack([inputs[f"ft{i}.{n}"] - inputs[f"ptm.{n}"] for i in range(3)]) for n in names}
    survey: list = []
    for look in passes(**knobs(case)):
        survey.append(reduce(add, [look(d, survey) for d in deltas.values()]))
    for name in names:
        merged = inputs[f"ptm.{name}"] + CASES[case]["params"]["lam"] * ties(deltas[name], survey=survey, **knobs(case))
        torch.testing.assert_close(merged, outputs[f"merged.{name}"], rtol=1e-6, atol=1e-7)


def test_without_an_election_it_is_the_mean_of_what_was_kept() -> None:
    """Which is what `ram` does with trimmed deltas."""
    inputs, outputs = tensors("ties_dare", UNELECTED)
    kept = torch.stack([ties(delta[None], **{**knobs(UNELECTED), "merge": "sum"}) for delta in inputs["tv"]])
    assert torch.equal(kept != 0, outputs["trim_mask"].bool() & (inputs["tv"] != 0))
    torch.testing.assert_close(ram(kept, epsilon=0.0), outputs["merged_tv"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ELECTED)
def test_ties_with_signs_elected_by_other_rules(case: str) -> None:
    """By squares, as shares of each expert's: the sign of the largest, or of the most in sum."""
    inputs, outputs = tensors("ties_dare", case)
    kept = torch.stack([ties(delta[None], **{**knobs(case), "merge": "sum"}) for delta in inputs["tv"]])
    shares = kept.square() / kept.square().sum(dim=1, keepdim=True)
    largest = kept.gather(0, shares.argmax(dim=0, keepdim=True))[0].sign()
    sign = largest if "normfrac" in case else (kept.sign() * shares).sum(dim=0).sign()
    merged = ram(torch.where(kept * sign > 0, kept, 0), epsilon=0.0)  # the mean over those that are not zero
    torch.testing.assert_close(merged, outputs["merged_tv"], rtol=1e-6, atol=1e-7)


def test_dare_that_keeps_nothing_is_refused() -> None:
    inputs, outputs = tensors("ties_dare", NOTHING)
    assert not outputs["delta"].any()
    with pytest.raises(ValueError, match="keep"):
        dare(inputs["delta"], keep=1 - CASES[NOTHING]["params"]["mask_rate"], rng=np.random.default_rng())


@pytest.mark.parametrize("case", MAGNITUDE)
def test_dare_by_magnitude_is_a_trim(case: str) -> None:
    """The published code drops int(n p) entries and all equal ones; `trim` keeps int(n (1 - p))."""
    inputs, outputs = tensors("ties_dare", case)
    drop, n = CASES[case]["params"]["mask_rate"], inputs["delta"].numel()
    kept = trim(inputs["delta"], density=(n - int(n * drop)) / n, scope="tensor") / (1 - drop)
    torch.testing.assert_close(kept, outputs["delta"], rtol=1e-6, atol=1e-7)


def test_task_arithmetic() -> None:
    inputs, outputs = tensors("ties_dare", "ties/rand_task_arithmetic_sum")
    torch.testing.assert_close(task_arithmetic(inputs["tv"]), outputs["merged_tv"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", DICE)
def test_dare_with_the_dice_of_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = CASES[case]["params"]
    drop, rescale = (
        params.get(a, params.get(b)) for a, b in (("mask_rate", "sparsity_level"), ("use_rescale", "rescale"))
    )
    inputs, outputs = tensors("ties_dare", case)
    mask = torch.rand(inputs["delta"].shape, generator=torch.Generator().manual_seed(params["seed"])) >= drop
    monkeypatch.setattr(room_of_dare, "_thrown", lambda *_: mask.float())
    ours = dare(inputs["delta"], keep=1 - drop, rescale=rescale, rng=np.random.default_rng())
    if rescale:  # by the share that is really kept, a multiple of 2^-16
        ours *= round((1 - drop) * 65536) / 65536 / (1 - drop)
    torch.testing.assert_close(ours, outputs["delta"], rtol=1e-6, atol=1e-7)
    if "drop_mask" in inputs:
        assert torch.equal(ours == 0, inputs["drop_mask"].bool())


def test_every_case_is_compared() -> None:
    assert CASES.keys() == {
        *FLAT, *WHOLE, *DICE, *MAGNITUDE, *ELECTED, UNELECTED, NOTHING, "ties/rand_task_arithmetic_sum"
    }  # fmt: skip
