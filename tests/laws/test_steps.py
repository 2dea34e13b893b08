"""Laws of every edit and combine step, found by walking the folders.

A new step is under these laws as soon as its file exists; what does not hold for it is declared below, with the reason.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GIVEN = ("rng", "name", "survey")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "scale": [{"by": -0.5}],
    "dare": [{"keep": 0.5}, {"keep": 0.5, "rescale": False}],
    "ties": [
        {"density": 0.5},
        {"merge": "sum"},
        {"density": 0.5, "merge": "max"},
        {"rule": "reference"},
        {"density": 1},
    ],
    "tsv": [{"rank": 1}, {"conv": "mean"}],
    "iso_c": [{"conv": "mean"}],
}
WRONG: dict[str, list[dict[str, Any]]] = {
    "average": [{"weights": [1, 2]}, {"weights": [1, -2, 1]}, {"weights": [1, math.nan, 1]}],
    "task_arithmetic": [{"weights": [1, 2]}, {"weights": [1, math.inf, 1]}],
    "ties": [{"density": x} for x in (0, 50, -0.1, math.nan, [0.2, 2, 0.2], [0.2, 0.2])]
    + [{"weights": [1, 2]}, {"scope": "layer"}, {"merge": "median"}, {"rule": "paper"}],
    "tsv": [{"rank": 0}, {"rank": 1.5}, {"conv": "svd"}],
    "iso_c": [{"conv": "svd"}],
    "dare": [{"keep": 0}, {"keep": 1.5}, {"keep": math.nan}],
    "scale": [{"by": math.inf}, {"by": math.nan}],
}
NOT_ELEMENTWISE = {
    "tsv": "a matrix has singular vectors, its parts have others",
    "iso_c": "a matrix has singular vectors, its parts have others",
    "dare": "its dice are thrown once per tensor",
}
WHOLE = {"ties": {"density": 1}, "tsv": {"rank": 10**6}}  # knobs with which a step keeps all of each expert
SUMS = {"task_arithmetic": "T identical experts give T times their delta"}
NOT_IDEMPOTENT = {"iso_c": "makes the spectrum flat, see its own law"}


def found(kind: str) -> dict[str, Callable[..., Tensor]]:
    folder = importlib.import_module(f"merganser.steps.{kind}")
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    return {name: getattr(importlib.import_module(f"{folder.__name__}.{name}"), name) for name in names}


EDIT, COMBINE = found("edit"), found("combine")
STEPS = EDIT | COMBINE
every_step = pytest.mark.parametrize(
    ("name", "knobs"), [(name, knobs) for name in STEPS for knobs in [{}, *VARIANTS.get(name, [])]], ids=str
)
every_combine = pytest.mark.parametrize(
    ("name", "knobs"), [(name, knobs) for name in COMBINE for knobs in [{}, *VARIANTS.get(name, [])]], ids=str
)
fast = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(), (1,), (7,), (5, 3), (3, 5), (4, 4), (2, 3, 4), (3, 2, 2, 2)])
counts = st.integers(1, 6)


def run(name: str, deltas: Tensor, *, seed: int = 0, **knobs: Any) -> Tensor:
    """Call a step as the merge does; an edit is called on the first expert's delta."""
    asked = inspect.signature(STEPS[name]).parameters
    extra = {"rng": torch.Generator().manual_seed(seed)} if "rng" in asked else {}
    return STEPS[name](deltas if name in COMBINE else deltas[0], **knobs, **extra)


