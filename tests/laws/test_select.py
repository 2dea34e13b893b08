"""Exact selection by histograms, and the steps that stand on it: trim, breadcrumbs, DARE, DELLA, ties, masks."""

import math
import sys
import warnings
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser import merge
from merganser.steps import select
from merganser.steps.combine.sce import sce
from merganser.steps.combine.ties import ties
from merganser.steps.combine.weighted import weighted
from merganser.steps.edit.breadcrumbs import breadcrumbs
from merganser.steps.edit.dare import dare
from merganser.steps.edit.della import della
from merganser.steps.edit.mask import mask
from merganser.steps.edit.trim import passes, trim

quick = settings(max_examples=100, deadline=None)
numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dice(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


def normal(seed: int, *shape: int) -> Tensor:
    return 0.01 * torch.randn(shape, generator=rng(seed))


def halved(seed: int, *shape: int) -> Tensor:
    """Deltas of bf16 weights: few distinct magnitudes."""
    base = torch.randn(shape, generator=rng(seed)).bfloat16()
    return (base.float() + 0.003 * torch.randn(shape, generator=rng(seed + 1))).bfloat16().float() - base.float()


@pytest.mark.parametrize("signed", [False, True])
@given(values=numbers, data=st.data())
@quick
def test_the_kth_largest_is_found_exactly_and_counted(signed: bool, values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    compared = x if signed else x.abs()
    ranks = data.draw(st.lists(st.integers(1, len(x)), min_size=1, max_size=3))
    cut = data.draw(st.integers(0, len(x)))
    parts = [x[None, :cut], x[None, cut:]]
    upper = reduce(add, [select.coarse(part, signed=signed) for part in parts])[0]
    bins = [select.places(upper, ranks)]
    lower = reduce(add, [select.fine(part, bins, signed=signed) for part in parts])[0]
    assert select.size(upper) == len(x)
    for k, (value, above, equals) in zip(ranks, select.ranked(upper, lower, ranks, signed=signed), strict=True):
        assert value == compared.sort(descending=True).values[k - 1]
        if signed and value == 0:
            continue  # -0 is ordered below 0
        assert (above, equals) == ((compared > value).sum(), (compared == value).sum())


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9, 1.0])
def test_keys_that_waited_are_all_counted(zeros: float) -> None:
    """Enough entries for a histogram to be counted in between, in pieces larger and smaller than one chunk.

    Of pieces that begin with many zeros the bins are counted by turns, of others they are not.
    """
    x = normal(0, 1, 3 * select.MANY // 2)
    x *= torch.rand(x.shape, generator=rng(1)) >= zeros
    x[:, : x.shape[1] // 2] += 0.01 * (zeros == 0.9)
    cuts = [*x.split(select.CHUNK + 5, dim=1)]
    assert torch.equal(
        reduce(add, [select.coarse(cut) for cut in cuts]).tensor(),
        torch.bincount(x[0].abs().view(torch.int32) >> 16, minlength=1 << 15)[None],
    )


@pytest.mark.parametrize("how", ["ties(density=0.3)", "trim(density=0.3) | average"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_model_is_looked_at_once_where_the_step_before_has_dropped_more(monkeypatch, how: str, scope: str) -> None:
    """The second look is known without looking: the threshold is zero, and what is left is kept, bit by bit."""
    looks = []
    fine = select.fine
    monkeypatch.setattr(select, "fine", lambda *args, **given: looks.append(1) or fine(*args, **given))
    base = {name: normal(9, 40, 50) for name in "ab"}
    experts = [{name: one + normal(k, 40, 50) for name, one in base.items()} for k in (1, 2)]
    scoped = how.replace("0.3", f'0.3, scope="{scope}"')
    sparse = merge(base, experts, f"dare(keep=0.1) | {scoped}")
    assert not looks
    untrimmed = merge(base, experts, f"dare(keep=0.1) | {how.replace('0.3', '1.0')}")
    assert all(torch.equal(sparse[name], untrimmed[name]) for name in base)
    merge(base, experts, f"dare(keep=0.9) | {scoped}")
    assert looks


@given(
    keep=st.lists(st.floats(0.02, 1.0), min_size=2, max_size=2),
    density=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32 - 1),
    rule=st.sampled_from(["exact", "reference"]),
    other=st.sampled_from([None, 0.05, 1.0]),
    half=st.booleans(),
)
@quick
def test_what_is_known_of_the_dice_alone_changes_no_bit(keep, density, seed, rule, other, half) -> None:
    """With experts' own shares, a pattern with another one, a tensor that nobody moved and one that one expert moved."""
    base = {name: normal(seed % 1000, 7, 90) for name in "abcd"}
    base = {name: one.bfloat16() if half else one for name, one in base.items()}
    experts = {
        e: {n: b + 0.01 * normal(seed % 999 + k, 7, 90).to(b) for n, b in base.items()} for k, e in enumerate("xy")
    }
    for e, n in ("xd", "yd", "yc"):
        experts[e][n] = base[n]
    how = f'dare(keep={dict(zip("xy", keep, strict=True))}) | ties(density={density}, rule="{rule}")'
    given_ = {"seed": seed, "where": {} if other is None else {"b": {"dare": {"keep": other}}}}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        quickly = merge(base, experts, how, **given_)
        patch.delattr(sys.modules[dare.__module__], "leaves")
        plainly = merge(base, experts, how, **given_)
    assert all(torch.equal(quickly[name], plainly[name]) for name in base)


@pytest.mark.parametrize(
    "how", ["ties(density=0.3)", "trim(density=0.3) | average", "scale(by=2.0) | trim(density=0.3) | ties"]
)
def test_the_dice_tell_that_nothing_will_be_trimmed(monkeypatch, how: str) -> None:
    """No delta is looked at where they leave fewer than are kept; nor are all thrown where few show that they leave more."""
    looks, counts = [], []
    coarse, leaves = select.coarse, sys.modules[dare.__module__].leaves
    monkeypatch.setattr(select, "coarse", lambda *args, **given: looks.append(1) or coarse(*args, **given))
    monkeypatch.setattr(
        sys.modules[dare.__module__], "leaves", lambda *args, **given: counts.append(1) or leaves(*args, **given)
    )
    base = {name: normal(9, 40, 50) for name in map(str, range(20))}
    experts = [{name: one + normal(k, 40, 50) for name, one in base.items()} for k in (1, 2)]
    merge(base, experts, f"dare(keep=0.1) | {how}")
    assert bool(looks) == how.startswith("scale"), "a step between tells nothing of what it leaves"
    assert bool(counts) != how.startswith("scale")
    looks.clear()
    counts.clear()
    merge(base, experts, f"dare(keep=0.9) | {how}")
    assert looks
    assert len(counts) < len(base)


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    keep=st.floats(0.02, 1.0),
)
@quick
def test_dare_leaves_what_it_says(seed: int, cuts: list[int], keep: float) -> None:
    leaves = sys.modules[dare.__module__].leaves
    first, second = dice(seed), dice(seed)
    delta = torch.ones(4 * sum(cuts))
    told = sum(leaves(4 * n, keep=keep, rng=first) for n in cuts)
    assert told == dare(delta, keep=keep, rng=second).count_nonzero()


def test_what_was_read_off_a_histogram_is_forgotten_when_it_changes() -> None:
    x = normal(0, 1, 1000)
    upper = select.coarse(x)[0].tensor()
    before = select.places(upper, [1])
    upper += select.coarse(100 * x)[0].tensor()
    assert select.size(upper) == 2000
    assert select.places(upper, [1]) > before


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 400), density=st.floats(0.01, 0.99), half=st.booleans())
@quick
def test_trim_keeps_the_share_or_all_equals(seed: int, size: int, density: float, half: bool) -> None:
    delta = (halved if half else normal)(seed, size)
    k = max(1, int(density * size))
    theta = delta.abs().sort(descending=True).values[k - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = trim(delta, density=density)
        first = trim(delta, density=density, scope="tensor", equal="first")
    assert torch.equal(kept, torch.where(delta.abs() >= theta, delta, 0))
    left = [i for i in range(size) if delta[i].abs() == theta][: k - int((delta.abs() > theta).sum())]
    expected = torch.where(delta.abs() > theta, delta, 0)
    expected[left] = delta[left]
    assert torch.equal(first, expected)
    assert torch.equal(ties(delta[None], density=density, scope="tensor", equal="first", merge="sum"), first)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_scope_of_trim_is_the_model_or_the_tensor(scope: str) -> None:
    base = {name: torch.zeros(4, 50) for name in ("small", "large")}
    experts = [{"small": normal(t, 4, 50), "large": 10 * normal(t + 9, 4, 50)} for t in range(2)]
    merged = merge(base, experts, f"trim(density=0.3, scope='{scope}') | task_arithmetic")
    for name in base:
        sizes = [expert[name].abs() for expert in experts]
        counted = [torch.cat([x.flatten() for x in e.values()]) if scope == "model" else e[name] for e in experts]
        limits = [c.abs().flatten().sort(descending=True).values[int(0.3 * c.numel()) - 1] for c in counted]
        kept = [expert[name] * (x >= limit) for expert, x, limit in zip(experts, sizes, limits, strict=True)]
        torch.testing.assert_close(merged[name], kept[0] + kept[1])


@pytest.mark.parametrize("equal", ["all", "first"])
@pytest.mark.parametrize("half", [False, True])
def test_a_rescaled_trim_keeps_the_length(equal: str, half: bool) -> None:
    delta = (halved if half else normal)(3, 60, 50)
    knobs = {"density": 0.3, "scope": "tensor", "equal": equal}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, longer = trim(delta, **knobs), trim(delta, **knobs, rescale="l1")
    torch.testing.assert_close(longer.abs().sum(), delta.abs().sum())
    torch.testing.assert_close(longer, plain * (delta.abs().sum() / plain.abs().sum()))


def test_a_share_that_equal_magnitudes_make_larger_is_told() -> None:
    delta = torch.tensor([1.0, -1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.0, 0.0])
    with pytest.warns(UserWarning, match=r"equal magnitudes.* 60.0% of them are kept instead of 40.0%"):
        assert (trim(delta, density=0.4) != 0).sum() == 6
    with pytest.warns(UserWarning, match=r"60.0% of them are kept instead of 40.0%"):
        ties(delta[None], density=0.4)
    with pytest.warns(UserWarning, match="a tensor keeps over a point more than its share; equal='first' keeps it"):
        trim(delta, density=0.4, scope="tensor")
    with pytest.warns(UserWarning, match="over a point"):
        sce(torch.stack([delta, -delta]), density=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trim(delta, density=0.6)
        trim(delta, density=0.9)  # entries that are zero may be counted, they are not kept
        trim(delta, density=0.4, scope="tensor", equal="first")


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 300), d=st.floats(0.01, 0.99), g=st.floats(0, 0.99))
@quick
def test_breadcrumbs_keep_what_follows_the_outliers(seed: int, size: int, d: float, g: float) -> None:
    delta = normal(seed, size)
    kept = max(1, int(d * size))
    dropped = min(int(g * size), size - kept)
    order = delta.abs().argsort(descending=True)[dropped : dropped + kept]
    expected = torch.zeros(size)
    expected[order] = delta[order]
    assert torch.equal(breadcrumbs(delta, density=d, gamma=g), expected)


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 50_000), max_size=4))
@settings(max_examples=20, deadline=None)
def test_dare_throws_the_same_dice_however_it_is_cut(seed: int, cuts: list[int]) -> None:
    delta, whole, pieces = normal(seed, 200_003), dice(seed), dice(seed)
    places = [0, *sorted(4 * cut for cut in cuts), 200_003]
    parts = [dare(delta[a:b], keep=0.3, rng=pieces) for a, b in pairwise(places)]
    assert torch.equal(torch.cat(parts), dare(delta, keep=0.3, rng=whole))


