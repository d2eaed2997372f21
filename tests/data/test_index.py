"""Folders of images: classes and order from a scan, from its stored index, and from a manifest."""

import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets

from moco.cli import UserError
from moco.data import index, manifest
from moco.data.frame_folder import FrameFolder

SETTINGS = {"class-by": "time", "fps": 5.0, "seg-len": 288.0, "drop-last": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def settle(tmp_path, monkeypatch):
    """A function that makes folders count as unchanged for long, and returns once a change has a later time stamp."""

    def wait(folder):
        monkeypatch.setattr(index, "SETTLED", -1)
        latest, probe = max(os.stat(path).st_ctime_ns for path, _, _ in os.walk(folder)), tmp_path / "probe"
        probe.touch()
        while os.stat(probe).st_ctime_ns <= latest:
            probe.touch()

    return wait


def paths(frames):
    return [frames.path(i) for i in range(len(frames))]


NAMES = st.text("ab-_Z0", min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(NAMES, st.sampled_from(["", "in/", "in-2/", "in/deep/"]), NAMES), min_size=1, max_size=12),
       st.sampled_from([".jpg", ".JPEG", ".png", ".webp"]))  # fmt: skip
def test_order_and_classes_are_those_of_imagefolder(tmp_path_factory, tree, ending):
    folder = tmp_path_factory.mktemp("tree")
    touch(folder, *(f"{top}/{inner}{name}{ending}" for top, inner, name in tree))
    theirs, ours = datasets.ImageFolder(folder), FrameFolder(folder)
    assert [str(path) for path in paths(ours)] == [path for path, _ in theirs.samples]
    assert ours.classes == theirs.classes and ours.labels().tolist() == theirs.targets
    assert [ours.label(i) for i in range(len(ours))] == theirs.targets
    assert ours.counts == np.bincount(theirs.targets).tolist()


def test_hidden_entries_empty_folders_and_other_files_are_ignored(tmp_path):
    touch(tmp_path, "b/1.jpg", "d/2.jpg", "d/inner/3.jpg")
    expected = FrameFolder(tmp_path)
    touch(tmp_path, ".ipynb_checkpoints/1.jpg", "b/._1.jpg", "b/.hidden/1.jpg", "d/notes.txt", "a/notes.txt", "0.jpg")
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "b" / "dangling.jpg")
    os.symlink(tmp_path, tmp_path / "d" / "inner" / "loop")
    ours = FrameFolder(tmp_path)
    assert ours.classes == ["b", "d"] and paths(ours) == paths(expected) and ours.counts == [1, 2]


def test_names_may_be_any_bytes(tmp_path, settle):
    names = [b"a\n.jpg", "é 1.jpg".encode(), b"\xff\xfe.jpg"]
    for folder in (b"x", b"\xfd"):
        (tmp_path / os.fsdecode(folder)).mkdir()
        for name in names:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder + b"/" + name)).touch()
    settle(tmp_path)
    for _ in range(2):  # from the scan, then from the stored index
        assert all(path.exists() for path in paths(FrameFolder(tmp_path)))


def test_one_flat_folder_is_one_class(tmp_path):
    touch(tmp_path / "toys", "2.png", "1.png", ".0.png")
    frames = FrameFolder(tmp_path / "toys")
    assert frames.classes == ["toys"] and [path.name for path in paths(frames)] == ["1.png", "2.png"]
    assert frames.labels().tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "no images", "empty manifest"])
def test_a_folder_without_images_is_refused(tmp_path, kind):
    folder = tmp_path / "frames of S"
    if kind == "file":
        folder.touch()
    elif kind != "missing":
        folder.mkdir()
    if kind == "no images":
        touch(folder, "a/notes.txt", "b/.hidden.jpg")
    if kind == "empty manifest":
        write_manifest(folder, 0)
    with pytest.raises(UserError, match="frames of S"):
        FrameFolder(folder)


# --- the stored index


def test_a_second_start_does_not_scan(tmp_path, monkeypatch, settle):
    folder = tmp_path / "frames"
    touch(folder, "a/1.jpg", "a/in/2.jpg", "b/3.jpg")
    (folder / "c").mkdir()
    settle(folder)
    first = FrameFolder(folder)
    monkeypatch.setattr(index, "_scan", None)
    second = FrameFolder(folder)
    assert (tmp_path / ".frames.index.npz").exists()
    assert paths(second) == paths(first) and second.classes == first.classes and second.counts == first.counts


