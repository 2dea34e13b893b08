"""All tasks as one: the right class among the classes of every task, without being told which task an input is of.

Classes of two tasks with the same name are one class; its logit is the larger of the two heads'.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.heads import AnyHead, Stacked

TOPS = (1, 3, 5, 10)


class Union:
    """The classes of all ``heads``, by name; ``classes`` are the phrases of each head's rows.

    Logits of different heads are compared as they are, so heads should share one scale (zero-shot and class-mean heads
    do).
    """

    def __init__(self, heads: Mapping[str, AnyHead], classes: Mapping[str, Sequence[str]]):
        self.heads = {name: heads[name] for name in classes}
        self.stacked = Stacked(self.heads)
        names = [phrase.casefold().strip() for phrases in classes.values() for phrase in phrases]
        self.names = list(dict.fromkeys(names))
        place = {name: k for k, name in enumerate(self.names)}
        self.column = torch.tensor([place[name] for name in names])
        starts = np.cumsum([0, *(len(phrases) for phrases in classes.values())])
        self.start = dict(zip(classes, starts.tolist(), strict=False))

    def ranks(
        self, features: Float[Tensor, "n width"], task: str, labels: Int[np.ndarray, "n"]
    ) -> Int[np.ndarray, "n"]:
        """Return how many classes of the union come before the right one, for inputs of ``task``; ties come before."""
        logits = self.stacked(features)
        joint = torch.full((len(logits), len(self.names)), -torch.inf)
        joint = joint.scatter_reduce(1, self.column.expand(len(logits), -1), logits.float(), "amax")
        right = self.column[torch.from_numpy(labels) + self.start[task]]
        return ((joint >= joint.gather(1, right[:, None])).sum(dim=1) - 1).numpy()


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
