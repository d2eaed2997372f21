"""Folders of good, damaged and hostile files, crashes, several readers at once, full disks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

import read_saycam
from moco import cli, files
from moco.data import manifest, recordings
from moco.videos import extract, images, video
from tests.support.videos import number, overwrite, write_video, write_videos

SCRIPT = Path(read_saycam.__file__)


def read(folder, save_dir, *flags, workers=0):
    return read_saycam.main([str(folder), "--save-dir", str(save_dir), "--workers", str(workers), *flags])


def left_out(save_dir):
    return dict(manifest.left_out(manifest.read(save_dir)))


def start(folder, save_dir, *flags, **options):
    """Start the reader in a process of its own."""
    command = [sys.executable, str(SCRIPT), str(folder), "--save-dir", str(save_dir), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def damage(path):
    """Overwrite the middle of the frames of a video whose index comes first."""
    data = path.read_bytes()
    overwrite(path, (data.find(b"mdat") + len(data)) // 2, np.random.default_rng(0).bytes(400))


@pytest.fixture
def mixed(tmp_path):
    """A folder of good videos, damaged ones, and files that are not videos."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    index_first = dict(options={"g": "25"}, container_options={"movflags": "faststart"})
    write_video(folder / "good one.mp4", 60)
    write_video(folder / "gut ü 赤.mp4", 31)
    write_video(folder / "tail cut off.mp4", 300, **index_first)
    os.truncate(folder / "tail cut off.mp4", (folder / "tail cut off.mp4").stat().st_size * 6 // 10)
    write_video(folder / "with damage.mp4", 300, **index_first)
    damage(folder / "with damage.mp4")
    (folder / "linked.mp4").symlink_to(folder / "good one.mp4")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._good one.mp4").write_bytes(b"\0\5\x16\7")
    (folder / "sub.mp4").mkdir()

    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    content = (folder / "good one.mp4").read_bytes()
    (folder / "no index.mp4").write_bytes(content[: content.find(b"moov") - 4])
    (folder / "no decoder.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))
    write_video(tmp_path / "outside.mp4", 6)
    (folder / "leaves.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nothing.mp4")
    for name in ("list.m3u8", "list.mp4"):
        (folder / name).write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/outside.mp4\n")
    (folder / "joined.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/outside.mp4\n")
    (folder / "stream.sdp").write_text("v=0\no=- 0 0 IN IP4 ::1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n")
    os.mkfifo(folder / "pipe.mp4")
    shutil.copy(folder / "good one.mp4", os.fsencode(folder) + b"/bad \xff name.mp4")
    return folder


BAD = {"empty.mp4", "text.mp4", "no index.mp4", "dangling.mp4", "list.m3u8", "list.mp4", "joined.mp4"}
BAD |= {"stream.sdp", "pipe.mp4", "no decoder.mp4", "bad \udcff name.mp4"}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_left_out_by_name_and_the_others_read(mixed, tmp_path, capsys, workers):
    assert read(mixed, tmp_path / "out", workers=workers) is None
    complete, plan = manifest.load(tmp_path / "out"), manifest.read(tmp_path / "out")
    assert set(left_out(tmp_path / "out")) == BAD | {"with damage.mp4"}
    assert [each["name"] for each in plan["videos"]] == [
        "good one.mp4", "gut ü 赤.mp4", "leaves.mp4", "linked.mp4", "tail cut off.mp4", "with damage.mp4",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for name in BAD - {"bad \udcff name.mp4"}:
        assert f"left out: {name}: " in printed
    assert r"left out: bad \udcff name.mp4: its name is not UTF-8" in printed
    assert "with damage.mp4: " in printed and "frames are damaged" in printed
    shown = {}
    for i in range(len(complete)):
        shown.setdefault(complete.video(i), []).append(number(tmp_path / "out" / complete.path(i)))
    assert shown[0] == shown[3] == list(range(0, 60, 6))
    assert shown[1] == list(range(0, 31, 6)) and shown[2] == [0]
    assert len(shown[4]) > 20 and shown[4] == list(range(0, 6 * len(shown[4]), 6))
    slots = plan["videos"][5]
    missing = {slot - slots["first_slot"] for first, end in slots["missing"] for slot in range(first, end)}
    assert 0 < len(missing) < 10
    assert shown[5] == [6 * slot for slot in range(50) if slot not in missing]


def test_strict_exits_with_status_1_if_anything_is_left_out(mixed, tmp_path):
    assert read(mixed, tmp_path / "out", "--strict") == 1
    (tmp_path / "good").mkdir()
    write_video(tmp_path / "good" / "v.mp4", 6)
    assert read(tmp_path / "good", tmp_path / "fine", "--strict") is None


def test_what_accompanies_videos_is_neither_read_nor_missed(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("GX010001.MP4", "clip_3.mov"):
        write_video(folder / name, 30)
    for name in ("GL010001.LRV", "GL010002.LRV", "clip_3.LRF"):
        shutil.copy(folder / "GX010001.MP4", folder / name)
    for name in ("GX010001.THM", "Notes.txt", "clip_3.srt"):
        (folder / name).write_text("no video")
    assert read(folder, out, "--strict") is None
    assert [each["name"] for each in manifest.read(out)["videos"]] == ["GL010002.LRV", "GX010001.MP4", "clip_3.mov"]
    (folder / "GX010001.MP4").unlink()
    (folder / "clip_3.mov").rename(folder / "GH010002.MP4")
    listed = [name for _, name, _ in extract.list_videos([folder], False, out)[0]]
    assert listed == ["GH010002.MP4", "GL010001.LRV", "clip_3.LRF"]


def test_a_plan_is_continued_in_its_own_order_and_with_its_own_videos(tmp_path, monkeypatch):
    """Earlier versions sorted names as text, and read the copies that cameras write."""
    names = ("part_10", "part_2", "GX010001", "GX010002", "GX020001", "GL010001")
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(names, 30)), tmp_path / "out"
    (folder / "GL010001.mp4").rename(folder / "GL010001.LRV")
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "sort_key", str)
        patch.setattr(extract, "COPIES", ())
        read(folder, out, "--plan")
    read(folder, out, "--strict")
    order = ["GL010001.LRV", *(f"{name}.mp4" for name in sorted(names) if name != "GL010001")]
    assert [each["name"] for each in manifest.read(out)["videos"]] == order
    assert len(manifest.load(out)) == 30
    read(folder, tmp_path / "new")
    order = ["GX010001.mp4", "GX020001.mp4", "GX010002.mp4", "part_2.mp4", "part_10.mp4"]
    assert [each["name"] for each in manifest.read(tmp_path / "new")["videos"]] == order


def test_no_readable_video_is_one_line_that_names_each_and_writes_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"")
    (folder / "b.mp4").write_text("text")
    process = start(folder, tmp_path / "out")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a.mp4: it is empty; b.mp4: it is not a video" in message.splitlines()[-1] and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_video_without_an_intact_frame_leaves_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "v.mp4", 30, container_options={"movflags": "faststart"})
    data = bytearray((folder / "v.mp4").read_bytes())
    first = data.find(b"mdat") + 4
    data[first:] = bytes(len(data) - first)
    (folder / "v.mp4").write_bytes(data)
    with pytest.raises(cli.UserError, match="no video could be read .*v.mp4: 5 of 5 frames are damaged"):
        read(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("flags, hint", [([], "--recursive"), (["--recursive"], "Give a folder of videos")])
def test_an_empty_folder_is_one_line(tmp_path, flags, hint):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    with pytest.raises(cli.UserError, match=f"there is no video in .*{hint}"):
        read(tmp_path / "videos", tmp_path / "out", *flags)
    with pytest.raises(cli.UserError, match="nowhere"):
        read(tmp_path / "nowhere", tmp_path / "out", *flags)


def test_a_file_that_changes_after_the_plan_is_left_out(tmp_path):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "b", "c"), 30)), tmp_path / "out"
    read(folder, out, "--plan", "--seg-len", "1")
    write_video(folder / "b.mp4", 60)
    assert read(folder, out, "--seg-len", "1") is None
    assert left_out(out) == {
        "b.mp4": "it has changed since the plan was made, or an earlier version of the program planned it"
    }
    complete = manifest.load(out)
    assert complete.classes == ["class_0000", "class_0002"]
    assert [complete.video(i) for i in range(10)] == [0] * 5 + [2] * 5
    assert not (out / "class_0001").exists()


