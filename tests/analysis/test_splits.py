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
from moco.data import manifest
from moco.data.folders import FrameFolder


def options(*words):
    parser = argparse.ArgumentParser()
    splits.add_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    return vars(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def toys(tmp_path):
    """A folder of 2 classes with 4 exemplars of 5 images each; only names matter, so the files are empty."""
    for name, exemplar, view in itertools.product(("car", "cat"), range(1, 5), range(5)):
        path = tmp_path / "toys" / name / f"{name}_{exemplar:02d}_rotate_{view:03d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "toys"


def tasks(folder, *words):
    return splits.make_tasks(FrameFolder(folder), options(*words))


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
    train, test = splits.hold_out(exemplars, labels, n_test, data.draw(st.integers(0, 1000)))
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
    assert (iid.name, exemplar.name, [*iid.splits]) == ("iid", "exemplar", [7, 8, 9])
    assert [len(test) for _, test in exemplar.splits.values()] == [10] * 3
    assert iid.names[0] == "car/car_01_rotate_000.jpeg"


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
        ("no json", "split.json is damaged or not JSON"),
        ('["a"]', "is not {'train'"),
        ('{"train": ["car/none.jpeg"], "test": []}', r"car/none.jpeg \(and 0 more\) is not among"),
        ('{"train": ["car/car_01_rotate_000.jpeg"], "test": []}', "or no test images"),
        ('{"train": ["car/car_01_rotate_000.jpeg"], "test": ["car/car_01_rotate_000.jpeg"]}', "on both sides"),
        (
            '{"train": ["car/car_01_rotate_000.jpeg"], "test": ["cat/cat_01_rotate_000.jpeg"]}',
            "fewer than two classes to train on",
        ),
        ('{"train": "car/car_01_rotate_000.jpeg", "test": []}', "is not {'train'"),
        ("", "split.json is damaged or not JSON"),
        ('{"train": [["car/car_01_rotate_000.jpeg"]], "test": []}', "is not among the images"),
    ],
)
def test_an_invalid_split_file_is_an_error(toys, tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        tasks(toys, "--split-file", tmp_path / "split.json")
    with pytest.raises(UserError, match="cannot read .*missing.json"):
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
    labels = np.array([0, 0, 1, 1, 0, 1])
    task = splits.Task("iid", None, ["a", "b"], np.arange(6), list("uvwxyz"), labels, {})
    bad = np.array([False, True, False, True, False, False])
    found = replace(task, splits={0: (np.array([0, 1, 2]), np.array([3, 4]))}).drop(bad)
    assert [side.tolist() for side in found.splits[0]] == [[0, 2], [4]]
    assert found.left_out == ("v", "x")
    for train, test in (([0, 1, 3], [2, 4]), ([0, 2, 4], [1, 3])):
        with pytest.raises(UserError, match="fewer than two classes to train on, or no test images"):
            replace(task, splits={0: (np.array(train), np.array(test))}).drop(bad)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_split_file_may_have_a_bom_or_be_utf_16(toys, tmp_path, encoding):
    (toys / "car" / "voiture_é_1.jpeg").touch()
    split = {"train": ["car/voiture_é_1.jpeg", "cat/cat_01_rotate_000.jpeg"], "test": ["cat/cat_02_rotate_001.jpeg"]}
    (tmp_path / "split.json").write_text(json.dumps(split, ensure_ascii=False), encoding=encoding)
    (task,) = tasks(toys, "--split-file", tmp_path / "split.json")
    assert [[task.names[i] for i in side] for side in task.splits[0]] == [split["train"], split["test"]]


def make_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def sides(task, split=0):
    """The file names on both sides of a split."""
    return [[task.names[i] for i in side] for side in task.splits[split]]


def test_halves_train_on_the_first_half_of_each_class_in_time(tmp_path):
    names = [f"car/img_{i}.jpeg" for i in (1, 2, 9, 10, 11)] + [f"dog/img_{i}.jpeg" for i in (99, 100, 101, 102)]
    make_images(tmp_path / "images", *names)
    (task,) = tasks(tmp_path / "images", "--split", "halves", "--seeds", 2)
    train, test = sides(task)
    assert set(train) == {"car/img_1.jpeg", "car/img_2.jpeg", "dog/img_99.jpeg", "dog/img_100.jpeg"}
    assert sorted(train + test) == sorted(names)
    assert sides(task, 1) == [train, test]


def test_recordings_of_a_table_are_on_one_side(tmp_path, capsys):
    names = [f"{name}/{recording}_{i}.jpeg" for name in ("car", "dog") for recording in "abcde" for i in range(3)]
    names += ["cup/a_0.jpeg", "cup/a_1.jpeg"]
    make_images(tmp_path / "images", *names)
    lines = [f"{name},{name.split('/')[1][0]},x" for name in names]
    (tmp_path / "groups.csv").write_text("\n".join(["file,recording,other", *lines]))
    words = ["--split", "recording", "--groups", tmp_path / "groups.csv", "--seeds", 6]
    (task,) = tasks(tmp_path / "images", *words)
    left_out = []
    for seed in task.splits:
        train, test = ({name.split("/")[1][0] for name in side} for side in sides(task, seed))
        assert not train & test and (len(train), len(test)) == (3, 2)
        if "a" not in train:  # the cup is nowhere else
            assert not any(name.startswith("cup") for side in sides(task, seed) for name in side)
            left_out.append(f"seed {seed}: no training recording has cup; their test images are left out")
    assert capsys.readouterr().out.splitlines() == left_out and 0 < len(left_out) < 6
    assert len({str(sides(task, seed)) for seed in task.splits}) > 1
    (tmp_path / "groups.csv").write_text("\n".join(["file,recording", *lines[3:]]).replace(",x", ""))
    with pytest.raises(UserError, match=r"groups.csv has no recording of car/a_0.jpeg \(and 2 more images\)"):
        tasks(tmp_path / "images", *words)
    (tmp_path / "groups.csv").write_text("file,group\na,b")
    with pytest.raises(UserError, match="groups.csv has no column 'recording'"):
        tasks(tmp_path / "images", *words)
    with pytest.raises(UserError, match="images has no manifest.json; give --groups"):
        tasks(tmp_path / "images", "--split", "recording")


def test_recordings_of_a_manifest_are_on_one_side(tmp_path):
    settings = {"class-by": "name", "fps": 1, "seg-len": 4, "drop-last": False}
    names = [f"{name}_{number}.mp4" for name in ("car", "dog") for number in range(6)]
    videos = [{"folder": 0, "name": name, "slots": 5, "frames": 5, "rate": 1.0} for name in names]
    manifest.write(tmp_path, manifest.make(settings, ["."], videos, []) | {"complete": True})
    (task,) = tasks(tmp_path, "--split", "recording", "--seeds", 3)
    for seed in range(3):
        train, test = ({name.rpartition("_")[0] for name in side} for side in sides(task, seed))
        assert not train & test and len(train | test) == 12 and len(test) == 6
    names = [f"{name}_GX0{chapter}000{n}.MP4" for name in ("car", "dog") for n in range(4) for chapter in (1, 2)]
    videos = [{"folder": 0, "name": name, "slots": 2, "frames": 2, "rate": 1.0} for name in names]
    manifest.write(tmp_path, manifest.make(settings, ["."], videos, []) | {"complete": True})
    (task,) = tasks(tmp_path, "--split", "recording", "--seeds", 3)
    for seed in range(3):  # car/car_GX020003_0001.jpeg is of the recording 3 of car
        train, test = ({(name[:3], name.rpartition("_")[0][-1]) for name in side} for side in sides(task, seed))
        assert not train & test and len(train | test) == 8 and len(test) == 4
    videos = [{"folder": 0, "name": "a.mp4", "slots": 8, "frames": 8, "rate": 1.0}]
    plan = manifest.make(settings | {"class-by": "time"}, ["."], videos, []) | {"complete": True}
    manifest.write(tmp_path, plan)
    with pytest.raises(UserError, match="are of one recording"):
        tasks(tmp_path, "--split", "recording")


def test_shares_worked_by_hand():
    """Of 4 and 10 training images, a half is 2 and 5, and a hundredth 1 and 1."""
    labels = np.repeat([0, 1, 2], [6, 12, 2])
    train = np.r_[2:6, 7:17]
    for share, counts in ((0.5, [2, 5]), (0.01, [1, 1]), (0.3, [1, 3]), (1, [4, 10])):
        kept = splits.nested_share(train, labels, share, 0)
        assert np.bincount(labels[kept]).tolist() == counts
        assert set(kept) <= set(train) and kept.tolist() == sorted(set(kept))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 2**32 - 1), st.data())
