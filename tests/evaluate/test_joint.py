"""Hits over the classes of all tasks: ranks by hand, shared names are one class, ties never help."""

from itertools import permutations

import numpy as np
import pytest
import torch

from merganser.errors import HeadError
from merganser.evaluate.ensemble import ensembles
from merganser.evaluate.joint import FORMS, Union, hits
from merganser.evaluate.run import Labelled, Model, Outcome, Scores, evaluate
from merganser.models.heads import Head
from merganser.suites.clip import EIGHT, facts


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


def drawn(seed: int, sizes: dict[str, int], width: int = 6) -> tuple[dict[str, Head], dict[str, list[str]]]:
    """Random heads; every second class of a task is called as one of the next task's."""
    rng = torch.Generator().manual_seed(seed)
    heads = {name: Head(torch.randn(n, width, generator=rng)) for name, n in sizes.items()}
    names = list(sizes)
    classes = {
        name: [f"shared {c}" if c % 2 else f"{name} {c}" for c in range(n)]
        if k < 2
        else [f"{name} {c}" for c in range(n)]
        for k, (name, n) in enumerate(sizes.items())
    }
    assert set(classes[names[0]]) & set(classes[names[1]])
    return heads, classes


SIZES = {"a": 4, "b": 5, "c": 3}


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_tasks_changes_no_rank(seed: int) -> None:
    heads, classes = drawn(seed, SIZES)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed + 50))
    for order in permutations(SIZES):
        other = Union({n: heads[n] for n in order}, {n: classes[n] for n in order})
        for task, n in SIZES.items():
            for form in FORMS:
                one = Union(heads, classes).ranks(x, task, np.arange(40) % n, form)
                assert np.array_equal(one, other.ranks(x, task, np.arange(40) % n, form))


@pytest.mark.parametrize("seed", range(5))
def test_a_task_that_is_there_twice_changes_no_rank(seed: int) -> None:
    heads, classes = drawn(seed, SIZES)
    once, twice = Union(heads, classes), Union({**heads, "again": heads["a"]}, {**classes, "again": classes["a"]})
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    for form in FORMS:
        assert once.size(form) == twice.size(form)
        for task in ("a", "again"):
            assert np.array_equal(
                once.ranks(x, "a", np.arange(40) % 4, form), twice.ranks(x, task, np.arange(40) % 4, form)
            )


@pytest.mark.parametrize("seed", range(5))
def test_one_name_for_one_class_can_only_help(seed: int) -> None:
    heads, classes = drawn(seed, SIZES)
    union = Union(heads, classes)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(seed))
    assert union.size() == 10
    assert union.size("published") == 12
    gained = 0
    for task, n in SIZES.items():
        by_name, apart = (union.ranks(x, task, np.arange(200) % n, form) for form in FORMS)
        assert (by_name <= apart).all()
        assert (apart < union.size("published")).all()
        gained += int((by_name < apart).sum())
    assert gained > 0


@pytest.mark.parametrize("seed", range(5))
def test_hits_never_fall_with_k_and_are_all_at_the_end(seed: int) -> None:
    rng = np.random.default_rng(seed)
    told = hits({"a": rng.integers(0, 12, 30), "b": rng.integers(0, 10, 7)})
    for kind in ("macro", "micro"):
        values = [told[str(k)][kind] for k in (1, 3, 5, 10)]
        assert values == sorted(values)
        assert 0 <= values[0] <= values[-1] <= 1
    assert hits({"b": rng.integers(0, 10, 7)})["10"]["micro"] == 1


def test_the_eight_vision_tasks_have_the_published_numbers_of_classes() -> None:
    classes = {name: facts()[name]["classes"] for name in EIGHT}
    union = Union({name: Head(torch.zeros(len(names), 1)) for name, names in classes.items()}, classes)
    assert union.size("published") == 748
    assert union.size("names") == 736


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


@pytest.mark.parametrize("seed", range(3))
def test_an_ensemble_of_equal_experts_is_the_model_itself(seed: int) -> None:
    heads, classes = drawn(seed, SIZES)
    rng = torch.Generator().manual_seed(seed)
    weights = {"map.weight": torch.randn(6, 6, generator=rng)}
    tasks = {name: Labelled(torch.randn(30, 6, generator=rng), np.arange(30) % n) for name, n in SIZES.items()}
    union = Union(heads, classes)
    alone = evaluate(Model(Net(), weights, heads, "fp32"), tasks, union=union)
    for scores in ensembles(Net(), dict.fromkeys(SIZES, weights), tasks, union, kind="fp32").values():
        for task, o in scores.items():
            assert np.array_equal(o.ranks, alone[task].ranks)
            assert np.array_equal(o.published, alone[task].published)
            assert o.score == alone[task].score


def test_an_ensemble_takes_each_expert_under_its_own_head_or_under_all() -> None:
    heads, classes = drawn(0, SIZES)
    rng = torch.Generator().manual_seed(3)
    experts = {name: {"map.weight": torch.randn(6, 6, generator=rng)} for name in SIZES}
    x, y = torch.randn(25, 6, generator=rng), np.arange(25) % 4
    found = ensembles(Net(), experts, {"a": Labelled(x, y)}, Union(heads, classes), kind="fp32")
    own = [heads[e](x @ w["map.weight"].T) for e, w in experts.items()]
    every = [torch.cat([h(x @ w["map.weight"].T) for h in heads.values()], 1) for w in experts.values()]
    expected = {"own": torch.cat(own, 1), "all": torch.stack(every).amax(0)}
    for form, logits in expected.items():
        right = logits.gather(1, torch.from_numpy(y)[:, None])
        assert np.array_equal(found[form]["a"].published, (logits > right).sum(1).numpy())
    assert found["own"]["a"].score == evaluate(Model(Net(), experts["a"], heads, "fp32"), {"a": Labelled(x, y)}).mean
    with pytest.raises(HeadError, match="an expert for each of the heads a, b, c"):
        ensembles(Net(), {"a": experts["a"]}, {}, Union(heads, classes))


def test_p_values_tell_a_difference_from_none() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)

    def scores(wrong: np.ndarray) -> Scores:
        return Scores({"t": Outcome(labels, np.where(wrong, 1 - labels, labels), np.ones(400))})

    worse, better, same = rng.random(400) < 0.3, rng.random(400) < 0.1, rng.random(400) < 0.3
    assert scores(better).compared(scores(worse))["p"] < 0.005
    assert scores(same).compared(scores(worse))["p"] > 0.05
    assert scores(worse).compared(scores(worse))["p"] == pytest.approx(1)
