"""AdaMerging against the published code: losses, coefficients and merged weights of three steps, and the clamp."""

import torch
from cases import described, tensors
from torch import Tensor, nn

from merganser.learn.coefficients import Coefficients, entropy
from merganser.train import Plan, train

CASES = described("concrete")


class Toy(nn.Module):
    """features = out tanh(fc x)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)))


def toy(per: str) -> tuple[Coefficients, dict[str, Tensor]]:
    given, _ = tensors("concrete", "concrete/toy")
    base = {n.removeprefix("pre."): t for n, t in given.items() if n.startswith("pre.")}
    experts = {f"t{k}": {n: t + given[f"tv{k}.{n}"] for n, t in base.items()} for k in range(2)}
    return Coefficients(base, experts, Toy(), per), given


def test_three_layer_wise_steps() -> None:
    work, given = toy("tensor")
    _, wanted = tensors("concrete", "concrete/lw_adamerging3")
    params = CASES["concrete/lw_adamerging3"]["params"]
    losses = []

    def loss(step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = work.weights()
        each = [
            entropy(work.features(weights, given[f"x{t}.{int(step)}"], "fp32") @ given[f"head{t}"]) for t in range(2)
        ]
        losses.append(sum(each))
        return sum(each), {}

    plan = Plan(params["steps"], params["lr"], schedule="constant", warmup=0.0, clip=0.0)
    found, _ = train(work.params, loss, torch.tensor, plan)
    for k, value in enumerate(losses):
        torch.testing.assert_close(value.detach(), wanted[f"loss{k}"].reshape(()), rtol=1e-5, atol=1e-6)
    order = ["fc.weight", "fc.bias", "out.weight"]  # the published matrix is [experts, tensors]
    ours = torch.stack([found[n] for n in order], dim=1)
    torch.testing.assert_close(ours, wanted["weight3"], rtol=1e-5, atol=1e-6)
    merged = work.weights()
    for name in order:
        torch.testing.assert_close(merged[name], wanted[f"merged3.{name}"], rtol=1e-5, atol=1e-6)


def test_coefficients_are_clamped_before_use() -> None:
    work, _ = toy("expert")
    given, wanted = tensors("concrete", "concrete/tw_merge_clamp")
    with torch.no_grad():
        work.params["*"].copy_(given["weight"].flatten())
    for name, tensor in work.weights().items():
        torch.testing.assert_close(tensor, wanted[f"merged.{name}"], rtol=1e-6, atol=1e-7)
    for told in work.told(work.params).values():
        assert float(told.min()) >= 0
        assert float(told.max()) <= 1
