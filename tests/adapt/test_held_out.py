"""What is held out: apart from what is trained on, scored in parts that are cheap and, for language models, fair."""

from itertools import pairwise

import pytest
import torch

from merganser.models.inputs import Prompts, Texts
from merganser.steps.student import Halves, Split


def texts(n: int) -> Texts:
    lengths = torch.randint(1, 65, (n,), generator=torch.Generator().manual_seed(n))
    return Texts([torch.ones(k, dtype=torch.int64) for k in lengths.tolist()])


def padded(inputs: Texts, parts: list[torch.Tensor]) -> int:
    return sum(inputs.take(at)["input_ids"].numel() for at in parts)


@pytest.mark.parametrize("n", [40, 1000, 6000])
def test_held_out_texts_are_scored_by_length_and_never_trained_on(n):
    inputs = texts(n)
    split = Split(inputs, 20, 32, 0.05, 3)
    assert len(split.kept) == min(256, n // 20)
    assert torch.cat(split.checked).tolist() == split.kept.tolist()
    assert not set(split.kept.tolist()) & set(split.used.tolist())
    spans = [inputs.lengths[at] for at in split.checked]
    assert all(a.max() <= b.min() for a, b in pairwise(spans))
    at_random = Split(torch.zeros(n, 1), 20, 32, 0.05, 3)
    assert sorted(at_random.kept.tolist()) == sorted(split.kept.tolist()), "lengths change the order alone"
    if n == 6000:
        assert padded(inputs, split.checked) < 0.65 * padded(inputs, list(at_random.kept.split(128)))


@pytest.mark.parametrize("own", [30, 500, 4000])
def test_every_part_of_held_out_prompts_has_both_kinds_alike(own):
    inputs = Prompts(texts(own + 3000), torch.tensor([0] * own + [1] * 1500 + [-1] * 1500), ("a", "b"))
    split = Halves(inputs, "a", 20, 32, 0.05, 0)
    assert sorted(torch.cat(split.checked).tolist()) == sorted(split.kept.tolist())
    assert not set(split.kept.tolist()) & {int(i) for s in range(20) for i in split.order(s)}
    mine = [int((inputs.kinds[at] == 0).sum()) for at in split.checked]
    assert sum(mine) == min(256, own // 20)
    assert min(mine) >= 1
    assert max(mine) - min(mine) <= 1


def test_without_a_single_prompt_of_its_own_held_out_all_are_one_part():
    inputs = Prompts(texts(3010), torch.tensor([0] * 10 + [-1] * 3000), ("a",))
    split = Halves(inputs, "a", 5, 8, 0.05, 0)
    assert [len(at) for at in split.checked] == [len(split.kept)] == [150]
