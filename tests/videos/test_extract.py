"""Plans into frame folders: good, damaged and hostile files, crashes, several readers at once, failing disks."""

import errno
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from tqdm import tqdm

from moco import cli, files
from moco.data import manifest
from moco.videos import extract, planning, video
from tests.support.videos import damaged, left_out, number, read, write_video, write_videos

SETTINGS = {"fps": 5.0, "seg-len": 2.0, "class-by": "time", "size": 64, "quality": 95, "shift": 16}
SETTINGS |= {"no-rotate": False, "published-step": False, "drop-last": False, "recursive": False}
CHANGED = "it has changed since the plan was made, or an earlier version of the program planned it"


@pytest.fixture
def mixed(tmp_path):
    """A folder of good videos, damaged ones, and files that are not videos."""
    folder = write_videos(tmp_path / "mixed", {"good one": 60, "gut ü 赤": 31})
    content = damaged(folder / "tail cut off.mp4").read_bytes()
    write_video(folder / "tail cut off.mp4", 300, options={"g": "25"}, container_options={"movflags": "faststart"})
    os.truncate(folder / "tail cut off.mp4", len(content) * 6 // 10)
    damaged(folder / "with damage.mp4")
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
    out = tmp_path / "out"
    assert read(mixed, out, "--dry-run", workers=workers) is None and not out.exists()
    printed = capsys.readouterr().out
    assert "6 videos" in printed and "expected size" in printed
    assert "left out: no decoder.mp4: there is no decoder for its codec" in printed
    assert read(mixed, out, "--strict", workers=workers) == 1
    complete, plan = manifest.load(out), manifest.read(out)
    assert set(left_out(out)) == BAD | {"with damage.mp4"}
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
        shown.setdefault(complete.video(i), []).append(number(out / complete.path(i)))
    assert shown[0] == shown[3] == list(range(0, 60, 6))
    assert shown[1] == list(range(0, 31, 6)) and shown[2] == [0]
    assert len(shown[4]) > 20 and shown[4] == list(range(0, 6 * len(shown[4]), 6))
    slots = plan["videos"][5]
    missing = {slot - slots["first_slot"] for first, end in slots["missing"] for slot in range(first, end)}
    assert 0 < len(missing) < 10
    assert shown[5] == [6 * slot for slot in range(50) if slot not in missing]


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


def test_a_file_that_changes_after_the_plan_is_left_out_and_its_class_does_not_count(tmp_path, capsys):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys("abc", 30)), tmp_path / "out"
    read(folder, out, "--plan", "--seg-len", "1")
    assert "3 videos, 3.00 seconds, 90 frames; 15 images in 3 classes, planned; re-run" in capsys.readouterr().out
    write_video(folder / "b.mp4", 60)
    assert read(folder, out, "--seg-len", "1") is None
    assert "10 images in 2 classes\n" in capsys.readouterr().out
    read(folder, out, "--seg-len", "1")
    assert f"nothing to do: {out} is complete" in capsys.readouterr().out
    assert left_out(out) == {"b.mp4": CHANGED}
    complete = manifest.load(out)
    assert complete.classes == ["class_0000", "class_0002"]
    assert [complete.video(i) for i in range(10)] == [0] * 5 + [2] * 5
    assert not (out / "class_0001").exists()


def test_a_planned_video_of_variable_rate_is_read_by_its_table_of_times(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 60))
    write_video(folder / "v.mkv", 60, times=times, options={"bf": "0"})
    read(folder, out, "--plan")
    table = (out / manifest.TIMES).read_bytes()
    (out / manifest.TIMES).unlink()
    with pytest.raises(cli.UserError, match="times.npy is missing or damaged"):
        read(folder, out)
    (out / manifest.TIMES).write_bytes(table)
    read(folder, out, "--strict")
    images = manifest.load(out)
    assert [number(out / images.path(i)) for i in range(len(images))] == images.frames(0).tolist()


