"""Co-adapting: the loss is the written one, experts see each other as they are at their turn, interference falls further."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import merganser
from merganser.adapt import stages
from merganser.card import read_card
from merganser.errors import HeadError, SentenceError
from merganser.sentence import parse_words
from merganser.steps.adapt.coadapt import coadapt
from merganser.steps.student import Split
from merganser.train import Plan

FIXED = {"steps": 10, "lr": 3e-3, "batch": 50, "weight_decay": 1e-2, "low": 0.7, "high": 0.7, "held_out": 0.0}
SENTENCE = f"coadapt({', '.join(f'{k}={v}' for k, v in FIXED.items())})"


def adapt(toy, how, experts=None, **more):
    given = {"encoder": toy.encoder, "heads": toy.heads, "inputs": toy.inputs, "kind": "fp32", **more}
    return merganser.adapt(toy.base, experts or toy.experts, how=how, **given)


def naive(toy, now, own, alpha=1.0):
    """The formula as written: all experts' targets anew at every step, the merge built from scratch, KL by the library."""
    student = {n: t.clone().requires_grad_(True) for n, t in now[own].items()}
    optimiser = torch.optim.AdamW(student.values(), lr=FIXED["lr"], weight_decay=FIXED["weight_decay"])
    plan = Plan(FIXED["steps"], FIXED["lr"], FIXED["weight_decay"])
    order = Split(toy.inputs, FIXED["steps"], FIXED["batch"], 0.0, 0).order
    for step in range(FIXED["steps"]):
        x = toy.inputs[order(step)]
        with torch.no_grad():
            wanted = {n: toy.heads[n](functional_call(toy.encoder, w, (x,))) for n, w in toy.experts.items()}
        everyone = {**now, own: student}
        merged = {n: t + 0.7 * sum(w[n] - t for w in everyone.values()) for n, t in toy.base.items()}
        said = functional_call(toy.encoder, merged, (x,))
        kl = {
            n: F.kl_div(toy.heads[n](said).log_softmax(1), t.softmax(1), reduction="batchmean")
            for n, t in wanted.items()
        }
        loss = kl[own] + alpha / (len(kl) - 1) * sum(v for n, v in kl.items() if n != own)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.values(), plan.clip)
        optimiser.step()
    return {n: t.detach() for n, t in student.items()}


def test_equals_the_formula_written_naively_one_expert_after_another(toy):
    now = dict(toy.experts)
    for name in toy.experts:  # each among those before it as they are now and those behind it as they were
        now[name] = naive(toy, now, name)
    ours = adapt(toy, SENTENCE)
    for name, tensors in now.items():
        for n, tensor in tensors.items():
            torch.testing.assert_close(ours[name][n], tensor, rtol=1e-4, atol=1e-6)


def test_interference_of_a_merge_falls_below_that_behind_ri_at_equal_steps(toy):
    data = {n: t.inputs for n, t in toy.tasks.items()}
    xi = {}
    for how in ("ri(steps=160, lr=0.003, batch=64)",
                "ri(steps=80, lr=0.003, batch=64) | coadapt(steps=80, lr=0.003, batch=64, low=0.6, high=0.9)"):  # fmt: skip
        experts = adapt(toy, how)
        for merger in ("task_arithmetic | scale(by=0.7)", "ties | scale(by=2)"):
            merged = merganser.merge(toy.base, experts, merger)
            how = {"encoder": toy.encoder, "heads": toy.heads, "reference": toy.experts, "kind": "fp32"}
            found = merganser.diagnose(toy.base, experts, merged, inputs=data, **how)
            xi.setdefault(merger, []).append(found.total("merged"))
    for merger, (alone, together) in xi.items():
        assert together < 0.9 * alone, (merger, xi)


