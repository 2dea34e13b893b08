"""The two terms of RI: keep the own head's outputs, leave every other head's (or the base's features) as they were."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..models.heads import AnyHead, Head, Span, Stacked, check_width
from ..models.targets import Rows

DISTANCES = ("kl", "reverse", "js", "ce", "mse", "cosine")
FORMS = ("heads", "rows", "features")


class Twins:
    """Distances to the expert under its own head and to the base under the others, for all heads by one matmul.

    ``hidden``: classes that take no part in the others' term, because the own head has them too (`overlapping`).
    ``form``: the others' term by "heads", by the base's normalised features in the span of their rows ("rows"), or by
    the base's features themselves ("features", which needs no other head). ``sample``: so many other heads a step.
    """

    def __init__(
        self,
        heads: Mapping[str, AnyHead],
        own: str,
        *,
        alpha: float = 1.0,
        distance: str = "kl",
        temperature: float = 1.0,
        form: str = "heads",
        sample: int = 0,
        hidden: Mapping[str, Bool[Tensor, "classes"]] | None = None,
    ):
        self.heads, self.own, self.alpha, self.risen = heads, own, alpha, 1.0
        self.distance, self.temperature, self.form, self.sample = distance, temperature, form, sample
        self.stacked = Stacked(heads)
        self.hidden = dict(hidden or {})

    def remember(self, at: Tensor, n: int, base: Tensor | Rows, expert: Tensor | Rows) -> None:
        """Keep the features of base and expert for the inputs ``at``, out of ``n``."""
        check_width(self.heads, base.shape[1])
        self.row = torch.full((n,), -1, dtype=torch.int64)
        self.row[at] = torch.arange(len(at))
        self.base, self.expert = base, expert
        self.stacked(base[:1])
        names, sizes = list(self.heads), self.stacked.sizes
        start = sum(sizes[: names.index(self.own)])
        self.slice = slice(start, start + sizes[names.index(self.own)])
        shown = [~self.hidden.get(n, torch.zeros(k, dtype=torch.bool)) for n, k in zip(names, sizes, strict=True)]
        self.shown = torch.cat(shown)
        # a head needs two classes to say anything
        counted = [n != self.own and int(one.sum()) > 1 for n, one in zip(names, shown, strict=True)]
        self.others = [k for k, yes in enumerate(counted) if yes]
        self.basis = _span(self.heads, self.own) if self.form == "rows" else None

    @torch.no_grad()
    def targets(self, at: Tensor) -> Float[Tensor, "batch all_classes"]:
        """Return logits: the expert's under its own head, the base's under every other."""
        row = self.row[at]
        logits = self.stacked(self.base[row])
        logits[:, self.slice] = self.heads[self.own](self.expert[row])
        return logits

    def __call__(self, at: Tensor, x: Float[Tensor, "batch width"]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the student's features ``x`` for the inputs ``at``, and its two terms."""
        x = x.cpu()  # heads are any functions of yours, and features are small
        if self.form != "heads":
            own = self._by_head(self.heads[self.own](self.expert[self.row[at]]), self.heads[self.own](x)).mean()
            others = self._features(at, x)
        else:
            each = self._distances(self.targets(at), self.stacked(x))
            own = each[self.heads_own].mean()
            chosen = self._chosen(at)
            others = torch.stack([each[k].mean() for k in chosen]).mean() if chosen else own.detach() * 0
        return own + self.weight * others, {"own": own.detach(), "others": others.detach()}

    @property
    def weight(self) -> float:
        """The others' weight: ``alpha``, times ``risen`` in training; held-out losses are to be of one kind."""
        return self.alpha * (self.risen if torch.is_grad_enabled() else 1.0)

    @property
    def heads_own(self) -> int:
        return list(self.heads).index(self.own)

    def _chosen(self, at: Tensor) -> list[int]:
        """Return the other heads of this step: all, or ``sample`` of them drawn by its inputs, each as often."""
        if not self.sample or self.sample >= len(self.others):
            return self.others
        rng = torch.Generator().manual_seed(int((at * (1 + torch.arange(len(at)))).sum()))
        drawn = torch.randperm(len(self.others), generator=rng)[: self.sample]
        return [self.others[k] for k in drawn.tolist()]

    def _distances(self, target: Tensor, logits: Tensor) -> list[Float[Tensor, "batch"]]:
        """Return every head's distances."""
        sizes = self.stacked.sizes
        parts = zip(target.split(sizes, 1), logits.split(sizes, 1), self.shown.split(sizes), strict=True)
        wanted = {self.heads_own, *self.others}
        return [
            self._by_head(t if all_ else t[:, seen], x if all_ else x[:, seen]) if k in wanted else x.sum(1) * 0
            for k, (t, x, seen) in enumerate(parts)
            for all_ in (k == self.heads_own or bool(seen.all()),)
        ]

    def _by_head(self, target: Tensor, logits: Tensor) -> Float[Tensor, "batch"]:
        return distance(self.distance, target / self.temperature, logits / self.temperature) * self.temperature**2

    def _features(self, at: Tensor, x: Tensor) -> Tensor:
        """Return the mean over inputs of |scale P (x_hat - x0_hat)|^2 / 2, scale being the own head's row norm."""
        gap = F.normalize(x, dim=-1) - F.normalize(self.base[self.row[at]], dim=-1)
        if self.basis is not None:
            gap = gap @ self.basis
        own = self.heads[self.own]
        scale = own.weight.norm(dim=1).mean() if isinstance(own, Head) else 1.0
        return 0.5 * (scale * gap).square().sum(dim=1).mean()


