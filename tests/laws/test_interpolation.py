"""What the interpolating, counting and input-weighted steps must do beyond the laws of every step."""

import importlib
import inspect
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.steps.combine.arcee_fusion import arcee_fusion
from merganser.steps.combine.emr import emr
from merganser.steps.combine.fisher import fisher
from merganser.steps.combine.karcher import karcher
from merganser.steps.combine.magmax import magmax
from merganser.steps.combine.model_stock import model_stock
from merganser.steps.combine.multislerp import multislerp
from merganser.steps.combine.nearswap import nearswap
from merganser.steps.combine.nuslerp import nuslerp
from merganser.steps.combine.ram import ram
from merganser.steps.combine.regmean import regmean
from merganser.steps.combine.slerp import slerp
from merganser.steps.inner import gram, of_weights

fast = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def told(value: Any) -> str:
    """Name a parameter the same in every process of the test run."""
    return getattr(value, "__name__", str(value))


def module_of(step: Any) -> Any:
    return importlib.import_module(step.__module__)


def streamed(step: Any, deltas: Tensor, base: Tensor, cuts: list[int], **knobs: Any) -> Tensor:
    """Survey and merge a flat tensor cut by cut, as the loop does."""
    pieces = list(zip(deltas.split(cuts, dim=1), base.split(cuts), strict=True))

    survey: list[Tensor] = []
    for look in module_of(step).passes(**knobs):
        seen = [look(d, survey, **_asked(look, base=b, numel=base.numel())) for d, b in pieces]
        survey.append(reduce(add, seen))
    given_ = [_asked(step, base=b, numel=base.numel(), survey=survey) for _, b in pieces]
    return torch.cat([step(d, **knobs, **more) for (d, _), more in zip(pieces, given_, strict=True)])


def _asked(step: Any, **given: Any) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k in inspect.signature(step).parameters}


ANGLES: list[tuple[Any, int, dict[str, Any]]] = [
    (slerp, 1, {"t": 0.3}),
    (slerp, 2, {"t": 0.3}),
    (nuslerp, 2, {"weights": [1, 3]}),
    (nuslerp, 2, {"on": "weights"}),
    (multislerp, 4, {"weights": [1, 2, 3, 4]}),
    (multislerp, 4, {"on": "weights"}),
    (karcher, 4, {}),
    (karcher, 4, {"on": "deltas"}),
    (model_stock, 4, {}),
]
every_angle = pytest.mark.parametrize(("step", "experts", "knobs"), ANGLES, ids=told)


@every_angle
@given(seed=seeds, cuts=st.lists(st.integers(0, 40), min_size=2, max_size=4), near=st.sampled_from([0.01, 1.0]))
@fast
def test_inner_products_add_up_over_cuts(step: Any, experts: int, knobs: dict, seed: int, cuts: list, near: float):
    n = sum(cuts)
    deltas, base = normal(seed, experts, n, scale=near), normal(seed + 1, n)
    whole = step(deltas, **knobs, **_asked(step, base=base))
    close(streamed(step, deltas, base, cuts, **knobs), whole)


@pytest.mark.parametrize(
    ("step", "experts", "knobs"),
    [a for a in ANGLES if a[0] is not model_stock and a[2].get("on") != "deltas"],
    ids=told,
)
@given(seed=seeds, shape=st.sampled_from([(7,), (4, 5), (2, 3, 4)]))
@fast
def test_what_works_on_weights_does_not_see_where_the_base_is(
    step: Any, experts: int, knobs: dict, seed: int, shape: tuple
) -> None:
    if step in (nuslerp, multislerp):
        knobs = {**knobs, "on": "weights"}
    thetas, base = normal(seed, 2 if step is slerp else experts, *shape), normal(seed + 1, *shape)
    close(base + step(thetas - base, base=base, **knobs), step(thetas, **knobs), rtol=1e-4, atol=1e-5)


@given(seed=seeds, t=st.floats(0, 1))
@fast
def test_slerp_goes_along_the_arc_at_even_speed(seed: int, t: float) -> None:
    base, theta = (x.double() for x in normal(seed, 2, 50))
    theta = theta * (base.norm() / theta.norm())
    merged = base + slerp((theta - base)[None], t=t, base=base)
    close(merged.norm(), base.norm())
    angle = torch.acos(base @ theta / base.norm() ** 2)
    close(torch.acos((base @ merged / base.norm() ** 2).clamp(-1, 1)), t * angle, atol=1e-5)
    close(slerp(torch.stack([base * 0, theta - base]), t=t, base=base), merged - base)


