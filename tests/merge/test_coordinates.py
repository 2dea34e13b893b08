"""What is given in a tensor's own coordinates does not stand behind a step that leaves other ones; grads do no harm."""

import pytest
import torch
from torch import nn

import merganser
from merganser.errors import SentenceError
from merganser.sentence import parse


@pytest.mark.parametrize(
    "how",
    ["knots | slerp", "core | karcher", "knots | arcee_fusion", "knots | nuslerp(on='weights')", "core | regmean",
     "core | multislerp(on='weights')", "knots | fisher", "knots | mask | average", "core | esm",
     "knots | scale(by=2) | slerp"],
)  # fmt: skip
def test_it_is_refused_as_a_sentence(how):
    with pytest.raises(SentenceError, match=r"in the tensor's own coordinates, and (knots|core) leaves other ones"):
        parse(how)


@pytest.mark.parametrize(
    "how",
    ["knots | ties", "core | tsv", "permute | slerp", "mask | knots | average", "knots | multislerp", "knots | nuslerp",
     "knots | karcher(on='deltas')", "core | average | mask", "knots | regmean", "knots | weighted", "slerp", "fisher"],
)  # fmt: skip
def test_what_has_its_place_stays(how):
    assert str(parse(how)).startswith(how.partition("(")[0])


def test_a_step_that_fails_on_the_smallest_tensor_is_told_before_the_work(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef broken(deltas):\n    return torch.linalg.cholesky(-torch.eye(3))\n"
    )
    base, expert = {"w": torch.zeros(4, 4)}, {"w": torch.ones(4, 4)}
    how = f"{tmp_path / 'mine.py'}:broken"
    with pytest.raises(SentenceError, match="fails on a tensor of 4 x 4"):
        merganser.merge(base, [expert], how)
    assert not merganser.check(base, [expert], how).ok


@pytest.mark.parametrize("how", ["average", "ties", "tsv", "knots | ties", "dare(keep=0.5) | average", "karcher"])
def test_parameters_that_want_a_gradient_are_merged_as_numbers(how):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) for _ in range(3)]
    base, *experts = (dict(net.named_parameters()) for net in nets)
    merged = merganser.merge(base, experts, how, own=["1.bias"])
    plain = [{name: p.detach() for name, p in one.items()} for one in (base, *experts)]
    wanted = merganser.merge(plain[0], plain[1:], how, own=["1.bias"])
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert not any(tensor.requires_grad for tensor in merged.values())
