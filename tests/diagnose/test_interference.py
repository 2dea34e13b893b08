"""Interference as the paper writes it: zero where it must be, equal to a plain computation, and its parts make sense."""

import pytest
import torch
from torch.func import functional_call

import merganser


def found(toy, merged, experts=None, reference=None):
    return merganser.diagnose(
        toy.base, experts or toy.experts, merged, encoder=toy.encoder, heads=toy.heads, kind="fp32",
        inputs={n: t.inputs for n, t in toy.tasks.items()}, reference=reference,
    )  # fmt: skip


def kl(p, q):
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).mean()


def test_xi_is_the_papers_sum_computed_plainly(toy):
    merged = merganser.merge(toy.base, toy.experts, "task_arithmetic | scale(by=0.4)")
    total = 0.0
    for name, task in toy.tasks.items():
        own, other = (
            toy.heads[name](functional_call(toy.encoder, w, (task.inputs,))) for w in (toy.experts[name], merged)
        )
        total += kl(own, other).item()
    diagnosis = found(toy, merged)
    assert diagnosis.total("merged") == pytest.approx(total, rel=1e-4)


def test_an_expert_has_no_interference_with_itself_and_the_base_does_not_drift(toy):
    diagnosis = found(toy, dict(toy.experts))
    for k, name in enumerate(diagnosis.tasks):
        assert diagnosis.xi[name][k][k] == pytest.approx(0, abs=1e-6)
        assert diagnosis.drift[k][k] == 0
    still = found(toy, toy.base, experts=dict.fromkeys(toy.experts, toy.base))
    assert all(value == pytest.approx(0, abs=1e-6) for row in still.drift for value in row)


def test_drift_is_the_experts_effect_on_another_head(toy):
    diagnosis = found(toy, toy.base)
    i, j = 0, 2
    a, b = diagnosis.tasks[i], diagnosis.tasks[j]
    x = toy.tasks[b].inputs
    want = kl(
        toy.heads[b](functional_call(toy.encoder, toy.base, (x,))),
        toy.heads[b](functional_call(toy.encoder, toy.experts[a], (x,))),
    )
    assert diagnosis.drift[i][j] == pytest.approx(want.item(), rel=1e-4)


def test_one_set_of_inputs_serves_all_tasks(toy):
    diagnosis = merganser.diagnose(
        toy.base, toy.experts, toy.base, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, kind="fp32"
    )
    assert len(diagnosis.drift) == len(toy.heads)
    assert diagnosis.total("merged") > 0
