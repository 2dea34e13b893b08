"""DisTaC: the task vector gets the wanted length, its own outputs come back, and confidence grows where asked."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import merganser
from merganser.errors import HeadError, SentenceError
from merganser.steps.adapt.distac import distac
from merganser.train import Plan

SHORT = {"steps": 60, "lr": 3e-3, "batch": 64, "pull": 1e-3, "_precision": "fp32"}


def run(toy, own="east", **knobs):
    return distac(toy.experts[own], toy.base, toy.heads, toy.inputs, own=own, encoder=toy.encoder, **{**SHORT, **knobs})


def length(toy, weights):
    return sum((weights[n] - toy.base[n]).square().sum() for n in toy.base).sqrt().item()


def outputs(toy, weights, own="east"):
    return toy.heads[own](functional_call(toy.encoder, dict(weights), (toy.tasks[own].inputs,)))


def kept(toy, weights, own="east"):
    target = outputs(toy, toy.experts[own], own)
    return F.kl_div(outputs(toy, weights, own).log_softmax(1), target.softmax(1), reduction="batchmean").item()


def shortened(toy, by, own="east"):
    return {n: toy.base[n] + by * (toy.experts[own][n] - toy.base[n]) for n in toy.base}


def test_first_step_is_the_papers_written_naively(toy):
    """One step from the start: the gradient is that of the scaled KL alone, the pull's being zero there."""
    knobs = {"by": 0.4, "temperature": 2.0, "sharper": 1.5, "lr": 1e-3, "batch": 2000, "held_out": 0.0}
    ours = run(toy, steps=1, **knobs)
    student = {n: t.clone().requires_grad_(True) for n, t in shortened(toy, 0.4).items()}
    with torch.no_grad():
        target = toy.heads["east"](functional_call(toy.encoder, toy.experts["east"], (toy.inputs,)))
    logits = toy.heads["east"](functional_call(toy.encoder, student, (toy.inputs,)))
    loss = F.kl_div((logits / 3).log_softmax(1), (target / 2).softmax(1), reduction="batchmean") * 2 * 3
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
    optimiser = torch.optim.AdamW(student.values(), lr=Plan(1, 1e-3).rate(0), weight_decay=0.0)
    optimiser.step()
    for name in student:
        torch.testing.assert_close(ours[name], student[name].detach(), rtol=1e-4, atol=1e-5)


def test_own_outputs_come_back_at_a_shorter_length(toy):
    start = shortened(toy, 0.4)
    adapted = run(toy, by=0.4)
    assert kept(toy, adapted) < 0.3 * kept(toy, start)
    assert length(toy, adapted) < 0.9 * length(toy, toy.experts["east"])


def test_a_stronger_pull_stays_nearer_to_the_start(toy):
    start = shortened(toy, 0.4)
    far = [
        sum((w[n] - start[n]).square().sum() for n in start).sqrt().item()
        for w in (run(toy, by=0.4, pull=p) for p in (0.0, 0.1, 10.0))
    ]
    assert far[0] > far[1] > far[2]


def test_sharper_makes_more_confident(toy):
    spread = [outputs(toy, run(toy, by=0.7, sharper=by)).log_softmax(1).amin(1).mean().item() for by in (0.5, 1.0, 2.0)]
    assert spread[0] > spread[1] + 0.3 > spread[2] + 0.6, "the least likely class gets less and less likely"


def test_in_a_sentence_before_ri_and_only_moved_tensors(toy):
    half = {**toy.experts["east"], "0.weight": toy.base["0.weight"]}
    out = distac(half, toy.base, toy.heads, toy.inputs, own="east", encoder=toy.encoder, **{**SHORT, "steps": 2})
    assert torch.equal(out["0.weight"], toy.base["0.weight"])
    how = "distac(steps=5, lr=0.003) | ri(steps=5, lr=0.003)"
    adapted = merganser.adapt(
        toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=how, kind="fp32"
    )
    assert set(adapted) == set(toy.experts)
    assert length(toy, adapted["east"]) < length(toy, toy.experts["east"])


def test_bad_knobs_and_heads_say_so(toy):
    with pytest.raises(HeadError, match="no head of that name"):
        distac(toy.experts["east"], toy.base, toy.heads, toy.inputs, own="nobody", encoder=toy.encoder)
    for knob in ("by=0", "temperature=0", "sharper=-1", "pull=-0.1", "held_out=1"):
        with pytest.raises(SentenceError, match=knob.split("=")[0]):
            merganser.adapt(
                toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=f"distac({knob})"
            )
