"""Which files are read, in which order, and which of their frames."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from moco import cli
from moco.data import manifest, recordings
from moco.videos import planning
from tests.support.videos import left_out, read, write_video, write_videos


@pytest.mark.parametrize(
    "native, fps, nearest, published",
    [(30000 / 1001, 5, 6, 6), (30, 5, 6, 7), (25, 5, 5, 6), (24.99, 5, 5, 5), (30, 0.5, 60, 61), (5, 60, 1, 1)],
)
def test_frame_step(native, fps, nearest, published):
    assert planning.frame_step(native, fps) == nearest
    assert planning.frame_step(native, fps, published=True) == published


def test_the_entry_of_a_video_in_the_plan(tmp_path):
    read(write_video(tmp_path / "v.mp4", 61, turn=90).parent, tmp_path / "out", "--plan")
    (entry,) = manifest.read(tmp_path / "out")["videos"]
    assert (entry["width"], entry["height"], entry["frames"], entry["step"], entry["slots"]) == (48, 64, 61, 6, 11)


def list_names(*folders, recursive=False, save_dir="out"):
    """[(folder number, name)] of the files that can be read."""
    return [(video["folder"], video["name"]) for video in planning.list_videos(folders, recursive, save_dir)[0]]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")


def test_names_are_in_order_within_each_folder_without_hidden_files(tmp_path):
    touch(tmp_path, "S/b.mp4", "S/a.mp4", "S/.hidden.mp4", "S/sub/c.mp4", "A/z.mp4")
    roots = [tmp_path / "S", tmp_path / "A"]
    assert list_names(*roots) == [(0, "a.mp4"), (0, "b.mp4"), (1, "z.mp4")]
    deep = [(0, "a.mp4"), (0, "b.mp4"), (0, "sub/c.mp4"), (1, "z.mp4")]
    assert list_names(*roots, recursive=True) == deep


def test_files_that_the_program_writes_are_not_listed(tmp_path):
    own = ("manifest.json", "times.npy", "frames.csv", "videos.csv", ".done-1.json", "frames/class_0000/img_0000.jpeg")
    touch(tmp_path, "v.mp4", *own)
    assert list_names(tmp_path, save_dir=tmp_path) == [(0, "v.mp4")]
    names = list_names(tmp_path, recursive=True, save_dir=tmp_path / "frames")
    assert (0, "v.mp4") in names and not any("img" in name for _, name in names)
    with pytest.raises(cli.UserError, match="give another --save-dir"):
        list_names(tmp_path, recursive=True, save_dir=tmp_path)


def test_links_are_followed_wherever_they_lead_but_not_in_circles(tmp_path):
    touch(tmp_path, "store/a.mp4", "store/deep/b.mp4", "S/own.mp4")
    (tmp_path / "S" / "linked.mp4").symlink_to("../store/a.mp4")
    (tmp_path / "S" / "folder").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "deep" / "up").symlink_to(tmp_path / "S")
    (tmp_path / "store" / "deep" / "round").symlink_to(tmp_path / "store" / "deep")
    (tmp_path / "S" / "itself").symlink_to("itself")
    readable, refused = planning.list_videos([tmp_path / "S"], True, tmp_path / "out")
    names = ["folder/a.mp4", "folder/deep/b.mp4", "linked.mp4", "own.mp4"]
    assert readable == [{"folder": 0, "name": name, "bytes": 5} for name in names]
    reason = "it cannot be accessed: Too many levels of symbolic links"
    assert refused == [{"folder": 0, "name": "itself", "reason": reason}]


def test_what_accompanies_videos_is_neither_read_nor_missed(tmp_path):
    folder, out = write_videos(tmp_path / "videos", {"GX010001.MP4": 30, "clip_3.mov": 30}), tmp_path / "out"
    for name in ("GL010001.LRV", "GL010002.LRV", "clip_3.LRF"):
        shutil.copy(folder / "GX010001.MP4", folder / name)
    shutil.copy(folder / "GX010001.MP4", folder / "GL010001.mp4")  # as those who want to look at one rename it
    for name in ("GX010001.THM", "Notes.txt", "clip_3.srt", "IMG_1.AAE", "VIDEO_TS.IFO"):
        (folder / name).write_text("no video")
    assert read(folder, out, "--strict") is None
    assert [each["name"] for each in manifest.read(out)["videos"]] == ["GL010002.LRV", "GX010001.MP4", "clip_3.mov"]
    (folder / "GX010001.MP4").unlink()
    (folder / "GL010001.mp4").unlink()
    (folder / "clip_3.mov").rename(folder / "GH010002.MP4")
    assert list_names(folder) == [(0, "GH010002.MP4"), (0, "GL010001.LRV"), (0, "clip_3.LRF")]


def test_a_plan_is_continued_in_its_own_order_and_with_its_own_videos(tmp_path, monkeypatch):
    """Earlier versions sorted names as text, and read the copies that cameras write."""
    names = ("part_10.mp4", "part_2.mp4", "GX010001.mp4", "GX010002.mp4", "GX020001.mp4", "GL010001.LRV")
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in names:
        write_video(folder / name, 30, format="mp4")
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "sort_key", str)
        patch.setattr(planning, "COPIES", re.compile("none"))
        read(folder, out, "--plan")
    read(folder, out, "--strict")
    assert [each["name"] for each in manifest.read(out)["videos"]] == sorted(names)
    assert len(manifest.load(out)) == 30
    read(folder, tmp_path / "new")
    order = ["GX010001.mp4", "GX020001.mp4", "GX010002.mp4", "part_2.mp4", "part_10.mp4"]
    assert [each["name"] for each in manifest.read(tmp_path / "new")["videos"]] == order


@pytest.mark.parametrize(
    "given, message",
    [
        ("v.mp4", "v.mp4 is a file; give the folder that it is in, and --select"),
        ("frames", "frames has images and no videos: it is a folder of frames"),
        ("labeled", "labeled has images and no videos: it is a folder of frames"),
    ],
)
def test_what_is_no_folder_of_videos_is_one_line(tmp_path, given, message):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / manifest.NAME).write_text("{}")
    touch(tmp_path, "v.mp4", "labeled/cup/1.jpg")
    with pytest.raises(cli.UserError, match=message):
        read(tmp_path / given, tmp_path / "out")


def test_a_save_folder_that_cannot_be_written_is_found_before_any_work(tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(planning, "list_videos", None)
    (tmp_path / "file").write_text("")
    for folder in (small_disk("1m", "ro"), tmp_path / "file"):
        for save_dir in (folder, folder / "new" / "out"):
            with pytest.raises(cli.UserError, match=f"cannot write to the folder {save_dir}: .*--save-dir"):
                read(tmp_path, save_dir)


def test_clips_that_become_one_class_are_said_so(tmp_path, capsys):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys("abcd", 30)), tmp_path / "out"
    read(folder, out)
    printed = capsys.readouterr().out
    assert "4 videos, 4.00 seconds, 120 frames; 20 images in 1 class\n" in printed
    assert "one class cannot be learned: give a smaller --seg-len, or --class-by video" in printed
    read(folder, tmp_path / "more", "--class-by", "video")
    assert "one class" not in capsys.readouterr().out


def test_no_readable_video_is_one_line_that_names_each_and_writes_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"")
    (folder / "b.mp4").write_text("text")
    with pytest.raises(cli.UserError, match="a.mp4: it is empty; b.mp4: it is not a video"):
        read(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, hint", [([], "--recursive"), (["--recursive"], "Give a folder of videos")])
def test_an_empty_folder_is_one_line(tmp_path, flags, hint):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    with pytest.raises(cli.UserError, match=f"there is no video in .*{hint}"):
        read(tmp_path / "videos", tmp_path / "out", *flags)
    with pytest.raises(cli.UserError, match="nowhere"):
        read(tmp_path / "nowhere", tmp_path / "out", *flags)


def test_videos_called_like_files_of_the_program_are_read(tmp_path):
    folder = write_videos(tmp_path / "videos", {"manifest.json.mp4": 30, "filled-a.jsonl.mp4": 30})
    for out in (tmp_path / "out", tmp_path / "out", folder):  # anew, resumed, beside them
        assert read(folder, out, "--class-by", "video", "--strict") is None
        assert manifest.load(out).classes == ["filled-a.jsonl", "manifest.json_"]
    assert len(manifest.load(folder)) == 10 and not left_out(folder)


def test_a_file_without_permission_to_read_is_left_out():
    with tempfile.TemporaryDirectory() as parent:  # not tmp_path, which only its owner may enter
        folder, out = write_videos(Path(parent, "videos"), {"a": 6, "b": 6}), Path(parent, "out")
        out.mkdir()
        for each in (Path(parent), folder, out):
            each.chmod(0o777)
        (folder / "b.mp4").chmod(0)
        process = os.fork()  # root may read everything, so another user reads
        if not process:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os._exit(read(folder, out) or 0)
        assert os.waitpid(process, 0)[1] == 0
        assert left_out(out) == {"b.mp4": "Permission denied"}
        assert len(manifest.load(out)) == 1
