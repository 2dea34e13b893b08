"""Laws of the align steps beyond those of test_steps.py: knobs, gradients, and what each one aligns."""

import functools
import importlib
import math
import pkgutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import merganser
import merganser.steps.align
from merganser.errors import SentenceError, WeightsError
from merganser.merge import merge
from merganser.steps.align.knots import knots, knots_in_turn
from merganser.steps.align.permute import SPECS, permute, prepare
from merganser.steps.combine.ties import ties

NAMES = [module.name for module in pkgutil.iter_modules(merganser.steps.align.__path__)]
ALIGN = {name: getattr(importlib.import_module(f"merganser.steps.align.{name}"), name) for name in NAMES}
KNOBS: dict[str, list[dict[str, Any]]] = {
    "knots": [{}, {"threshold": 0}, {"conv": "mean"}],
    "core": [{}, {"conv": "mean"}],
    "permute": [{}, {"to": "base"}, {"spec": "mlp"}],
}
WRONG: dict[str, list[dict[str, Any]]] = {
    "knots": [{"threshold": -1}, {"threshold": "small"}, {"threshold": float("nan")}, {"conv": "svd"}],
    "core": [{"conv": "svd"}],
    "permute": [{"to": "last"}, {"spec": "resnet"}, {"spec": "no/such/file.toml"}, {"spec": 3}],
}
every_align = pytest.mark.parametrize(("name", "knobs"), [(n, k) for n in ALIGN for k in KNOBS[n]], ids=str)
fast = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 6)


def normal(seed: int, *shape: int) -> Tensor:
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@every_align
def test_gradients_flow(name: str, knobs: dict) -> None:
    deltas = normal(0, 3, 6, 5).requires_grad_()
    coords, restore = ALIGN[name](deltas, **knobs)
    restore(coords.relu().sum(0)).square().sum().backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    assert deltas.grad.any()


@pytest.mark.parametrize(("name", "knobs"), [(n, k) for n, many in WRONG.items() for k in many], ids=str)
def test_a_knob_out_of_range_is_named(name: str, knobs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        ALIGN[name](normal(0, 3, 4, 4), **knobs)


# --- knots


@given(seed=seeds, shape=st.sampled_from([(5, 3), (3, 5), (40, 2), (3, 2, 2, 2)]), experts=counts)
@fast
def test_rows_of_the_coordinates_are_orthogonal_and_fall(seed: int, shape: tuple, experts: int) -> None:
    coords, _ = knots(normal(seed, experts, *shape))
    rows = torch.cat(list(coords), dim=1)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(rows @ rows.mT, norms.square().diag(), rtol=1e-4, atol=1e-9)
    assert (norms[:-1] >= norms[1:]).all()


def test_knots_do_not_depend_on_the_sign_of_a_singular_vector() -> None:
    """Turning the outputs' signs turns singular vectors, and nothing else, whatever the decomposition returned."""
    deltas, signs = normal(0, 3, 6, 5), torch.tensor([1, -1, -1, 1, 1, -1.0])[:, None]
    coords, restore = knots(deltas)
    turned, back = knots(deltas * signs)
    close(turned.abs(), coords.abs())
    close(back(ties(turned, density=0.3)) * signs, restore(ties(coords, density=0.3)))


def test_knots_settle_the_sign_by_the_largest_entry() -> None:
    deltas = normal(0, 2, 6, 5)
    coords, restore = knots(deltas)
    basis = torch.stack([restore(torch.eye(len(coords[0]))[k].expand(5, -1).mT)[:, 0] for k in range(len(coords[0]))])
    assert (basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)) > 0).all()
    close(basis @ basis.mT, torch.eye(len(basis)))
    assert torch.equal(knots(-deltas)[0], -coords)


def test_knots_drop_what_is_below_the_threshold_and_what_is_noise() -> None:
    deltas = normal(1, 3, 12, 2) @ normal(2, 3, 2, 9)
    assert knots(deltas, threshold=0)[0].shape == (3, 6, 9)
    s = torch.linalg.svdvals(torch.cat(list(deltas), dim=1))
    assert knots(deltas, threshold=float(s[2:4].mean()))[0].shape == (3, 3, 9)


