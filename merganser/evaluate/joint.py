"""All tasks as one: the right class among the classes of every task, without being told which task an input is of.

Two forms of "the classes of every task":

names       classes with the same name are one class, whatever tasks they are of; its logit is the largest of its rows'
published   KnOTS' benchmark: every row of every head is an answer of its own, and only the input's own task's row is
            right; but tasks with the same whole list of classes (MNIST and SVHN) share theirs. 748 for its eight tasks
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.heads import AnyHead, Stacked

TOPS = (1, 3, 5, 10)
FORMS = ("names", "published")


class Union:
    """The classes of all ``heads``; ``classes`` are the phrases of each head's rows.

    Logits of different heads are compared as they are, so heads should share one scale (zero-shot and class-mean heads
    do). Source: KnOTS (arXiv 2410.19735, section 5.2).
    """

    def __init__(self, heads: Mapping[str, AnyHead], classes: Mapping[str, Sequence[str]]):
        self.heads = {name: heads[name] for name in classes}
        self.stacked = Stacked(self.heads)
        lists = {task: tuple(phrase.casefold().strip() for phrase in phrases) for task, phrases in classes.items()}
        self.names = list(dict.fromkeys(name for names in lists.values() for name in names))
        self.columns = {
            "names": _numbered([name for names in lists.values() for name in names]),
            "published": _numbered([(names, k) for names in lists.values() for k in range(len(names))]),
        }
        self.rows: dict[str, slice] = {}
        for task, names in lists.items():
            start = max((rows.stop for rows in self.rows.values()), default=0)
            self.rows[task] = slice(start, start + len(names))

    def size(self, form: str = "names") -> int:
        """Return how many classes there are in all."""
        return int(self.columns[form].max()) + 1

    def ranks(
        self, features: Float[Tensor, "n width"], task: str, labels: Int[np.ndarray, "n"], form: str = "names"
    ) -> Int[np.ndarray, "n"]:
        """Return how many classes of the union come before the right one, for inputs of ``task``; ties come before."""
        return self.ranks_of(self.stacked(features), task, labels, form)

    def ranks_of(
        self, logits: Float[Tensor, "n rows"], task: str, labels: Int[np.ndarray, "n"], form: str = "names"
    ) -> Int[np.ndarray, "n"]:
        """Return the same from the logits of all heads' rows, side by side."""
        column = self.columns[form]
        joint = torch.full((len(logits), self.size(form)), -torch.inf)
        joint = joint.scatter_reduce(1, column.expand(len(logits), -1), logits.detach().float(), "amax")
        right = column[torch.from_numpy(labels) + self.rows[task].start]
        return ((joint >= joint.gather(1, right[:, None])).sum(dim=1) - 1).numpy()


def _numbered(keys: Sequence[Any]) -> Int[Tensor, "rows"]:
    place = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([place[key] for key in keys])


def hits(ranks: Mapping[str, Int[np.ndarray, "n"]]) -> dict[str, dict[str, float]]:
    """Return hits@k: the mean over tasks ("macro") and over all inputs ("micro"), for k in 1, 3, 5, 10.

    Source: KnOTS (arXiv 2410.19735, section 5.2), whose numbers are micro averages.
    """
    every = np.concatenate(list(ranks.values()))
    return {
        str(k): {
            "macro": float(np.mean([(rank < k).mean() for rank in ranks.values()])),
            "micro": float((every < k).mean()),
        }
        for k in TOPS
    }