@pytest.mark.parametrize("keep", [0.001, 0.1, 1 / 3, 0.9])
def test_dare_keeps_its_share_in_every_place_of_a_word(keep: float) -> None:
    """Four entries share one random number: each keeps the share, and none knows of its neighbours."""
    kept = dare(torch.ones(1 << 22), keep=keep, rng=dice(0), rescale=False).reshape(-1, 4).double()
    n = len(kept)
    assert ((kept.mean(dim=0) - keep).abs() < 5 * (keep * (1 - keep) / n) ** 0.5).all()
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 5 / n**0.5
    followed = torch.stack([kept[:-1, 3], kept[1:, 0]])
    assert torch.corrcoef(followed)[0, 1].abs() < 5 / n**0.5


@pytest.mark.parametrize("step", [dare, della])
def test_random_steps_rescaled_by_l1_keep_the_length(step) -> None:
    delta = normal(0, 40, 50)
    kept = step(delta, rescale="l1", rng=dice(0))
    torch.testing.assert_close(kept.abs().sum(), delta.abs().sum())


@pytest.mark.parametrize("shape", [(30, 500), (2, 15, 500)])
def test_della_keeps_entries_by_their_rank_in_the_row(shape: tuple) -> None:
    """Over many seeds an entry is kept as often as its rank says, within five standard deviations, and 1/p the size."""
    delta = normal(0, *shape)
    rank = delta.abs().argsort(-1).argsort(-1)
    share = 0.2 + 0.6 * rank / 499
    runs = torch.stack([della(delta, density=0.5, epsilon=0.3, rng=dice(seed)) for seed in range(200)])
    deviation = (share * (1 - share) / 200).sqrt()
    off = ((runs != 0).float().mean(0) - share) / deviation
    assert off.abs().max() < 6
    assert abs(off.mean()) < 5 / math.sqrt(off.numel())
    torch.testing.assert_close(runs[0], torch.where(runs[0] != 0, delta / share, 0))


