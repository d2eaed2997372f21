"""Accuracies, comparisons and the table of models, from hand-made scores and from formulas worked by hand."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from moco.analysis import accuracy, splits
from moco.cli import UserError


def task(labels, split, classes="ab"):
    labels = np.array(labels)
    names = [f"{i}.jpeg" for i in range(len(labels))]
    return splits.Task("iid", None, list(classes), np.arange(len(labels)), names, labels, {0: split})


def test_majority_is_the_test_accuracy_of_the_largest_training_class():
    first = np.array([0, 1, 2, 3, 8]), np.array([4, 5, 6, 7, 9])  # class 0 trains most and is never tested
    second = np.array([3, 4, 8]), np.array([0, 5, 6, 9])  # class 1: 2 of 4 test images
    toy = task([0, 0, 0, 1, 1, 1, 1, 1, 2, 2], first, "abc")
    assert accuracy.majority(replace(toy, splits={0: first, 1: second})) == 0.25


def test_a_summary():
    toy = task([0, 0, 0, 1], (np.array([0]), np.array([1, 2, 3])))
    found = accuracy.summarize(toy, [np.array([[1, 0], [0, 1], [0, 1]])])
    assert found["mean"] == pytest.approx(2 / 3) and found["std"] is None
    assert found["per_class"] == {"a": 0.5, "b": 1.0}
    assert (found["majority"], found["chance"], found["test_images"]) == (2 / 3, 0.5, [3])
    assert "top5" not in found
    assert accuracy.confusion_matrix(toy, [np.array([[1, 0], [0, 1], [0, 1]])]).tolist() == [[1, 1], [0, 1]]


def test_top5_is_reported_for_more_than_five_classes():
    """Of three test images one is right, and the label of another is among the five highest scores."""
    scores = np.array([[9, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    seven = task([0, 1, 0, 2, 1, 3, 6], (np.array([0, 1]), np.array([2, 3, 4])), "abcdefg")
    found = accuracy.summarize(seven, [scores])
    assert (found["mean"], found["top5"]["mean"]) == pytest.approx((1 / 3, 2 / 3))


def test_balanced_accuracy_is_reported_for_unequal_classes():
    """Of class a 1 of 4 images is right, of class b 1 of 1: 0.625."""
    toy = task([0, 0, 0, 0, 1, 0], (np.array([5]), np.arange(5)))
    found = accuracy.summarize(toy, [np.array([[1, 0], [0, 1], [0, 1], [0, 1], [0, 1]])])
    assert (found["mean"], found["balanced"]["mean"], found["hits"]) == (0.4, 0.625, "10001")
    equal = task([0, 0, 1, 1], (np.array([0]), np.arange(1, 4)))
    assert "balanced" not in accuracy.summarize(equal, [np.zeros((3, 2))])
    assert accuracy.cells({"TC": {"iid": found}})[-1] == ["TC", "40.0 (balanced 62.5)"]


def test_hits_are_kept_for_one_split_only():
    toy = task([0, 1, 0, 1], (np.array([0, 1]), np.array([2, 3])))
    two = replace(toy, splits=toy.splits | {1: (np.array([2, 3]), np.array([0, 1]))})
    same = replace(toy, splits=dict.fromkeys([0, 1], toy.splits[0]))
    scores = [np.eye(2), np.eye(2)[::-1]]
    assert accuracy.summarize(same, scores)["hits"] == "11"
    found = accuracy.summarize(two, scores)
    assert "hits" not in found and len(set(found["splits"])) == 2
    assert found["splits"][0] == accuracy.summarize(toy, scores[:1])["splits"][0]


def test_accuracies_by_number_of_training_images(tmp_path):
    toy = task([0, 1] * 4, (np.arange(4), np.arange(4, 8)))
    models = {"TC": {}}
    for share, train in ((1.0, np.arange(4)), (0.5, np.arange(2))):
        each = replace(toy, splits={0: (train, np.arange(4, 8))}, share=share)
        models["TC"][f"iid {share}"] = accuracy.summarize(each, [np.tile(np.eye(2), (2, 1))])
    models["TC"]["other"] = accuracy.summarize(toy, [np.tile(np.eye(2), (2, 1))])
    models["TC"]["iid 0.5"]["knn"] = {"k": 1, "mean": 0.5, "std": None, "each": [0.5]}
    expected = {"iid": {"TC": [(2, 1, None), (4, 1, None)], "TC (1-NN)": [(2, 0.5, None)]}}
    assert accuracy.by_training_images(models) == expected


def test_the_standard_deviation_is_that_of_a_sample():
    assert accuracy.mean_and_std([0.1, 0.2, 0.6])["std"] == pytest.approx(np.sqrt(0.14 / 2))


def test_published_accuracies_exist_for_toybox_only():
    toybox = task(range(12), (np.arange(6), np.arange(6, 12)), accuracy.TOYBOX)
    assert accuracy.published_accuracy(toybox, "TC-SAY-resnext") == accuracy.published_accuracy(toybox, "TC-SAY") == 0.9
    assert accuracy.published_accuracy(toybox, "random") is None
    assert accuracy.published_accuracy(task([0, 1], (np.array([0]), np.array([1]))), "TC-SAY") is None


def results(path, model, classes="abcd", **by_task):
    entry = {"std": 0.1, "each": [0.4, 0.6], "majority": 0.3, "chance": 0.25, "per_class": dict.fromkeys(classes, 0.5)}
    path.write_text(json.dumps({"models": {model: {name: entry | {"mean": mean} for name, mean in by_task.items()}}}))
    return path


def test_results_of_several_files_make_one_table(tmp_path):
    paths = [results(tmp_path / "a", "TC", iid=0.5), results(tmp_path / "b", "TC", exemplar=0.25)]
    models = accuracy.read_results([*paths, results(tmp_path / "c", "hog", iid=0.125)])
    assert accuracy.table(models).splitlines() == [
        "top-1 %           iid     exemplar",
        "chance           25.0         25.0",
        "majority         30.0         30.0",
        "TC        50.0 ± 10.0  25.0 ± 10.0",
        "hog       12.5 ± 10.0            -",
        "±: sd over 2 splits",
    ]


def test_knn_accuracies_have_a_row_of_their_own(tmp_path):
    models = accuracy.read_results([results(tmp_path / "a", "TC", iid=0.5, exemplar=0.3)])
    models["TC"]["iid"]["knn"] = {"k": 5, "mean": 0.75, "std": None, "each": [0.75]}
    assert [row.split() for row in accuracy.table(models).splitlines()[3:5]] == [
        ["TC", "50.0", "±", "10.0", "30.0", "±", "10.0"],
        ["TC", "(5-NN)", "75.0", "-"],
    ]


def test_the_same_result_twice_is_an_error(tmp_path):
    same = [results(tmp_path / name, "TC", iid=0.5) for name in "ab"]
    with pytest.raises(UserError, match="b has another result of TC .iid.; choose other --names"):
        accuracy.read_results(same)


@pytest.mark.parametrize("classes", ["abce", "abc"])
def test_results_of_other_classes_cannot_share_a_column(tmp_path, classes):
    first = results(tmp_path / "a", "TC", iid=0.5)
    other = results(tmp_path / "b", "HOG", classes, iid=0.5)
    with pytest.raises(UserError, match="b: results of iid have different classes .*d"):
        accuracy.read_results([first, other])
    accuracy.read_results([first, results(tmp_path / "c", "HOG", classes, exemplar=0.5)])


@pytest.mark.parametrize(
    "content",
    ["[]", '{"models": {}}', '{"models": {"TC": {}}}', '{"models": {"TC": {"iid": {"mean": 0.5}}}}']
    + ['{"models": {"TC": {"iid": {"mean": NaN, "majority": 0.3, "chance": 0.5}}}}'],
)
def test_a_file_without_results_is_an_error(tmp_path, content):
    (tmp_path / "c").write_text(content)
    with pytest.raises(UserError, match="c has no accuracies; give a results.json of linear_decoding.py"):
        accuracy.read_results([tmp_path / "c"])
    with pytest.raises(UserError, match="cannot read .*d: No such file"):
        accuracy.read_results([tmp_path / "d"])


def test_the_corrected_interval_worked_by_hand():
    """Differences of mean 0.03 and variance 0.00025 over 5 splits of 90 and 10 images.

    Variance of the mean (1/5 + 10/90) * 0.00025 = 7.7778e-5, standard error 0.0088192; the 97.5 % quantile of Student's
    t with 4 degrees of freedom is 2.7764 in tables, so that the interval is 0.03 +- 0.024486. t = 3.4017; tables give
    a two-sided p of 0.05 at 2.776 and 0.02 at 3.747.
    """
    low, high, p = accuracy.corrected_t([0.02, 0.04, 0.03, 0.05, 0.01], 90, 10)
    assert (low, high) == pytest.approx((0.03 - 0.024486, 0.03 + 0.024486), abs=1e-6)
    assert 0.02 < p < 0.05


def test_two_splits_have_the_cauchy_distribution():
    """With one degree of freedom p = 1 - 2 arctan(t) / pi. Mean 0.1, variance 0.02, t = 0.1 / sqrt((1/2 + 1) 0.02)."""
    _, _, p = accuracy.corrected_t([0.0, 0.2], 50, 50)
    assert p == pytest.approx(1 - 2 * np.arctan(0.1 / np.sqrt(0.03)) / np.pi)


@pytest.mark.parametrize("difference", [0, 0.1])
def test_equal_differences_give_no_interval(difference):
    """Two splits in which the same few images differ are no proof."""
    assert accuracy.corrected_t([difference] * 3, 5, 5) == (None, None, None)
    models = {"A": {"iid": entry(*[0.5 + difference] * 3)}, "B": {"iid": entry(0.5, 0.5, 0.5)}}
    text = accuracy.describe(accuracy.compare(models))
    assert text.startswith(f"A - B, iid: {100 * difference:+.1f} in every split, which gives no interval\nthe standard")


def test_p_values_corrected_for_several_comparisons_worked_by_hand():
    """0.01 counts threefold, 0.03 twice, and 0.04 not less than what is before it; never above 1."""
    assert accuracy.holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert accuracy.holm([0.9, 0.8]).tolist() == [1, 1] and accuracy.holm([]).tolist() == []


def test_intervals_of_shares_are_said_to_be_too_wide():
    models = {name: {"iid 10%": entry(*each, train_share=0.1)} for name, each in (("A", (0.5, 0.7)), ("B", (0.4, 0.4)))}
    assert "a share of the training images intervals are too wide" in accuracy.describe(accuracy.compare(models))


def test_majority_below_chance_is_explained(tmp_path):
    models = accuracy.read_results([results(tmp_path / "a", "TC", iid=0.5)])
    models["TC"]["iid"]["majority"] = 0.2
    assert "majority below chance (iid): the largest class in training is small" in accuracy.table(models)
    models["TC"]["iid"] |= {"std": None, "hits": "01"}
    assert "±" not in accuracy.table(models)
    models["TC"]["iid"]["std"] = 0.1
    assert accuracy.spread(models) == "sd over 2 seeds"


def test_the_difference_is_that_of_the_means_when_a_split_has_several_seeds():
    models = {
        "A": {"halves": entry(0.5, 0.75, splits="dd", hits="1100")},
        "B": {"halves": entry(0.25, 0.25, splits="dd", hits="0001")},
    }
    (comparison,) = accuracy.compare(models)
    assert (comparison["difference"], comparison["test"]) == (0.375, "McNemar, exact, first seed")


@pytest.mark.parametrize("only_a, only_b", [(1, 7), (7, 1), (0, 0), (0, 6), (5, 5), (10, 30)])
def test_mcnemars_exact_test_sums_binomial_tails(only_a, only_b):
    """For 1 and 7: 2 (1 + 8) / 256 = 0.0703."""
    a = np.repeat([True, True, False, False], [20, only_a, only_b, 9])
    b = np.repeat([True, False, True, False], [20, only_a, only_b, 9])
    n, fewer = only_a + only_b, min(only_a, only_b)
    expected = min(1, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
    assert accuracy.mcnemar(a, b) == pytest.approx(expected)
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
    iid, halves = accuracy.compare(models)
    assert (iid["models"], iid["task"]) == (["A", "B"], "iid")
    assert iid["difference"] == pytest.approx(0.2)
    expected = accuracy.corrected_t([0.1, 0.2, 0.3], 90, 10)
    assert (iid["low"], iid["high"], iid["p"]) == pytest.approx(expected)
    assert halves == {
        "task": "halves", "models": ["A", "B"], "difference": 0.25, "test": "McNemar, exact", "p": 1.0, "p_holm": 1.0,
        "notes": [],
    }  # fmt: skip
    low, high = 100 * expected[0], 100 * expected[1]
    assert accuracy.describe([iid, halves]).splitlines() == [
        f"A - B, iid: +20.0 [{low:+.1f}, {high:+.1f}], p = {2 * expected[2]:.2g} ({iid['test']})",
        "A - B, halves: +25.0, p = 1 (McNemar, exact)",
        "p values are corrected for 2 comparisons (Holm)",
        "the standard deviation of 3 splits is uncertain: use 5 --seeds or more",
    ]
    assert accuracy.describe([halves] * 13) == "13 comparisons of models: see comparisons in results.json"
