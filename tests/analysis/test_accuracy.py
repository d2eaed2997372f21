"""Accuracies and the table of many models, from hand-made scores."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moco.analysis import accuracy, splits
from moco.cli import UserError


def task(labels, split, classes="ab"):
    labels = np.array(labels)
    names = [f"{i}.jpeg" for i in range(len(labels))]
    return splits.Task("iid", list(classes), np.arange(len(labels)), names, labels, [split], [0])


def test_topk_accuracies():
    scores = np.array([[9, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    labels = np.array([0, 2, 1])
    assert accuracy.topk_accuracy(scores, labels) == pytest.approx(1 / 3)
    assert accuracy.topk_accuracy(scores, labels, 5) == pytest.approx(2 / 3)


def test_a_summary():
    toy = task([0, 0, 0, 1], (np.array([0]), np.array([1, 2, 3])))
    found = accuracy.summarize(toy, [np.array([[1, 0], [0, 1], [0, 1]])])
    assert found["mean"] == pytest.approx(2 / 3) and found["std"] is None
    assert found["per_class"] == {"a": 0.5, "b": 1.0}
    assert (found["majority"], found["chance"], found["test_images"]) == (2 / 3, 0.5, [3])
    assert "top5" not in found
    assert accuracy.confusion_matrix(toy, [np.array([[1, 0], [0, 1], [0, 1]])]).tolist() == [[1, 1], [0, 1]]


def test_top5_is_reported_for_more_than_five_classes():
    six = task(range(6), (np.array([0]), np.arange(1, 6)), "abcdef")
    assert accuracy.summarize(six, [np.eye(6)[1:]])["top5"]["mean"] == 1
    assert accuracy.summarize(six, [-np.eye(6)[1:]])["top5"]["mean"] == 0


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
    two = replace(toy, splits=[toy.splits[0], (np.array([2, 3]), np.array([0, 1]))], seeds=[0, 1])
    same = replace(toy, splits=2 * toy.splits, seeds=[0, 1])
    scores = [np.eye(2), np.eye(2)[::-1]]
    assert accuracy.summarize(same, scores)["hits"] == "11"
    found = accuracy.summarize(two, scores)
    assert "hits" not in found and len(set(found["splits"])) == 2
    assert found["splits"][0] == accuracy.summarize(toy, scores[:1])["splits"][0]


def test_accuracies_by_number_of_training_images(tmp_path):
    toy = task([0, 1] * 4, (np.arange(4), np.arange(4, 8)))
    models = {"TC": {}}
    for share, train in ((1.0, np.arange(4)), (0.5, np.arange(2))):
        each = replace(toy, splits=[(train, np.arange(4, 8))], split="iid", share=share)
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
    ]


def test_knn_accuracies_have_a_row_of_their_own(tmp_path):
    models = accuracy.read_results([results(tmp_path / "a", "TC", iid=0.5, exemplar=0.3)])
    models["TC"]["iid"]["knn"] = {"k": 5, "mean": 0.75, "std": None, "each": [0.75]}
    assert [row.split() for row in accuracy.table(models).splitlines()[3:]] == [
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
    ["[]", "", '{"models": {}}', '{"models": {"TC": {}}}', '{"models": {"TC": {"iid": {"mean": 0.5}}}}']
    + ['{"models": {"TC": {"iid": {"mean": NaN, "majority": 0.3, "chance": 0.5}}}}'],
)
def test_a_file_without_results_is_an_error(tmp_path, content):
    (tmp_path / "c").write_text(content)
    with pytest.raises(UserError, match="c is not a results.json of linear_decoding.py or hog_baseline.py"):
        accuracy.read_results([tmp_path / "c"])
    with pytest.raises(UserError, match="cannot read the results .*d: No such file"):
        accuracy.read_results([tmp_path / "d"])
