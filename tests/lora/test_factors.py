"""Steps on factors: the same as on full deltas, and no decomposition of a layer's size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import base, by_hand, write
from safetensors.torch import load_file
from torch import Tensor

import merganser
from merganser.job import Job
from merganser.loop import merge_each
from merganser.sentence import parse
from merganser.steps.align.core import core, core_factors
from merganser.steps.align.knots import knots, knots_factors
from merganser.steps.combine.iso_c import iso_c
from merganser.steps.combine.task_arithmetic import task_arithmetic
from merganser.steps.combine.ties import ties
from merganser.steps.combine.tsv import tsv
from merganser.survey import survey
from merganser.weights.adapter import Adapted, Adapter, Factors

fast = settings(max_examples=25, deadline=None)
shapes = st.sampled_from([(9, 7), (5, 12), (12, 4), (3, 3)])
ranks = st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any)
seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, shape: tuple[int, ...], ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape[0], r, generator=rng), torch.randn(r, shape[1], generator=rng)) for r in ranks]


def full(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([b @ a for b, a in factors])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


@given(seed=seeds, shape=shapes, ranks=ranks)
@fast
def test_knots_from_factors_are_knots(seed: int, shape: tuple, ranks: list[int]) -> None:
    factors = drawn(seed, shape, ranks)
    coords, restore = knots_factors(factors, shape) or pytest.fail("no form for factors")
    theirs, back = knots(full(factors))
    assert coords.shape == theirs.shape
    close(coords, theirs)  # in sign too: the largest entry of a basis vector settles it
    close(Factors(*restore(ties(coords, density=0.5))).product(shape), back(ties(theirs, density=0.5)))


@pytest.mark.parametrize("form", [knots_factors, core_factors])
@given(seed=seeds, shape=shapes, ranks=ranks)
@fast
def test_coordinates_are_restored_and_linear_merges_are_the_same(
    form: Any, seed: int, shape: tuple, ranks: list
) -> None:
    factors = drawn(seed, shape, ranks)
    coords, restore = form(factors, shape)
    for row, delta in zip(coords, full(factors), strict=True):
        close(Factors(*restore(row)).product(shape), delta)
    close(Factors(*restore(task_arithmetic(coords))).product(shape), full(factors).sum(0))


@pytest.mark.parametrize("merger", [tsv, iso_c, task_arithmetic])
@given(seed=seeds, ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@fast
def test_core_from_factors_is_core_where_the_basis_does_not_matter(merger: Any, seed: int, ranks: list[int]) -> None:
    factors = drawn(seed, (14, 12), ranks)
    coords, restore = core_factors(factors, (14, 12)) or pytest.fail("no form for factors")
    theirs, back = core(full(factors))
    assert coords.shape[1:] == theirs.shape[1:]
    torch.testing.assert_close(
        Factors(*restore(merger(coords))).product((14, 12)), back(merger(theirs)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("form", [knots_factors, core_factors])
@given(seed=seeds, data=st.data())
@fast
def test_the_sign_of_a_basis_vector_does_not_matter(form: Any, seed: int, data: st.DataObject) -> None:
    """Turning coordinates as another sign of the singular vectors would turns nothing that comes back."""
    factors = drawn(seed, (9, 7), [2, 2, 2])
    coords, restore = form(factors, (9, 7))
    rows = torch.tensor(
        data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(coords[0]), max_size=len(coords[0])))
    )
    turned = ties(coords * rows[:, None], density=0.4) * rows[:, None]
    close(Factors(*restore(turned)).product((9, 7)), Factors(*restore(ties(coords, density=0.4))).product((9, 7)))


def test_a_convolution_and_what_passes_unchanged() -> None:
    factors = drawn(0, (4, 2 * 9), [2, 1])
    deltas = full(factors).reshape(2, 4, 2, 3, 3)
    for form, dense in ((knots_factors, knots), (core_factors, core)):
        coords, _ = form(factors, (4, 2, 3, 3))
        assert coords.shape == dense(deltas)[0].shape
        assert form(factors, (4, 2, 3, 3), conv="mean") is None
        assert form(drawn(0, (4, 6), [1]), (4, 2, 3)) is None
        with pytest.raises(ValueError, match="conv"):
            form(factors, (4, 18), conv="svd")
    with pytest.raises(ValueError, match="threshold"):
        knots_factors(factors, (4, 18), threshold=-1)


MODULES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (8, 6), "layers.1.square": (8, 8)}
SENTENCES = [
    "average", "task_arithmetic(weights=[1, -0.5, 2]) | scale(by=0.3)", "scale(by=2.0) | average", "knots | average",
    "knots | ties(density=0.5)", "knots | ties(scope='tensor') | scale(by=0.7) | trim(density=0.9)", "core | tsv",
    "knots | dare(keep=0.5) | ties", "ties(density=0.3)", "scale(by=0.5) | knots | ties", "knots | core | tsv",
]  # fmt: skip


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Path]:
    """Three adapters of different ranks and targets, one of which trains an embedding and a norm in full."""
    base(tmp_path / "base")
    made = {"one": by_hand(tmp_path / "one", MODULES, 2, 1), "two": by_hand(tmp_path / "two", MODULES, 3, 2)}
    some = dict(list(MODULES.items())[:2])
    made["three"] = by_hand(tmp_path / "three", some, 1, 3, modules_to_save=["norm"])
    told = load_file(made["three"] / "adapter_model.safetensors")
    told["base_model.model.layers.0.norm.weight"] = torch.randn(8)
    told["base_model.model.embed.lora_embedding_A"] = torch.randn(1, 11)
    told["base_model.model.embed.lora_embedding_B"] = torch.randn(8, 1)
    import json

    write(made["three"], told, json.loads((made["three"] / "adapter_config.json").read_text()))
    return made


@pytest.mark.parametrize("how", SENTENCES)
def test_a_merge_of_adapters_is_that_of_the_models_they_make(tmp_path: Path, experts: dict, how: str) -> None:
    origin = merganser.open_weights(tmp_path / "base")
    models = {who: {n: t.clone() for n, t in Adapted(origin, Adapter(path)).items()} for who, path in experts.items()}
    ours, theirs = merganser.merge(tmp_path / "base", experts, how), merganser.merge(tmp_path / "base", models, how)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("how", ["average", "knots | ties(density=0.5)", "ties", "dare(keep=0.5) | average"])
def test_memory_disk_and_parts_give_the_same_bytes(tmp_path: Path, experts: dict, how: str) -> None:
    memory = merganser.merge(tmp_path / "base", experts, how)
    disk = merganser.merge(tmp_path / "base", experts, how, into=tmp_path / "out")
    for k in (1, 2):
        merganser.merge(tmp_path / "base", experts, how, into=tmp_path / "parts", part=(k, 2))
    from merganser.weights.parts import join

    parts = join(tmp_path / "parts")
    assert all(torch.equal(memory[n], disk[n]) and torch.equal(memory[n], parts[n]) for n in memory)
    cards = [merganser.card.read_card(tmp_path / f)["inputs"] for f in ("out", "parts")]
    assert cards[0] == cards[1]
    assert set(cards[0]) == {"base", *experts}


@pytest.mark.parametrize("how", ["knots | ties", "knots | average", "core | tsv", "average"])
def test_no_decomposition_is_of_a_layers_size(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """With aligned factors nothing larger than the ranks together is decomposed, and no expert's delta is made."""
    rng = torch.Generator().manual_seed(0)

    origin = {"w.weight": torch.randn(300, 200, generator=rng)}
    seen: list[int] = []
    for name in ("svd", "eigh"):
        plain = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda x, *a, _p=plain, **k: (seen.append(max(x.shape)), _p(x, *a, **k))[1]
        )
    monkeypatch.setattr(Adapted, "__getitem__", lambda *_: pytest.fail("an expert was made in full"))
    views = {}
    for k in range(3):
        told = {
            f"base_model.model.w.lora_{x}.weight": torch.randn(*s, generator=rng)
            for x, s in (("A", (4, 200)), ("B", (300, 4)))
        }
        adapter = Adapter.__new__(Adapter)
        adapter.path, adapter.weights, adapter.full = Path(), told, {}
        adapter.config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
        adapter.modules = {"w": adapter._module("w", {"lora_A": next(iter(told)), "lora_B": list(told)[1]})}
        views[f"e{k}"] = Adapted(origin, adapter)
    job = Job(origin, views, parse(how), ["w.weight"])
    merge_each(job, survey(job), lambda name, piece: None)
    assert all(size <= 12 for size in seen)
