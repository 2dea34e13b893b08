"""How well inputs cover the classes, and the command that ranks sources by it."""

import pytest
import torch
from torch import nn

from merganser.diagnose.sources import coverage, covered
from merganser.errors import DataError, HeadError
from merganser.models.heads import linear_head


def heads():
    eye = torch.eye(4)
    return {"a": linear_head(3 * eye[:2]), "b": linear_head(eye[2:], torch.ones(2))}


def test_inputs_that_are_the_classes_cover_them():
    assert coverage(7 * torch.eye(4), heads()) == pytest.approx((1, 1))


def test_cover_asks_for_every_class_and_near_for_every_input():
    one_class = torch.eye(4)[:1].repeat(5, 1)
    cover, near = coverage(one_class, heads())
    assert (cover, near) == pytest.approx((0.25, 1))
    all_and_more = torch.cat([torch.eye(4), torch.ones(4, 4)])
    cover, near = coverage(all_and_more, heads())
    assert (cover, near) == pytest.approx((1, 0.75))


def test_lengths_do_not_count_and_more_inputs_never_cover_less():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert coverage(x, heads()) == pytest.approx(coverage(x * torch.rand(30, 1).add(0.1), heads()))
    covers = [coverage(x[:n], heads())[0] for n in (1, 5, 10, 30)]
    assert covers == sorted(covers)


def test_sources_come_the_best_first():
    sources = {"few": torch.eye(4)[:2], "all": torch.eye(4), "one": torch.eye(4)[:1]}
    found = covered(nn.Identity(), {}, heads(), sources, kind="fp32")
    assert [(one.source, one.inputs) for one in found] == [("all", 4), ("few", 2), ("one", 1)]
    assert [one.cover for one in found] == pytest.approx([1, 0.5, 0.25])
    assert covered(nn.Identity(), {}, heads(), sources, few=1, kind="fp32")[0].inputs == 1


def test_wrong_asks_are_told():
    with pytest.raises(HeadError, match="the head of 'c' has no class vectors"):
        coverage(torch.eye(4), {**heads(), "c": nn.Linear(4, 2)})
    with pytest.raises(HeadError, match="the head of 'c' has no class vectors"):
        coverage(torch.eye(4), {**heads(), "c": linear_head(torch.eye(3))})
    with pytest.raises(DataError, match="source 'none' has no inputs"):
        covered(nn.Identity(), {}, heads(), {"none": torch.zeros(0, 4)})
