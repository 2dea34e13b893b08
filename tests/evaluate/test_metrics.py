"""Metrics equal the library's, bootstraps equal resampling by hand, intervals cover, paired intervals are narrower."""

import numpy as np
import pytest

from merganser.evaluate.metrics import bootstrap, calibration_error, interval, mean_scores, score
from merganser.evaluate.run import Outcome, Scores, means


def sample(n=400, classes=4, right=0.7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    predictions = np.where(rng.random(n) < right, labels, rng.integers(0, classes, n))
    return labels, predictions


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, predictions = sample(seed=seed)
    assert score("accuracy", labels, predictions) == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert score("macro_f1", labels, predictions) == pytest.approx(
        metrics.f1_score(labels, predictions, average="macro")
    )
    rare = np.where(labels == 3, 0, labels)
    assert score("macro_f1", rare, predictions) == pytest.approx(
        metrics.f1_score(rare, predictions, average="macro", labels=[0, 1, 2])
    )


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_bootstrap_equals_resampling_examples(metric):
    labels, one = sample(seed=1)
    _, two = sample(seed=2)
    draws = bootstrap(metric, labels, [one, two], draws=4000)
    rng = np.random.default_rng(5)
    by_hand = []
    for _ in range(1500):
        at = rng.integers(0, len(labels), len(labels))
        by_hand.append([score(metric, labels[at], p[at]) for p in (one, two)])
    by_hand = np.array(by_hand)
    np.testing.assert_allclose(draws.mean(axis=0), by_hand.mean(axis=0), atol=0.004)
    np.testing.assert_allclose(np.cov(draws.T), np.cov(by_hand.T), atol=8e-5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for k in range(300):
        right = (rng.random(250) < 0.8).astype(int)
        both = interval(bootstrap("accuracy", np.ones(250, int), [right], draws=400, seed=k)[:, 0])
        covered += both["low"] <= 0.8 <= both["high"]
    assert 0.90 <= covered / 300 <= 0.985


def test_pairing_narrows_the_interval_of_a_gain():
    labels, one = sample(n=800, seed=3)
    two = one.copy()
    two[:40] = labels[:40]
    row = [Scores({"t": Outcome(labels, p, np.ones(len(p)))}) for p in (one, two)]
    gain, low, high = row[1].gain(row[0])
    assert gain == pytest.approx(np.mean(two == labels) - np.mean(one == labels))
    assert 0 < low < gain < high
    apart = [means([r], seed=k)[:, 0] for k, r in enumerate(row)]
    loose = interval(apart[1] - apart[0])
    assert high - low < 0.6 * (loose["high"] - loose["low"])


def test_a_model_gains_nothing_over_itself():
    labels, one = sample()
    scores = Scores({"t": Outcome(labels, one, np.ones(len(one)))})
    assert scores.gain(scores) == (0.0, 0.0, 0.0)


def test_the_mean_over_tasks_is_the_plain_mean():
    tasks = {str(k): ("accuracy", sample(n=100 * (k + 1), seed=k)[0]) for k in range(3)}
    row = {str(k): sample(n=100 * (k + 1), seed=k)[1] for k in range(3)}
    draws = mean_scores(tasks, [row])
    want = np.mean([score("accuracy", tasks[n][1], row[n]) for n in tasks])
    assert draws.mean() == pytest.approx(want, abs=0.003)


def test_calibration_error_of_known_cases():
    correct = np.array([1, 1, 0, 0] * 25)
    assert calibration_error(np.full(100, 0.5), correct) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.full(100, 0.9), correct) == pytest.approx(0.4)
    assert calibration_error(np.full(100, 1.0), np.ones(100)) == pytest.approx(0)
