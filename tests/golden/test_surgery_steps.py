"""Representation Surgery against the published code: losses, both matrices and corrected features of three steps."""

import torch
from cases import described, tensors

from merganser.learn.surgery import Correction, fitted
from merganser.train import Plan

CASE = "surgery/d8_r3"


def test_three_steps() -> None:
    given, wanted = tensors("mergers_data", CASE)
    params = described("mergers_data")[CASE]["params"]
    steps = len(wanted["losses"])

    def some(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return given[f"merged_feat{int(step)}"], given[f"expert_feat{int(step)}"]

    def after(n: int) -> Correction:
        return fitted(given["down0"], some, Plan(n, params["lr"], schedule="constant", warmup=0.0, clip=0.0))

    for k in range(steps):  # the loss of a step is that of the correction before it
        before = after(k) if k else Correction(given["down0"], torch.zeros_like(wanted["up"]))
        merged, expert = some(torch.tensor(k))
        torch.testing.assert_close((before(merged) - expert).abs().mean(), wanted["losses"][k], rtol=1e-5, atol=1e-6)
    found = after(steps)
    assert torch.equal(after(1).down, given["down0"]), "behind a zero the first step teaches nothing"
    torch.testing.assert_close(found.down, wanted["down"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.up, wanted["up"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found(given["merged_feat0"]), wanted["out"], rtol=1e-5, atol=1e-6)