def test_a_small_share_is_part_of_a_larger_one(labels, seed, data):
    small, large = sorted(data.draw(st.floats(0, 1)) for _ in range(2))
    labels, train = np.array(labels), np.arange(0, len(labels), 2)
    parts = [set(splits.nested_share(train, labels, share, seed)) for share in (small, large)]
    assert parts[0] <= parts[1] <= set(train)
    assert {labels[i] for i in parts[0]} == set(labels[train])


def test_every_share_is_a_task_on_the_whole_test_side(toys):
    words = ["--split", "iid", "exemplar", "--train-share", 0.1, 1, "--seeds", 2]
    found = tasks(toys, *words)
    assert [each.name for each in found] == ["iid 10%", "iid 100%", "exemplar 10%", "exemplar 100%"]
    assert [each.slug for each in found[:2]] == ["iid_10", "iid_100"]
    assert [(each.split, each.share) for each in found[1:3]] == [("iid", 1), ("exemplar", 0.1)]
    plain = tasks(toys, *words[:3], "--seeds", 2)
    for position, (few, many) in enumerate([found[:2], found[2:]]):
        for seed in range(2):
            assert sides(few, seed)[1] == sides(many, seed)[1] == sides(plain[position], seed)[1]
            assert sides(many, seed)[0] == sides(plain[position], seed)[0]
            assert set(sides(few, seed)[0]) < set(sides(many, seed)[0])
    for share in ("-0.1", "1.1", "nan"):
        with pytest.raises(SystemExit):
            options("--train-share", share)


