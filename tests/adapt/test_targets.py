"""What frozen networks say is worked out once: the same in memory and from files, for every expert, word and run."""

import pytest
import torch

import merganser
from merganser.models import targets as module
from merganser.models.encoder import features
from merganser.models.inputs import Subset
from merganser.models.targets import LARGEST, Targets


@pytest.fixture
def asked(monkeypatch):
    """How many inputs each network was asked about, a call each."""
    calls = []

    def counted(encoder, weights, inputs, **how):
        calls.append(len(inputs))
        return features(encoder, weights, inputs, **how)

    monkeypatch.setattr(module, "features", counted)
    return calls


def adapted(toy, how, into=None, **more):
    return merganser.adapt(
        toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, how=how, into=into,
        **{"kind": "fp32", **more},
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(one[n][k], other[n][k]) for n in one for k in one[n])


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["ri(steps=6)", "distac(steps=6)", "coadapt(steps=6)"])
def test_files_and_memory_give_the_same_experts(toy, tmp_path, how, kind):
    first = adapted(toy, how, tmp_path / "a", kind=kind)
    assert same(first, adapted(toy, how, kind=kind))
    targets = list((tmp_path / "a" / ".targets").iterdir())
    assert targets, "they are kept"
    for file in targets:
        file.unlink()
    again = adapted(toy, how, tmp_path / "b", kind=kind, _targets=tmp_path / "a" / ".targets")
    assert same(first, again), "the folder may be deleted"


def test_each_network_is_asked_once(toy, tmp_path, asked):
    count = len(toy.experts)
    adapted(toy, "ri(steps=6)", tmp_path / "one", _targets=tmp_path / "t")
    assert len(asked) == count + 1, "every expert and, once for all, the base"
    first = adapted(toy, "ri(steps=6, alpha=3.0)", tmp_path / "two", _targets=tmp_path / "t")
    assert len(asked) == count + 1, "other knobs ask for nothing more"
    adapted(toy, "ri(steps=6) | coadapt(steps=6)", tmp_path / "three", _targets=tmp_path / "t")
    assert len(asked) == count + 1, "nor does what is said together"
    adapted(toy, "ri(steps=7)", tmp_path / "four", _targets=tmp_path / "t")
    assert len(asked) == 2 * (count + 1), "other inputs do"
    assert same(first, adapted(toy, "ri(steps=6, alpha=3.0)"))


def test_without_a_folder_only_what_is_asked_again_stays(toy, asked):
    said = Targets(toy.encoder, toy.inputs, "fp32")
    at = torch.arange(9)
    for _ in range(2):
        assert torch.equal(said(toy.base, at)[:], features(toy.encoder, toy.base, Subset(toy.inputs, at), kind="fp32"))
    assert asked == [9]
    for _ in range(2):
        said(toy.experts["east"], at, keep=False)
    assert asked == [9, 9, 9]
    said(toy.base, at + 1)
    assert len(asked) == 4


def test_rows_are_rounded_to_fp16_where_the_network_computes_in_bf16(toy, tmp_path):
    at = torch.arange(12)
    exact = features(toy.encoder, toy.base, Subset(toy.inputs, at), kind="bf16")
    found = Targets(toy.encoder, toy.inputs, "bf16", tmp_path)(toy.base, at)
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(found[rows], exact[rows].half().float())
    assert found.shape == (12, toy.heads["east"].width)
    assert next(tmp_path.iterdir()).stat().st_size < 2 * exact.numel() + 200
    large = {**toy.base, "3.weight": toy.base["3.weight"] * LARGEST}
    wide = Targets(toy.encoder, toy.inputs, "bf16", tmp_path)(large, at)
    assert wide[:].isfinite().all(), "what fp16 cannot hold is kept in fp32"


def test_what_was_half_written_is_written_again(toy, tmp_path):
    at = torch.arange(5)
    first = Targets(toy.encoder, toy.inputs, "fp32", tmp_path)(toy.base, at)[:]
    (file,) = tmp_path.iterdir()
    file.rename(file.with_name(f".{file.name}.partial"))  # as a kill leaves it
    assert torch.equal(Targets(toy.encoder, toy.inputs, "fp32", tmp_path)(toy.base, at)[:], first)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
