"""Surgery: what it brings nearer, what it leaves alone, what it refuses. The published steps: `golden/`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merganser
from merganser.errors import DataError, HeadError
from merganser.learn.surgery import Correction, corrected, surgeries, surgery

SHORT = {"rank": 4, "steps": 200, "lr": 1e-2}


def pair(seed: int, n: int = 200, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    merged = torch.randn(n, width, generator=rng)
    low = torch.randn(width, 2, generator=rng) @ torch.randn(2, width, generator=rng)
    return merged, merged - 0.3 * torch.relu(merged @ low)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10, deadline=None)
def test_features_come_nearer_and_the_same_seed_gives_the_same_bytes(seed: int) -> None:
    merged, expert = pair(seed)
    found, again = surgery(merged, expert, **SHORT), surgery(merged, expert, **SHORT)
    assert torch.equal(found.down, again.down) and torch.equal(found.up, again.up)  # noqa: PT018
    assert found.down.shape == (4, 12) and found.up.shape == (12, 4)  # noqa: PT018
    assert (found(merged) - expert).abs().mean() < 0.9 * (merged - expert).abs().mean()


def test_where_nothing_is_wrong_nothing_is_corrected() -> None:
    merged, _ = pair(0)
    found = surgery(merged, merged.clone(), **SHORT)
    assert torch.equal(found(merged), merged)
    assert torch.equal(Correction(found.down, torch.zeros(12, 4))(merged), merged)


def test_a_merged_model_agrees_more_with_its_experts_on_inputs_not_seen(toy) -> None:
    merged = merganser.merge(toy.base, toy.experts, "task_arithmetic | scale(by=0.3)")
    inputs = {name: task.inputs for name, task in toy.train.items()}
    found = surgeries(merged, toy.experts, encoder=toy.encoder, inputs=inputs, kind="fp32", rank=4, steps=300)
    heads = corrected(toy.heads, found)

    def away(these) -> float:
        total = 0.0
        for name, task in toy.tasks.items():
            z, own = (torch.func.functional_call(toy.encoder, w, (task.inputs,)) for w in (merged, toy.experts[name]))
            total += float((these[name](z).softmax(1) - toy.heads[name](own).softmax(1)).abs().mean())
        return total

    assert away(heads) < 0.9 * away(toy.heads)


def test_bad_input_is_one_clear_error(toy) -> None:
    merged, expert = pair(1)
    for wrong in ({"rank": 0}, {"steps": 0}, {"lr": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            surgery(merged, expert, **wrong)
    with pytest.raises(DataError, match="must agree"):
        surgery(merged, expert[:5])
    with pytest.raises(HeadError, match="'north' has no correction"):
        corrected(toy.heads, {})
