"""Distilling a merged model: the formula written naively, what it brings, and going on where it stopped."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import merganser
from merganser.errors import HeadError
from merganser.evaluate.run import Model, evaluate
from merganser.learn.distil import distil
from merganser.steps.student import Split
from merganser.train import Checkpoint, Plan

SHORT = {"steps": 12, "lr": 3e-3, "batch": 50, "weight_decay": 1e-2, "kind": "fp32"}


def distilled(toy, model, **more):
    return distil(
        model, toy.experts, toy.base, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, **{**SHORT, **more}
    )


@pytest.fixture(scope="module")
def merged(toy):
    return merganser.merge(toy.base, toy.experts, "task_arithmetic | scale(by=0.3)")


def test_equals_the_formula_written_naively(toy, merged):
    student = {n: t.clone().requires_grad_(True) for n, t in merged.items()}
    optimiser = torch.optim.AdamW(student.values(), lr=SHORT["lr"], weight_decay=SHORT["weight_decay"])
    plan, order = Plan(SHORT["steps"], SHORT["lr"]), Split(toy.inputs, SHORT["steps"], SHORT["batch"], 0.0, 0).order
    for step in range(SHORT["steps"]):
        x = toy.inputs[order(step)]
        said = functional_call(toy.encoder, student, (x,))
        loss = 0.0
        for name, expert in toy.experts.items():
            with torch.no_grad():
                wanted = toy.heads[name](functional_call(toy.encoder, expert, (x,))).softmax(1)
            kl = F.kl_div(toy.heads[name](said).log_softmax(1), wanted, reduction="batchmean")
            loss = loss + kl / len(toy.experts)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
        optimiser.step()
    ours = distilled(toy, merged, held_out=0.0)
    for name, tensor in student.items():
        torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-4, atol=1e-6)


def test_it_brings_back_what_merging_lost(toy, merged):
    def score(weights):
        return evaluate(Model(toy.encoder, weights, toy.heads, "fp32"), toy.tasks).mean

    own = sum(
        evaluate(Model(toy.encoder, w, toy.heads, "fp32"), {n: toy.tasks[n]}).mean for n, w in toy.experts.items()
    ) / len(toy.experts)
    before, after = score(merged), score(distilled(toy, merged, steps=150))
    assert after - before > 0.3 * (own - before) > 0


def test_what_no_expert_moved_stays_and_names_and_dtypes_are_the_models(toy, merged):
    same = {n: {**w, "0.weight": toy.base["0.weight"]} for n, w in toy.experts.items()}
    model = {**merged, "0.weight": toy.base["0.weight"], "2.bias": merged["2.bias"].half()}
    made = distil(
        model, same, toy.base, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, **{**SHORT, "steps": 3}
    )
    assert torch.equal(made["0.weight"], toy.base["0.weight"])
    assert not torch.equal(made["3.weight"], merged["3.weight"])
    assert {n: t.dtype for n, t in made.items()} == {n: t.dtype for n, t in model.items()}


def test_interrupted_it_ends_in_the_same_bytes(toy, merged, tmp_path):
    whole = distilled(toy, merged)

    class Stopped(Checkpoint):
        def write(self, *given):
            super().write(*given)
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            distilled(toy, merged, checkpoint=Stopped(tmp_path / "c.safetensors", "key", every=0.0))
    found = distilled(toy, merged, checkpoint=Checkpoint(tmp_path / "c.safetensors", "key"))
    assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_knobs_out_of_range_and_heads_that_lack(toy, merged):
    for wrong, said in (({"steps": 0}, "steps must be positive"), ({"held_out": 1.0}, "held_out must lie")):
        with pytest.raises(ValueError, match=said):
            distilled(toy, merged, **wrong)
    with pytest.raises(HeadError, match="expert 'north' has no head"):
        distil(merged, toy.experts, toy.base, encoder=toy.encoder, heads={}, inputs=toy.inputs)
