"""Extra tensors are told from a tensor's own entries by their shape, not by how many numbers they hold."""

import pytest
import torch

import merganser
from merganser.errors import SentenceError
from merganser.steps.combine.esm import esm
from merganser.steps.combine.fisher import fisher
from merganser.steps.combine.regmean import regmean


def family(shape, count):
    rng = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(shape, generator=rng)}
    experts = {f"e{k}": {"w": base["w"] + torch.randn(shape, generator=rng)} for k in range(count)}
    return base, experts, torch.stack([one["w"] - base["w"] for one in experts.values()])


def each(experts, make):
    return {who: {"w": make(k)} for k, who in enumerate(experts)}


def stacked(told):
    return torch.stack([one["w"] for one in told.values()])


# with out = experts * in, in = out and one expert, and so on, a Gram matrix has as many entries as the tensor
@pytest.mark.parametrize(
    ("out", "inner", "count"), [(24, 6, 4), (12, 6, 2), (6, 6, 1), (7, 6, 4), (18, 6, 3), (6, 6, 3)]
)
def test_regmean_takes_gram_matrices_of_any_shape(out, inner, count):
    base, experts, deltas = family((out, inner), count)
    gram = each(experts, lambda k: torch.eye(inner) * (k + 1) + 0.1)
    merged = merganser.merge(base, experts, "regmean", ingredients={"gram": gram})
    torch.testing.assert_close(merged["w"], base["w"] + regmean(deltas, gram=stacked(gram)))


@pytest.mark.parametrize(("out", "inner", "count", "rows"), [(24, 6, 4, 6), (8, 6, 4, 2), (16, 6, 2, 8), (7, 6, 3, 5)])
def test_esm_takes_as_many_inputs_as_there_are(out, inner, count, rows):
    base, experts, deltas = family((out, inner), count)
    inputs = each(experts, lambda k: torch.randn(rows, inner, generator=torch.Generator().manual_seed(k)))
    merged = merganser.merge(base, experts, "esm", ingredients={"inputs": inputs})
    want = base["w"] + esm(deltas, inputs=stacked(inputs), name="w")
    torch.testing.assert_close(merged["w"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0, 3), (600, 300)])
def test_fisher_takes_one_expert_and_any_shape(shape, count):
    base, experts, deltas = family(shape, count)
    told = each(experts, lambda k: torch.full(shape, 0.5 + k))
    merged = merganser.merge(base, experts, "fisher(normalize=False)", ingredients={"fisher": told})
    want = base["w"] + fisher(deltas, normalize=False, fisher=stacked(told), survey=None)
    torch.testing.assert_close(merged["w"], want)
    assert merganser.merge(base, experts, "fisher", ingredients={"fisher": told})["w"].shape == shape


@pytest.mark.parametrize(("how", "word"), [("fisher", "fisher"), ("mask | average", "mask")])
def test_a_transposed_one_is_told(how, word):
    base, experts, _ = family((6, 4), 2)
    for given in (each(experts, lambda _: torch.ones(4, 6)), each(experts, lambda _: torch.ones(24))):
        with pytest.raises(SentenceError, match=rf"'{word}': 'w' is \[.*\], the tensor is \[6, 4\]"):
            merganser.merge(base, experts, how, ingredients={word: given})
        found = merganser.check(base, experts, how, ingredients={word: given})
        assert any("the tensor is [6, 4]" in str(one) for one in found.errors)
    with pytest.raises(SentenceError, match=r"'mask': 'w' is \[4, 6\]"):
        merganser.merge(base, experts, "mask | average", ingredients={"mask": {"w": torch.ones(4, 6)}})