def test_batches_are_merged_at_scales_that_only_seed_and_batch_decide(toy):
    from merganser.steps.rank import Ranked
    from merganser.steps.together import Inside

    trained = Ranked(toy.experts["east"], list(toy.base), 0, 0)
    given = (toy.experts["east"], toy.base, {}, toy.encoder, toy.inputs, trained, "fp32", (0.3, 0.9))
    one, again, other = Inside(*given, 0), Inside(*given, 0), Inside(*given, 1)
    batches = torch.arange(400).split(8)
    scales = [one.scale(at) for at in batches]
    assert scales == [again.scale(at) for at in batches] != [other.scale(at) for at in batches]
    assert 0.3 <= min(scales) < 0.4 < 0.8 < max(scales) <= 0.9


def test_what_others_moved_counts_and_only_what_the_own_moved_is_trained(toy):
    half = {**toy.experts["west"], "0.weight": toy.base["0.weight"]}
    rest = {n: w for n, w in toy.experts.items() if n != "west"}
    how = {"own": "west", "encoder": toy.encoder, "others": rest, "_precision": "fp32", **FIXED}
    out = coadapt(half, toy.base, toy.heads, toy.inputs, **how)
    assert torch.equal(out["0.weight"], toy.base["0.weight"])
    assert not torch.equal(out["3.weight"], half["3.weight"])
    still = {n: {**w, "0.weight": toy.base["0.weight"]} for n, w in rest.items()}
    elsewhere = coadapt(
        half, toy.base, toy.heads, toy.inputs, **{**how, "others": still, "_originals": {"west": half, **rest}}
    )
    assert not torch.equal(out["3.weight"], elsewhere["3.weight"])


def inside(toy, merger, **knobs):
    """Return a student of "east" inside merges of all experts at scale 0.7."""
    from merganser.steps.rank import Ranked
    from merganser.steps.together import Inside

    own = toy.experts["east"]
    others = {n: w for n, w in toy.experts.items() if n != "east"}
    trained = Ranked(own, list(toy.base), 0, 0, base=toy.base, experts=len(toy.experts), **knobs)
    return Inside(own, toy.base, others, toy.encoder, toy.inputs, trained, "fp32", (0.7, 0.7), 0, merger)


def merged_output(toy, merger, own, at):
    merged = merganser.merge(toy.base, {**toy.experts, "east": own}, f"{merger} | scale(by=0.7)")
    return functional_call(toy.encoder, merged, (toy.inputs[at],))


@pytest.mark.parametrize("merger", ["task_arithmetic", "average", "tsv", "ties(density=0.5)", "iso_c"])
def test_another_merger_is_what_the_student_begins_in(toy, merger):
    own, at = dict(toy.experts["east"]), torch.arange(8)
    student = inside(toy, merger)
    torch.testing.assert_close(student(at), merged_output(toy, merger, own, at))
    if merger.startswith("ties"):
        return  # of a vector only some entries arrive, their share stands for all
    with torch.no_grad():  # a longer vector of a tensor that is averaged or summed: exactly what the merge makes of it
        own["3.bias"] = own["3.bias"] + 2 * (own["3.bias"] - toy.base["3.bias"])
        student.moving.params["3.bias"].copy_(own["3.bias"])
    torch.testing.assert_close(student(at), merged_output(toy, merger, own, at))


def test_a_refreshed_student_is_in_the_merge_of_what_it_has_become(toy):
    student, at = inside(toy, "tsv"), torch.arange(8)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in student.moving.params.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=rng)
    wanted = merged_output(toy, "tsv", dict(student.moving.params), at)
    before = (student(at) - wanted).norm()
    student.refresh()
    torch.testing.assert_close(student(at), wanted)
    assert before > 1e-3, "nothing to refresh"


