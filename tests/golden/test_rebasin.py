"""Git Re-Basin's weight matching against the numbers of the published code (samuela/git-re-basin), exactly.

The published code draws the order in which it visits permutations; the cases hold it. Kernels are [in, out] (flax).
Not here: core/* are in test_core.py.
"""

import numpy as np
import pytest
import torch
from cases import described, tensors

from merganser.steps.align.permute import _chains, _groups, _tables, match, permute, prepare

CASES = described("mergers_core")
REBASIN = ["rebasin/mlp1_random", "rebasin/mlp2_noise", "rebasin/mlp3_planted"]


@pytest.mark.parametrize("case", REBASIN)
def test_matching(case: str) -> None:
    inputs, outputs = tensors("mergers_core", case)
    a, b = ({k[2:]: v for k, v in inputs.items() if k.startswith(side)} for side in ("a.", "b."))
    groups = _groups(_tables("flax_mlp"), list(a), lambda name: a[name].shape)
    assert [len(chain) for chain in _chains(groups)] == [CASES[case]["params"]["hidden_layers"]]
    perms = match(a, b, groups, inputs["visit_order"].tolist())
    for k, perm in enumerate(perms):
        assert torch.equal(perm, outputs[f"perm.P_{k}"])

    survey: dict = {}
    for group, perm in zip(groups, perms, strict=True):
        for name, axis in group.items():
            survey.setdefault(name, {})[axis] = torch.stack([torch.arange(len(perm)), perm])
    squares = []
    for name, reference in a.items():
        aligned, restore = permute(torch.stack([reference, b[name]]), name=name, survey=survey)
        assert torch.equal(aligned[0], reference)
        assert torch.equal(aligned[1], outputs[f"aligned.{name}"])
        assert torch.equal(restore(aligned[1]), aligned[1])
        squares.append([(reference - x).square().sum() for x in (b[name], aligned[1])])
    torch.testing.assert_close(torch.tensor(squares).double().sum(0), outputs["sq_distance"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", REBASIN)
def test_the_whole_step_comes_as_near(case: str) -> None:
    """In its own order of visits the step finds an optimum at least as good, or one within a tenth of the gain."""
    inputs, outputs = tensors("mergers_core", case)
    names = [k[2:] for k in inputs if k.startswith("a.")]
    rows = {name: torch.stack([inputs[f"a.{name}"], inputs[f"b.{name}"]]) for name in names}
    survey = prepare(lambda name: (None, rows[name]), names, spec="flax_mlp", rng=np.random.default_rng(0))
    aligned = [permute(rows[name], name=name, survey=survey)[0] for name in names]
    distance = sum((x[0] - x[1]).square().sum() for x in aligned)
    before, after = outputs["sq_distance"]
    assert distance <= after + 0.1 * (before - after)


def test_every_case_is_compared_or_left_out() -> None:
    assert {name for name in CASES if not name.startswith("core/")} == set(REBASIN)
