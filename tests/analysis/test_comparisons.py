"""Comparisons of models: intervals and tests worked by hand, from published formulas."""

from math import comb

import numpy as np
import pytest

from moco.analysis import comparisons


def test_the_corrected_interval_worked_by_hand():
    """Differences of mean 0.03 and variance 0.00025 over 5 splits of 90 and 10 images.

    Variance of the mean (1/5 + 10/90) * 0.00025 = 7.7778e-5, standard error 0.0088192; the 97.5 % quantile of Student's
    t with 4 degrees of freedom is 2.7764 in tables, so that the interval is 0.03 +- 0.024486. t = 3.4017; tables give
    a two-sided p of 0.05 at 2.776 and 0.02 at 3.747.
    """
    low, high, p = comparisons.corrected_t([0.02, 0.04, 0.03, 0.05, 0.01], 90, 10)
    assert (low, high) == pytest.approx((0.03 - 0.024486, 0.03 + 0.024486), abs=1e-6)
    assert 0.02 < p < 0.05


def test_two_splits_have_the_cauchy_distribution():
    """With one degree of freedom p = 1 - 2 arctan(t) / pi. Mean 0.1, variance 0.02, t = 0.1 / sqrt((1/2 + 1) 0.02)."""
    _, _, p = comparisons.corrected_t([0.0, 0.2], 50, 50)
    assert p == pytest.approx(1 - 2 * np.arctan(0.1 / np.sqrt(0.03)) / np.pi)


@pytest.mark.parametrize("difference", [0, 0.1])
def test_equal_differences_give_no_interval(difference):
    """Two splits in which the same few images differ are no proof."""
    assert comparisons.corrected_t([difference] * 3, 5, 5) == (None, None, None)
    models = {"A": {"iid": entry(*[0.5 + difference] * 3)}, "B": {"iid": entry(0.5, 0.5, 0.5)}}
    text = comparisons.text(comparisons.compare(models))
    assert text == f"A - B, iid: {100 * difference:+.1f} in every split, which gives no interval"


def test_the_difference_is_that_of_the_means_when_a_split_has_several_seeds():
    models = {
        "A": {"halves": entry(0.5, 0.75, splits="dd", hits="1100")},
        "B": {"halves": entry(0.25, 0.25, splits="dd", hits="0001")},
    }
    (comparison,) = comparisons.compare(models)
    assert (comparison["difference"], comparison["test"]) == (0.375, "McNemar, exact, first seed")


@pytest.mark.parametrize("only_a, only_b", [(1, 7), (7, 1), (0, 0), (0, 6), (5, 5), (10, 30)])
def test_mcnemars_exact_test_sums_binomial_tails(only_a, only_b):
    """For 1 and 7: 2 (1 + 8) / 256 = 0.0703."""
    a = np.repeat([True, True, False, False], [20, only_a, only_b, 9])
    b = np.repeat([True, False, True, False], [20, only_a, only_b, 9])
    n, fewer = only_a + only_b, min(only_a, only_b)
    expected = min(1, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
    assert comparisons.mcnemar(a, b) == pytest.approx(expected)
    if n == 8:
        assert expected == 0.0703125


def entry(*each, splits="abc", **more):
    return {"each": list(each), "splits": list(splits), "train_images": [90] * 3, "test_images": [10] * 3, **more}


def test_models_are_compared_on_the_same_splits_only():
    models = {
        "A": {"iid": entry(0.7, 0.8, 0.9), "halves": entry(0.5, splits="d", hits="1100")},
        "B": {"iid": entry(0.6, 0.6, 0.6), "halves": entry(0.25, splits="d", hits="0001")},
        "C": {"iid": entry(0.6, 0.6, 0.6, splits="abd")},
        "old": {"iid": {"each": [0.1]}},
    }
    iid, halves = comparisons.compare(models)
    assert (iid["models"], iid["task"]) == (["A", "B"], "iid")
    assert iid["difference"] == pytest.approx(0.2)
    expected = comparisons.corrected_t([0.1, 0.2, 0.3], 90, 10)
    assert (iid["low"], iid["high"], iid["p"]) == pytest.approx(expected)
    assert halves == {
        "task": "halves", "models": ["A", "B"], "difference": 0.25, "test": "McNemar, exact", "p": 1.0
    }  # fmt: skip
    low, high = 100 * expected[0], 100 * expected[1]
    text = comparisons.text([iid, halves]).splitlines()
    assert text[0] == f"A - B, iid: +20.0 [{low:+.1f}, {high:+.1f}], p = {expected[2]:.2g} ({iid['test']})"
    assert text[1] == "A - B, halves: +25.0, p = 1 (McNemar, exact)"
    assert comparisons.text([halves] * 13) == "13 comparisons of models: see comparisons in results.json"
