"""RI beyond the paper: overlapping heads, other distances and forms, a part of the network, low rank, a pull."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import merganser
from merganser.adapt import heads_digest
from merganser.errors import HeadError, SentenceError
from merganser.models.heads import Head
from merganser.steps.adapt.ri import ri
from merganser.steps.moving import chosen, low_rank
from merganser.steps.twins import DISTANCES, Twins, _matched, assigned, distance, overlapping

SHORT = {"steps": 40, "lr": 3e-3, "batch": 64, "_precision": "fp32"}


def adapted(toy, own="east", heads=None, **knobs):
    given = {**SHORT, **knobs}
    return ri(toy.experts[own], toy.base, heads or toy.heads, toy.inputs, own=own, encoder=toy.encoder, **given)


def drift(toy, weights, own="east"):
    """Return how far the other heads' outputs are from the base's, and the own head's from the expert's (KL)."""
    x = torch.cat([task.inputs for task in toy.tasks.values()])
    f, f0, fe = (torch.func.functional_call(toy.encoder, w, (x,)) for w in (weights, toy.base, toy.experts[own]))
    others = [h for n, h in toy.heads.items() if n != own]
    kept = distance("kl", toy.heads[own](fe), toy.heads[own](f)).mean()
    return torch.stack([distance("kl", h(f0), h(f)).mean() for h in others]).mean().item(), kept.item()


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_vanish_on_the_target_and_nowhere_near_it(kind):
    rng = torch.Generator().manual_seed(0)
    target, other = torch.randn(2, 30, 5, generator=rng)
    if kind != "ce":  # the entropy of a point is zero, but q is no point
        assert distance(kind, target, target).abs().max() < 1e-6
    assert (distance(kind, target, other) >= -1e-7).all()
    shifted = distance(kind, target, other + 3)
    if kind not in ("mse", "cosine"):
        assert torch.allclose(shifted, distance(kind, target, other), atol=1e-5), "a softmax does not see a shift"
    small = target + 1e-3 * (other - target)
    small.requires_grad_(True)
    distance(kind, target, small).sum().backward()
    assert small.grad.isfinite().all()


def test_divergences_are_those_of_the_library():
    p, q = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert torch.allclose(distance("kl", p, q), kl)
    assert torch.allclose(distance("reverse", p, q), distance("kl", q, p))
    mean = torch.log((log_p.exp() + log_q.exp()) / 2)
    js = 0.5 * sum(F.kl_div(mean, one, log_target=True, reduction="none").sum(1) for one in (log_p, log_q))
    assert torch.allclose(distance("js", p, q), js, atol=1e-6)
    assert distance("js", p, q).max() <= torch.log(torch.tensor(2.0))


@pytest.mark.parametrize(
    "knobs",
    [
        {"distance": "reverse"},
        {"distance": "js"},
        {"distance": "cosine", "alpha": 3.0},
        {"temperature": 2.0},
        {"form": "rows", "alpha": 0.1},
        {"form": "features", "alpha": 0.1},
        {"sample": 1},
        {"only": "3.*, 2.*"},
        {"rank": 4},
    ],
    ids=str,
)
def test_every_form_quiets_the_expert_under_other_heads_and_keeps_its_own(toy, knobs):
    before, _ = drift(toy, toy.experts["east"])
    after, kept = drift(toy, adapted(toy, **knobs))
    assert after < 0.6 * before
    assert kept < before


def test_only_trains_what_it_names(toy):
    out = adapted(toy, only="3.*")
    moved = {n for n in out if not torch.equal(out[n], toy.experts["east"][n])}
    assert moved == {"3.weight", "3.bias"}
    with pytest.raises(ValueError, match="takes none of the"):
        adapted(toy, only="nowhere.*")


def test_a_low_rank_change_has_that_rank_and_starts_at_the_expert(toy):
    expert = toy.experts["east"]
    moving = low_rank(expert, list(expert), 3)
    start = moving.weights(moving.params)
    assert all(torch.equal(start[n], expert[n]) for n in expert)
    assert moving.pull(moving.params, expert) == 0
    out = adapted(toy, rank=3)
    for name in ("0.weight", "3.weight"):
        s = torch.linalg.svdvals(out[name] - expert[name])
        assert s[2] > 1e-4
        assert s[3] < 1e-5 * s[0]
    assert not torch.equal(out["0.bias"], expert["0.bias"]), "what is no matrix is trained whole"


def test_matrices_that_lie_the_other_way_have_their_random_factor_on_the_inputs_side():
    start = {"w": torch.randn(6, 9)}  # [in, out]
    low = low_rank(start, ["w"], 2, turned=True).low["w"]
    straight = low_rank({"w": start["w"].mT}, ["w"], 2).low["w"]
    assert torch.equal(low.left, straight.right.mT)
    assert torch.equal(low.right, torch.zeros(2, 9))
    assert torch.equal(low.made(low.left, low.right), start["w"])


def test_a_pull_keeps_the_weights_nearer_to_the_expert(toy):
    far, near = (
        sum((adapted(toy, pull=pull)[n] - toy.experts["east"][n]).square().sum() for n in toy.base) for pull in (0, 30)
    )
    assert near < 0.5 * far


def test_heads_that_are_drawn_give_the_mean_over_all_on_average(toy):
    at = torch.arange(64)
    x0 = torch.func.functional_call(toy.encoder, toy.base, (toy.inputs,))
    x = torch.func.functional_call(toy.encoder, toy.experts["east"], (toy.inputs,))
    values = {}
    for sample in (0, 1):
        twins = Twins(toy.heads, "east", sample=sample)
        twins.remember(torch.arange(len(toy.inputs)), len(toy.inputs), x0, x)
        rows = [at] if not sample else [at + k for k in range(600)]
        values[sample] = torch.stack([twins(r, x[at])[1]["others"] for r in rows]) if sample else None
        if not sample:
            each = twins._distances(twins.targets(at), twins.stacked(x[at]))
            whole = twins(at, x[at])[1]["others"]
            assert torch.allclose(whole, torch.stack([each[k].mean() for k in twins.others]).mean())
    chosen_heads = [tuple(twins._chosen(at + k)) for k in range(600)]
    counts = torch.tensor([[head in one for head in twins.others] for one in chosen_heads]).float().mean(0)
    assert torch.allclose(counts, torch.full((3,), 1 / 3), atol=0.08), "each as often"


def test_classes_that_two_heads_share_are_found_whatever_their_order():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 16, generator=rng)
    template = 5 * torch.randn(16, generator=rng)  # all prompts say "a photo of"
    heads = {
        "a": Head(rows[:4] + template),
        "b": Head(rows[[5, 2, 0]] * 1.0 + template),
        "c": Head(rows[[4, 5]] + template),
    }
    found = overlapping(heads, "a", 0.95)
    assert set(found) == {"b"}
    same, pairs = found["b"]
    assert same.tolist() == [False, True, True]
    assert sorted((i, j) for i, j, _ in pairs) == [(0, 2), (2, 1)]
    assert overlapping(heads, "a", 1.5) == {}


def test_a_head_that_is_the_own_one_again_asks_for_nothing(toy):
    """With the very same head twice, the paper's two terms contradict each other: the mask takes the second away."""
    twice = {**toy.heads, "again": toy.heads["east"]}
    masked, plain = adapted(toy, heads=twice), adapted(toy, heads=twice, overlap=2.0)
    _, kept = drift(toy, masked)
    _, torn = drift(toy, plain)
    assert kept < 0.5 * torn, "unmasked, the own outputs are drawn back to the base's"