def test_slerp_of_near_models_is_the_line_and_its_ends_are_the_models() -> None:
    base, delta = normal(0, 60), normal(1, 1, 60, scale=0.01)
    close(slerp(delta, t=0.3, base=base), 0.3 * delta[0], atol=1e-8)
    for far in (0.01, 2.0):
        delta = normal(1, 1, 60, scale=far)
        close(slerp(delta, t=0, base=base), 0 * delta[0])
        close(slerp(delta, t=1, base=base), delta[0])
    assert not slerp(delta, t=0, base=base).any()


def test_a_base_of_zero_is_no_base() -> None:
    delta = normal(0, 1, 9)
    close(slerp(delta, base=torch.zeros(9)), slerp(delta))
    close(slerp(delta), delta[0] * 0.5**0.5)


@pytest.mark.parametrize("step", [karcher, multislerp, slerp, nuslerp])
def test_weights_that_fine_tuning_has_set_to_zero_have_no_direction(step: Any) -> None:
    """base + delta is zero only up to fp32 rounding; dividing by that length would make noise of everything."""
    theta, base = normal(0, 3000), normal(1, 3000)
    deltas = torch.stack([theta - base, normal(2, 3000, scale=3e-8) - base])
    knobs = {"on": "weights"} if step in (nuslerp, multislerp) else {}
    close(base + step(deltas, base=base, **knobs), step(torch.stack([theta, 0 * theta]), **knobs))


@given(seed=seeds, experts=st.integers(2, 6))
@fast
def test_karcher_is_where_the_logarithms_cancel(seed: int, experts: int) -> None:
    """At the centre of mass the tangents towards all points sum to zero; its length is their mean length."""
    points = normal(seed, experts, 30).double() + 1
    merged = karcher(points, steps=100, tol=1e-9)
    mu, units = merged / merged.norm(), points / points.norm(dim=1, keepdim=True)
    cos = units @ mu
    logs = (units - cos[:, None] * mu) * (cos.acos() / cos.acos().sin())[:, None]
    close(logs.sum(0), torch.zeros(30, dtype=torch.float64), atol=1e-7)
    close(merged.norm(), points.norm(dim=1).mean())


def test_karcher_of_opposite_points_is_their_mean_and_zeros_have_no_direction() -> None:
    x = normal(0, 20)
    close(karcher(torch.stack([x, -2 * x])), -0.5 * x)
    close(karcher(torch.stack([x, 3 * x, -2 * x])), 2 * x)
    close(karcher(torch.stack([x, 0 * x])), x / 2)
    close(karcher(torch.stack([x, 3 * x]), weights=[3, 1]), 1.5 * x)


@given(seed=seeds, experts=st.integers(2, 6))
@fast
def test_multislerp_has_the_mean_direction_and_the_mean_length(seed: int, experts: int) -> None:
    """The tangent step of mergekit, written out: it is zero up to rounding."""
    deltas, w = normal(seed, experts, 30).double(), torch.rand(experts, dtype=torch.float64) + 0.1
    w = w / w.sum()
    norms = deltas.norm(dim=1)
    units = deltas / norms[:, None]
    mu = w @ units / (w @ units).norm()
    assert (w @ (units - (units @ mu)[:, None] * mu)).norm() < 1e-12
    close(multislerp(deltas, weights=w.tolist()), mu * (w @ norms))


def test_multislerp_of_opposite_deltas_is_the_line_between_them() -> None:
    x = normal(0, 20)
    close(multislerp(torch.stack([x, -2 * x])), -0.5 * x)
    assert not multislerp(torch.stack([x, -x])).any()
    close(multislerp(torch.stack([x, -x]), weights=[3, 1]), x)  # here there is a mean direction