def test_within_the_rank_that_tsv_keeps_nothing_is_cut_off(toy):
    adapted = adapt(toy, "ri(steps=5, lr=0.003, batch=50, within='tsv')")
    given = {"steps": 5, "lr": 3e-3, "batch": 50, "within": "'tsv'", "merger": "'tsv'", "refresh": 2}
    both = adapt(toy, f"coadapt({', '.join(f'{k}={v}' for k, v in given.items())})", adapted)
    matrices = [n for n, t in toy.base.items() if t.ndim == 2]
    for name in toy.experts:
        for n in matrices:
            k = max(1, min(toy.base[n].shape) // len(toy.experts))
            for delta in (adapted[name][n] - toy.base[n], both[name][n] - toy.base[n]):
                s = torch.linalg.svdvals(delta)
                assert s[k:].max() < 1e-5 * s[0] < s[k - 1], (name, n)
    start = inside(toy, "tsv", within="tsv").moving
    made = start.weights(start.params)
    u, s, v = torch.linalg.svd(toy.experts["east"][matrices[0]] - toy.base[matrices[0]])
    k = max(1, len(s) // len(toy.experts))
    torch.testing.assert_close(
        made[matrices[0]], toy.base[matrices[0]] + u[:, :k] * s[:k] @ v[:k], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("more", ["", ", merger='tsv', refresh=3"])
def test_interrupted_at_any_expert_it_ends_in_the_same_bytes(toy, tmp_path, monkeypatch, more):
    monkeypatch.setattr("merganser.train.Checkpoint.due", lambda self: True)  # so that it goes on, not anew
    how = f"ri(steps=5, lr=0.003) | {SENTENCE[:-1]}{more})"
    whole = adapt(toy, how)
    names = list(toy.experts)

    class Stop(Exception):
        pass

    def until(word):
        from contextlib import contextmanager

        @contextmanager
        def progress(said, total):
            ticks = []

            def tick(advance=1, **terms):
                ticks.append(advance)
                if said == word and sum(ticks) >= 4:
                    raise Stop

            yield tick

        return progress

    for name in names[1:3]:
        with pytest.raises(Stop):
            adapt(toy, how, into=tmp_path / "out", progress=until(f"coadapt {name}"))
    found = adapt(toy, how, into=tmp_path / "out")
    for name in names:
        for n in whole[name]:
            assert torch.equal(found[name][n], whole[name][n]), (name, n)
        assert read_card(tmp_path / "out" / name)["sentence"].startswith("ri(")
        assert read_card(tmp_path / "out" / ".ri-steps-5-lr-0.003" / name)["sentence"] == "ri(steps=5, lr=0.003)"
    before = {name: read_card(tmp_path / "out" / name) for name in names}
    adapt(toy, how, into=tmp_path / "out")
    assert before == {name: read_card(tmp_path / "out" / name) for name in names}
    fewer = {n: w for n, w in toy.experts.items() if n != names[-1]}
    adapt(toy, how, fewer, into=tmp_path / "out")  # another company: nothing of the old one is taken for done
    assert before[names[0]]["key"] != read_card(tmp_path / "out" / names[0])["key"]


def test_steps_are_grouped_at_those_that_see_all_experts():
    steps = parse_words("distac | ri | coadapt | coadapt(steps=5) | ri(steps=2)")
    told = [([s.name for s in part], len(before)) for part, before in stages(steps)]
    assert told == [(["distac", "ri"], 0), (["coadapt"], 2), (["coadapt"], 3), (["ri"], 4)]


def test_bad_input_is_one_clear_error(toy):
    others = {n: w for n, w in toy.experts.items() if n != "east"}
    given = {"encoder": toy.encoder, "others": others}
    with pytest.raises(HeadError, match="'nobody' has no head"):
        coadapt(toy.experts["east"], toy.base, toy.heads, toy.inputs, own="nobody", **given)
    for knob in (
        "low=0",
        "low=0.9, high=0.5",
        "steps=0",
        "alpha=-1",
        "distance='far'",
        "rank='thin'",
        "held_out=1",
        "merger='ri | ties'",
        "refresh=-1",
        "within='ties'",
        "within=4, rank=2",
        "guard=-1",
    ):
        with pytest.raises(SentenceError, match=knob.split("=")[0].split(",")[0]):
            adapt(toy, f"coadapt({knob})")
