"""Laws of every edit, align and combine step, found by walking the folders.

A new step is under these laws as soon as its file exists; what does not hold for it is declared below, with the reason.
"""

import importlib
import inspect
import math
import pkgutil
from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.sentence import GIVEN, Step, ingredients_of

pytestmark = pytest.mark.filterwarnings("ignore:many entries have equal magnitudes")

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "scale": [{"by": -0.5}],
    "dare": [{"keep": 0.5}, {"keep": 0.5, "rescale": False}, {"keep": 0.5, "rescale": "l1"}, {"keep": 1}],
    "della": [{"density": 0.4, "rescale": "l1"}, {"density": 0.7, "epsilon": 0.1, "rescale": False}],
    "trim": [
        {"density": 0.5, "rescale": "l1"},
        {"density": 0.4, "scope": "tensor", "rescale": "l1"},
        {"density": 0.4, "scope": "tensor", "equal": "first", "rescale": "l1"},
        {"density": 1},
    ],
    "breadcrumbs": [
        {"density": 0.5, "gamma": 0.1},
        {"density": 0.9, "gamma": 0.3, "scope": "model"},
        {"density": 0.6, "gamma": 0.2, "rescale": "l1"},
    ],
    "sce": [{"density": 0.5}, {"density": 1}, {"density": 0.4, "floor": 1e-6}],
    "pcb": [{"density": 0.4}, {"density": 0.5, "rule": "vision", "scope": "tensor"}],
    "consensus": [
        {"agree": 1, "threshold": 0.2},
        {"of": "ties", "agree": 1},
        {"of": "ties", "agree": 0, "rule": "reference", "density": 0.6},
        {"expert": 0},
    ],
    "weighted": [{"default": -1}],
    "ties": [
        {"density": 0.5},
        {"merge": "sum"},
        {"density": 0.5, "merge": "max"},
        {"rule": "reference"},
        {"density": 1},
        {"scope": "tensor", "density": 0.4},
        {"scope": "tensor", "equal": "first", "density": 0.4},
        {"scope": "tensor", "equal": "first", "density": 1},
        {"elect": "count"},
    ],
    "tsv": [{"rank": 1}, {"conv": "mean"}],
    "iso_c": [{"conv": "mean"}],
    "cart": [{"share": 0.5}, {"share": 1, "by": 0.3}, {"share": 0.3, "conv": "mean"}],
    "iso_cts": [{"common": 0}, {"common": 0.5}, {"common": 1}, {"conv": "mean"}],
    "dc": [{"density": 1}, {"rank": 1}, {"smoothing": "mean"}, {"smoothing": "linear"}, {"conv": "mean"}],
    "wudi": [{"solve": "exact"}, {"steps": 0}, {"conv": "mean"}],
    "esm": [{"conv": "mean"}],
    "knots": [{"threshold": 0}, {"conv": "mean"}],
    "core": [{"conv": "mean"}],
    "permute": [{"to": "base"}, {"spec": "mlp"}],
    "slerp": [{"t": 0}, {"t": 0.3}],
    "nuslerp": [{"weights": [1, 3]}, {"on": "weights"}, {"flatten": False}, {"flatten": False, "row_wise": True}],
    "multislerp": [{"on": "weights"}],
    "karcher": [{"on": "deltas"}, {"steps": 2, "tol": 1e-3}],
    "model_stock": [{"filter_wise": True}],
    "ram": [{"epsilon": 0}, {"plus": True, "epsilon": 0}],
    "emr": [{"expert": 0}],
    "fisher": [{"normalize": False}],
    "regmean": [{"reduce": 0.9, "ridge": 0}],
}
WRONG: dict[str, list[dict[str, Any]]] = {
    "average": [{"weights": [1, 2]}, {"weights": [1, -2, 1]}, {"weights": [1, math.nan, 1]}],
    "task_arithmetic": [{"weights": [1, 2]}, {"weights": [1, math.inf, 1]}],
    "ties": [{"density": x} for x in (0, 50, -0.1, math.nan, True, [0.2, 2, 0.2], [0.2, 0.2])]
    + [{"weights": [1, 2]}, {"scope": "layer"}, {"merge": "median"}, {"rule": "paper"}, {"equal": "first"}],
    "tsv": [{"rank": 0}, {"rank": 1.5}, {"conv": "svd"}],
    "iso_c": [{"conv": "svd"}],
    "cart": [{"share": 0}, {"share": 1.1}, {"share": True}, {"by": math.inf}, {"by": True}, {"conv": "svd"}],
    "iso_cts": [{"common": -0.1}, {"common": 1.1}, {"common": math.nan}, {"conv": "svd"}],
    "dc": [{"density": 0}, {"density": 2}, {"rank": 0}, {"smoothing": "max"}, {"rho": 0.5}, {"rho": math.inf}],
    "wudi": [{"solve": "sgd"}, {"steps": -1}, {"steps": 1.5}, {"lr": 0}, {"lr": math.nan}, {"conv": "svd"}],
    "esm": [{"conv": "svd"}],
    "dare": [{"keep": 0}, {"keep": 1.5}, {"keep": math.nan}, {"rescale": "l2"}],
    "della": [{"density": 0}, {"density": 0.1}, {"epsilon": 0.6}, {"epsilon": -0.1}, {"rescale": "l2"}],
    "trim": [{"density": x} for x in (0, 20, math.nan)] + [{"equal": "first"}, {"scope": "layer"}, {"rescale": "l2"}],
    "breadcrumbs": [{"density": 0}, {"gamma": 1}, {"gamma": -0.1}, {"scope": "layer"}, {"rescale": True}],
    "sce": [{"density": 0}, {"floor": -1}],
    "pcb": [{"density": 0}, {"rule": "text"}, {"weights": [1, 2]}, {"scope": "layer"}],
    "consensus": [{"threshold": x} for x in (-1, math.nan, [0.2, 0.2])]
    + [{"agree": -1}, {"agree": 1.5}, {"of": "max"}]
    + [{"density": 0, "of": "ties"}, {"rule": "paper", "of": "ties"}, {"expert": 3}, {"expert": "nobody"}],
    "weighted": [{"default": math.inf}, {"coefficients": torch.ones(2)}, {"coefficients": torch.ones(3, 4)}],
    "mask": [{"mask": torch.ones(4, 5)}],
    "scale": [{"by": math.inf}, {"by": math.nan}],
    "slerp": [{"t": x} for x in (-0.1, 1.1, math.nan)],
    "nuslerp": [{"weights": [1]}, {"weights": [1, -1]}, {"on": "base"}],
    "multislerp": [{"weights": [1, 2]}, {"weights": [1, -2, 1]}, {"weights": [1, math.nan, 1]}, {"on": "base"}],
    "karcher": [{"weights": [1, 2]}, {"weights": [1, -1, 1]}, {"on": "base"}, {"steps": 0}, {"steps": 1.5}, {"tol": 0}],
    "model_stock": [{"floor": -1}, {"floor": math.nan}],
    "nearswap": [{"t": -1}, {"t": math.nan}],
    "ram": [{"epsilon": -1}, {"epsilon": math.nan}, {"r": -0.1}, {"alpha": -0.1}],
    "emr": [{"expert": x} for x in (-1, 3, 0.5, "expert9")],
    "fisher": [{"weights": [1, 2]}, {"weights": [1, -1, 1]}, {"minimal": 0}, {"minimal": math.nan}],
    "regmean": [{"reduce": -0.1}, {"reduce": 1.1}, {"ridge": -1}, {"ridge": math.nan}],
}
NOT_ELEMENTWISE = {  # with its default knobs
    "della": "ranks are those within a row",
    "tsv": "a matrix has singular vectors, its parts have others",
    "iso_c": "a matrix has singular vectors, its parts have others",
    "iso_cts": "a matrix has singular vectors, its parts have others",
    "cart": "a matrix has singular vectors, its parts have others",
    "dc": "a matrix has singular vectors, its parts have others",
    "esm": "a matrix has singular vectors, its parts have others",
    "wudi": "its objective is about products of matrices",
    "regmean": "it solves a system for each matrix",
    "arcee_fusion": "its importance is a softmax along rows",
}
GENERIC = {
    "tsv",
    "iso_c",
    "iso_cts",
    "cart",
    "dc",
    "esm",
    "wudi",
}  # these get distinct singular values, others coarse numbers
EXPERTS = {
    "slerp": (2, 2),
    "nuslerp": (2, 2),
    "nearswap": (1, 1),
    "arcee_fusion": (1, 1),
}  # how many, if not any number
FOLLOWS: dict[str, Callable[[Any, list[int]], Any]] = {
    "expert": lambda one, order: order.index(one),
    "weights": lambda each, order: [each[t] for t in order],
    "t": lambda t, order: t if order == sorted(order) else 1 - t,
}  # what a knob that tells experts apart becomes where they come in another order
UNEQUAL = {"magmax": "of equal magnitudes the later one wins"}  # the order matters where entries are equal
NOT_SCALING = {  # why scaled deltas do not give the scaled result
    "pcb": "tanh of products of the deltas",
    "nearswap": "t is a distance between weights",
    "wudi": "a step of Adam has the same length whatever the deltas",
    "arcee_fusion": "a softmax of the weights",
    "ram": "epsilon is in units of the weights",
}
WHOLE = {
    "ties": {"density": 1},
    "tsv": {"rank": 10**6},
    "wudi": {"solve": "exact"},
    "sce": {"density": 1},
    "consensus": {"agree": 0},
    "weighted": {"default": 1},
    "nearswap": {"t": 1e9},
    "ram": {"epsilon": 0},
}  # knobs with which a step keeps all of each expert
SUMS = dict.fromkeys(["task_arithmetic", "consensus", "weighted"], "T identical experts give T times their delta")
NOT_IDEMPOTENT = {
    "pcb": "clamps and drops within each expert whatever the others are",
    "iso_c": "makes the spectrum flat, see its own law",
    "iso_cts": "makes the spectrum flat, see its own law",
    "dc": "keeps what each expert writes into its own block, 1/T of what identical ones share",
    "esm": "raises what is large: directions, columns and layers get powers of their norms",
    "arcee_fusion": "takes outliers only, see its own law",
}
ROUNDED: dict[str, str] = {
    **dict.fromkeys(["slerp", "nuslerp", "multislerp", "karcher", "model_stock"], "inner products are float64 sums"),
    "emr": "lengths are float64 sums",
    "sce": "weights are from float64 sums",
    "fisher": "norms are float64 sums",
}  # why the result may differ by a rounding error when a tensor is cut
INGREDIENTS: dict[str, Callable[[int, Tensor], dict[str, Tensor]]] = {
    "mask": lambda seed, deltas: {"mask": normal(seed + 2, *deltas.shape) > 0},
    "weighted": lambda seed, deltas: {"coefficients": normal(seed + 2, *deltas.shape)},
    "fisher": lambda seed, deltas: {"fisher": normal(seed + 2, *deltas.shape).square()},
}  # (seed, deltas) -> the extra tensors
RELATIVE = {
    "knots": {"threshold": 0}
}  # its default is in units of singular values, so what it drops depends on the scale
NOT_RESTORING: dict[str, str] = {}  # align steps whose coordinates are not another basis of the same deltas


