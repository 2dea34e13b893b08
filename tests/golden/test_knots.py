"""KnOTS and what it is compared with, against the numbers of the published code (gstoica27/KnOTS).

A model is the row of all layers' coordinates, layers in sorted order; a merger sees that row, as published.
sq_ties_K30_rowstack is KnOTS of the transposed deltas, which the published code can do for square layers only.
The joint benchmark (joint_eval*) is in test_joint_eval.py.
"""

import pytest
import torch
from cases import described, tensors
from torch import Tensor

from merganser.steps.align.knots import knots
from merganser.steps.combine.ties import ties

CASES = described("knots")
KNOTS = [f"knots/{name}" for name in ("ties_K20", "ties_K30", "ties_K100", "ties_K30_sum", "sq_ties_K30_colstack")]
KNOTS += ["knots/dup_task_ties_K50", "knots/ta_sum", "knots/ta_mean"]
DARE = ["knots/knots_dare_ties", "knots/knots_dare_ties_p5"]
PLAIN = [f"knots/{name}" for name in ("plain_ties_K20", "plain_ties_K30", "plain_ties_K100", "plain_dare_ties")]
PLAIN += ["knots/plain_ta_sum", "knots/plain_ta_mean"]
PRIMITIVES = [
    f"knots/prim_{name}"
    for name in ("ties_masking_sum_of_values", "ties_masking_sum_of_signs", "masked_merge_mean", "masked_merge_sum")
]
JOINT = {"knots/joint_eval", "knots/joint_eval_ensemble"}
VOTED, ROWS, SIGNLESS = "knots/ties_K30_sumofsigns", "knots/sq_ties_K30_rowstack", "knots/prim_masked_merge_max"


