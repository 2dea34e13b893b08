"""Batch norm after a merge: statistics measured anew are those of the merged weights, and undo variance collapse."""

import pytest
import torch
from torch import Tensor, nn

import merganser
from merganser.models.statistics import is_statistic, moving, reset_statistics


class Net(nn.Module):
    """Two layers with batch norm under a name that the checkpoint does not have."""

    prefix = "inner."

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def weights_of(net: Net) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.inner.state_dict().items()}


def inputs(n: int = 640) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1)) * 3 + 1


def test_measured_statistics_are_those_of_the_layers_inputs(net: Net) -> None:
    x, weights = inputs(), weights_of(net)
    first = net.inner[0](x)
    found = reset_statistics(net, weights, x, batch=len(x), kind="fp32")
    torch.testing.assert_close(found["1.running_mean"], first.mean(0))
    torch.testing.assert_close(found["1.running_var"], first.var(0))
    whole = [first[at : at + 64] for at in range(0, 640, 64)]
    in_batches = reset_statistics(net, weights, x, batch=64, kind="fp32")
    torch.testing.assert_close(in_batches["1.running_mean"], torch.stack([z.mean(0) for z in whole]).mean(0))
    torch.testing.assert_close(in_batches["1.running_var"], torch.stack([z.var(0) for z in whole]).mean(0))


def test_network_and_weights_stay_as_they_were(net: Net) -> None:
    weights = weights_of(net)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    found = reset_statistics(net, weights, inputs(), kind="fp32")
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(net).items())
    assert not any(module.training for module in net.modules())
    assert [module.momentum for module in net.modules() if isinstance(module, nn.BatchNorm1d)] == [0.1, 0.1]
    assert {name for name in found if not torch.equal(found[name], before[name])} == {
        n for n in found if is_statistic(n)
    }


def test_features_are_normalised_again_after_a_merge(net: Net) -> None:
    """Variance collapses where weights are averaged; measured anew, every feature has its variance of 1 again."""
    x, base = inputs(), weights_of(net)
    rng = torch.Generator().manual_seed(2)
    noise = [
        {n: t + torch.randn(t.shape, generator=rng) * ("weight" in n and t.ndim > 1) for n, t in base.items() if t.ndim}
        for _ in range(4)
    ]
    experts = [reset_statistics(net, {**base, **one}, x, kind="fp32") for one in noise]
    merged = merganser.merge(base, experts, "average")

    def spread(weights: dict[str, Tensor]) -> float:
        named = {f"inner.{name}": tensor for name, tensor in weights.items()}
        return torch.func.functional_call(net, named, (x,)).var(0).mean().item()

    assert all(abs(spread(one) - 1) < 0.05 for one in experts)
    assert spread(merged) < 0.6
    assert abs(spread(reset_statistics(net, merged, x, kind="fp32")) - 1) < 0.05


def test_without_batch_norm_nothing_changes_and_one_input_is_too_few(net: Net) -> None:
    plain = nn.Linear(6, 2)
    same = reset_statistics(plain, dict(plain.state_dict()), inputs())
    assert all(torch.equal(same[name], tensor) for name, tensor in plain.state_dict().items())
    with pytest.raises(ValueError, match="at least two"):
        reset_statistics(net, weights_of(net), inputs(1))


def test_a_network_is_put_back_even_if_it_fails(net: Net) -> None:
    with pytest.raises(ZeroDivisionError), moving(net):
        raise ZeroDivisionError
    assert not any(module.training for module in net.modules())