def found(kind: str) -> dict[str, Callable[..., Any]]:
    folder = importlib.import_module(f"merganser.steps.{kind}")
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    return {name: getattr(importlib.import_module(f"{folder.__name__}.{name}"), name) for name in names}


EDIT, ALIGN, COMBINE = found("edit"), found("align"), found("combine")
STEPS = EDIT | COMBINE


def with_knobs(steps: Any) -> Any:
    """Ask for a law with each of the steps, at its defaults and at each of its variants."""
    each = [(name, knobs) for name in steps for knobs in [{}, *VARIANTS.get(name, [])]]
    return pytest.mark.parametrize(("name", "knobs"), each, ids=str)


every_step, every_combine, every_align = with_knobs(STEPS), with_knobs(COMBINE), with_knobs(ALIGN)
fast = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(), (1,), (7,), (5, 3), (3, 5), (4, 4), (2, 3, 4), (3, 2, 2, 2)])
any_shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
counts = st.integers(1, 6)


def step_of(name: str, knobs: dict[str, Any]) -> Step:
    kind = "edit" if name in EDIT else "align" if name in ALIGN else "combine"
    return Step(name, kind, (STEPS | ALIGN)[name], knobs)


def allowed(name: str, experts: int) -> int:
    least, most = EXPERTS.get(name, (1, experts))
    return min(max(experts, least), most)


