"""DisTaC's loss, gradient, pull and clipping are those of the published code."""

import cases
import pytest
import torch

from merganser.steps.adapt.distac import distilled, pulled

FILE = "mergers_data"
NAMES = [name for name in cases.described(FILE) if name.startswith("distac/")]


def test_there_are_cases():
    assert len(NAMES) == 3


@pytest.mark.parametrize("case", NAMES)
def test_loss_and_gradient_are_the_published_ones(case):
    told = cases.described(FILE)[case]["params"]
    given, wanted = cases.tensors(FILE, case)
    weight = given["student_w"].clone().requires_grad_(True)
    teacher, student = given["x"] @ given["teacher_w"].T, given["x"] @ weight.T
    torch.testing.assert_close(student.detach(), given["student_logits"])
    loss = distilled(teacher, student, told["T_teacher"], told["T_student"])
    torch.testing.assert_close(loss.detach(), wanted["loss"], rtol=1e-5, atol=1e-7)
    (alone,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(alone, wanted["grad_kl"], rtol=1e-4, atol=1e-6)
    (loss + told["beta"] * pulled({"w": weight}, {"w": given["student_init_w"]})).backward()
    torch.testing.assert_close(weight.grad, wanted["grad_with_pull"], rtol=1e-4, atol=1e-6)
    torch.nn.utils.clip_grad_norm_([weight], told["clip"])
    torch.testing.assert_close(weight.grad, wanted["grad_clipped"], rtol=1e-4, atol=1e-6)