def test_model_stock_is_the_base_for_orthogonal_deltas_and_the_formula_for_two() -> None:
    assert not model_stock(torch.eye(3)).any()
    deltas = normal(0, 2, 30) + 0.3
    cos = torch.nn.functional.cosine_similarity(deltas[0], deltas[1], dim=0)
    close(model_stock(deltas), 2 * cos / (1 + cos) * deltas.mean(0))
    assert not model_stock(torch.stack([deltas[0], -deltas[0]])).any()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_a_knob_by_row_is_the_step_row_by_row(shape: tuple) -> None:
    deltas = normal(0, 2, *shape)
    rows = list(deltas.reshape(2, -1, shape[-1]).unbind(1))
    by_row = torch.stack([model_stock(row) for row in rows]).reshape(shape)
    close(model_stock(deltas, filter_wise=True), by_row)
    base = normal(1, *shape)
    for given_, origins in (({}, None), ({"on": "weights", "base": base}, base.reshape(-1, shape[-1]))):
        wanted = [
            nuslerp(row, weights=[1, 2], **({**given_, "base": origins[k]} if origins is not None else {}))
            for k, row in enumerate(rows)
        ]
        close(nuslerp(deltas, weights=[1, 2], flatten=False, **given_), torch.stack(wanted).reshape(shape))
    turned = nuslerp(deltas.transpose(1, -1), flatten=False, row_wise=True)
    close(turned, nuslerp(deltas, flatten=False).transpose(0, -1))


def test_steps_say_which_knobs_need_whole_tensors() -> None:
    assert module_of(nuslerp).elementwise()
    assert module_of(model_stock).elementwise()
    assert not module_of(nuslerp).elementwise(flatten=False)
    assert not module_of(model_stock).elementwise(filter_wise=True)
    assert not hasattr(module_of(arcee_fusion), "ELEMENTWISE")
    assert not hasattr(module_of(regmean), "ELEMENTWISE")


@given(seed=seeds, t=st.floats(0, 2))
@fast
def test_nearswap_is_its_formula(seed: int, t: float) -> None:
    delta = normal(seed, 1, 40)
    share = (t / delta[0].abs().clamp(min=1e-6)).clamp(0, 1)
    close(nearswap(delta, t=t), share * delta[0])


@given(seed=seeds, experts=st.integers(1, 5), plus=st.booleans())
@fast
def test_ram_entry_by_entry(seed: int, experts: int, plus: bool) -> None:
    deltas = normal(seed, experts, 40)
    changed = deltas.abs() > 0.8
    counts = changed.sum(0)
    shared = [int((one & (counts > 1)).sum()) for one in changed]
    unique = [int((one & (counts == 1)).sum()) for one in changed]
    knobs = {"epsilon": 0.8, "plus": plus, "r": 0.5, "alpha": 0.9}
    for j, value in enumerate(ram(deltas, **knobs).tolist()):
        own = [k for k in range(experts) if changed[k, j]]
        wanted = sum(float(deltas[k, j]) for k in own) / max(1, len(own))
        if plus and len(own) == 1:
            wanted *= 1 + 0.5 * min(0.9, shared[own[0]] / unique[own[0]])
        assert abs(value - wanted) < 1e-5
    assert torch.equal(streamed(ram, deltas, deltas[0], [11, 29], **knobs), ram(deltas, **knobs))


def test_magmax_takes_the_later_of_equals() -> None:
    deltas = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-1.0, 1.0, 0.0, -3.0], [0.5, 2.0, 0.0, 3.0]])
    assert magmax(deltas).tolist() == [-1.0, 2.0, 0.0, 3.0]


@given(seed=seeds, experts=st.integers(1, 5))
@fast
def test_emr_elects_signs_and_gives_each_expert_its_length_back(seed: int, experts: int) -> None:
    deltas = normal(seed, experts, 60)
    sign = torch.where(deltas.sum(0) > 0, 1, -1)
    unified = sign * (deltas * sign).clamp(min=0).amax(0)
    assert torch.equal(emr(deltas), unified)
    names = [f"e{k}" for k in range(experts)]
    for k in range(experts):
        own = emr(deltas, expert=names[k], experts=names)
        assert torch.equal(own, emr(deltas, expert=k))
        assert torch.equal(own != 0, deltas[k] * unified > 0)
        close(own.abs().mean(), deltas[k].abs().mean())
        cut = streamed(emr, deltas, deltas[0], [0, 13, 47], expert=k)
        assert torch.equal(cut, own)