CHANGES = {
    "an image": lambda folder: touch(folder, "a/0.jpg"),
    "an image further down": lambda folder: touch(folder, "a/in/0.jpg"),
    "an image in an empty folder": lambda folder: touch(folder, "c/0.jpg"),
    "a class": lambda folder: touch(folder, "aa/0.jpg"),
    "another name": lambda folder: (folder / "a" / "1.jpg").rename(folder / "a" / "9.jpg"),
    "one less": lambda folder: (folder / "b" / "3.jpg").unlink(),
    "a class less": lambda folder: shutil.rmtree(folder / "b"),
    "a damaged index": lambda folder: (folder.parent / ".frames.index.npz").write_bytes(b"PK\x03\x04 damaged"),
    "an empty index": lambda folder: (folder.parent / ".frames.index.npz").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_scanned_again(tmp_path, change, settle):
    folder = tmp_path / "frames"
    touch(folder, "a/1.jpg", "a/in/2.jpg", "b/3.jpg")
    (folder / "c").mkdir()
    settle(folder)
    FrameFolder(folder)
    CHANGES[change](folder)
    frames = FrameFolder(folder)
    assert sorted(paths(frames)) == sorted(folder.rglob("*.jpg"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_although_modification_times_are_set_back(tmp_path, change, settle):
    """As tar, unzip, rsync -t and cp -a do."""
    folder = tmp_path / "frames"
    touch(folder, "a/1.jpg", "a/in/2.jpg", "b/3.jpg")
    (folder / "c").mkdir()
    before = {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(folder)}
    settle(folder)
    FrameFolder(folder)
    assert (tmp_path / ".frames.index.npz").exists()
    CHANGES[change](folder)
    for path, modified in before.items():
        if os.path.exists(path):
            os.utime(path, ns=(modified, modified))
    frames = FrameFolder(folder)
    assert sorted(paths(frames)) == sorted(folder.rglob("*.jpg"))


def test_an_index_of_the_old_format_is_replaced(tmp_path, settle):
    """It has modification times only."""
    folder, stored = tmp_path / "frames", tmp_path / ".frames.index.npz"
    touch(folder, "a/1.jpg")
    settle(folder)
    FrameFolder(folder)
    with np.load(stored) as content:
        old = {
            **content,
            "changed": content["changed"][:, 0],
            "names": content["names"][:0],
            "ends": content["ends"] * 0,
        }
    np.savez(stored, **old)
    assert FrameFolder(folder).name(0) == "a/1.jpg"


def test_the_index_of_a_folder_that_changed_just_now_is_not_stored(tmp_path):
    touch(tmp_path / "frames", "a/1.jpg")
    FrameFolder(tmp_path / "frames")
    assert not (tmp_path / ".frames.index.npz").exists()


def test_beside_a_read_only_folder_the_index_goes_to_the_users_cache(tmp_path, cache, monkeypatch, settle):
    folder = tmp_path / "frames"
    touch(folder, "a/1.jpg")
    settle(folder)
    (tmp_path / ".frames.index.npz").mkdir()  # prevents writing, as a read-only disk would
    FrameFolder(folder)
    assert len(list((cache / "baby-vision").iterdir())) == 1
    monkeypatch.setattr(index, "_scan", None)
    assert len(FrameFolder(folder)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(index, "SETTLED", -1)
    monkeypatch.setattr(index, "_index_paths", lambda folder: [Path("/dev/null/a"), Path("/dev/null/b")])
    assert len(FrameFolder(folder)) == 1


# --- frame folders with a manifest


def write_manifest(folder, slots, hours=1):
    """Write the manifest of a frame folder, with videos of an hour and three undecodable frames in each; no images.

    Returns the number of images.
    """
    per_video = round(5 * 3600 * hours)
    videos = [
        {"name": f"{i:05d}.mp4", "folder": 0, "slots": min(per_video, slots - first)}
        for i, first in enumerate(range(0, slots, per_video))
    ]
    plan = manifest.make(SETTINGS, ["videos"], videos, [])
    for video in videos:
        if video["slots"] > 100:
            video["missing"] = [[video["first_slot"] + 10, video["first_slot"] + 13]]
    plan["complete"] = True
    folder.mkdir(exist_ok=True)
    manifest.write(folder, plan)
    return slots - 3 * sum(video["slots"] > 100 for video in videos)


def test_a_manifest_gives_what_a_scan_gives(tmp_path):
    total = write_manifest(tmp_path, 4000, hours=0.1)
    by_manifest = FrameFolder(tmp_path)
    touch(tmp_path, *(os.path.relpath(path, tmp_path) for path in paths(by_manifest)))
    (tmp_path / manifest.NAME).unlink()
    by_scan = FrameFolder(tmp_path)
    assert len(by_manifest) == total and paths(by_manifest) == paths(by_scan) and by_manifest.classes == by_scan.classes
    assert np.array_equal(by_manifest.labels(), by_scan.labels()) and by_manifest.counts == by_scan.counts


@pytest.mark.parametrize(
    "millions", [1, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 4, 8, 10))]
)  # fmt: skip
def test_opening_millions_of_frames_takes_little_memory(tmp_path, millions):
    total = write_manifest(tmp_path, millions * 1_000_000)
    tracemalloc.start()
    frames = FrameFolder(tmp_path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6 + 12e6 * millions and size < 4e6 + 4e6 * millions  # slots have 4 bytes, for a moment 8 more
    assert len(frames) == total and len(frames.classes) == -(-millions * 1_000_000 // 1440)
    assert frames.path(total - 1).parent.name == frames.classes[frames.label(total - 1)] == frames.classes[-1]