def test_a_convolution_is_the_matrix_of_its_patches() -> None:
    conv = normal(0, 3, 4, 2, 3, 3)
    assert torch.equal(knots(conv)[0], knots(conv.flatten(2))[0])
    assert torch.equal(knots(conv, conv="mean")[0], conv)


@given(
    seed=seeds, shape=st.sampled_from([(5, 3), (3, 5), (3, 2, 2, 2), (1, 1)]), experts=counts, rank=st.integers(0, 3)
)
@fast
def test_knots_of_deltas_in_turn_are_knots(seed: int, shape: tuple, experts: int, rank: int) -> None:
    many = (normal(seed, experts, shape[0], rank) @ normal(seed, rank, math.prod(shape[1:]))).reshape(experts, *shape)
    many, calls, buffer = many if rank < 3 else normal(seed, experts, *shape), [], torch.empty(shape)

    def deltas() -> Iterator[Tensor]:  # each in the place of the one before
        calls.append(len(calls))
        return (buffer.copy_(one) for one in many)

    found = knots_in_turn(deltas, many.shape)
    if found is None:
        assert not many.any() or shape[0] > experts * math.prod(shape[1:])
        return
    (coords, back), (same, restore) = found, knots(many)
    assert torch.equal(coords, same)
    assert torch.equal(back(coords.sum(0)), restore(same.sum(0)))
    assert len(calls) == 2


def test_a_merge_reads_the_deltas_for_knots_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": normal(0, 8, 6), "flat": normal(1, 6), "tall": normal(2, 20, 2), "still": normal(3, 4, 4)}
    experts = {f"e{k}": {n: w + normal(9 + k, *w.shape) * (n != "still") for n, w in base.items()} for k in range(3)}
    turns: list[Any] = []
    told = sys.modules[knots.__module__]

    @functools.wraps(knots_in_turn)
    def seen(*args: Any, **knobs: Any) -> Any:
        turns.append(knots_in_turn(*args, **knobs))
        return turns[-1]

    monkeypatch.setattr(told, "knots_in_turn", seen)
    merged = merge(base, experts, "knots | ties")
    assert {found is not None for found in turns} == {True, False}  # the tall and the still one are taken together
    monkeypatch.setattr(told, "knots_in_turn", functools.wraps(knots_in_turn)(lambda *_, **__: None))
    together = merge(base, experts, "knots | ties")
    assert all(torch.equal(merged[name], together[name]) for name in base)
    experts["e1"]["w"][0, 0] = float("nan")
    monkeypatch.setattr(told, "knots_in_turn", knots_in_turn)
    with pytest.raises(WeightsError, match="expert 'e1' has NaN or inf in tensor 'w'"):
        merge(base, experts, "knots | ties")


# --- permute