def test_emr_refuses_unknown_experts_and_gives_an_unmoved_one_nothing() -> None:
    deltas = torch.stack([normal(0, 9), torch.zeros(9)])
    assert not emr(deltas, expert=1).any()
    for wrong in ("c", 2, -1, True):
        with pytest.raises(ValueError, match="expert must be one of a, b"):
            emr(deltas, expert=wrong, experts=("a", "b"))


@given(seed=seeds, experts=st.integers(1, 5))
@fast
def test_fisher_weighs_entry_by_entry(seed: int, experts: int) -> None:
    deltas, information = normal(seed, experts, 6, 5), normal(seed + 1, experts, 6, 5).square()
    weighted = (information * deltas).sum(0) / information.sum(0)
    close(fisher(deltas, fisher=information, normalize=False, minimal=1e-12), weighted, rtol=1e-4)
    same = torch.full_like(information, 0.3)
    close(fisher(deltas, fisher=same), deltas.mean(0))
    close(fisher(deltas, fisher=0 * information, normalize=False), deltas.mean(0))
    close(fisher(deltas, fisher=None), deltas.mean(0))
    assert torch.equal(fisher(deltas, fisher=None, normalize=False), fisher(deltas, fisher=None))


def test_normalized_fisher_does_not_see_how_large_gradients_are() -> None:
    deltas, information = normal(0, 3, 50), normal(1, 3, 50).square() + 1
    larger = information * torch.tensor([1.0, 10.0, 1000.0])[:, None]
    close(fisher(deltas, fisher=larger), fisher(deltas, fisher=information), rtol=1e-4)
    assert not torch.allclose(fisher(deltas, fisher=larger, normalize=False), fisher(deltas, fisher=larger), rtol=0.1)


def test_weights_of_fisher_count_where_it_was_not_measured_too() -> None:
    deltas = normal(0, 2, 50)
    close(fisher(deltas, weights=[3, 1], fisher=None), (3 * deltas[0] + deltas[1]) / 4)
    close(fisher(deltas, weights=[3, 1], fisher=torch.ones(2, 50)), (3 * deltas[0] + deltas[1]) / 4)


def inputs_of(seed: int, experts: int, width: int, rows: int = 40) -> tuple[list[Tensor], Tensor]:
    xs = [normal(seed + k, rows, width).double() for k in range(experts)]
    return xs, torch.stack([x.mT @ x / rows for x in xs])


@given(seed=seeds, experts=st.integers(1, 4))
@fast
def test_regmean_is_the_least_squares_solution(seed: int, experts: int) -> None:
    """Stationary: the gradient of the summed squared differences of outputs is zero there."""
    deltas = normal(seed, experts, 7, 5).double()
    xs, grams = inputs_of(seed, experts, 5)
    merged = regmean(deltas, gram=grams, ridge=0.0).requires_grad_()
    sum((x @ (merged - delta).mT).square().sum() for x, delta in zip(xs, deltas, strict=True)).backward()
    assert merged.grad.norm() < 1e-8 * sum(x.norm() ** 2 for x in xs)
    close(regmean(deltas, gram=grams), merged.detach(), rtol=1e-3, atol=1e-4)


def test_regmean_takes_the_mean_where_no_inputs_reach() -> None:
    deltas = normal(0, 3, 7, 5)
    _, grams = inputs_of(0, 3, 5)
    grams[:, 2, :] = 0
    grams[:, :, 2] = 0
    share = grams.diagonal(dim1=1, dim2=2).mean(1)
    close(regmean(deltas, gram=grams)[:, 2], ((share @ deltas[:, :, 2].double()) / share.sum()).float(), rtol=1e-4)
    close(regmean(deltas, gram=grams[:1].expand(3, 5, 5)), deltas.mean(0), rtol=1e-4, atol=1e-5)
    close(regmean(deltas, gram=0 * grams), deltas.mean(0))
    with pytest.raises(ValueError, match="gram is singular"):
        regmean(deltas, gram=grams, ridge=0.0)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5), (2, 3, 5, 5), (0, 5)])
def test_regmean_averages_what_is_no_matrix_or_was_not_measured(shape: tuple) -> None:
    deltas = normal(0, 3, *shape)
    close(regmean(deltas, gram=None), deltas.mean(0))
    if len(shape) != 2:
        close(regmean(deltas, gram=torch.eye(5).expand(3, 5, 5)), deltas.mean(0))
    matrix = normal(0, 3, 4, 5)
    close(regmean(matrix, gram=None), matrix.mean(0))


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    deltas = normal(0, 3, 7, 5).double()
    _, grams = inputs_of(0, 3, 5)
    d = torch.stack([g.diagonal() for g in grams])
    close(regmean(deltas, gram=grams, reduce=0, ridge=0), (deltas * d[:, None, :]).sum(0) / d.sum(0))