def test_the_card_says_which_classes_were_left_out(toy, tmp_path):
    from merganser.card import read_card

    experts = {"east": toy.experts["east"], "again": toy.experts["east"]}
    heads = {"east": toy.heads["east"], "again": toy.heads["east"]}
    merganser.adapt(
        toy.base, experts, encoder=toy.encoder, heads=heads, inputs=toy.inputs, how="ri(steps=2)",
        into=tmp_path, kind="fp32",
    )  # fmt: skip
    told = read_card(tmp_path / "east")["overlap"]
    assert [pair[:2] for pair in told["again"]] == [[k, k] for k in range(4)]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("ri(temperature=0)", "temperature must be positive"),
        ("ri(form='all')", "form must be one of heads, rows, features"),
        ("ri(rank=-1)", "rank must not be negative"),
        ("ri(rank='all')", 'rank must be "own" or a whole number'),
        ("ri(overlap=0)", "overlap must be positive"),
    ],
)
def test_knobs_out_of_range_are_told_before_work(toy, how, says):
    with pytest.raises(SentenceError, match=says):
        merganser.adapt(toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=how)


def test_patterns_may_be_several():
    assert chosen(["a.x", "a.y", "b.x"], "a.*, *.x") == ["a.x", "a.y", "b.x"]
    assert chosen([], "z") == []


@pytest.mark.parametrize("how", ["ri", "distac"])
def test_a_batch_in_small_parts_is_the_same_step(toy, how):
    """Gradients add up to the batch's: weights differ by rounding alone, and not with the size of the parts."""
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return toy.heads["east"](x)

    def adapted(micro):
        step = f"{how}(steps=6, lr=0.003, batch=48, held_out=0.0, micro={micro})"
        one = {"east": toy.experts["east"]}
        heads = {**toy.heads, "east": counted}
        return merganser.adapt(
            toy.base, one, encoder=toy.encoder, heads=heads, inputs=toy.inputs, how=step, kind="fp32"
        )

    whole = adapted(0)["east"]
    assert 48 in sizes
    sizes.clear()
    parts = adapted(20)["east"]
    assert 48 not in sizes
    assert {20, 8} <= set(sizes)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=2e-6)


