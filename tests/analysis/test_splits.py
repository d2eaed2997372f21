"""Splits: training images are never test images, and a user's mistake is one clear line."""

import argparse
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco.analysis import splits
from moco.cli import UserError
from moco.data import loader


def options(*words):
    parser = argparse.ArgumentParser()
    splits.add_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    return splits.SplitOptions.from_flags(vars(parser.parse_args([str(word) for word in words])))


@pytest.fixture
def toys(tmp_path):
    """A folder of 2 classes with 4 exemplars of 5 images each; only names matter, so the files are empty."""
    for name, exemplar, view in itertools.product(("car", "cat"), range(1, 5), range(5)):
        path = tmp_path / "toys" / name / f"{name}_{exemplar:02d}_rotate_{view:03d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "toys"


def tasks(folder, *words):
    return splits.make_tasks(loader.FrameFolder(folder), options(*words))


@given(st.integers(4, 300), st.integers(0, 2**31))
def test_an_iid_split_has_every_image_once_and_half_of_them_train(n, seed):
    train, test = splits.iid(n, seed)
    assert len(train) == n // 2
    assert sorted([*train, *test]) == list(range(n))


def test_seeds_give_different_splits_and_the_same_seed_the_same():
    a, b, again = (splits.iid(100, seed)[0].tolist() for seed in (0, 1, 0))
    assert a == again != b


@given(st.data())
def test_no_exemplar_is_ever_on_both_sides(data):
    n_test = data.draw(st.integers(1, 3))
    labels, exemplars = [], []
    for label in range(data.draw(st.integers(1, 4))):
        for exemplar in data.draw(st.sets(st.integers(0, 20), min_size=n_test + 1, max_size=8)):
            count = data.draw(st.integers(1, 5))
            labels += [label] * count
            exemplars += [f"{exemplar:02d}"] * count
    order = data.draw(st.permutations(range(len(labels))))
    labels, exemplars = np.array(labels)[order], np.array(exemplars)[order]
    train, test = splits.by_exemplar(labels, exemplars, n_test, data.draw(st.integers(0, 1000)))
    assert sorted([*train, *test]) == list(range(len(labels)))
    trained, tested = ({(labels[i], exemplars[i]) for i in side} for side in (train, test))
    assert not trained & tested
    for label in np.unique(labels):
        assert sum(each == label for each, _ in tested) == n_test


@pytest.mark.parametrize(
    ("name", "exemplar"),
    [
        ("airplane_01_pivothead_rxplus.mp4", "01"),
        ("car/car_30_rotate_0007.jpeg", "30"),
        ("hot_dog_03_grow_1.png", "03"),
        ("class_0001/img_0001.jpeg", None),
        ("car/1234.jpeg", None),
        ("car/car_01.jpeg", None),
    ],
)
def test_exemplars_are_read_from_toybox_names(name, exemplar):
    assert splits.exemplar(name) == exemplar


def test_a_subsample_is_every_tenth_image_of_a_class_in_time():
    names = [f"a/img_{i}.jpeg" for i in range(25)] + [f"b/img_{i}.jpeg" for i in range(11)]
    labels = np.repeat([0, 1], [25, 11])
    order = sorted(range(36), key=lambda i: names[i])  # img_10 before img_2, as a folder lists them
    kept = splits.every_nth(lambda i: names[order[i]], labels[order], 10)
    expected = {f"a/img_{i}.jpeg" for i in (0, 10, 20)} | {"b/img_0.jpeg", "b/img_10.jpeg"}
    assert {names[order[i]] for i in kept} == expected
    assert kept.tolist() == sorted(kept)


def test_subsampled_tasks_split_only_the_tenth(toys):
    for flag in ([], ["--published-sampling"]):
        found = tasks(toys, "--subsample", "--seed", 0, *flag)[0]
        assert (found.name, len(found.images), sum(map(len, found.splits[0]))) == ("subsample", 4, 4)
    assert [name[-11:-5] for name in tasks(toys, "--subsample")[0].names] == ["te_000"] * 4


def test_tasks_by_seed_class_and_exemplar(toys):
    iid, exemplar = tasks(toys, "--split", "iid", "exemplar", "--seeds", 3, "--seed", 7, "--test-exemplars", 1)
    assert (iid.name, exemplar.name, iid.seeds) == ("iid", "exemplar", [7, 8, 9])
    assert [len(test) for _, test in exemplar.splits] == [10] * 3
    assert iid.names[0] == "car/car_01_rotate_000.jpeg"
    assert iid.majority == 0.5