def test_a_crash_of_a_decoder_costs_only_its_video(tmp_path, monkeypatch):
    folder, out = write_videos(tmp_path / "videos", dict.fromkeys(("a", "crash", "c"), 30)), tmp_path / "out"
    monkeypatch.setattr(extract, "extract_images", extract_and_crash)
    assert read(folder, out, workers=2) is None
    assert left_out(out) == {"crash.mp4": "a worker process crashed on it (SIGSEGV)"}
    assert len(manifest.load(out)) == 10 == len(list(out.rglob("*.jpeg")))


def extract_and_crash(folder, plan, task, report, extract=extract.extract_images):
    result = extract(folder, plan, task, report)
    if task[0].endswith("crash.mp4"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return result


def test_a_full_disk_is_one_line_and_the_run_is_resumed_when_there_is_space(tmp_path, small_disk):
    folder, disk = write_videos(tmp_path / "videos", {"a": 200, "b": 200}), small_disk("200k")
    with pytest.raises(cli.UserError, match="cannot write .*No space left on device"):
        read(folder, disk, workers=2)
    assert all(cv2.imread(str(path)) is not None for path in disk.rglob("*.jpeg"))
    assert {path.name for path in disk.iterdir() if path.is_file() and "moco-tmp" not in path.name} <= {manifest.NAME}
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert read(folder, disk) is None
    assert len(manifest.load(disk)) == 68


def test_records_of_others_and_temporary_files_of_killed_processes_are_removed(tmp_path):
    folder, out = write_videos(tmp_path / "videos", {"a": 30, "b": 30}), tmp_path / "out"
    read(folder, out, "--plan")
    files.temporary_path(out / "image").write_bytes(b"half an ima")
    read(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["class_0000", manifest.NAME, "videos.csv"]
    for number_of_video in (0, 1):  # as another reader does, which began before the first was done
        extract.mark_done(out, number_of_video, [], None)
    read(folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["class_0000", manifest.NAME, "videos.csv"]


def test_ctrl_c_says_what_is_kept(tmp_path, monkeypatch):
    folder, out = write_videos(tmp_path / "videos", {"a": 60, "b": 30}), tmp_path / "out"
    mark_done = extract.mark_done

    def interrupt(*arguments):
        mark_done(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "mark_done", interrupt)
    with pytest.raises(KeyboardInterrupt) as end:
        read(folder, out)
    message = "\npytest: interrupted; 1 of 2 videos are done and kept; re-run the command to resume\n"
    monkeypatch.setattr(cli, "program", lambda: "pytest")
    assert cli.failure(end.value) == (130, message)


def test_a_bar_of_80_columns_shows_its_numbers():
    numbers = dict(prefix="read", unit=" frames", unit_scale=True, postfix=extract.pace(3_124_944, 3_600_000, 18_000))
    bar = tqdm.format_meter(86_804_000, 100_000_000, 18_000, ncols=80, **numbers)
    assert "868.0 of 1000.0 h, 174x" in bar and "frames/s" in bar and len(bar) <= 80
    assert extract.pace(30, 90, 10) == "0.5 of 1.5 min, 3x"


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
                **{name: getattr(container, name) for name in ("streams", "format", "name", "seek", "start_time")},
                demux=lambda stream: self.packets(container.demux(stream)),
            )

    def packets(self, packets):
        yield from islice(packets, 20)
        if self.middle:
            self.fail(av.error.OSError)
        yield from packets


@pytest.mark.parametrize("number, middle", [(errno.EIO, False), (errno.EIO, True), (errno.ESTALE, False)])
def test_a_disk_that_fails_for_a_while_costs_no_frame(tmp_path, monkeypatch, number, middle):
    folder, out = write_videos(tmp_path / "videos", {"a": 30, "b": 30}), tmp_path / "out"
    disk = Disk(monkeypatch, number, middle)
    for more in (["--plan"], []):
        disk.failures = 2
        assert read(folder, out, "--strict", *more) is None
        assert disk.failures == 0
    assert len(manifest.load(out)) == 10


def test_a_disk_that_fails_for_long_ends_the_run_and_nothing_is_left_out(tmp_path, monkeypatch):
    folder, out = write_videos(tmp_path / "videos", {"a": 30, "b": 30}), tmp_path / "out"
    read(folder, out, "--plan")
    disk = Disk(monkeypatch)
    disk.failures = 1000
    with pytest.raises(cli.UserError, match="cannot read .*/a.mp4: Input/output error; .* re-run to resume"):
        read(folder, out)
    assert extract.completed_videos(out) == {}
    disk.failures = 0
    assert read(folder, out, "--strict") is None
    assert len(manifest.load(out)) == 10


# --- one video


def test_the_crop_is_the_published_one_and_stays_inside_any_picture():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, 1).repeat(3, 2)
    assert np.array_equal(extract.crop(ramp)[:, 0, 0], np.arange(223, -1, -1))
    for shift, first in ((0, 16), (4, 12), (99, 0)):
        assert np.array_equal(extract.crop(ramp, shift=shift, rotate=0)[:, 0, 0], np.arange(first, first + 224))
    for size, shape in [(224, (480, 640)), (224, (640, 360)), (96, (1, 1)), (33, (50, 31)), (300, (120, 160))]:
        assert extract.crop(np.zeros((*shape, 3), np.uint8), size).shape == (size, size, 3)


@pytest.fixture
def planned(tmp_path):
    """(path, plan, FrameSelection) of a video of 60 frames."""
    path = write_video(tmp_path / "v.mp4", 60)
    (entry,), _ = planning.plan_video(SETTINGS, (path, None))
    entry |= {"folder": 0, "name": path.name, "bytes": path.stat().st_size}
    return path, manifest.make(SETTINGS, [str(tmp_path)], [entry], []), entry["selection"]


def extract_images(path, plan, selection, report=lambda done: None):
    return extract.extract_images(path.parent, plan, (path, plan["videos"][0], selection), report)


def fail(*_):
    raise ZeroDivisionError("surprise")


def test_whatever_a_library_raises_is_the_reason_of_one_video(planned, monkeypatch):
    reason = "reading it fails with ZeroDivisionError('surprise')"
    monkeypatch.setattr(extract, "encode", fail)
    assert extract_images(*planned) == ([[0, 10]], reason)
    monkeypatch.setattr(planning, "probe", fail)
    assert planning.plan_video(SETTINGS, (planned[0], None)) == ([], [reason])


def test_a_file_is_read_once_where_its_selection_is_known(planned, monkeypatch):
    monkeypatch.setattr(extract, "probe", fail)
    reported = []
    assert extract_images(*planned, reported.append) == ([], None)
    assert reported == list(range(0, 60, 6))
    assert len(list(planned[0].parent.rglob("img_*.jpeg"))) == 10


@pytest.mark.parametrize("frames, is_known", [(90, False), (90, True), (59, False)])
def test_a_file_that_is_not_the_planned_one_is_left_out(planned, frames, is_known):
    path, plan, selection = planned
    write_video(path, frames)
    assert extract_images(path, plan, selection if is_known else np.arange(0, 60, 6)) == ([[0, 10]], CHANGED)


def test_an_image_whose_writer_is_killed_does_not_appear(tmp_path, monkeypatch):
    (tmp_path / "class_0000").mkdir()
    extract.write_image(tmp_path, "class_0000/img_0001.jpeg", b"complete")
    process = os.fork()
    if not process:
        half = partial(os.kill, os.getpid(), signal.SIGKILL)
        monkeypatch.setattr(type(tmp_path), "replace", lambda *_: half())
        extract.write_image(tmp_path, "class_0000/img_0000.jpeg", b"0123456789" * 10)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert [path.name for path in (tmp_path / "class_0000").iterdir()] == ["img_0001.jpeg"]
    files.remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["class_0000"]


def test_an_image_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "class_0000").write_text("a file where the folder of the class should be")
    with pytest.raises(cli.UserError, match="cannot write .*class_0000/img_0000.jpeg: .*re-run the command to resume"):
        extract.write_image(tmp_path, "class_0000/img_0000.jpeg", b"complete")
    assert [path.name for path in tmp_path.iterdir()] == ["class_0000"]


def test_the_expected_size_ignores_videos_without_a_first_frame(planned):
    path, plan, selection = planned
    _, picture = next(video.frames(path, selection))
    assert extract.mean_size(plan) == len(extract.encode(picture, SETTINGS, {}))
    os.truncate(path, 100)
    assert extract.mean_size(plan) == 0
