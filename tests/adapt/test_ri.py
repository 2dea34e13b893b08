"""Resolving Interference: the loss equals the paper's written naively, resuming changes nothing, interference falls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import merganser
from merganser.errors import HeadError, SentenceError
from merganser.evaluate.run import Model
from merganser.models.heads import Head
from merganser.steps.adapt.ri import ri
from merganser.steps.student import Split
from merganser.train import Plan

HOW = "ri(steps=120, lr=0.003, batch=64)"


def naive_ri(toy, own, *, steps, lr, alpha, batch, weight_decay, ramp=0.0):
    """Algorithm 1 as written: three forward passes a step, a loop over the heads, KL by the library."""
    student = {n: t.clone().requires_grad_(True) for n, t in toy.experts[own].items()}
    optimiser = torch.optim.AdamW(student.values(), lr=lr, weight_decay=weight_decay)
    plan = Plan(steps, lr, weight_decay)
    order = Split(toy.inputs, steps, batch, 0.0, 0).order
    losses = []
    for step in range(steps):
        x = toy.inputs[order(step)]
        with torch.no_grad():
            f_base, f_expert = (
                functional_call(toy.encoder, toy.base, (x,)),
                functional_call(toy.encoder, toy.experts[own], (x,)),
            )
        f_student = functional_call(toy.encoder, student, (x,))

        def kl(head, target, f=f_student):
            return F.kl_div(head(f).log_softmax(1), head(target).softmax(1), reduction="batchmean")

        others = [kl(head, f_base) for name, head in toy.heads.items() if name != own]
        risen = min(1.0, (step + 1) / (ramp * steps)) if ramp else 1.0
        loss = kl(toy.heads[own], f_expert) + risen * alpha / len(others) * sum(others)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.values(), plan.clip)
        optimiser.step()
        losses.append(loss.item())
    return {n: t.detach() for n, t in student.items()}, losses


@pytest.mark.parametrize(("alpha", "ramp"), [(0.5, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.6)])
def test_equals_the_papers_algorithm_written_naively(toy, tmp_path, alpha, ramp):
    settings = {"steps": 12, "lr": 3e-3, "alpha": alpha, "batch": 50, "weight_decay": 1e-2, "ramp": ramp}
    theirs, losses = naive_ri(toy, "east", **settings)
    log = tmp_path / "log.jsonl"
    ours = ri(
        toy.experts["east"], toy.base, toy.heads, toy.inputs, own="east", encoder=toy.encoder,
        held_out=0.0, _precision="fp32", _log=log, **settings,
    )  # fmt: skip
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    logged = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert logged == pytest.approx(losses, rel=1e-3, abs=2e-6)


def test_first_loss_has_no_own_term(toy, tmp_path):
    ri(
        toy.experts["north"], toy.base, toy.heads, toy.inputs, own="north", encoder=toy.encoder,
        steps=1, lr=1e-3, held_out=0.1, _precision="fp32", _log=tmp_path / "log.jsonl",
    )  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["held_own"] == pytest.approx(0, abs=1e-6)
    assert first["held_others"] > 0.01


def test_only_moved_tensors_are_trained(toy):
    half = {**toy.experts["west"], "0.weight": toy.base["0.weight"]}
    out = ri(
        half, toy.base, toy.heads, toy.inputs, own="west", encoder=toy.encoder, steps=3, lr=1e-2, _precision="fp32"
    )
    assert torch.equal(out["0.weight"], toy.base["0.weight"])
    assert not torch.equal(out["3.weight"], half["3.weight"])
    assert set(out) == set(half)


@pytest.mark.parametrize("distance", ["kl", "ce", "mse"])
def test_every_distance_lowers_interference(toy, distance):
    adapted = merganser.adapt(
        toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs,
        how=f"ri(steps=80, lr=0.003, batch=64, distance='{distance}')", kind="fp32",
    )  # fmt: skip
    data = {n: t.inputs for n, t in toy.tasks.items()}
    how = "task_arithmetic"
    xi = []
    for experts in (toy.experts, adapted):
        merged = merganser.merge(toy.base, experts, how)
        found = merganser.diagnose(
            toy.base,
            experts,
            merged,
            encoder=toy.encoder,
            heads=toy.heads,
            inputs=data,
            reference=toy.experts,
            kind="fp32",
        )
        xi.append(found.total("merged"))
    assert xi[1] < 0.5 * xi[0]


def test_merging_gets_better_with_an_interval_above_zero(toy, adapted):
    for how in ("task_arithmetic | scale(by=0.6)", "ties"):
        scores = [
            merganser.evaluate(Model(toy.encoder, merganser.merge(toy.base, e, how), toy.heads, "fp32"), toy.tasks)
            for e in (toy.experts, adapted)
        ]
        gain, low, high = scores[1].gain(scores[0])
        assert low > 0, (how, gain, low, high)
        assert low < gain < high


@pytest.fixture(scope="module")
def adapted(toy):
    return merganser.adapt(
        toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=HOW, kind="fp32"
    )


def test_same_seed_same_bytes_and_another_seed_others(toy, adapted):
    def again(seed):
        return merganser.adapt(
            toy.base, {"north": toy.experts["north"]}, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs,
            how=HOW, kind="fp32", seed=seed,
        )["north"]  # fmt: skip

    assert all(torch.equal(again(0)[n], adapted["north"][n]) for n in toy.base)
    assert any(not torch.equal(again(1)[n], adapted["north"][n]) for n in toy.base)


def test_cut_at_any_checkpoint_and_resumed_gives_the_same_bytes(toy, tmp_path, adapted):
    from merganser.train import Checkpoint

    class Stop(Exception):
        pass

    def cut(after):
        seen = 0

        def tick(advance=1, **_terms):
            nonlocal seen
            seen += advance
            if seen >= after:
                raise Stop

        return tick

    class Eager(Checkpoint):
        def due(self):
            return True

    settings = {"own": "north", "encoder": toy.encoder, "steps": 120, "lr": 0.003, "batch": 64, "_precision": "fp32"}
    file = tmp_path / "checkpoint.safetensors"
    for after in (1, 30, 77, 119):
        with pytest.raises(Stop):
            ri(
                toy.experts["north"],
                toy.base,
                toy.heads,
                toy.inputs,
                **settings,
                _checkpoint=Eager(file, "k"),
                _tick=cut(after),
            )
        assert after == 1 or file.exists()
    out = ri(toy.experts["north"], toy.base, toy.heads, toy.inputs, **settings, _checkpoint=Eager(file, "k"))
    assert all(torch.equal(out[n], adapted["north"][n]) for n in out)


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
import conftest, merganser.train, merganser
merganser.train.Checkpoint.every = 0.0
torch.set_num_threads(1)
toy = conftest.toy._get_wrapped_function()()
merganser.train.Checkpoint.due = lambda self: True
merganser.adapt(toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how={how!r},
                kind="fp32", into={into!r})
"""