def distance(kind: str, target: Float[Tensor, "batch k"], logits: Float[Tensor, "batch k"]) -> Float[Tensor, "batch"]:
    """Return the distance of each row of ``logits`` from that of ``target`` (logits too), p and q being their softmax.

    kl sum p log(p/q), reverse sum q log(q/p), js their mean against (p+q)/2, ce -log q of p's top class, mse of the
    logits, cosine 1 - cos of the logits.
    """
    if kind == "mse":
        return (logits - target).square().mean(dim=1)
    if kind == "cosine":
        return 1 - F.cosine_similarity(logits, target, dim=1)
    log_q = logits.log_softmax(dim=1)
    if kind == "ce":
        return -log_q.gather(1, target.argmax(dim=1, keepdim=True))[:, 0]
    log_p = target.log_softmax(dim=1)
    if kind == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(dim=1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=1)


def overlapping(
    heads: Mapping[str, AnyHead], own: str, threshold: float
) -> dict[str, tuple[Bool[Tensor, "classes"], list[tuple[int, int, float]]]]:
    """Return, for every other linear head that shares classes with ``own``: which of its rows, and the pairs.

        cos(w_c - m, w_k - m) >= threshold,    m the mean row of all heads

    The mean is taken off because prompts of one template are alike whatever they name, and a softmax does not see it.
    Pairs (own class, other class, cosine) are an optimal one-to-one matching of those rows.
    """
    rows = {n: F.normalize(h.weight.double(), dim=1) for n, h in heads.items() if isinstance(h, Head)}
    if own not in rows or len(rows) < 2 or threshold > 1:
        return {}
    mean = torch.cat(list(rows.values())).mean(dim=0)
    centred = {n: F.normalize(r - mean, dim=1) for n, r in rows.items()}
    found = {}
    for name, other in centred.items():
        if name == own:
            continue
        cos = centred[own] @ other.T
        same = cos.amax(dim=0) >= threshold
        if same.any():
            found[name] = (same, _matched(cos, threshold))
    return found


def _matched(cos: Float[Tensor, "own other"], threshold: float) -> list[tuple[int, int, float]]:
    """Return the one-to-one pairs of cosines of at least ``threshold`` whose sum is the largest."""
    fit = cos >= threshold
    rows, columns = fit.any(dim=1).nonzero()[:, 0].tolist(), fit.any(dim=0).nonzero()[:, 0].tolist()
    worth = torch.where(fit, cos, 0.0)[rows][:, columns].numpy()
    pairs = assigned(worth.T) if len(rows) > len(columns) else assigned(worth)
    pairs = [(b, a) for a, b in pairs] if len(rows) > len(columns) else pairs
    found = [(rows[a], columns[b]) for a, b in pairs]
    return sorted((i, j, cos[i, j].item()) for i, j in found if fit[i, j])


def assigned(worth: np.ndarray) -> list[tuple[int, int]]:
    """Return the column of each row, no column twice, by which the sum of ``worth`` ``[rows, columns >= rows]`` is largest.

    The Hungarian method: rows are taken in one after another, each along the cheapest path that frees a column, at prices
    that keep every pair so far cheapest (Kuhn 1955; Munkres 1957). Cost: rows squared times columns.
    """
    n, m = worth.shape
    price, level = np.zeros(m + 1), np.zeros(n)
    owner = np.full(m + 1, -1)  # of each column; the last is where a new row stands
    for row in range(n):
        owner[m], at = row, m
        least, before, seen = np.full(m, np.inf), np.full(m, m), np.zeros(m + 1, dtype=bool)
        while owner[at] >= 0:
            seen[at] = True
            slack = -worth[owner[at]] - level[owner[at]] - price[:m]
            better = ~seen[:m] & (slack < least)
            least[better], before[better] = slack[better], at
            after = int(np.where(seen[:m], np.inf, least).argmin())
            step = least[after]
            level[owner[seen]] += step
            price[seen] -= step
            least[~seen[:m]] -= step
            at = after
        while at != m:
            owner[at], at = owner[before[at]], int(before[at])
    return sorted((int(owner[k]), k) for k in range(m) if owner[k] >= 0)


def _span(heads: Mapping[str, AnyHead], own: str) -> Float[Tensor, "width k"] | None:
    """Return an orthonormal basis of the other heads' rows, or of what a `Span` has.

    None where a head is no `Head`, so all directions count.
    """
    others = [h for n, h in heads.items() if n != own]
    if not others or not all(isinstance(h, Head) for h in others):
        return None
    linear = [h for h in others if isinstance(h, Head)]
    rows = torch.cat([h.weight if isinstance(h, Span) else h.weight - h.weight.mean(dim=0) for h in linear])
    _, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    return v[s > 1e-6 * s[0]].T.float()
