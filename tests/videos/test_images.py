"""One video and its images: sampling, crop, files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from moco import cli, files
from moco.data import manifest
from moco.videos import images, video
from tests.support import ROOT
from tests.support.videos import write_video

SETTINGS = {"fps": 5.0, "seg-len": 2.0, "class-by": "time", "size": 64, "quality": 95, "shift": 16}
SETTINGS |= {"no-rotate": False, "published-step": False, "drop-last": False, "recursive": False}


@pytest.mark.parametrize(
    "native, fps, nearest, published",
    [(30000 / 1001, 5, 6, 6), (30, 5, 6, 7), (25, 5, 5, 6), (24.99, 5, 5, 5), (30, 0.5, 60, 61), (5, 60, 1, 1)],
)
def test_frame_step(native, fps, nearest, published):
    assert images.frame_step(native, fps) == nearest
    assert images.frame_step(native, fps, published=True) == published


def test_the_crop_is_the_published_one_and_stays_inside_any_picture():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, 1).repeat(3, 2)
    assert np.array_equal(images.crop(ramp)[:, 0, 0], np.arange(223, -1, -1))
    assert np.array_equal(images.crop(ramp, shift=0, rotate=0)[:, 0, 0], np.arange(16, 240))
    assert np.array_equal(images.crop(ramp, shift=4, rotate=0)[:, 0, 0], np.arange(12, 236))
    assert np.array_equal(images.crop(ramp, shift=99, rotate=0)[:, 0, 0], np.arange(224))
    for size, shape in [(224, (480, 640)), (224, (640, 360)), (96, (1, 1)), (33, (50, 31)), (300, (120, 160))]:
        assert images.crop(np.zeros((*shape, 3), np.uint8), size).shape == (size, size, 3)


def plan_of(path, **changes):
    """The plan of a folder with one video."""
    settings = SETTINGS | changes
    [(entry, selection)], _ = images.plan_video(settings, (path, None))
    entry = {"folder": 0, "name": path.name, "bytes": path.stat().st_size, **entry}
    return manifest.make(settings, [str(path.parent)], [entry], []), selection


def test_the_entry_of_a_video_in_the_plan(tmp_path):
    plan, selection = plan_of(write_video(tmp_path / "v.mp4", 61, turn=90))
    entry = plan["videos"][0]
    assert (entry["width"], entry["height"], entry["frames"], entry["step"], entry["slots"]) == (48, 64, 61, 6, 11)
    assert selection.indices.tolist() == list(range(0, 61, 6))


def fail(*_):
    raise ZeroDivisionError("surprise")


def test_whatever_a_library_raises_is_the_reason_of_one_video(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 60)
    plan, selection = plan_of(path)
    monkeypatch.setattr(images, "encode", fail)
    result = images.extract_images(tmp_path, plan, (path, plan["videos"][0], selection), lambda amount: None)
    assert result == ([[0, 10]], "reading it fails with ZeroDivisionError('surprise')")
    monkeypatch.setattr(images, "probe", fail)
    assert images.plan_video(SETTINGS, (path, None)) == ([], ["reading it fails with ZeroDivisionError('surprise')"])


def test_a_file_is_read_once_where_its_selection_is_known(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 60)
    plan, selection = plan_of(path)
    task = path, plan["videos"][0], selection
    monkeypatch.setattr(images, "probe", fail)
    reported = []
    assert images.extract_images(tmp_path, plan, task, reported.append) == ([], None)
    assert reported == list(range(0, 60, 6))
    assert len(list(tmp_path.rglob("img_*.jpeg"))) == 10


def test_a_file_that_is_not_the_planned_one_is_left_out(tmp_path):
    path = write_video(tmp_path / "v.mp4", 60)
    plan, selection = plan_of(path)
    for frames, known in ((90, None), (90, selection), (59, None)):
        write_video(path, frames)
        _, reason = images.extract_images(tmp_path, plan, (path, plan["videos"][0], known), lambda amount: None)
        assert "changed since the plan was made" in reason


KILLED_WRITER = """
import os, pathlib, sys
from moco.videos import images
pathlib.Path.write_bytes = lambda path, data: (open(path, "wb").write(data[:9]), os.kill(os.getpid(), 9))
images.write_image(sys.argv[1], "class_0000/img_0000.jpeg", b"0123456789" * 10)
"""


def test_an_image_whose_writer_is_killed_does_not_appear(tmp_path):
    (tmp_path / "class_0000").mkdir()
    images.write_image(tmp_path, "class_0000/img_0001.jpeg", b"complete")
    process = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert [Path(path).name for path, _ in ImageFolder(tmp_path).samples] == ["img_0001.jpeg"]
    files.remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["class_0000"]


def test_an_image_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "class_0000").write_text("a file where the folder of the class should be")
    with pytest.raises(cli.UserError, match="cannot write .*class_0000/img_0000.jpeg: .*re-run the command to resume"):
        images.write_image(tmp_path, "class_0000/img_0000.jpeg", b"complete")
    assert [path.name for path in tmp_path.iterdir()] == ["class_0000"]


def test_the_expected_size_ignores_videos_without_a_first_frame(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 60)
    plan, _ = plan_of(path)
    assert images.mean_size(plan) == len(images.encode(next(video.frames(path, first_frame(path)))[1], SETTINGS, {}))
    os.truncate(path, 100)
    assert images.mean_size(plan) == 0


def first_frame(path):
    return images.probe(path).select([0])