@pytest.mark.slow
def test_killed_for_real_and_run_again_gives_the_same_bytes(toy, tmp_path, adapted):
    into = tmp_path / "adapted"
    code = KILLED.format(tests=str(Path(__file__).parent.parent), how=HOW, into=str(into))
    first = subprocess.Popen([sys.executable, "-c", code])
    while not list(into.glob("*/checkpoint-0.safetensors")):
        assert first.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (into / "west" / "card.json").exists()
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in toy.experts:
        stored = merganser.open_weights(into / name)
        assert all(torch.equal(stored[n], adapted[name][n]) for n in toy.base)
    assert not list(into.glob("*/checkpoint-*"))


def test_a_second_run_reads_back_what_is_done(toy, tmp_path, adapted):
    def again(how):
        return merganser.adapt(
            toy.base,
            toy.experts,
            encoder=toy.encoder,
            heads=toy.heads,
            inputs=toy.inputs,
            how=how,
            kind="fp32",
            into=tmp_path,
        )

    again(HOW)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/model.safetensors")}
    stored = again(HOW)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/model.safetensors")} == written
    assert all(torch.equal(stored["east"][n], adapted["east"][n]) for n in toy.base)
    again("ri(steps=5)")
    assert all(p.stat().st_mtime_ns != t for p, t in written.items())