def offered(name: str, deltas: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return what the merge gives with these deltas, but for base and survey: alone, a step does without."""
    return {
        "rng": np.random.default_rng(seed),
        "name": "layer.weight",
        "experts": tuple(f"expert{t}" for t in range(len(deltas))),
        "numel": deltas[0].numel(),
        **dict.fromkeys(ingredients_of((STEPS | ALIGN)[name])),
    }


def run(name: str, deltas: Tensor, *, seed: int = 0, **knobs: Any) -> Any:
    """Call a step as the merge does; an edit is called on the first expert's delta."""
    given = {k: v for k, v in offered(name, deltas, seed).items() if k not in knobs}
    return step_of(name, knobs).call(deltas[0] if name in EDIT else deltas, **given)


def surveyed(step: Step, parts: list[Tensor], given: list[dict[str, Any]], plain: bool = False) -> list[Any] | None:
    """Return what the step learns from all parts, added up as the merge does; ``plain``: as tensors."""
    learned: list[Any] = []
    for look in step.looks:
        wanted = inspect.signature(look).parameters
        seen = [
            look(part, learned, **{k: v for k, v in one.items() if k in wanted})
            for part, one in zip(parts, given, strict=True)
        ]
        total = reduce(add, seen)
        learned.append(total.tensor() if plain and hasattr(total, "tensor") else total)
    return learned or None


def normal(seed: int, *shape: int) -> Tensor:
    """Small numbers as deltas have, generic enough for singular values to be distinct."""
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coarse(seed: int, *shape: int) -> Tensor:
    """Few distinct values: many equal magnitudes and zero sums, and every sum is exact in fp32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 8


def some(name: str, seed: int, experts: int, *shape: int) -> Tensor:
    """Return deltas of as many experts as the step takes: generic numbers or coarse ones."""
    return (normal if name in GENERIC else coarse)(seed, allowed(name, experts), *shape)


def close(a: Tensor, b: Tensor) -> None:
    # near its pole a step such as model_stock multiplies deltas by 400: what cancels then leaves that much more rounding
    largest = float(b.abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=1e-3, atol=max(1e-6, 4e-6 * largest))


@every_step
@given(shape=shapes, experts=counts)
@fast
def test_zero_in_zero_out(name: str, knobs: dict, shape: tuple, experts: int) -> None:
    merged = run(name, torch.zeros(allowed(name, experts), *shape), **knobs)
    assert merged.shape == shape
    assert not merged.any()


@every_step
@given(seed=seeds, dtype=dtypes, shape=any_shapes, experts=counts)
@example(seed=0, dtype=torch.bfloat16, shape=(0, 3), experts=3)
@example(seed=0, dtype=torch.float16, shape=(4, 3), experts=3)
@fast
def test_shape_dtype_and_device_stay_and_inputs_are_untouched(
    name: str, knobs: dict, seed: int, dtype: torch.dtype, shape: tuple, experts: int
) -> None:
    deltas = normal(seed, allowed(name, experts), *shape).to(dtype)
    before = deltas.clone()
    merged = run(name, deltas, **knobs)
    assert (merged.shape, merged.dtype, merged.device) == (shape, dtype, deltas.device)
    assert merged.isfinite().all()
    assert torch.equal(deltas, before)


@every_combine
@given(seed=seeds, shape=shapes, experts=counts)
@example(seed=30222936, shape=(5, 3), experts=6)  # a row near model_stock's pole
@fast
def test_the_order_of_experts_does_not_matter(name: str, knobs: dict, seed: int, shape: tuple, experts: int) -> None:
    deltas = normal(seed, allowed(name, experts), *shape) if name in UNEQUAL else some(name, seed, experts, *shape)
    order = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(seed)).tolist()
    turned = {knob: FOLLOWS[knob](value, order) if knob in FOLLOWS else value for knob, value in knobs.items()}
    close(run(name, deltas[order], **turned), run(name, deltas, **knobs))


@every_step
@given(seed=seeds, shape=shapes, experts=counts, power=st.integers(-8, 8))
@fast
def test_scaling_the_deltas_scales_the_result(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int, power: int
) -> None:
    if name in NOT_SCALING:
        return
    deltas = some(name, seed, experts, *shape)
    close(run(name, deltas * 2.0**power, **knobs) / 2.0**power, run(name, deltas, **knobs))


@pytest.mark.parametrize("name", sorted(COMBINE.keys() - NOT_IDEMPOTENT.keys()))
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_identical_experts_give_their_delta(name: str, seed: int, shape: tuple, experts: int) -> None:
    delta = normal(seed, *shape)
    experts = allowed(name, experts)
    merged = run(name, delta.expand(experts, *shape), **WHOLE.get(name, {}))
    close(merged, delta * experts if name in SUMS else delta)


@given(seed=seeds, experts=counts)
@fast
def test_identical_experts_give_tsv_their_leading_part(seed: int, experts: int) -> None:
    """The polar factor of T equal bases is that basis, T times over: no arbitrary vectors come in."""
    delta = normal(seed, 9, 6)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    k = max(1, 6 // experts)
    close(run("tsv", delta.expand(experts, 9, 6)), u[:, :k] * s[:k] @ v[:k])


@given(seed=seeds, shape=st.sampled_from([(5, 3), (3, 5), (6, 6), (1, 4)]), experts=counts)
@fast
def test_iso_c_has_a_flat_spectrum_and_the_directions_of_the_sum(seed: int, shape: tuple, experts: int) -> None:
    deltas = normal(seed, experts, *shape)
    merged, s = run("iso_c", deltas), torch.linalg.svdvals(deltas.sum(0))
    close(torch.linalg.svdvals(merged), s.mean().expand_as(s))
    inner = merged.mT @ deltas.sum(0) if shape[0] >= shape[1] else merged @ deltas.sum(0).mT
    close(inner, inner.mT)  # both have the same singular vectors
    close(inner.trace(), s.mean() * s.sum())


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
@pytest.mark.parametrize("turn", [False, True])
def test_spectral_steps_turn_with_the_matrix_and_invent_nothing(name: str, turn: bool) -> None:
    """Low-rank experts: the result has no part outside the span of their rows and columns."""
    left, right = normal(1, 3, 12, 2), normal(2, 3, 2, 9)
    deltas = left @ right
    merged = run(name, deltas.mT).mT if turn else run(name, deltas)
    columns = torch.linalg.qr(torch.cat(list(left), dim=1)).Q
    rows = torch.linalg.qr(torch.cat(list(right.mT), dim=1)).Q
    torch.testing.assert_close(columns @ (columns.mT @ merged @ rows) @ rows.mT, merged, rtol=1e-4, atol=1e-8)
    close(run(name, deltas.mT).mT, run(name, deltas))


def test_directions_that_are_zero_enter_the_mean_of_iso_c_and_stay_zero() -> None:
    deltas = normal(1, 3, 12, 2) @ normal(2, 3, 2, 9)
    s = torch.linalg.svdvals(deltas.sum(0))
    torch.testing.assert_close(
        torch.linalg.svdvals(run("iso_c", deltas)), s.sum() / 9 * (torch.arange(9) < 6), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_text_projection_is_averaged(name: str) -> None:
    deltas = normal(0, 3, 4, 5)
    assert torch.equal(STEPS[name](deltas, name="model.text_projection.weight"), deltas.mean(0))
    assert not torch.allclose(STEPS[name](deltas, name="model.visual.proj"), deltas.mean(0))


@every_step
@given(seed=seeds)
@fast
def test_the_same_seed_gives_the_same_bytes(name: str, knobs: dict, seed: int) -> None:
    deltas = normal(seed, allowed(name, 3), 6, 5)
    assert torch.equal(run(name, deltas, seed=seed, **knobs), run(name, deltas, seed=seed, **knobs))


@every_step
@given(seed=seeds, experts=st.integers(1, 9), length=st.integers(1, 200), data=st.data())
@fast
def test_elementwise_steps_do_not_see_how_a_tensor_is_cut(
    name: str, knobs: dict, seed: int, experts: int, length: int, data: st.DataObject
) -> None:
    """Cuts surveyed one by one, added up and merged one by one are the whole tensor, bit for bit."""
    step = step_of(name, knobs)
    if not step.elementwise:
        return
    deltas, base = normal(seed, allowed(name, experts), length), normal(seed + 1, length)
    cut = data.draw(st.integers(0, length))
    if name == "dare":  # four entries share a random number; the loop's cuts are multiples of far more
        cut -= cut % 4

    def merged(cuts: list[slice]) -> Tensor:
        parts = [deltas[:, one] for one in cuts]
        given = [{**offered(name, deltas, seed), **extra(name, seed, deltas, one), "base": base[one]} for one in cuts]
        for one in given:
            one["rng"] = given[0]["rng"]
        survey = surveyed(step, parts, given)
        if name not in EDIT:
            return torch.cat([step.call(part, survey=survey, **one) for part, one in zip(parts, given, strict=True)])
        first = None if survey is None else [total[0] for total in survey]
        own = [{k: v[0] if k in step.ingredients and v is not None else v for k, v in one.items()} for one in given]
        return torch.cat([step.call(part[0], survey=first, **one) for part, one in zip(parts, own, strict=True)])

    whole, pieces = merged([slice(None)]), merged([slice(0, cut), slice(cut, None)])
    if name in ROUNDED or knobs.get("rescale") == "l1":  # a float64 sum too
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-8)
    else:
        assert torch.equal(pieces, whole)


def extra(name: str, seed: int, deltas: Tensor, cut: slice) -> dict[str, Tensor]:
    """Return the ingredients that lie under a cut; those of another shape than the tensor's are not cut."""
    tensors = INGREDIENTS.get(name, lambda *_: {})(seed, deltas)
    return {k: v[..., cut] if v.shape[-1] == deltas.shape[-1] else v for k, v in tensors.items()}


@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_is_elementwise_or_is_declared_not_to_be(name: str) -> None:
    assert step_of(name, {}).elementwise != (name in NOT_ELEMENTWISE)


@with_knobs([name for name in STEPS if hasattr(inspect.getmodule(STEPS[name]), "passes")])
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_alone_a_step_learns_what_its_survey_tells(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int
) -> None:
    deltas, step = some(name, seed, experts, *shape), step_of(name, knobs)
    rows = deltas[:1] if name in EDIT else deltas
    survey = surveyed(step, [rows], [offered(name, rows)])
    told = None if survey is None else [total[0] for total in survey] if name in EDIT else survey
    assert torch.equal(run(name, deltas, **knobs, survey=told), run(name, deltas, **knobs))


@with_knobs([name for name in STEPS if hasattr(inspect.getmodule(STEPS[name]), "passes")])
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_integer_totals_may_be_kept_as_tensors(name: str, knobs: dict, seed: int, shape: tuple, experts: int) -> None:
    """Histograms wait with their counting; the numbers they come to say the same."""
    deltas, step = some(name, seed, experts, *shape), step_of(name, knobs)
    alone = deltas[:1] if name in EDIT else deltas
    totals = surveyed(step, [alone], [offered(name, alone)], plain=True)
    assert all(isinstance(total, Tensor | Counter) for total in totals or [])  # by kind of layer in esm
    survey = None if totals is None else [total[0] for total in totals] if name in EDIT else totals
    assert torch.equal(run(name, alone, **knobs, survey=survey), run(name, alone, **knobs))


@every_align
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_aligned_deltas_are_restored_and_their_sum_is_too(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int
) -> None:
    """Coordinates are the same deltas in another basis, so whatever is linear gives the same with and without."""
    if name in NOT_RESTORING:
        return
    deltas = normal(seed, experts, *shape)
    coords, restore = run(name, deltas, **knobs)
    assert len(coords) == experts
    for row, delta in zip(coords, deltas, strict=True):
        close(restore(row), delta)
    for linear in (STEPS["average"], STEPS["task_arithmetic"]):
        close(restore(linear(coords)), linear(deltas))


@every_align
@given(seed=seeds, dtype=dtypes, shape=any_shapes, experts=counts)
@example(seed=0, dtype=torch.bfloat16, shape=(0, 3), experts=3)
@fast
def test_an_align_step_restores_shape_and_dtype(
    name: str, knobs: dict, seed: int, dtype: torch.dtype, shape: tuple, experts: int
) -> None:
    deltas = normal(seed, experts, *shape).to(dtype)
    before = deltas.clone()
    coords, restore = run(name, deltas, **knobs)
    restored = restore(coords[0])
    assert (restored.shape, restored.dtype, restored.device) == (shape, dtype, deltas.device)
    assert restored.isfinite().all()
    assert torch.equal(deltas, before)


@every_align
@given(shape=shapes, experts=counts)
@fast
def test_zero_deltas_are_aligned_to_zero(name: str, knobs: dict, shape: tuple, experts: int) -> None:
    coords, restore = run(name, torch.zeros(experts, *shape), **knobs)
    assert not coords.any()
    assert restore(coords.sum(0)).shape == shape
    assert not restore(coords.sum(0)).any()


def behind(name: str, deltas: Tensor, merger: str, **knobs: Any) -> Tensor:
    """Return what a merger that is not linear makes of the coordinates, as deltas again."""
    coords, restore = run(name, deltas, **knobs)
    return restore(run(merger, coords))


@every_align
@pytest.mark.parametrize("merger", ["ties", "magmax", "tsv"])
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_the_order_of_experts_does_not_matter_in_coordinates(
    name: str, knobs: dict, merger: str, seed: int, shape: tuple, experts: int
) -> None:
    deltas = normal(seed, experts, *shape)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    close(behind(name, deltas[order], merger, **knobs), behind(name, deltas, merger, **knobs))


@every_align
@pytest.mark.parametrize("merger", ["ties", "magmax", "tsv"])
@given(seed=seeds, shape=shapes, experts=counts, power=st.integers(-8, 8))
@fast
def test_scaled_deltas_have_scaled_coordinates(
    name: str, knobs: dict, merger: str, seed: int, shape: tuple, experts: int, power: int
) -> None:
    knobs, deltas = {**knobs, **RELATIVE.get(name, {})}, normal(seed, experts, *shape)
    scaled = behind(name, deltas * 2.0**power, merger, **knobs)
    close(scaled / 2.0**power, behind(name, deltas, merger, **knobs))


@every_align
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_identical_experts_have_identical_coordinates(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int
) -> None:
    delta = normal(seed, *shape)
    coords, restore = run(name, delta.expand(experts, *shape), **knobs)
    assert all(torch.equal(one, coords[0]) for one in coords)
    close(restore(run("ties", coords, density=1)), delta)


@every_align
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_the_same_deltas_are_aligned_to_the_same_bytes(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int
) -> None:
    deltas = normal(seed, experts, *shape)
    (one, first), (other, second) = (run(name, deltas, seed=seed, **knobs) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(first(one.sum(0)), second(other.sum(0)))


@every_step
def test_gradients_flow(name: str, knobs: dict) -> None:
    deltas = normal(3, allowed(name, 3), 12, 10).requires_grad_()
    run(name, deltas, **knobs).square().sum().backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    assert deltas.grad.any()


@pytest.mark.parametrize("name", ["average", "task_arithmetic"])
def test_coefficients_can_be_learned(name: str) -> None:
    deltas, weights = normal(0, 3, 4), torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    run(name, deltas, weights=weights).square().sum().backward()
    assert weights.grad is not None
    assert weights.grad.any()


@pytest.mark.parametrize(("name", "knobs"), [(n, k) for n, many in WRONG.items() for k in many], ids=str)
def test_a_knob_out_of_range_is_named(name: str, knobs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        run(name, normal(0, allowed(name, 3), 4, 4), **knobs)


@pytest.mark.parametrize("name", list(STEPS))
def test_every_knob_refuses_nonsense_by_name(name: str) -> None:
    for knob, parameter in inspect.signature(STEPS[name]).parameters.items():
        asked = parameter.kind is parameter.KEYWORD_ONLY and knob not in (*GIVEN, *ingredients_of(STEPS[name]))
        if asked and not isinstance(parameter.default, bool):
            with pytest.raises(ValueError, match=knob):
                run(name, normal(0, allowed(name, 3), 4, 4), **{knob: "nonsense"})


numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60)


@given(values=numbers, density=st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_the_histograms_find_exactly_the_kth_largest_magnitude(values: list[float], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    k = max(1, int(density * len(delta)))
    threshold = delta.abs().kthvalue(len(delta) - k + 1).values
    kept = torch.where(delta.abs() >= threshold, delta, 0)
    assert torch.equal(run("ties", delta[None], density=density, merge="sum"), kept)


def test_a_large_tensor_is_worked_on_in_pieces_with_the_same_result() -> None:
    deltas = normal(0, 3, 200_003)
    thresholds = deltas.abs().kthvalue(200_003 - int(0.2 * 200_003) + 1, dim=1, keepdim=True).values
    kept = torch.where(deltas.abs() >= thresholds, deltas, 0)
    sign = torch.where(kept.sum(0) >= 0, 1, -1)
    agree = kept * (kept * sign > 0)
    close(run("ties", deltas), agree.sum(0) / (agree != 0).sum(0).clamp(min=1))


def test_a_zero_sum_elects_plus() -> None:
    assert run("ties", torch.tensor([[1.0, -2.0], [-1.0, 2.0]]), density=1).tolist() == [1.0, 2.0]


@given(seed=seeds)
@fast
def test_dare_keeps_the_expectation(seed: int) -> None:
    """Survivors are delta / keep exactly, and their share is `keep` within five standard deviations."""
    delta = torch.ones(40_000)
    out = run("dare", delta[None], seed=seed, keep=0.25)
    assert set(out.unique().tolist()) <= {0.0, 4.0}
    assert abs((out != 0).float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)