def test_a_crash_of_a_decoder_costs_only_its_video(tmp_path, monkeypatch):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "crash", "c"), 30)), tmp_path / "out"
    monkeypatch.setattr(images, "extract_images", extract_and_crash)
    assert read(folder, out, workers=2) is None
    assert left_out(out) == {"crash.mp4": "a worker process crashed on it (SIGSEGV)"}
    assert len(manifest.load(out)) == 10 == len(list(out.rglob("*.jpeg")))


def extract_and_crash(folder, plan, task, report, extract=images.extract_images):
    result = extract(folder, plan, task, report)
    if task[0].endswith("crash.mp4"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return result


def test_a_file_without_permission_to_read_is_left_out():
    with tempfile.TemporaryDirectory() as parent:  # not tmp_path, which only its owner may enter
        folder, out = Path(parent, "videos"), Path(parent, "out")
        for each in (Path(parent), folder, out):
            each.mkdir(exist_ok=True)
            each.chmod(0o777)
        for name in ("a", "b"):
            write_video(folder / f"{name}.mp4", 6)
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


def test_a_full_disk_is_one_line_and_the_run_is_resumed_when_there_is_space(tmp_path, small_disk):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", 200)
    disk = small_disk("200k")
    process = start(folder, disk, "--workers", "2")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in message
    assert "cannot write" in message.splitlines()[-1] and "No space left on device" in message
    assert all(cv2.imread(str(path)) is not None for path in disk.rglob("*.jpeg"))
    assert {path.name for path in disk.iterdir() if path.is_file() and "moco-tmp" not in path.name} <= {manifest.NAME}
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert read(folder, disk) is None
    assert len(manifest.load(disk)) == 68


def test_a_read_only_save_folder_is_one_line(tmp_path, small_disk):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "v.mp4", 6)
    disk = small_disk("1m", "ro")
    with pytest.raises(cli.UserError, match=f"{disk}"):
        read(folder, disk)


