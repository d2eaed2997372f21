"""Accuracies, their spread, and the results of many models, by hand-made scores."""

import json

import numpy as np
import pytest

from moco.analysis import accuracy, splits
from moco.cli import UserError


def task(labels, split, classes="ab"):
    labels = np.array(labels)
    names = [f"{i}.jpeg" for i in range(len(labels))]
    return splits.Task("iid", list(classes), np.arange(len(labels)), names, labels, [split], [0])


def test_accuracies_by_hand():
    scores = np.array([[9, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    labels = np.array([0, 2, 1])
    assert accuracy.accuracy(scores, labels) == pytest.approx(1 / 3)
    assert accuracy.accuracy(scores, labels, 5) == pytest.approx(2 / 3)


def test_a_summary_by_hand():
    toy = task([0, 0, 0, 1], (np.array([0]), np.array([1, 2, 3])))
    found = accuracy.summary(toy, [np.array([[1, 0], [0, 1], [0, 1]])])
    assert found["mean"] == pytest.approx(2 / 3) and found["std"] is None
    assert found["per_class"] == {"a": 0.5, "b": 1.0}
    assert (found["majority"], found["chance"], found["test_images"]) == (0.75, 0.5, [3])
    assert "top5" not in found
    assert accuracy.confusion(toy, [np.array([[1, 0], [0, 1], [0, 1]])]).tolist() == [[1, 1], [0, 1]]


def test_top5_stands_under_its_name_where_there_are_more_than_five_classes():
    six = task(range(6), (np.array([0]), np.arange(1, 6)), "abcdef")
    assert accuracy.summary(six, [np.eye(6)[1:]])["top5"]["mean"] == 1
    assert accuracy.summary(six, [-np.eye(6)[1:]])["top5"]["mean"] == 0


def test_the_spread_is_the_sample_standard_deviation():
    assert accuracy.spread([0.1, 0.2, 0.6])["std"] == pytest.approx(np.sqrt(0.14 / 2))


def test_knn_finds_the_nearest_by_angle():
    train = np.array([[1, 0], [100, 1], [0, 1], [1, 100]], np.float32)
    test = np.array([[5, 0.1], [0.1, 5]], np.float32)
    scores = accuracy.knn(train, np.array([2, 2, 0, 0]), test, 2, 3)
    assert scores.argmax(1).tolist() == [2, 0]
    assert accuracy.knn(train, np.array([2, 2, 0, 1]), test, 4, 3)[1].argmax() == 2  # two votes beat nearness


def test_published_figures_are_known_only_for_their_set():
    toybox = task(range(12), (np.arange(6), np.arange(6, 12)), accuracy.TOYBOX)
    assert accuracy.published(toybox, "TC-SAY-resnext") == accuracy.published(toybox, "TC-SAY") == 0.9
    assert accuracy.published(toybox, "random") is None
    assert accuracy.published(task([0, 1], (np.array([0]), np.array([1]))), "TC-SAY") is None


def results(path, model, **by_task):
    entry = {"mean": 0.5, "std": 0.1, "each": [0.4, 0.6], "majority": 0.3, "chance": 0.25}
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


def test_results_that_clash_or_are_none_are_errors(tmp_path):
    same = [results(tmp_path / name, "TC", iid=0.5) for name in "ab"]
    with pytest.raises(UserError, match="b holds another result of TC .iid."):
        accuracy.read_results(same)
    (tmp_path / "c").write_text("[]")
    with pytest.raises(UserError, match="c holds no results"):
        accuracy.read_results([tmp_path / "c"])
    with pytest.raises(UserError, match="cannot read the results .*d: No such file"):
        accuracy.read_results([tmp_path / "d"])
