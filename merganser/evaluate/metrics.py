"""Metrics from predictions, with bootstrap intervals over the examples.

Resampling examples with replacement is a multinomial draw over the distinct outcomes, so a bootstrap costs one draw of
counts; several models scored on the same examples are resampled together, which makes their difference paired.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("accuracy", "macro_f1")
DRAWS = 2000


def score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the metric in [0, 1]: "accuracy", or "macro_f1" (mean of F1 over the classes that occur in labels)."""
    cells, counts = _cells(metric, labels, [predictions])
    return float(_metric(metric, cells, counts[None])[0, 0])


def bootstrap(
    metric: str, labels: np.ndarray, predictions: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Return the metric of each set of predictions in every resample of the examples, ``[draws, sets]``."""
    cells, counts = _cells(metric, labels, predictions)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(int(counts.sum()), counts / counts.sum(), size=draws)
    return _metric(metric, cells, drawn)


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the 95 % percentile interval of bootstrap ``values``."""
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def mean_scores(
    tasks: Mapping[str, tuple[str, np.ndarray]], rows: Sequence[Mapping[str, np.ndarray]], *, seed: int = 0
) -> np.ndarray:
    """Return bootstrap draws of each row's mean over ``tasks`` (name: metric, labels), ``[draws, rows]``.

    A row holds predictions by task. Tasks are resampled independently, rows together.
    """
    total: Any = 0
    for k, (name, (metric, labels)) in enumerate(sorted(tasks.items())):
        total = total + bootstrap(metric, labels, [row[name] for row in rows], seed=seed + k)
    return total / len(tasks)


def calibration_error(confidences: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error: ``sum_b |B_b|/n * |accuracy(B_b) - confidence(B_b)|`` over equal bins.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 2.
    """
    at = np.minimum((confidences * bins).astype(int), bins - 1)
    sizes = np.bincount(at, minlength=bins)
    gaps = np.bincount(at, correct, minlength=bins) - np.bincount(at, confidences, minlength=bins)
    return float(np.abs(gaps)[sizes > 0].sum() / len(confidences))


def _cells(metric: str, labels: np.ndarray, predictions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct outcomes ``[cells, 1 + sets]`` (label, then predictions or hits) and how often each occurs."""
    if metric == "accuracy":
        table = np.stack([np.zeros_like(labels), *((p == labels).astype(labels.dtype) for p in predictions)], axis=1)
    else:
        table = np.stack([labels, *predictions], axis=1)
    return np.unique(table, axis=0, return_counts=True)


def _metric(metric: str, cells: np.ndarray, counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    if metric == "accuracy":
        return counts @ cells[:, 1:] / total
    label = cells[:, :1]
    classes = np.unique(label)
    f1 = np.zeros((len(counts), cells.shape[1] - 1))
    for c in classes:
        hit = counts @ ((label == c) & (cells[:, 1:] == c))
        of_class = counts @ (label == c)
        said = counts @ (cells[:, 1:] == c)
        f1 += 2 * hit / np.maximum(of_class + said, 1)
    return f1 / len(classes)