def test_a_second_folder_tests_the_classes_of_both(tmp_path, capsys):
    make_images(tmp_path / "first", *(f"{name}/{i}.jpeg" for name in ("ant", "car", "dog", "zoo") for i in range(3)))
    make_images(tmp_path / "second", *(f"{name}/{i}.jpeg" for name in ("car", "cup", "dog", "zoo") for i in range(2)))
    frames = FrameFolder([tmp_path / "first", tmp_path / "second"], one_size=False)
    (task,) = splits.make_tasks(frames, options("--test-data", tmp_path / "second", "--classes", "dog", "car"))
    assert (task.name, task.slug, task.classes) == ("to second", "to_second", ["car", "dog"])
    train, test = sides(task)
    assert train == [f"first/{name}/{i}.jpeg" for name in ("car", "dog") for i in range(3)]
    assert test == [f"second/{name}/{i}.jpeg" for name in ("car", "dog") for i in range(2)]
    for side in task.splits[0]:
        assert all(task.classes[task.labels[i]] == task.names[i].split("/")[1] for i in side)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"classes of {where} only, which are not used: {name}" for where, name in
                     (("data", "ant"), ("--test-data", "cup"))]  # fmt: skip
    with pytest.raises(UserError, match="has no class folder ant; it has car, dog, zoo"):
        splits.make_tasks(frames, options("--test-data", tmp_path / "second", "--classes", "ant", "car"))
    with pytest.raises(UserError, match="give either --test-data or --split-file"):
        splits.make_tasks(frames, options("--test-data", tmp_path / "second", "--split-file", "x.json"))
    make_images(tmp_path / "third", "car/1.jpeg", "ape/1.jpeg")
    frames = FrameFolder([tmp_path / "first", tmp_path / "third"], one_size=False)
    with pytest.raises(UserError, match="have 1 classes in common"):
        splits.make_tasks(frames, options("--test-data", tmp_path / "third"))