def test_a_save_folder_that_is_a_file_is_one_line(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "v.mp4", 6)
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.UserError, match="--save-dir"):
        read(folder, tmp_path / "file")


def test_the_dry_run_leaves_odd_files_out_by_name(mixed, tmp_path, capsys):
    assert read(mixed, tmp_path / "out", "--dry-run") is None
    printed = capsys.readouterr().out
    assert "left out: no decoder.mp4: there is no decoder for its codec" in printed
    assert "6 videos" in printed and "expected size" in printed
    assert not (tmp_path / "out").exists()


def test_classes_without_images_do_not_count(tmp_path, capsys):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "b", "c"), 30)), tmp_path / "out"
    read(folder, out, "--plan", "--seg-len", "1")
    assert "15 images in 3 classes, not complete yet" in capsys.readouterr().out
    write_video(folder / "b.mp4", 60)
    read(folder, out, "--seg-len", "1")
    assert "10 images in 2 classes\n" in capsys.readouterr().out


def test_a_second_reader_of_the_same_folder_leaves_no_records(tmp_path):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "b"), 30)), tmp_path / "out"
    read(folder, out, "--plan")
    read(folder, out)
    for number_of_video in (0, 1):  # as the second one does, which began before the first was done
        extract.mark_done(out, number_of_video, [], None)
    read(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["class_0000", manifest.NAME, "videos.csv"]


def test_videos_called_like_files_of_the_program_are_read(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("manifest.json.mp4", "filled-a.jsonl.mp4"):
        write_video(folder / name, 30)
    assert read(folder, out, "--class-by", "video", "--strict") is None
    assert manifest.load(out).classes == ["filled-a.jsonl", "manifest.json_"]
    assert read(folder, out, "--class-by", "video", "--strict") is None  # resumed
    assert read(folder, folder, "--class-by", "video", "--strict") is None
    assert len(manifest.load(folder)) == 10


class Disk:
    """A disk whose next reads fail: where a video is opened, or in the middle of it."""

    def __init__(self, monkeypatch, number=errno.EIO, middle=False):
        self.number, self.middle, self.failures = number, middle, 0
        monkeypatch.setattr(files, "WAITS", (0, 0, 0))
        monkeypatch.setattr(video, "open", self.open, raising=False)
        monkeypatch.setattr(video.av, "open", partial(self.open_video, av.open))

    def fail(self, kind):
        if self.failures:
            self.failures -= 1
            raise kind(self.number, "the disk fails")

    def open(self, path, *arguments, **options):
        self.fail(OSError)
        return open(path, *arguments, **options)

    @contextmanager
    def open_video(self, av_open, *arguments, **options):
        if not self.middle:
            self.fail(av.error.OSError)
        with av_open(*arguments, **options) as container:
            yield SimpleNamespace(
                **{name: getattr(container, name) for name in ("streams", "format", "name", "seek")},
                demux=lambda stream: self.packets(container.demux(stream)),
            )

    def packets(self, packets):
        yield from islice(packets, 20)
        if self.middle:
            self.fail(av.error.OSError)
        yield from packets


@pytest.mark.parametrize("number, middle", [(errno.EIO, False), (errno.EIO, True), (errno.ESTALE, False)])
def test_a_disk_that_fails_for_a_while_costs_no_frame(tmp_path, monkeypatch, number, middle):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "b"), 30)), tmp_path / "out"
    disk = Disk(monkeypatch, number, middle)
    for more in (["--plan"], []):
        disk.failures = 2
        assert read(folder, out, "--strict", *more) is None
        assert disk.failures == 0
    assert len(manifest.load(out)) == 10