def mlp(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    for k in range(3):
        x = functional.linear(x, weights[f"net.{k}.weight"], weights[f"net.{k}.bias"])
        x = x.relu() if k < 2 else x
    return x


def block(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (weights[f"h.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    x = x + functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
    hidden = functional.gelu(x @ weights["h.0.mlp.c_fc.weight"] + weights["h.0.mlp.c_fc.bias"])  # Conv1D
    x = x + hidden @ weights["h.0.mlp.c_proj.weight"]
    hidden = functional.gelu(functional.linear(x, weights["l.0.fc1.weight"], weights["l.0.fc1.bias"]))
    return x + functional.linear(hidden, weights["l.0.fc2.weight"])


MLP = {"net.0.weight": (6, 3), "net.1.weight": (5, 6), "net.2.weight": (2, 5)}
MLP |= {f"net.{k}.bias": (n,) for k, n in enumerate((6, 5, 2))}
BLOCK = {"h.0.mlp.gate_proj.weight": (9, 4), "h.0.mlp.up_proj.weight": (9, 4), "h.0.mlp.down_proj.weight": (4, 9)}
BLOCK |= {"h.0.mlp.c_fc.weight": (4, 7), "h.0.mlp.c_fc.bias": (7,), "h.0.mlp.c_proj.weight": (7, 4)}
BLOCK |= {"l.0.fc1.weight": (8, 4), "l.0.fc1.bias": (8,), "l.0.fc2.weight": (4, 8), "l.0.norm.weight": (4,)}
networks = pytest.mark.parametrize(
    ("shapes", "net", "spec"), [(MLP, mlp, "mlp"), (BLOCK, block, "auto")], ids=["mlp", "block"]
)


def random_model(seed: int, shapes: dict) -> dict[str, Tensor]:
    return {name: 50 * normal(seed + k, *shape) for k, (name, shape) in enumerate(shapes.items())}


def aligned(experts: list[dict[str, Tensor]], base: dict[str, Tensor] | None, **knobs: Any) -> list[dict[str, Tensor]]:
    def read(name: str) -> tuple[Tensor | None, Tensor]:
        origin = None if base is None else base[name]
        return origin, torch.stack([e[name] if origin is None else e[name] - origin for e in experts])

    survey = prepare(read, list(experts[0]), rng=np.random.default_rng(0), **knobs)
    results: list[dict[str, Tensor]] = [{} for _ in experts]
    for name in experts[0]:
        origin, deltas = read(name)
        coords, _ = permute(deltas, name=name, base=origin, survey=survey, **knobs)
        for result, delta in zip(results, coords, strict=True):
            result[name] = delta if origin is None else origin + delta
    return results


@networks
def test_a_permuted_network_computes_the_same_and_is_nearer(shapes: dict, net: Any, spec: str) -> None:
    experts, x = [random_model(100 * e, shapes) for e in range(3)], normal(9, 10, 3 if net is mlp else 4)
    after = aligned(experts, None, spec=spec)
    assert all(torch.equal(after[0][name], experts[0][name]) for name in shapes)
    for before, now in zip(experts[1:], after[1:], strict=True):
        torch.testing.assert_close(net(now, x), net(before, x))
        distances = [sum((experts[0][n] - m[n]).square().sum() for n in shapes) for m in (before, now)]
        assert distances[1] < distances[0]


@networks
@pytest.mark.parametrize("to", ["first", "base"])
def test_a_renumbered_copy_is_found_back(shapes: dict, net: Any, spec: str, to: str) -> None:
    base = random_model(0, shapes)
    expert = {name: w + normal(k, *w.shape) for k, (name, w) in enumerate(base.items())}
    other = dict(expert)
    group = [("net.0.weight", 0), ("net.0.bias", 0), ("net.1.weight", 1)]
    if net is block:
        group = [("h.0.mlp.gate_proj.weight", 0), ("h.0.mlp.up_proj.weight", 0), ("h.0.mlp.down_proj.weight", 1)]
    for name, axis in group:
        order = torch.randperm(shapes[name][axis], generator=torch.Generator().manual_seed(1))
        other[name] = other[name].index_select(axis, order)
    assert not torch.equal(other[group[0][0]], expert[group[0][0]])
    first, second = aligned([expert, other], base, spec=spec, to=to)
    for name in shapes:
        close(second[name], expert[name])
        close(first[name], expert[name])


def test_sizes_tell_linear_from_conv1d_and_broken_groups_are_left_alone() -> None:
    shapes = {"h.mlp.c_fc.weight": (7, 4), "h.mlp.c_fc.bias": (7,), "h.mlp.c_proj.weight": (4, 7)}
    models = [random_model(100 * e, shapes) for e in range(2)]
    stacked = {name: torch.stack([m[name] for m in models]) for name in shapes}
    survey = prepare(lambda name: (None, stacked[name]), list(shapes))
    assert {name: list(axes) for name, axes in survey.items()} == {
        "h.mlp.c_fc.weight": [0], "h.mlp.c_fc.bias": [0], "h.mlp.c_proj.weight": [1]
    }  # fmt: skip
    stacked["h.mlp.c_proj.weight"] = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="spec 'auto' finds no units"):
        prepare(lambda name: (None, stacked[name]), list(shapes))


def test_a_spec_of_ones_own(tmp_path: Any) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text('[mine.all]\n"*in" = 0\n"*out" = 1\n')
    models = [random_model(100 * e, {"a.in": (6, 3), "a.out": (2, 6)}) for e in range(2)]
    _, second = aligned(models, None, spec=str(spec))
    close(second["a.out"] @ second["a.in"], models[1]["a.out"] @ models[1]["a.in"])
    assert not torch.equal(second["a.in"], models[1]["a.in"])


def test_alone_a_tensor_passes_unchanged() -> None:
    deltas = normal(0, 3, 4, 4)
    coords, restore = permute(deltas, name="net.0.weight")
    assert torch.equal(coords, deltas)
    assert torch.equal(restore(coords[0]), deltas[0])


def test_to_the_base_without_one_and_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [random_model(100 * e, MLP) for e in range(2)]
    with pytest.raises(ValueError, match="base"):
        aligned(models, None, spec="mlp", to="base")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match="needs the 'align' extra"):
        aligned(models, None, spec="mlp")


def test_a_merge_aligns_first() -> None:
    base = random_model(0, BLOCK)
    one = {name: w + normal(k, *w.shape) for k, (name, w) in enumerate(base.items())}
    renumbered = one | {
        n: one[n].flip(axis) for n, axis in [("l.0.fc1.weight", 0), ("l.0.fc1.bias", 0), ("l.0.fc2.weight", 1)]
    }
    merged = merge(base, [one, renumbered], "permute | average")
    for name in BLOCK:
        close(merged[name], one[name])
    experts = [one, {name: w + normal(9 + k, *w.shape) for k, (name, w) in enumerate(base.items())}]
    aligned_sum, plain = (merge(base, experts, how) for how in ("knots | task_arithmetic", "task_arithmetic"))
    assert any(
        (merge(base, experts, "knots | ties")[name] - merge(base, experts, "ties")[name]).any() for name in BLOCK
    )
    for name in BLOCK:
        close(aligned_sum[name], plain[name])
    with pytest.raises(SentenceError, match="permute: spec 'auto' finds no units"):
        merge({"w": base["l.0.fc1.weight"]}, [{"w": one["l.0.fc1.weight"]}], "permute | average")


def test_every_table_is_well_formed() -> None:
    for table in tomllib.loads(SPECS.read_text()).values():
        assert table.keys() <= {"all", "if_present", "named"}
        assert len(table["all"]) >= 2
        assert all(isinstance(axis, int) for axis in [*table["all"].values(), *table.get("if_present", {}).values()])


@networks
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 4), power=st.integers(-8, 8), data=st.data())
@fast
def test_renumbering_has_the_laws_of_an_align_step(
    shapes: dict, net: Any, spec: str, seed: int, experts: int, power: int, data: st.DataObject
) -> None:
    """Same bytes again; experts that are the base stay; scaled and identical ones are renumbered alike; to the base, in
    any order."""
    base, many = random_model(seed, shapes), [random_model(seed + 100 * (e + 1), shapes) for e in range(experts)]
    order = data.draw(st.permutations(range(experts)))
    first, to_base = aligned(many, None, spec=spec), aligned(many, base, spec=spec, to="base")
    again, still = aligned(many, None, spec=spec), aligned([base] * experts, base, spec=spec, to="base")
    scaled = aligned([{n: w * 2.0**power for n, w in one.items()} for one in many], None, spec=spec)
    turned = aligned([many[t] for t in order], base, spec=spec, to="base")
    alike = aligned([many[0]] * experts, base, spec=spec, to="base")
    for name in shapes:
        for k in range(experts):
            assert torch.equal(again[k][name], first[k][name])
            assert torch.equal(still[k][name], base[name])
            assert torch.equal(scaled[k][name], first[k][name] * 2.0**power)
            assert torch.equal(turned[k][name], to_base[order[k]][name])
            assert torch.equal(alike[k][name], to_base[0][name])


@pytest.mark.parametrize("how", ["permute | average", "permute | ties(density=0.5)"])
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 4), data=st.data())
@settings(max_examples=4, deadline=None)
def test_in_memory_on_disk_and_in_parts_a_network_is_renumbered_alike(
    how: str, seed: int, parts: int, data: st.DataObject
) -> None:
    models = {f"m{e}": random_model(seed + 100 * e, BLOCK) for e in range(3)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, weights in models.items():
            merganser.save(weights, root / name)
        base, *experts = (root / name for name in models)
        memory = merge(base, experts, how, seed=seed)
        merge(base, experts, how, seed=seed, into=root / "out")
        for k in data.draw(st.permutations(range(1, parts + 1))):
            merge(base, experts, how, seed=seed, into=root / "parts", part=(k, parts))
        merganser.join(root / "parts")
        files = [(root / one / "model.safetensors").read_bytes() for one in ("out", "parts")]
        assert files[0] == files[1]
        on_disk = merganser.open_weights(root / "out")
        assert all(torch.equal(memory[name], on_disk[name]) for name in BLOCK)