def test_binary_tasks_are_those_of_the_paper(tmp_path):
    for name in ("car", "chair", "door", "foot", "hand", "road", "table", "window", "zebra"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpeg").touch()
    found = tasks(tmp_path, "--binary-tasks")
    assert [each.name for each in found] == ["iid car/road", "iid door/window", "iid foot/hand", "iid chair/table"]
    assert all(each.labels.tolist() == [0, 0, 0, 1, 1, 1] for each in found)
    assert found[0].names[3] == "road/0.jpeg" and found[0].slug == "iid_car_road"


def test_a_split_file_is_used_as_it_is(toys, tmp_path):
    train = ["car/car_01_rotate_000.jpeg", "cat/cat_01_rotate_000.jpeg"]
    split = {"train": train, "test": ["cat/cat_02_rotate_001.jpeg"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (found,) = tasks(toys, "--split-file", tmp_path / "split.json")
    assert found.name == "own"
    assert [[found.names[i] for i in side] for side in found.splits[0]] == [split["train"], split["test"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not {'train'"),
        ('["a"]', "is not {'train'"),
        ('{"train": ["car/none.jpeg"], "test": []}', r"car/none.jpeg \(and 0 more\) is not among"),
        ('{"train": ["car/car_01_rotate_000.jpeg"], "test": []}', "has no test images"),
        ('{"train": ["car/car_01_rotate_000.jpeg"], "test": ["car/car_01_rotate_000.jpeg"]}', "on both sides"),
        (
            '{"train": ["car/car_01_rotate_000.jpeg"], "test": ["cat/cat_01_rotate_000.jpeg"]}',
            "fewer than two classes to train on",
        ),
        ('{"train": "car/car_01_rotate_000.jpeg", "test": []}', "is not {'train'"),
        ("", "is empty"),
        ("\n ", "is empty"),
    ],
)
def test_an_invalid_split_file_is_an_error(toys, tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        tasks(toys, "--split-file", tmp_path / "split.json")
    with pytest.raises(UserError, match="cannot read --split-file"):
        tasks(toys, "--split-file", tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "car"], "has one class, car"),
        (["--classes", "car", "dog"], "no class folder dog; it has car, cat"),
        (["--binary-tasks"], "no class folder road"),
        (["--num-classes", 3], "--num-classes 3 does not match .*: 2 classes"),
        (["--split", "exemplar", "--test-exemplars", 4], "--test-exemplars 4 of 4 leaves no car to train on"),
        (["--subsample", "--published-sampling", "--seed", 2], "the class car in .* has 1 image"),
        (["--seed", -1], "--seed -1 --seeds 1: seeds are from 0 to 4294967295"),
        (["--seed", 2**32 - 2, "--seeds", 3], "seeds are from 0 to 4294967295"),
    ],
)
def test_impossible_tasks_are_an_error(toys, words, message):
    with pytest.raises(UserError, match=message):
        tasks(toys, *words)


def test_one_class_one_image_and_names_without_exemplars_are_errors(toys):
    (toys / "cat" / "img_0001.jpeg").touch()
    with pytest.raises(UserError, match="cat/img_0001.jpeg contains no exemplar"):
        tasks(toys, "--split", "exemplar")
    for path in [*(toys / "cat").iterdir()][1:]:
        path.unlink()
    with pytest.raises(UserError, match=r"the class cat in .* has 1 image\(s\)"):
        tasks(toys)
    for path in (toys / "cat").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has one class, car"):
        tasks(toys)


def test_drop_removes_unreadable_images_from_the_splits():
    task = splits.Task("iid", ["a", "b"], np.arange(6), list("uvwxyz"), np.array([0, 0, 1, 1, 0, 1]), [], [0])
    bad = np.array([False, True, False, True, False, False])
    found = replace(task, splits=[(np.array([0, 1, 2]), np.array([3, 4]))]).drop(bad)
    assert [side.tolist() for side in found.splits[0]] == [[0, 2], [4]]
    assert found.left_out == ["v", "x"]
    for train, test in (([0, 1, 3], [2, 4]), ([0, 2, 4], [1, 3])):
        with pytest.raises(UserError, match="fewer than two classes to train on, or no test images"):
            replace(task, splits=[(np.array(train), np.array(test))]).drop(bad)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_split_file_may_have_a_bom_or_be_utf_16(toys, tmp_path, encoding):
    (toys / "car" / "voiture_é_1.jpeg").touch()
    split = {"train": ["car/voiture_é_1.jpeg", "cat/cat_01_rotate_000.jpeg"], "test": ["cat/cat_02_rotate_001.jpeg"]}
    (tmp_path / "split.json").write_text(json.dumps(split, ensure_ascii=False), encoding=encoding)
    (task,) = tasks(toys, "--split-file", tmp_path / "split.json")
    assert [[task.names[i] for i in side] for side in task.splits[0]] == [split["train"], split["test"]]


def test_majority_is_the_test_accuracy_of_the_largest_training_class():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    first = np.array([0, 1, 2, 3, 8]), np.array([4, 5, 6, 7, 9])  # class 0 trains most and is never tested
    second = np.array([3, 4, 8]), np.array([0, 5, 6, 9])  # class 1: 2 of 4 test images
    task = splits.Task("iid", ["a", "b", "c"], np.arange(10), list("qrstuvwxyz"), labels, [first, second], [0, 1])
    assert task.majority == 0.25
