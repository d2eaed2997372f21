"""Folders of images, by a scan or a manifest, one or several, all or selected: what a plain list would give."""

import json
import os
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

import moco_temp
from moco.cli import UserError
from moco.data import manifest, tars
from moco.data.folders import FrameFolder
from moco.data.recordings import Selection
from moco.networks import checkpoint
from scripts import pack_frames
from tests import support
from tests.data.test_manifest import make
from tests.support.training import SMALL_MOCO, train

NAMES = ["A_20130814_0507_02.mp4", "S_20130417_0600_01.mp4", "S_20130421_0604_01.mp4", "S_20131101_1200_01.mp4"]


def make_folder(folder, slots, missing=(), size=40, names=NAMES):
    """A frame folder of videos of so many images each, in classes of 10, with images."""
    plan = make(slots, missing, names)
    images = manifest.Manifest(plan, folder)
    random = np.random.default_rng(0)
    for i in range(len(images)):
        path = folder / images.path(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), random.integers(0, 255, (size, size, 3), np.uint8))
    manifest.write(folder, plan)
    return folder


# --- folders without a manifest


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def paths(frames):
    return [frames.path(i) for i in range(len(frames))]


STEMS = st.text("ab-_Z0", min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(STEMS, st.sampled_from(["", "in/", "in-2/", "in/deep/"]), STEMS), min_size=1, max_size=12),
       st.sampled_from([".jpg", ".JPEG", ".png", ".webp"]))  # fmt: skip
def test_order_and_classes_are_those_of_imagefolder(tmp_path_factory, tree, ending):
    folder = tmp_path_factory.mktemp("tree")
    touch(folder, *(f"{top}/{inner}{name}{ending}" for top, inner, name in tree))
    theirs, ours = ImageFolder(folder), FrameFolder(folder)
    assert [str(path) for path in paths(ours)] == [path for path, _ in theirs.samples]
    assert ours.classes == theirs.classes and ours.labels().tolist() == theirs.targets
    assert [ours.label(i) for i in range(len(ours))] == theirs.targets
    assert ours.counts == np.bincount(theirs.targets).tolist()
    assert sorted(path.name for path in folder.iterdir()) == ours.classes  # nothing is written there


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


def test_one_flat_folder_is_one_class(tmp_path):
    touch(tmp_path / "toys", "2.png", "1.png", ".0.png")
    frames = FrameFolder(tmp_path / "toys")
    assert frames.classes == ["toys"] and [path.name for path in paths(frames)] == ["1.png", "2.png"]
    assert frames.labels().tolist() == [0, 0]


def test_a_folder_without_images_is_refused(tmp_path):
    touch(tmp_path, "a file", "no images/a/notes.txt", "no images/b/.hidden.jpg", "empty/inner/.hidden", "manifest/a")
    manifest.write(tmp_path / "manifest", make([0]))
    for name in ("missing", "a file", "no images", "empty", "manifest"):
        with pytest.raises(UserError, match=f"/{name}(; give | has no images; | is not a folder of images; )"):
            FrameFolder(tmp_path / name)
    touch(tmp_path, "a.mp4")
    with pytest.raises(UserError, match="a.mp4 is not a folder of images; .*first: read_saycam.py"):
        FrameFolder(tmp_path / "a.mp4")


def test_time_without_a_manifest_is_the_natural_order_of_names(tmp_path):
    """Indices and labels stay those of ImageFolder."""
    touch(tmp_path / "tree", *(f"{name}/frame_{k}.png" for name in ("a", "b") for k in range(1, 13)))
    frames = FrameFolder(tmp_path / "tree")
    assert [frames.name(i) for i in range(3)] == ["a/frame_1.png", "a/frame_10.png", "a/frame_11.png"]
    in_time = [f"{name}/frame_{k}.png" for name in ("a", "b") for k in range(1, 13)]
    assert [frames.name(i) for i in frames.in_time()] == in_time
    for k, name in enumerate(in_time):
        i = frames.in_time()[k]
        near = {frames.name(j) for j in frames.neighbors(i, 2)}
        assert near == {in_time[j] for j in range(max(0, k - 2), min(24, k + 3)) if j != k and in_time[j][0] == name[0]}
    touch(tmp_path / "padded", *(f"a/{k:02d}.png" for k in range(12)))
    assert FrameFolder(tmp_path / "padded").in_time().tolist() == list(range(12))


# --- memory