def test_early_stop_returns_the_best_on_held_out(toy, tmp_path):
    log = tmp_path / "log.jsonl"
    ri(
        toy.experts["north"], toy.base, toy.heads, toy.inputs[:80], own="north", encoder=toy.encoder, steps=400, lr=0.3,
        held_out=0.5, patience=1, _precision="fp32", _log=log,
    )  # fmt: skip
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert max(line["step"] for line in lines) < 400


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("ri(steps=0)", "steps must be positive"),
        ("ri(stesp=5)", "did you mean 'steps'"),
        ("ri(distance='kullback')", "kl, reverse, js, ce"),
        ("ri(alpha=-1)", "alpha must not be negative"),
        ("ri(ramp=1.5)", "ramp is a share"),
        ("ties", "adapt() takes adapt steps"),
        ("ir", "did you mean 'ri'"),
    ],
)
def test_bad_words_are_told_before_work(toy, how, says):
    with pytest.raises(SentenceError, match=says.replace("(", r"\(").replace(")", r"\)")):
        merganser.adapt(toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=how)


def test_heads_that_do_not_fit_are_told_before_work(toy):
    def adapt(heads):
        merganser.adapt(toy.base, toy.experts, encoder=toy.encoder, heads=heads, inputs=toy.inputs)

    with pytest.raises(HeadError, match="head 'north' takes features of width 5, the encoder gives 16"):
        adapt({**toy.heads, "north": Head(torch.zeros(3, 5))})
    with pytest.raises(HeadError, match="expert 'north' has no head of that name"):
        adapt({n: h for n, h in toy.heads.items() if n != "north"})
    with pytest.raises(HeadError, match="head 'north' does not take"):
        adapt({**toy.heads, "north": lambda x: x @ torch.zeros(4, 4)})


def test_heads_may_be_any_function(toy):
    class Wrapped:
        def __init__(self, head):
            self.head = head

        def __call__(self, x):
            return self.head(x)

    settings = {"own": "east", "encoder": toy.encoder, "steps": 5, "lr": 1e-3, "_precision": "fp32"}
    plain = ri(toy.experts["east"], toy.base, toy.heads, toy.inputs, **settings)
    loops = ri(toy.experts["east"], toy.base, {n: Wrapped(h) for n, h in toy.heads.items()}, toy.inputs, **settings)
    for name in plain:
        torch.testing.assert_close(plain[name], loops[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("losses", "checks", "best"),
    [
        ([1.0, 1.3, 1.2, 1.1, 1.05, 0.9], 6, 5),  # what a full rate loses at first, its fall wins back
        ([1.0, 1.3, 1.4, 1.4, 1.4, 0.9], 5, 0),  # three without a new lowest since the first step
        ([1.0, 0.9, 0.95, 0.8, 0.85, 0.7], 6, 5),
    ],
)
def test_the_start_is_no_mark_to_stop_by(losses, checks, best):
    from merganser.train import train

    told = iter(losses)
    weight = {"w": torch.zeros(())}
    plan = Plan(5, 1.0, schedule="constant", checks=5, patience=3)
    out, history = train(
        weight, lambda _at: (weight["w"].square() + weight["w"], {}), lambda _step: torch.arange(1), plan,
        held_out=lambda: {"loss": next(told)},
    )  # fmt: skip
    seen = [line for line in history if "held_out" in line]
    assert [line["held_out"] for line in seen] == losses[:checks]
    assert bool(out["w"] == 0) == (best == 0), "the best weights are returned, be they the start's"