def test_della_takes_a_row_of_one_entry_and_a_vector_as_one_row() -> None:
    assert set(della(torch.ones(400, 1), density=0.5, rng=dice(0)).unique().tolist()) == {0.0, 2.0}
    vector = normal(1, 300)
    assert torch.equal(della(vector, rng=dice(0)), della(vector[None], rng=dice(0))[0])


def test_masks_and_coefficients_by_shape() -> None:
    deltas = normal(0, 3, 4, 5)
    assert torch.equal(mask(deltas[0], mask=None), deltas[0])
    assert torch.equal(mask(deltas[0], mask=deltas[0] > 0), deltas[0].clamp(min=0))
    torch.testing.assert_close(weighted(deltas, coefficients=None), 0.3 * deltas.sum(0))
    torch.testing.assert_close(weighted(deltas, coefficients=torch.tensor(2.0)), 2 * deltas.sum(0))
    c = torch.tensor([1.0, -1.0, 0.5], requires_grad=True)
    out = weighted(deltas, coefficients=c)
    torch.testing.assert_close(out, deltas[0] - deltas[1] + 0.5 * deltas[2])
    out.sum().backward()
    torch.testing.assert_close(c.grad, deltas.sum((1, 2)))
    each = normal(1, 3, 4, 5)
    torch.testing.assert_close(weighted(deltas, coefficients=each), (deltas * each).sum(0))


def test_an_expert_may_have_its_own_density() -> None:
    """The looks see all experts with a list of densities; then each expert is trimmed with its own."""
    deltas, shares = normal(0, 3, 1000), [0.1, 0.5, 1.0]
    totals = select.look_at(deltas, passes(density=shares))
    for t, share in enumerate(shares):
        kept = trim(deltas[t], density=share, survey=[total[t] for total in totals])
        assert (kept != 0).sum() == share * 1000
