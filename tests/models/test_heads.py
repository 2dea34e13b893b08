"""Laws of heads: zero-shot, class means, and many heads stacked into one."""

import pytest
import torch
import torch.nn.functional as F

from merganser.errors import HeadError
from merganser.models.heads import (
    Head,
    Stacked,
    check_width,
    class_mean_head,
    linear_head,
    prompted_head,
    zero_shot_head,
)
from merganser.models.split import DenseHead

WIDTH = 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def head(classes, bias=False, normalize=False):
    return Head(torch.randn(classes, WIDTH), torch.randn(classes) if bias else None, normalize)


def dense(classes):
    return DenseHead(Head(torch.randn(4, WIDTH), torch.randn(4)), "tanh", Head(torch.randn(classes, 4)))


STACKS = {
    "no bias": lambda: {"a": head(3), "b": head(5), "c": head(1)},
    "all bias": lambda: {"a": head(3, bias=True), "b": head(2, bias=True)},
    "some bias": lambda: {"a": head(3, bias=True), "b": head(2), "c": head(7, bias=True)},
    "normalised": lambda: {"a": head(3, normalize=True), "b": head(2, bias=True, normalize=True)},
    "mixed norms": lambda: {"a": head(3, normalize=True), "b": head(2)},
    "functions": lambda: {"a": head(3), "b": dense(4), "c": lambda x: x[:, :2] * 3},
    "one": lambda: {"a": head(4)},
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_stacked_is_a_loop_over_heads(stack):
    heads = stack()
    x = torch.randn(8, WIDTH)
    stacked = Stacked(heads)
    logits = stacked(x)
    torch.testing.assert_close(logits, torch.cat([h(x) for h in heads.values()], dim=1))
    assert stacked.sizes == [h(x).shape[1] for h in heads.values()]
    torch.testing.assert_close(
        stacked.log_softmax(logits), torch.cat([h(x).log_softmax(1) for h in heads.values()], dim=1)
    )


def test_zero_shot_head_is_cosine_with_the_mean_prompt():
    prompts = torch.randn(4, 3, WIDTH)
    x = torch.randn(5, WIDTH)
    unit = F.normalize(prompts, dim=-1).mean(1)
    expected = 50 * F.cosine_similarity(x[:, None], unit[None], dim=-1)
    torch.testing.assert_close(zero_shot_head(prompts, scale=50)(x), expected)
    # prompts and features count by direction alone
    scaled = prompts * torch.rand(4, 3, 1).add(0.1)
    torch.testing.assert_close(zero_shot_head(scaled, scale=50)(3 * x), expected)


def test_prompted_head_asks_for_each_class_in_each_template():
    asked = []

    def embed(texts):
        asked.extend(texts)
        return torch.arange(len(texts) * WIDTH).view(len(texts), WIDTH).float() + 1

    made = prompted_head(embed, ["cat", "dog"], ["a {}", "the {} of {}"], scale=7)
    assert asked == ["a cat", "the cat of cat", "a dog", "the dog of dog"]
    rows = embed(list(asked)).view(2, 2, WIDTH)
    torch.testing.assert_close(made.weight, zero_shot_head(rows, scale=7).weight)


def test_class_mean_head_is_the_nearest_class_mean():
    x, y = torch.randn(40, WIDTH), torch.arange(40) % 4
    made = class_mean_head(x, y, 4, scale=20)
    for c in range(4):
        mean = F.normalize(x[y == c], dim=1).mean(0)
        torch.testing.assert_close(made.weight[c], 20 * mean / mean.norm())
    assert made(x).abs().max() <= 20.0001
    # the order of examples and their lengths do not matter
    order = torch.randperm(40)
    again = class_mean_head(x[order] * torch.rand(40, 1).add(0.1), y[order], 4, scale=20)
    torch.testing.assert_close(again.weight, made.weight)


def test_class_mean_head_needs_every_class():
    x = torch.randn(3, WIDTH)
    with pytest.raises(HeadError, match=r"classes \[1\] of 3 have no example"):
        class_mean_head(x, torch.tensor([0, 2, 2]), 3)
    with pytest.raises(HeadError, match="label 5 in 3 classes"):
        class_mean_head(x, torch.tensor([0, 1, 5]), 3)


def test_linear_head_is_the_layer():
    layer = torch.nn.Linear(WIDTH, 3)
    x = torch.randn(4, WIDTH)
    made = linear_head(layer.weight, layer.bias)
    torch.testing.assert_close(made(x), layer(x))
    assert not made.weight.requires_grad


def test_width_is_checked():
    check_width({"a": head(3), "free": lambda x: x}, WIDTH)
    for wrong in (head(3), dense(3)):
        with pytest.raises(HeadError, match="head 'b' takes features of width 6, the encoder gives 7"):
            check_width({"free": lambda x: x, "b": wrong}, 7)