@given(seed=seeds, shape=st.sampled_from([(9,), (6, 8), (2, 3, 4)]), scale=st.sampled_from([1e-3, 0.1, 1.0]))
@fast
def test_arcee_fusion_takes_outliers_of_importance(seed: int, shape: tuple, scale: float) -> None:
    base, delta = normal(seed, *shape).double(), normal(seed + 1, 1, *shape, scale=scale).double()
    p, q = ((x.softmax(-1) + 1e-8) for x in (base + delta[0], base))
    importance = delta[0].abs() * (p * (p.log() - q.log())).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    q1, q2, q3 = (ordered[int(s * (len(ordered) - 1))] for s in (0.25, 0.5, 0.75))
    wanted = torch.where(importance >= q2 + 1.5 * (q3 - q1), delta[0], 0)
    merged = arcee_fusion(delta, base=base)
    assert torch.equal(merged, wanted)


def test_arcee_fusion_takes_some_and_leaves_most() -> None:
    base, delta = normal(0, 64, 32, scale=0.05), normal(1, 1, 64, 32, scale=0.01)
    taken = arcee_fusion(delta, base=base)[None] != 0
    assert 0.01 < taken.float().mean() < 0.3
    assert delta[taken].abs().mean() > 1.5 * delta.abs().mean()
    assert not torch.equal(arcee_fusion(delta)[None] != 0, taken), "the base's rows count"


@pytest.mark.parametrize(
    ("step", "experts", "says"),
    [
        (slerp, 3, "two models, got 3"),
        (nuslerp, 1, "two experts, got 1"),
        (nuslerp, 3, "two experts, got 3"),
        (nearswap, 2, "one expert, got 2"),
        (arcee_fusion, 2, "one expert, got 2"),
    ],
)
def test_a_number_of_experts_that_does_not_fit_is_told(step: Any, experts: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        step(normal(0, experts, 4, 4))


def test_ingredients_of_another_shape_are_told() -> None:
    with pytest.raises(ValueError, match="fisher must have the deltas' shape"):
        fisher(normal(0, 2, 4, 5), fisher=torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match="gram must be"):
        regmean(normal(0, 2, 4, 5), gram=torch.ones(2, 4, 4))


def test_angles_between_fine_tunings_are_as_good_as_float64s():
    """A short cut in fp32 is taken beside a long base alone, and the angles do not feel it."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(200_000, generator=rng)
    deltas = 0.003 * torch.randn(3, 200_000, generator=rng)
    points = base.double() + deltas.double()
    units = points / points.norm(dim=1, keepdim=True)
    exact = torch.cat([deltas, base[None]]).double()
    assert not torch.equal(gram(deltas, base), exact @ exact.mT)  # the short cut
    cos = of_weights(gram(deltas, base))
    cos = cos / cos.diagonal().sqrt()[:, None] / cos.diagonal().sqrt()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        angle = 2 * torch.asin((units[i] - units[j]).norm() / 2)
        torch.testing.assert_close(cos[i, j].acos(), angle, rtol=1e-6, atol=0)
    for long in (gram(deltas), gram(100 * deltas + base, base)):  # no base, or deltas as long as it
        rows = exact[:3] if len(long) == 3 else torch.cat([(100 * deltas + base).double(), base.double()[None]])
        torch.testing.assert_close(long, rows @ rows.mT, rtol=1e-12, atol=0)


@given(seed=seeds, length=st.integers(1, 300))
@fast
def test_inner_products_do_not_depend_on_where_numbers_lie(seed: int, length: int) -> None:
    """A float64 tensor of a file lies at any multiple of eight bytes, one in memory at one of 64."""
    base, deltas = normal(seed, length).double(), normal(seed + 1, 3, length).double()
    here = gram(deltas, base)
    for shift in range(1, 8):
        there = torch.empty(length + shift, dtype=torch.float64)[shift:].copy_(base)
        assert torch.equal(gram(deltas, there), here)
