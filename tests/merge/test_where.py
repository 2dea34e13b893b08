"""Knobs by pattern, by layer and by expert: what a tensor gets is what the sentence with those knobs gives it."""

import pytest
import torch
from torch import Tensor

import merganser
from merganser.errors import SentenceError
from merganser.where import interpolate, layers_of, read_where


def model(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = ["embed.weight", "head.weight"] + [f"layers.{k}.{w}.weight" for k in range(5) for w in ("attn", "mlp")]
    return {name: torch.randn(6, 4, generator=rng) for name in names}


@pytest.fixture
def models() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    return model(0), {"a": model(1), "b": model(2)}


def test_a_pattern_changes_its_tensors_and_no_other(models):
    plain = merganser.merge(*models, "task_arithmetic | scale(by=0.3)")
    other = merganser.merge(*models, "task_arithmetic | scale(by=0.7)")
    mixed = merganser.merge(*models, "task_arithmetic | scale(by=0.3)", where={"*.mlp.*": {"scale": {"by": 0.7}}})
    for name in plain:
        assert torch.equal(mixed[name], (other if ".mlp." in name else plain)[name]), name


def test_the_first_pattern_that_names_a_knob_decides(models):
    where = {"layers.0.*": {"scale": {"by": 1.0}}, "layers.*": {"scale": {"by": 0.5}}}
    mixed = merganser.merge(*models, "average | scale(by=0.0)", where=where)
    base, average = models[0], merganser.merge(*models, "average")
    assert torch.equal(mixed["layers.0.mlp.weight"], average["layers.0.mlp.weight"])
    assert torch.equal(mixed["embed.weight"], base["embed.weight"])
    half = (base["layers.3.mlp.weight"] + average["layers.3.mlp.weight"]) / 2
    torch.testing.assert_close(mixed["layers.3.mlp.weight"], half)


def test_a_gradient_is_interpolated_over_the_layers(models):
    where = {"layers.*": {"scale": {"by": {"gradient": [0.0, 1.0, 0.5]}}}}
    mixed = merganser.merge(*models, "average | scale(by=1.0)", where=where)
    base, average = models[0], merganser.merge(*models, "average")
    for layer, by in enumerate([0.0, 0.5, 1.0, 0.75, 0.5]):
        name = f"layers.{layer}.attn.weight"
        torch.testing.assert_close(mixed[name], torch.lerp(base[name], average[name], by))
    assert [interpolate([2.0], t) for t in (0, 0.3, 1)] == [2.0] * 3


def test_one_expert_may_have_a_gradient_and_another_none(models):
    where = {"layers.*": {"task_arithmetic": {"weights": {"a": {"gradient": [0.0, 1.0]}, "b": 0.5}}}}
    mixed = merganser.merge(*models, "task_arithmetic", where=where)
    listed = {"layers.*": {"task_arithmetic": {"weights": [{"gradient": [0.0, 1.0]}, 0.5]}}}
    again = merganser.merge(*models, "task_arithmetic", where=listed)
    base, experts = models
    for layer, weight in enumerate([0.0, 0.25, 0.5, 0.75, 1.0]):
        name = f"layers.{layer}.attn.weight"
        told = base[name] + weight * (experts["a"][name] - base[name]) + 0.5 * (experts["b"][name] - base[name])
        torch.testing.assert_close(mixed[name], told)
        assert torch.equal(again[name], mixed[name])
    plain = merganser.merge(*models, "task_arithmetic")
    assert torch.equal(mixed["embed.weight"], plain["embed.weight"])


@pytest.mark.parametrize(
    "weights", [{"a": {"gradient": "x"}, "b": 1}, [{"gradient": []}, 1], {"a": {"gradient": [0, "x"]}, "b": 1}]
)
def test_a_gradient_of_one_expert_is_checked_as_one_of_all(models, weights):
    with pytest.raises(SentenceError, match="a gradient is"):
        merganser.merge(*models, "average", where={"layers.*": {"average": {"weights": weights}}})
    with pytest.raises(SentenceError, match="is told for a pattern of tensors: where = "):
        merganser.merge(*models, f"average(weights={weights!r})")


def test_tensors_with_the_same_density_are_trimmed_together(models):
    """TIES at density 0.2 on the attention alone is TIES of a model that has nothing else."""
    base, experts = models
    mixed = merganser.merge(base, experts, "ties(density=0.5)", where={"*.attn.*": {"ties": {"density": 0.2}}})
    few = [name for name in base if ".attn." in name]
    alone = merganser.merge(
        {n: base[n] for n in few}, {e: {n: w[n] for n in few} for e, w in experts.items()}, "ties(density=0.2)"
    )
    assert all(torch.equal(mixed[name], alone[name]) for name in few)


def test_knobs_by_expert(models):
    base, experts = models
    by_name = merganser.merge(base, experts, "task_arithmetic(weights={'b': 0.5, 'a': 2.0})")
    by_place = merganser.merge(base, experts, "task_arithmetic(weights=[2.0, 0.5])")
    assert all(torch.equal(by_name[name], by_place[name]) for name in base)
    scaled = merganser.merge(base, experts, "scale(by={'a': 2.0, 'b': 0.5}) | task_arithmetic")
    assert all(torch.equal(scaled[name], by_place[name]) for name in base)
    with pytest.raises(SentenceError, match="'c': there is no such expert"):
        merganser.merge(base, experts, "scale(by={'a': 2.0, 'c': 0.5}) | average")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"*.mpl.*": {"scale": {"by": 1.0}}}, "no tensor has such a name"),
        ({"*": {"sclae": {"by": 1.0}}}, "did you mean 'scale'"),
        ({"*": {"scale": {"bye": 1.0}}}, "did you mean 'by'"),
        ({"*": {"scale": {"by": {"gradient": [0.0, 1.0]}}}}, "lies in no numbered layer"),
        ({"layers.*": {"scale": {"by": {"gradient": []}}}}, "a gradient is"),
        ({"layers.*": {"scale": {"by": float("nan")}}}, "by must be"),
    ],
)
def test_what_cannot_be_meant_is_told_before_work(models, where, says):
    with pytest.raises(SentenceError, match=says):
        merganser.merge(*models, "average | scale(by=1.0)", where=where)


def test_the_command_lines_form():
    lines = ["*.mlp.*: ties(density=0.4) | scale(by=2)", "*.mlp.*:scale(by=1)"]
    assert read_where(lines) == {"*.mlp.*": {"ties": {"density": 0.4}, "scale": {"by": 1}}}
    with pytest.raises(SentenceError, match="write PATTERN"):
        read_where(["nonsense"])


def test_layers_are_counted_a_stack():
    names = ["encoder.layer.0.x", "encoder.layer.11.x", "decoder.layer.2.x", "embed", "conv1.weight"]
    assert layers_of(names) == {
        "encoder.layer.0.x": (0, 12),
        "encoder.layer.11.x": (11, 12),
        "decoder.layer.2.x": (2, 3),
    }
