"""Rows that enter layers, against what the layers make of them."""

import pytest
import torch
from torch import Tensor, nn

import merganser
from merganser.errors import DataError
from merganser.learn.entering import entering
from merganser.learn.measure import gram


class Net(nn.Module):
    """A convolution, attention to itself, a layer called twice a picture and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out, self.unused = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.grouped(torch.tanh(self.conv(x)))).flatten(2).mT
        return self.out(self.attend(x, x, x, need_weights=False)[0]).mean(dim=1)


@pytest.fixture
def setting():
    torch.manual_seed(0)
    net = Net().train()
    return net, {n: t.clone() for n, t in Net().state_dict().items()}, torch.randn(5, 2, 6, 6)


def watched(net, weights, inputs, layer):
    """Return what goes into a layer and what comes out of it."""
    seen = []
    hook = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    net.eval()
    torch.func.functional_call(net, weights, (inputs,))
    hook.remove()
    return seen[0]


def test_rows_are_those_that_the_layers_multiply(setting):
    net, weights, inputs = setting
    rows = 5 * 9  # all there are
    found = entering(net, weights, inputs, rows=rows)
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert set(found) == {"conv.weight", "attend.in_proj_weight", "out.weight"}, "others have no rows of their own"
    assert {tuple(t.shape) for t in found.values()} == {(rows, 18), (rows, 4)}
    _, out = watched(net, weights, inputs, net.conv)
    made = found["conv.weight"] @ weights["conv.weight"].flatten(1).mT
    torch.testing.assert_close(made, out.flatten(2).mT.reshape(rows, 4))
    x, _ = watched(net, weights, inputs, net.attend)
    torch.testing.assert_close(found["attend.in_proj_weight"], x.reshape(rows, 4))
    x, _ = watched(net, weights, inputs, net.out)
    torch.testing.assert_close(found["out.weight"], x.reshape(rows, 4))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_some_rows_are_of_all_inputs_alike_and_too_few_are_filled_with_zeros(setting, batch):
    net, weights, inputs = setting
    every = entering(net, weights, inputs, rows=45)["out.weight"]
    some = entering(net, weights, inputs, rows=10, batch=batch)["out.weight"]
    assert len(some) == 10
    from_input = [int((every - row).abs().sum(dim=1).argmin()) // 9 for row in some]
    assert {from_input.count(k) for k in range(5)} <= {1, 2, 3}
    many = entering(net, weights, inputs, rows=60, batch=batch)["out.weight"]
    assert len(many) == 60
    assert many[:45].any(dim=1).all()
    assert not many[45:].any()


def test_zeros_below_the_rows_change_no_merge(setting):
    net, weights, inputs = setting
    experts = {k: {n: t + 0.1 * torch.randn_like(t) for n, t in weights.items()} for k in "ab"}
    merged = [
        merganser.merge(
            weights, experts, "esm", ingredients={"inputs": {k: entering(net, w, inputs, rows=r) for k, w in experts.items()}}
        )
        for r in (45, 60)
    ]  # fmt: skip
    tsv = merganser.merge(weights, experts, "tsv")
    for name in ("conv.weight", "attend.in_proj_weight", "out.weight"):
        torch.testing.assert_close(merged[0][name], merged[1][name])
        assert not torch.allclose(merged[0][name], tsv[name], atol=1e-3)


def test_a_layer_called_by_keywords_alone_has_no_rows():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.first(x))

    net = Named()
    assert set(entering(net, net.state_dict(), torch.randn(3, 4))) == {"first.weight"}
    assert set(gram(net, net.state_dict(), torch.randn(3, 4))) == {"first.weight"}


def test_wrong_asks_are_told(setting):
    net, weights, inputs = setting
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got 0"):
        entering(net, weights, inputs, rows=0)
    with pytest.raises(DataError, match="no inputs"):
        entering(net, weights, inputs[:0])
    with pytest.raises(DataError, match="nothing entered one"):
        entering(nn.Flatten(), {}, inputs)