def layers(case: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (pretrained weight, stacked deltas) of each layer, in sorted order."""
    inputs = tensors("knots", case if CASES[case]["inputs"] else "knots/base")[0]
    inputs = inputs if "t0.enc.l0.q_proj.A" in inputs else tensors("knots", "knots/base")[0]
    found = {}
    for key in sorted(k.removeprefix("W0.") for k in inputs if k.startswith("W0.")):
        experts = range(sum(k.endswith(f".{key}.A") for k in inputs))
        found[key] = (
            inputs[f"W0.{key}"],
            torch.stack([inputs[f"t{i}.{key}.B"] @ inputs[f"t{i}.{key}.A"] for i in experts]),
        )
    return found


def elected(params: dict) -> str:
    return {"sum_of_values": "mass", "sum_of_signs": "count"}[params["sign_resolve_mode"]]


def merged_rows(case: str, rows: Tensor) -> Tensor:
    """Merge ``[experts, entries]`` as the case says."""
    params = CASES[case]["params"]
    if params["merge_method"] == "ties":
        merged = ties(
            rows, density=params["topK"] / 100, merge=params["merging_type"], rule="reference", elect=elected(params)
        )
    elif params["merging_type"] == "sum":
        merged = rows.sum(0)
    elif params["representation"] == "vector":
        merged = rows.mean(0)
    else:  # as published: the mean over entries that are not zero
        merged = rows.sum(0) / (rows != 0).sum(0).clamp(min=1)
    return params["scaling_coeffs"] * merged


def merged_models(case: str, align: bool, turned: bool = False) -> dict[str, Tensor]:
    masks = tensors("knots", case)[0]
    parts, restores, weights = {}, {}, {}
    for key, (weight, deltas) in layers(case).items():
        if turned:
            weight, deltas = weight.mT, deltas.mT
        coords, restore = knots(deltas) if align else (deltas, lambda merged: merged)
        if CASES[case]["params"].get("dare"):
            end = key if align else f"{key}.weight"
            keep = torch.stack([masks[f"keep_mask.t{i}.{end}"] for i in range(len(deltas))]).to(coords.dtype)
            coords = coords * keep / (1 - CASES[case]["params"]["dare_pruning_coeffs"])
        parts[key], restores[key], weights[key] = coords, restore, weight
    merged = merged_rows(case, torch.cat([part.flatten(1) for part in parts.values()], dim=1))
    pieces = merged.split([part[0].numel() for part in parts.values()])
    return {
        key: weights[key] + restores[key](piece.reshape(part.shape[1:]))
        for (key, part), piece in zip(parts.items(), pieces, strict=True)
    }


@pytest.mark.parametrize("case", [*KNOTS, *DARE, *PLAIN])
def test_merged(case: str) -> None:
    outputs = tensors("knots", case)[1]
    for key, merged in merged_models(case, align=case not in PLAIN).items():
        torch.testing.assert_close(merged, outputs[f"merged.{key}"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", [*KNOTS, *DARE])
def test_rows_have_the_kept_singular_values_as_norms(case: str) -> None:
    outputs = tensors("knots", case)[1]
    for key, (_, deltas) in layers(case).items():
        coords, _ = knots(deltas)
        norms = coords.square().sum(dim=(0, 2)).sqrt()
        torch.testing.assert_close(norms, outputs[f"s.{key}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", PRIMITIVES)
def test_what_ties_does_with_a_row(case: str) -> None:
    inputs, outputs = tensors("knots", case)
    params = CASES[case]["params"]
    if "mask" in outputs:
        kept = ties(inputs["v"], density=params["topK"] / 100, merge="sum", rule="reference", elect=elected(params))
        torch.testing.assert_close(kept, (inputs["v"] * outputs["mask"]).sum(0))
        return
    agreeing = inputs["v"] * inputs["mask"]
    merged = ties(agreeing, density=1, merge=params["merge_func"], rule="reference") * params["weights"][0]
    same_sign = ((agreeing > 0).any(0) & (agreeing < 0).any(0)).logical_not()
    assert same_sign.any()
    torch.testing.assert_close(merged[same_sign], outputs["merged"][same_sign])


def test_stacked_rows_are_transposed_deltas() -> None:
    outputs = tensors("knots", ROWS)[1]
    for key, merged in merged_models(ROWS, align=True, turned=True).items():
        torch.testing.assert_close(merged.mT, outputs[f"merged.{key}"], rtol=1e-5, atol=2e-6)


def test_signs_by_vote_but_where_the_vote_is_a_draw() -> None:
    """There the published code takes minus, we plus; which is which depends on the SVD, so either may be what it has."""
    outputs, params = tensors("knots", VOTED)[1], CASES[VOTED]["params"]
    aligned = {key: (weight, *knots(deltas)) for key, (weight, deltas) in layers(VOTED).items()}
    rows = torch.cat([coords.flatten(1) for _, coords, _ in aligned.values()], dim=1)
    kept = torch.stack([ties(row[None], density=params["topK"] / 100, merge="sum", rule="reference") for row in rows])
    plus, draw = merged_rows(VOTED, rows), kept.sign().sum(0) == 0
    minus = -params["scaling_coeffs"] * ties(-kept, density=1, elect="count")
    at = 0
    for key, (weight, coords, restore) in aligned.items():
        units = torch.eye(coords.shape[1])[:, :, None].expand(-1, -1, coords.shape[2])
        basis = torch.stack([restore(unit)[:, 0] for unit in units], dim=1)
        theirs = basis.mT @ (outputs[f"merged.{key}"] - weight)
        here = slice(at, at := at + coords[0].numel())
        ours, other, even = (x[here].reshape(coords.shape[1:]) for x in (plus, minus, draw))
        right = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert right[~even].all()
        assert (right | torch.isclose(other, theirs, rtol=1e-4, atol=1e-5)).all()
    assert draw.any()


def test_the_published_maximum_has_lost_its_signs() -> None:
    inputs, outputs = tensors("knots", SIGNLESS)
    agreeing = inputs["v"] * inputs["mask"]
    merged = torch.stack(
        [ties(side, density=1, merge="max") for side in (agreeing.clamp(min=0), agreeing.clamp(max=0))]
    )
    ours = merged.abs().amax(0) * CASES[SIGNLESS]["params"]["weights"][0]
    torch.testing.assert_close(ours, outputs["merged"])


def test_every_case_is_compared() -> None:
    assert CASES.keys() == {*KNOTS, *DARE, *PLAIN, *PRIMITIVES, *JOINT, VOTED, ROWS, SIGNLESS, "knots/base"}
