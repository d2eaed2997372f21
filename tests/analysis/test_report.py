"""Readouts: equal to scikit-learn called by hand and to DINO's rule of nearest neighbors."""

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

from moco.analysis import report


@pytest.fixture(scope="module")
def blobs():
    """Features of three classes that overlap, and their labels."""
    return make_classification(150, 30, n_informative=6, n_classes=3, class_sep=0.7, random_state=0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_logistic_regression_is_scikit_learns_called_by_hand(blobs):
    x, y = blobs
    scaled = x / np.sqrt(np.mean(x**2))
    random, held_out = np.random.default_rng(4), []
    for label in range(3):
        order = random.permutation(np.flatnonzero(y == label))
        held_out += order[round(0.8 * len(order)) :].tolist()
    kept = np.setdiff1d(np.arange(150), held_out)
    fits = [LogisticRegression(C=c, max_iter=1000).fit(scaled[kept], y[kept]) for c in 10.0 ** np.arange(-5, 4)]
    accuracies = [fit.score(scaled[held_out], y[held_out]) for fit in fits]
    best = 10.0 ** (int(np.argmax(accuracies)) - 5)
    assert 1e-5 < best < 1e3 and len(set(accuracies)) > 2
    expected = LogisticRegression(C=best, max_iter=1000).fit(scaled, y).decision_function(scaled)
    for scale in (1, 100):  # of the features, which changes nothing
        found = report.logistic(scale * x, y, 4)
        np.testing.assert_allclose(found.C, best)
        scores = report.class_scores(found, scale * x, np.arange(150), 3)
        np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-9)


def test_standardized_features_and_the_layer_that_does_the_same_worked_by_hand():
    """Features 1, 3, 5 have mean 3 and deviation sqrt(8 / 3); those that do not vary count as 0, in test images too."""
    x = np.array([[1, 7, 1e4], [3, 7, 1e4], [5, 7, 1e4 + 1e-3]], np.float32)
    mean, factor = report.standardization(x)
    np.testing.assert_allclose(mean, [3, 7, 1e4])
    np.testing.assert_allclose(factor, [np.sqrt(3 / 8), 0, 0])
    weight, bias = report.fold(np.array([[2, 9, 9]], np.float32), np.array([1], np.float32), mean, factor)
    np.testing.assert_allclose(weight, [[2 * np.sqrt(3 / 8), 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(bias, [1 - 6 * np.sqrt(3 / 8)], rtol=1e-6)


@pytest.mark.parametrize(("scale", "is_noted"), [(0.05, True), (0.2, False), (9, False), (11, True)])
def test_an_extreme_scale_of_features_is_noted(scale, is_noted, capsys):
    report.note_scale("TC", np.full((3, 4), scale, np.float32))
    line = f"note: the root mean square of TC's features is {scale:.2g}; the accuracy of the published readout depends"
    assert capsys.readouterr().out.startswith(line) == is_noted


def test_a_class_with_one_image_is_trained_on(blobs, capsys, monkeypatch):
    x, _ = blobs
    assert report.logistic(x[:2], np.array([0, 1]), 0).C == 1
    monkeypatch.setattr(report, "MAX_ITERATIONS", 1)
    assert set(report.logistic(x[:12], np.array([2, *[0, 1] * 5, 0]), 0).classes_) == {0, 1, 2}
    assert "did not converge in 1 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 5, 200])
def test_nearest_neighbors_vote_by_dinos_rule(k):
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, 60)
    train = (draws.normal(0, 1, (60, 8)) + np.eye(4, 8)[labels]).astype(np.float32)
    test = draws.normal(0, 1, (30, 8)).astype(np.float32)
    classifier = report.nearest_neighbors(train, labels, 0, k)
    found = report.class_scores(classifier, test, np.arange(30), 5)
    assert (found[:, 4] == np.finfo(float).min).all()  # the fifth class has no training images
    for row, features in zip(found, test, strict=True):
        votes = [0.0] * 4
        cosines = [float(features @ other / np.linalg.norm(features) / np.linalg.norm(other)) for other in train]
        for i in sorted(range(60), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] += np.exp(cosines[i] / 0.07)
        np.testing.assert_allclose(row[:4], np.array(votes) / sum(votes), rtol=1e-3, atol=1e-12)
        assert row.argmax() == np.argmax(votes)
