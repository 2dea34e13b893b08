"""AdaMerging: entropy falls, an interrupted run ends in the same bytes, and what cannot be learned is said."""

import pytest
import torch

import merganser
from merganser.errors import DataError, HeadError
from merganser.learn.coefficients import Coefficients, adamerging, entropy

SHORT = {"steps": 40, "lr": 1e-2, "batch": 50, "kind": "fp32"}


def own(toy):
    return {name: task.inputs for name, task in toy.train.items()}


def unsure(toy, coefficients):
    """Return the entropy of the merged model under every head on that task's inputs, by `merge` alone."""
    merged = merganser.merge(toy.base, toy.experts, "weighted", ingredients={"coefficients": coefficients})
    logits = {n: h(torch.func.functional_call(toy.encoder, merged, (own(toy)[n],))) for n, h in toy.heads.items()}
    return float(sum(entropy(z) for z in logits.values()))


@pytest.mark.parametrize("per", ["tensor", "expert"])
def test_the_merged_model_becomes_surer(toy, per):
    found = adamerging(toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=own(toy), per=per, **SHORT)
    assert set(found) == set(toy.base)
    start = {n: torch.full((4,), 0.3) for n in toy.base}
    assert unsure(toy, found) < 0.98 * unsure(toy, start)
    if per == "expert":
        assert all(torch.equal(c, found["0.weight"]) for c in found.values())


def test_shared_inputs_are_asked_of_every_head(toy):
    found = adamerging(toy.base, toy.experts, encoder=toy.encoder, heads=toy.heads, inputs=toy.inputs, **SHORT)

    def all_heads(coefficients):
        merged = merganser.merge(toy.base, toy.experts, "weighted", ingredients={"coefficients": coefficients})
        x = torch.func.functional_call(toy.encoder, merged, (toy.inputs,))
        return float(sum(entropy(head(x)) for head in toy.heads.values()))

    assert all_heads(found) < 0.98 * all_heads({n: torch.full((4,), 0.3) for n in toy.base})


def test_interrupted_it_ends_in_the_same_bytes(toy, tmp_path, monkeypatch):
    from merganser.train import Checkpoint

    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    how = {"encoder": toy.encoder, "heads": toy.heads, "inputs": own(toy), **SHORT}
    whole = adamerging(toy.base, toy.experts, **how)

    class Stop(Exception):
        pass

    calls = []

    def stopping(x):
        calls.append(x)
        if len(calls) == 60:
            raise Stop
        return toy.heads["north"](x)

    held = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        adamerging(
            toy.base, toy.experts, **{**how, "heads": {**toy.heads, "north": stopping}, "steps": 100}, checkpoint=held
        )
    assert held.exists()
    calls.clear()
    other = adamerging(toy.base, toy.experts, **how, checkpoint=held)  # another run's: not taken up
    assert all(torch.equal(other[n], whole[n]) for n in whole)
    held.unlink()
    stopped = {**how, "heads": {**toy.heads, "north": stopping}}
    stopped["steps"] = 40
    calls.extend(range(40))  # the 20th step stops
    with pytest.raises(Stop):
        adamerging(toy.base, toy.experts, **stopped, checkpoint=held)
    again = adamerging(toy.base, toy.experts, **how, checkpoint=held)
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_bad_input_is_one_clear_error(toy):
    how = {"encoder": toy.encoder, "heads": toy.heads, "inputs": own(toy)}
    with pytest.raises(HeadError, match="'east' has no head"):
        adamerging(toy.base, toy.experts, **{**how, "heads": {n: h for n, h in toy.heads.items() if n != "east"}})
    with pytest.raises(DataError, match="'east' has no inputs"):
        adamerging(toy.base, toy.experts, **{**how, "inputs": {n: x for n, x in own(toy).items() if n != "east"}})
    for wrong in ({"per": "layer"}, {"steps": 0}, {"lr": 0}, {"batch": 0}, {"start": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            adamerging(toy.base, toy.experts, **{**how, **wrong})


def test_tensors_the_encoder_does_not_run_with_are_left_out(toy):
    more = {name: {**w, "head.weight": torch.ones(3)} for name, w in toy.experts.items()}
    work = Coefficients({**toy.base, "head.weight": torch.zeros(3)}, more, toy.encoder)
    assert "head.weight" not in work.names
