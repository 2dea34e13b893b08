"""Hits over the classes of all tasks: ranks by hand, shared names are one class, ties never help."""

import numpy as np
import pytest
import torch

from merganser.evaluate.joint import Union, hits
from merganser.evaluate.run import Labelled, Model, Outcome, Scores, evaluate
from merganser.models.heads import Head


def union() -> Union:
    """Two heads over four features; 'cat' is in both."""
    rows = torch.eye(4)
    heads = {"pets": Head(rows[:2]), "zoo": Head(torch.stack([rows[2], rows[0] * 0.5, rows[3]]))}
    return Union(heads, {"pets": ["cat", "dog"], "zoo": ["ape", "Cat", "emu"]})


def test_ranks_are_those_one_counts_by_hand() -> None:
    joint = union()
    assert joint.names == ["cat", "dog", "ape", "emu"]
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    for task, order in (("pets", [0, 1]), ("zoo", [2, 0, 3])):
        for label, rank in enumerate(order):
            assert joint.ranks(x, task, np.array([label])).tolist() == [rank]


def test_a_shared_class_has_the_larger_of_its_logits() -> None:
    x = torch.tensor([[-4.0, -3.0, -9.0, -9.0]])  # 'cat': -4 under one head, -2 under the other
    assert union().ranks(x, "pets", np.array([0])).tolist() == [0]
    assert union().ranks(x, "zoo", np.array([1])).tolist() == [0]


def test_a_model_that_says_nothing_hits_nothing() -> None:
    assert union().ranks(torch.zeros(3, 4), "zoo", np.array([0, 1, 2])).tolist() == [3, 3, 3]


def test_hits_are_means_over_tasks_and_over_inputs() -> None:
    told = hits({"a": np.array([0, 0, 4, 9]), "b": np.array([2])})
    assert told["1"] == {"macro": 0.25, "micro": 0.4}
    assert told["3"] == {"macro": 0.75, "micro": 0.6}
    assert told["5"] == {"macro": 0.875, "micro": 0.8}
    assert told["10"] == {"macro": 1.0, "micro": 1.0}


def test_one_task_alone_is_its_accuracy() -> None:
    torch.manual_seed(0)
    head, x, y = Head(torch.randn(5, 7)), torch.randn(50, 7), np.arange(50) % 5
    model = Model(torch.nn.Identity(), {}, {"t": head}, "fp32")
    scores = evaluate(model, {"t": Labelled(x, y)}, union=Union({"t": head}, {"t": list("abcde")}))
    found = scores.hits()
    assert found is not None
    assert found["1"]["micro"] == scores["t"].score
    assert found["5"]["macro"] == 1


def test_p_values_tell_a_difference_from_none() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)

    def scores(wrong: np.ndarray) -> Scores:
        return Scores({"t": Outcome(labels, np.where(wrong, 1 - labels, labels), np.ones(400))})

    worse, better, same = rng.random(400) < 0.3, rng.random(400) < 0.1, rng.random(400) < 0.3
    assert scores(better).compared(scores(worse))["p"] < 0.005
    assert scores(same).compared(scores(worse))["p"] > 0.05
    assert scores(worse).compared(scores(worse))["p"] == pytest.approx(1)