WORKER = """
import os, re, sys
import numpy as np
from pathlib import Path
from moco.data.folders import FrameFolder
def private(kind):
    return sum(map(int, re.findall(kind + r":\\s*(\\d+) kB", Path("/proc/self/smaps_rollup").read_text()))) / 1024
FrameFolder(sys.argv[1])
before = private("Anonymous")
frames = FrameFolder(sys.argv[1])
opened = private("Anonymous") - before
pipe = os.pipe()
if os.fork() == 0:
    before = private("Private_Dirty")
    for i in np.random.default_rng(0).integers(len(frames), size=20_000).tolist():
        frames.path(i)
    os.write(pipe[1], str(private("Private_Dirty") - before).encode())
    os._exit(0)
os.wait()
print(len(frames), opened, os.read(pipe[0], 100).decode())
"""


def measure_memory(folder):
    """The number of images of a folder, MB that opening it takes, and MB that a forked worker then takes for itself."""
    done = subprocess.run([sys.executable, "-c", WORKER, folder], capture_output=True, text=True, cwd=support.ROOT)
    assert done.returncode == 0, done.stderr
    n, opened, worker = done.stdout.splitlines()[-1].split()
    return int(n), float(opened), float(worker)


@pytest.mark.parametrize("millions", [0.2, pytest.param(8, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["manifest", "tars and manifest", "tars"])
def test_opening_millions_of_images_takes_little_memory(tmp_path, monkeypatch, kind, millions):
    """By a manifest, an image takes 4 bytes, and for a moment 12."""
    n, per_video = int(millions * 10**6), 5000
    names = [f"{k:04d}.mp4" for k in range(n // per_video)]
    images = manifest.Manifest(make([per_video] * len(names), names=names))
    if "manifest" in kind:
        manifest.write(tmp_path, make([per_video] * len(names), names=names))
    if "tars" in kind:
        own = {path: images.video_images(k) for k, path in enumerate(manifest.video_tars(images.videos))}
        monkeypatch.setattr(
            tars, "scan", lambda path: ({images.path(i): (512 * i, 9) for i in own[path.name]}, {}, Counter())
        )
        touch(tmp_path, *own)
        FrameFolder(tmp_path)  # stores the index
    n_images, opened, worker = measure_memory(tmp_path)
    assert n_images == n and opened < 20 + 13 * millions and worker < 10


# --- several folders, and selections


@settings(deadline=None)
@given(
    slots=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    missing=st.sets(st.integers(0, 120)),
    shares=st.dictionaries(st.integers(0, 3), st.floats(0, 1)),
    window=st.integers(0, 9),
)
def test_a_selected_manifest_is_the_plain_list_of_its_images(slots, missing, shares, window):
    plan = make(slots, missing)
    everything_, selected = manifest.Manifest(plan), manifest.Manifest(plan).select(shares)
    kept = []
    for i in range(len(everything_)):
        number = everything_.video(i)
        position = everything_.slot(i) - plan["videos"][number]["first_slot"]
        if position < round(shares.get(number, 0) * plan["videos"][number]["slots"]):
            kept.append(i)
    paths = [everything_.path(i) for i in kept]
    assert [selected.path(i) for i in range(len(selected))] == paths
    assert selected.classes == sorted({path.split("/")[0] for path in paths})
    for i in range(len(paths)):
        near = [paths.index(everything_.path(j)) for j in everything_.neighbors(kept[i], window) if j in kept]
        assert list(selected.neighbors(i, window)) == near
    assert selected.counts == list(Counter(path.split("/")[0] for path in paths).values())


def test_a_selection_of_ages_has_the_frames_of_the_recordings_of_these_ages(tmp_path):
    """Videos of 7, 15, 8 and 12 images, in classes of 10: an episode that the selection cuts keeps what is left."""
    make_folder(tmp_path / "frames", [7, 15, 8, 12], missing={9, 41})
    frames = FrameFolder(tmp_path / "frames", Selection(ages=(6, 12)))
    slots = [slot for slot in range(7, 30) if slot != 9]
    assert [frames.name(i) for i in range(len(frames))] == [
        f"class_{slot // 10:04d}/img_{slot % 10:04d}.jpeg" for slot in slots
    ]
    assert frames.classes == ["class_0000", "class_0001", "class_0002"] and frames.counts == [2, 10, 10]
    assert frames.selected == "2 of 4 recordings, 4.60 seconds, child S, ages 6.0 to 6.1 months"
    late = FrameFolder(tmp_path / "frames", Selection(ages=(12, 99)))
    assert late.classes == ["class_0003", "class_0004"] and late.counts == [10, 1]


def test_several_folders_follow_one_another(tmp_path):
    for name, slots in {"S": [7, 5], "A": [11], "Y": [3]}.items():
        make_folder(tmp_path / name, slots)
    make_folder(tmp_path / "tree", [12])
    (tmp_path / "tree" / "manifest.json").unlink()
    folders = [tmp_path / name for name in ("S", "A", "tree", "Y")]
    frames = FrameFolder(folders)
    plain = [ImageFolder(folder) for folder in folders]
    paths = [path for each in plain for path, _ in each.samples]
    assert [str(frames.path(i)) for i in range(len(frames))] == paths
    assert frames.classes == [
        *("S/class_0000", "S/class_0001", "A/class_0000", "A/class_0001", "tree/class_0000", "tree/class_0001"),
        "Y/class_0000",
    ]
    assert frames.counts == [10, 2, 10, 1, 10, 2, 3]
    assert [frames.label(i) for i in range(len(frames))] == frames.labels().tolist()
    assert frames.name(12) == "A/class_0000/img_0000.jpeg"
    assert frames.neighbors(11, 1) == [10] and frames.neighbors(12, 2) == [13, 14]  # never in another folder
    assert frames.neighbors(32, 1) == [31] and frames.neighbors(33, 1) == [34]  # of its class, without a manifest
    assert FrameFolder([tmp_path / "S"]).classes == ["class_0000", "class_0001"]
    (tmp_path / "other").mkdir()
    (tmp_path / "Y").rename(tmp_path / "other" / "S")  # equal names are told apart
    names = FrameFolder([tmp_path / "S", tmp_path / "other" / "S"]).classes
    assert names == [f"{tmp_path.as_posix()}/{name}" for name in ("S/class_0000", "S/class_0001", "other/S/class_0000")]


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_state_of_an_image_changes_with_its_content(tmp_path, is_packed):
    files = make_folder(tmp_path / "files", [7, 5])
    pack_frames.main([str(files), "--save-dir", str(tmp_path / "tars")])
    folder = tmp_path / "tars" if is_packed else files
    frames = FrameFolder(folder)
    states = [frames.state(i) for i in range(len(frames))]
    assert states == [FrameFolder(folder).state(i) for i in range(12)]
    path = sorted(folder.glob("*.tar"))[0] if is_packed else frames.path(0)
    content, before = path.read_bytes(), os.stat(path)
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an extracted archive has it
    changed = [i for i in range(12) if frames.state(i) != states[i]]
    assert changed == (list(range(7)) if is_packed else [0])
    path.unlink()
    with pytest.raises(OSError):
        frames.state(0)


def test_hours_are_drawn_over_all_folders(tmp_path):
    make_folder(tmp_path / "S", [50, 30], names=NAMES[1:])
    make_folder(tmp_path / "A", [20], names=NAMES)
    frames = FrameFolder([tmp_path / "S", tmp_path / "A"], Selection(hours=12 / 3600, seed=3))
    assert len(frames) == 60  # 12 seconds at 5 per second
    assert {name.split("/")[0] for name in frames.classes} == {"S", "A"}
    only_a = FrameFolder([tmp_path / "S", tmp_path / "A"], Selection(children=("A",)))
    assert only_a.classes == ["A/class_0000", "A/class_0001"] and len(only_a) == 20


def test_mistakes_are_one_line(tmp_path):
    make_folder(tmp_path / "S", [7])
    make_folder(tmp_path / "small", [7], size=20)
    with pytest.raises(UserError, match="small are 20x20 pixels, those of .*S 40x40"):
        FrameFolder([tmp_path / "S", tmp_path / "small"])
    with pytest.raises(UserError, match="no recording is of child Q; there are A"):
        FrameFolder(tmp_path / "S", Selection(children=("Q",)))
    (tmp_path / "S" / "manifest.json").unlink()
    with pytest.raises(UserError, match="S has no manifest.json"):
        FrameFolder(tmp_path / "S", Selection(children=("S",)))


@pytest.mark.usefixtures("handlers")
def test_a_training_on_ages_sees_these_and_resumes_with_the_same_selection(tmp_path, capsys):
    data = make_folder(tmp_path / "frames", [7, 15, 8, 12])
    train(data, tmp_path / "run", "--ages", "6-12", "--epochs", 1)
    assert "2 of 4 recordings" in capsys.readouterr().out
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert content["images"] == 23 and content["n_out"] == 3
    train(data, tmp_path / "run", "--ages", "6-12", "--resume")
    with pytest.raises(UserError, match="children was None and is "):
        train(data, tmp_path / "run", "--ages", "6-12", "--resume", "--children", "S")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["ages"] == [6, 12]


@pytest.mark.usefixtures("handlers")
def test_moco_over_time_takes_several_folders(tmp_path):
    for name, slots in {"S": [12, 12], "A": [12]}.items():
        make_folder(tmp_path / name, slots, size=64)
    folders = [str(tmp_path / "S"), str(tmp_path / "A")]
    moco_temp.main([*folders, "--save-dir", str(tmp_path / "run"), *SMALL_MOCO, "--epochs", "1"])
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert content["images"] == 36 and content["classes"][:2] == ["S/class_0000", "S/class_0001"]
