"""Which videos of a plan are done."""

import errno
import os

import pytest

from moco.data import manifest
from moco.videos import progress_log

SETTINGS = {"fps": 5.0, "seg-len": 2.0, "class-by": "time", "drop-last": False}


def make_plan(folder):
    """A plan of two videos of 15 slots, all of whose images are in folder, except for slot 20."""
    videos = [{"folder": 0, "name": f"{name}.mp4", "slots": 15} for name in "ab"]
    plan = manifest.make(SETTINGS, ["videos"], videos, [])
    for video in plan["videos"]:
        for slot in range(video["first_slot"], video["first_slot"] + 15):
            path = folder / manifest.slot_path(plan, video, slot)
            path.parent.mkdir(exist_ok=True)
            if slot != 20:
                path.write_bytes(b"image")
    return plan


def test_lines_of_all_processes_are_read_and_half_lines_ignored(tmp_path):
    plan = make_plan(tmp_path)
    progress_log.mark_done(tmp_path, plan, 1, [[20, 21]], "1 of 15 frames are damaged")
    (tmp_path / "filled-other-1.jsonl").write_text('\n{"video": 0, "missing": [], "reason": null}\n{"video": 1, "mi')
    (tmp_path / "filled-folder.jsonl").mkdir()  # a class of --class-by video
    lines = progress_log.completed_videos(tmp_path)
    assert lines[1] == {"video": 1, "missing": [[20, 21]], "reason": "1 of 15 frames are damaged"}
    assert lines.keys() == {0, 1}
    progress_log.remove(tmp_path)
    assert progress_log.completed_videos(tmp_path) == {}
    assert (tmp_path / "filled-folder.jsonl").is_dir()


def test_images_are_flushed_before_their_video_is_marked_as_done(tmp_path, monkeypatch):
    """Where syncfs does not exist, every image and its folder is flushed."""
    plan, flushed = make_plan(tmp_path), []
    fsync = os.fsync

    def record(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(progress_log.sys, "platform", "darwin")
    monkeypatch.setattr(os, "fsync", record)
    progress_log.mark_done(tmp_path, plan, 1, [[20, 21]], None)
    images = [manifest.slot_path(plan, plan["videos"][1], slot) for slot in range(15, 30) if slot != 20]
    assert flushed[:-1] == [str(tmp_path / name) for name in [*images, "class_0001", "class_0002"]]
    assert flushed[-1].endswith(".jsonl")


def test_a_failing_disk_leaves_no_line(tmp_path, monkeypatch):
    plan = make_plan(tmp_path)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(progress_log.sys, "platform", "darwin")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        progress_log.mark_done(tmp_path, plan, 0, [], None)
    assert progress_log.names(tmp_path) == []