def test_guard_is_the_change_seen_from_the_own_tasks_directions_and_holds_it_back(toy):
    from merganser.steps.guard import Guard

    expert, names = toy.experts["east"], list(toy.base)
    guard = Guard(expert, toy.base, names)
    assert guard(expert) == 0
    matrices = [n for n in names if toy.base[n].ndim == 2]
    tau = {n: (expert[n] - toy.base[n]).double() for n in matrices}
    rng = torch.Generator().manual_seed(0)
    change = {n: torch.randn(t.shape, generator=rng, dtype=torch.float64) for n, t in tau.items()}
    wanted = sum((change[n] @ t.T).square().sum() for n, t in tau.items()) / sum(
        (t @ t.T).square().sum() for t in tau.values()
    )  # 24 rows at most, so all directions count
    moved = {**expert, **{n: expert[n] + d.float() for n, d in change.items()}}
    assert float(guard(moved)) == pytest.approx(float(wanted), rel=1e-3)
    unseen = {n: d - d @ torch.linalg.pinv(t) @ t for (n, d), t in zip(change.items(), tau.values(), strict=True)}
    moved = {**expert, **{n: expert[n] + d.float() for n, d in unseen.items()}}
    assert float(guard(moved)) < 1e-6 * float(wanted)
    free, held = (adapted(toy, guard=by) for by in (0.0, 100.0))
    assert float(guard(held)) < 0.1 * float(guard(free))
    assert drift(toy, held)[1] < drift(toy, free)[1], "the own outputs are kept better"


def test_a_span_stands_for_the_other_heads(toy):
    """The rows of the other heads, given as a span by another basis, make the same loss and nearly the same expert."""
    own = toy.heads["east"]
    rows = torch.cat([h.weight - h.weight.mean(dim=0) for name, h in toy.heads.items() if name != "east"])
    mixed = torch.randn(len(rows), len(rows), generator=torch.Generator().manual_seed(2)) @ rows
    known = adapted(toy, form="rows", alpha=0.1)
    given = adapted(toy, heads={"east": own, "kept": merganser.Span(mixed)}, form="rows", alpha=0.1)
    for name, tensor in known.items():
        assert torch.allclose(given[name], tensor, atol=1e-4)
    before, _ = drift(toy, toy.experts["east"])
    nothing = adapted(toy, heads={"east": own}, form="rows", alpha=0.0)
    assert drift(toy, given)[0] < 0.6 * before
    assert drift(toy, nothing)[0] > 0.9 * before


def test_a_change_outside_a_span_costs_nothing():
    rows, width = 3, 8
    heads = {"own": Head(torch.randn(4, width), normalize=True), "kept": merganser.Span(torch.eye(width)[:rows])}
    base, at = torch.nn.functional.normalize(torch.randn(6, width), dim=1), torch.arange(6)
    twins = Twins(heads, "own", form="rows")
    twins.remember(at, 6, base, base)
    inside, outside = base.clone(), base.clone()
    inside[:, :rows] *= -1
    outside[:, rows:] *= -1  # the length stays, so that normalised features are these
    assert twins(at, outside)[1]["others"] < 1e-12
    assert twins(at, inside)[1]["others"] > 1e-3


def test_where_a_span_does_not_belong(toy):
    heads = {**toy.heads, "kept": merganser.Span(torch.eye(toy.heads["east"].width)[:2])}
    for form in ("heads", "features"):
        with pytest.raises(
            HeadError, match=f"'kept' is a span, which only ri.form='rows'. keeps; this is form='{form}'"
        ):
            adapted(toy, heads=heads, form=form)
    with pytest.raises(HeadError, match="a span is a matrix"):
        merganser.Span(torch.ones(3))
    plain = {name: Head(head.weight, head.bias, head.normalize) for name, head in heads.items()}
    assert heads_digest(heads) != heads_digest(plain)


@given(st.integers(1, 5), st.integers(0, 2), st.integers(0, 10_000))
def test_classes_are_matched_as_well_as_can_be(n, more, seed):
    """No other choice of one column for each row is worth more."""
    worth = np.random.default_rng(seed).uniform(-1, 1, (n, n + more)).round(seed % 3)  # equal ones too
    pairs = assigned(worth)
    assert [row for row, _ in pairs] == list(range(n))
    assert len({column for _, column in pairs}) == n
    best = max(sum(worth[range(n), list(p)]) for p in itertools.permutations(range(n + more), n))
    assert sum(worth[a, b] for a, b in pairs) == pytest.approx(best)


def test_pairs_are_those_of_the_largest_sum_not_the_largest_first():
    cos = torch.tensor([[0.99, 0.98, 0.0], [0.98, 0.1, 0.0]])
    assert [pair[:2] for pair in _matched(cos, 0.95)] == [(0, 1), (1, 0)], "greedily it would be the first alone"
    assert [pair[:2] for pair in _matched(cos.T, 0.95)] == [(0, 1), (1, 0)]
    assert _matched(cos, 0.995) == []