def normal(seed: int, *shape: int) -> Tensor:
    """Small numbers as deltas have, generic enough for singular values to be distinct."""
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coarse(seed: int, *shape: int) -> Tensor:
    """Few distinct values: many equal magnitudes and zero sums, and every sum is exact in fp32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 8


def some(name: str, seed: int, *shape: int) -> Tensor:
    """Return generic numbers for spectral steps, coarse ones for the others."""
    return (normal if name in NOT_ELEMENTWISE else coarse)(seed, *shape)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@every_step
@given(shape=shapes, experts=counts)
@fast
def test_zero_in_zero_out(name: str, knobs: dict, shape: tuple, experts: int) -> None:
    merged = run(name, torch.zeros(experts, *shape), **knobs)
    assert merged.shape == shape
    assert not merged.any()


@every_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (6,), (4, 3), (0, 3), (2, 3, 4), (3, 2, 2, 2)], ids=str)
def test_shape_dtype_and_device_stay_and_inputs_are_untouched(
    name: str, knobs: dict, dtype: torch.dtype, shape: tuple
) -> None:
    deltas = normal(0, 3, *shape).to(dtype)
    before = deltas.clone()
    merged = run(name, deltas, **knobs)
    assert (merged.shape, merged.dtype, merged.device) == (shape, dtype, deltas.device)
    assert merged.isfinite().all()
    assert torch.equal(deltas, before)


@every_combine
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_the_order_of_experts_does_not_matter(name: str, knobs: dict, seed: int, shape: tuple, experts: int) -> None:
    deltas = some(name, seed, experts, *shape)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    close(run(name, deltas[order], **knobs), run(name, deltas, **knobs))


@every_step
@given(seed=seeds, shape=shapes, experts=counts, power=st.integers(-8, 8))
@fast
def test_scaling_the_deltas_scales_the_result(
    name: str, knobs: dict, seed: int, shape: tuple, experts: int, power: int
) -> None:
    deltas = some(name, seed, experts, *shape)
    close(run(name, deltas * 2.0**power, **knobs) / 2.0**power, run(name, deltas, **knobs))


@pytest.mark.parametrize("name", sorted(COMBINE.keys() - NOT_IDEMPOTENT.keys()))
@given(seed=seeds, shape=shapes, experts=counts)
@fast
def test_identical_experts_give_their_delta(name: str, seed: int, shape: tuple, experts: int) -> None:
    delta = normal(seed, *shape)
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
    deltas = normal(seed, 3, 6, 5)
    assert torch.equal(run(name, deltas, seed=seed, **knobs), run(name, deltas, seed=seed, **knobs))


@every_step
@given(seed=seeds, experts=st.integers(1, 9), length=st.integers(1, 200), data=st.data())
@fast
def test_elementwise_steps_do_not_see_how_a_model_is_cut(
    name: str, knobs: dict, seed: int, experts: int, length: int, data: st.DataObject
) -> None:
    """Parts surveyed one by one and merged one by one are the merged whole, bit for bit."""
    if name in NOT_ELEMENTWISE:
        return
    deltas = normal(seed, experts, length)
    cut = data.draw(st.integers(0, length))
    parts = [deltas[:, :cut], deltas[:, cut:]]
    passes = getattr(importlib.import_module(STEPS[name].__module__), "passes", None)
    if passes is not None:
        survey: list[Tensor] = []
        for look in passes(**knobs):
            survey.append(look(parts[0], survey) + look(parts[1], survey))
        knobs = knobs | {"survey": survey}
    whole = run(name, deltas, **{k: v for k, v in knobs.items() if k != "survey"})
    assert torch.equal(torch.cat([run(name, part, **knobs) for part in parts]), whole)


@every_step
def test_gradients_flow(name: str, knobs: dict) -> None:
    deltas = normal(3, 3, 12, 10).requires_grad_()
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
        run(name, normal(0, 3, 4, 4), **knobs)


@pytest.mark.parametrize("name", list(STEPS))
def test_every_knob_refuses_nonsense_by_name(name: str) -> None:
    for knob, parameter in inspect.signature(STEPS[name]).parameters.items():
        asked = parameter.kind is parameter.KEYWORD_ONLY and knob not in GIVEN
        if asked and not isinstance(parameter.default, bool):
            with pytest.raises(ValueError, match=knob):
                run(name, normal(0, 3, 4, 4), **{knob: "nonsense"})


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