def test_a_disk_that_fails_for_long_ends_the_run_and_nothing_is_left_out(tmp_path, monkeypatch):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "b"), 30)), tmp_path / "out"
    read(folder, out, "--plan")
    disk = Disk(monkeypatch)
    disk.failures = 1000
    with pytest.raises(cli.UserError, match="cannot read .*/a.mp4: Input/output error; .* re-run to resume"):
        read(folder, out)
    assert extract.completed_videos(out) == {}
    disk.failures = 0
    assert read(folder, out, "--strict") is None
    assert len(manifest.load(out)) == 10


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "a.mp4", 30)
    read(folder, out, "--plan")
    files.temporary_path(out / "image").write_bytes(b"half an ima")
    read(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["class_0000", manifest.NAME, "videos.csv"]


def test_names_are_in_order_within_each_folder_without_hidden_files(tmp_path):
    for name in ("S/b.mp4", "S/a.mp4", "S/.hidden.mp4", "S/sub/c.mp4", "A/z.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    roots = [tmp_path / "S", tmp_path / "A"]
    flat = [(0, "a.mp4", 5), (0, "b.mp4", 5), (1, "z.mp4", 5)]
    assert extract.list_videos(roots, False, tmp_path) == (flat, [])
    deep = [(0, "a.mp4", 5), (0, "b.mp4", 5), (0, "sub/c.mp4", 5), (1, "z.mp4", 5)]
    assert extract.list_videos(roots, True, tmp_path) == (deep, [])


def test_files_that_the_program_writes_are_not_listed(tmp_path):
    for name in (
        "v.mp4",
        "manifest.json",
        "times.npy",
        "frames.csv",
        "videos.csv",
        ".done-1.json",
        "frames/class_0000/img_0000.jpeg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    listed = extract.list_videos([tmp_path], True, tmp_path / "frames")[0]
    assert (0, "v.mp4", 1) in listed and not any("img" in name for _, name, _ in listed)
    assert extract.list_videos([tmp_path], False, tmp_path) == ([(0, "v.mp4", 1)], [])
    with pytest.raises(cli.UserError, match="give another --save-dir"):
        extract.list_videos([tmp_path], True, tmp_path)


def test_links_are_followed_wherever_they_lead_but_not_in_circles(tmp_path):
    for name in ("store/a.mp4", "store/deep/b.mp4", "S/own.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "S" / "linked.mp4").symlink_to("../store/a.mp4")
    (tmp_path / "S" / "folder").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "deep" / "up").symlink_to(tmp_path / "S")
    (tmp_path / "store" / "deep" / "round").symlink_to(tmp_path / "store" / "deep")
    (tmp_path / "S" / "itself").symlink_to("itself")
    reason = "it cannot be accessed: Too many levels of symbolic links"
    readable, left_out = extract.list_videos([tmp_path / "S"], True, tmp_path / "out")
    assert [name for _, name, _ in readable] == ["folder/a.mp4", "folder/deep/b.mp4", "linked.mp4", "own.mp4"]
    assert left_out == [(0, "itself", reason)]
