"""Folders with everything in them that a folder of videos can hold, and disks that fail."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import read_saycam
from moco import cli
from moco.data import manifest
from tests.support.videos import number, write_video

SCRIPT = Path(read_saycam.__file__)


def read(folder, save_dir, *flags, workers=0):
    return read_saycam.main([str(folder), "--save-dir", str(save_dir), "--workers", str(workers), *flags])


def left_out(save_dir):
    return dict(manifest.left_out(manifest.read(save_dir)))


def start(folder, save_dir, *flags, **options):
    """Start the reader in a process of its own."""
    command = [sys.executable, str(SCRIPT), str(folder), "--save-dir", str(save_dir), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def damaged(path, rng):
    """Noise in the middle of the pictures of a video whose index stands first."""
    data = bytearray(path.read_bytes())
    middle = (data.find(b"mdat") + len(data)) // 2
    data[middle : middle + 400] = rng.bytes(400)
    path.write_bytes(data)


@pytest.fixture
def zoo(tmp_path):
    """A folder of three good videos and of everything else."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    index_first = dict(options={"g": "25"}, container_options={"movflags": "faststart"})
    write_video(folder / "good one.mp4", 60)
    write_video(folder / "gut ü 赤.mp4", 31)
    write_video(folder / "tail cut off.mp4", 300, **index_first)
    os.truncate(folder / "tail cut off.mp4", (folder / "tail cut off.mp4").stat().st_size * 6 // 10)
    write_video(folder / "with damage.mp4", 300, **index_first)
    damaged(folder / "with damage.mp4", np.random.default_rng(0))
    (folder / "linked.mp4").symlink_to(folder / "good one.mp4")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "._good one.mp4").write_bytes(b"\0\5\x16\7")
    (folder / "sub.mp4").mkdir()

    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    whole = (folder / "good one.mp4").read_bytes()
    (folder / "no index.mp4").write_bytes(whole[: whole.find(b"moov") - 4])
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


BAD = {"empty.mp4", "text.mp4", "no index.mp4", "leaves.mp4", "dangling.mp4", "list.m3u8", "list.mp4", "joined.mp4"}
BAD |= {"stream.sdp", "pipe.mp4", "bad \udcff name.mp4"}


def test_bad_files_are_left_out_by_name_and_the_others_read_in_full(zoo, tmp_path, capsys):
    start_time = time.monotonic()
    assert read(zoo, tmp_path / "out") is None
    assert time.monotonic() - start_time < 10
    images, plan = manifest.load(tmp_path / "out"), manifest.read(tmp_path / "out")
    assert set(left_out(tmp_path / "out")) == BAD | {"with damage.mp4", "tail cut off.mp4"}  # the last frame is halved
    assert [each["name"] for each in plan["videos"]] == [
        "good one.mp4", "gut ü 赤.mp4", "linked.mp4", "tail cut off.mp4", "with damage.mp4",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for name in BAD - {"bad \udcff name.mp4"}:
        assert f"left out: {name}: " in printed
    assert r"left out: bad \udcff name.mp4: its name is not UTF-8" in printed
    assert "with damage.mp4: " in printed and "frames are damaged" in printed
    shown = {}
    for i in range(len(images)):
        shown.setdefault(images.video(i), []).append(number(tmp_path / "out" / images.path(i)))
    assert shown[0] == shown[2] == list(range(0, 60, 6))
    assert shown[1] == list(range(0, 31, 6))
    assert len(shown[3]) > 20 and shown[3] == list(range(0, 6 * len(shown[3]), 6))
    slots = plan["videos"][4]
    gone = {slot - slots["first_slot"] for first, end in slots["missing"] for slot in range(first, end)}
    assert 0 < len(gone) < 10
    assert shown[4] == [6 * slot for slot in range(50) if slot not in gone]


def test_strict_ends_with_status_1_where_anything_is_left_out(zoo, tmp_path):
    assert read(zoo, tmp_path / "out", "--strict") == 1
    (tmp_path / "good").mkdir()
    write_video(tmp_path / "good" / "v.mp4", 6)
    assert read(tmp_path / "good", tmp_path / "fine", "--strict") is None


def test_no_readable_video_is_one_line_that_names_each_and_writes_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"")
    (folder / "b.mp4").write_text("text")
    process = start(folder, tmp_path / "out")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a.mp4: it is empty; b.mp4: it is no video" in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_video_of_which_no_frame_can_be_decoded_leaves_nothing(tmp_path):
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


def test_a_file_that_changes_between_plan_and_fill_is_left_out(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4", 30)
    read(folder, out, "--plan", "--seg-len", "1")
    write_video(folder / "b.mp4", 60)
    assert read(folder, out, "--seg-len", "1") is None
    assert left_out(out) == {"b.mp4": "it has changed since the plan was made"}
    images = manifest.load(out)
    assert images.classes == ["class_0000", "class_0002"]
    assert [images.video(i) for i in range(10)] == [0] * 5 + [2] * 5
    assert not (out / "class_0001").exists()


def test_a_crash_of_the_decoder_costs_its_video_only(tmp_path, monkeypatch):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "crash", "c"):
        write_video(folder / f"{name}.mp4", 30)
    monkeypatch.setattr(read_saycam, "extract_frames", fill_with_a_crash)
    assert read(folder, out, workers=2) is None
    assert left_out(out) == {"crash.mp4": "a worker process crashed on it (SIGSEGV)"}
    assert len(manifest.load(out)) == 10 == len(list(out.rglob("*.jpeg")))


def fill_with_a_crash(folder, head, task, report, fill=read_saycam.extract_frames):
    result = fill(folder, head, task, report)
    if task[0].endswith("crash.mp4"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return result


def test_a_file_that_nobody_may_read_is_left_out():
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, which only its owner may enter
        folder, out = Path(place, "videos"), Path(place, "out")
        for each in (Path(place), folder, out):
            each.mkdir(exist_ok=True)
            each.chmod(0o777)
        for name in ("a", "b"):
            write_video(folder / f"{name}.mp4", 6)
        (folder / "b.mp4").chmod(0)
        process = os.fork()  # root may read all, so somebody else reads
        if not process:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os._exit(read(folder, out) or 0)
        assert os.waitpid(process, 0)[1] == 0
        assert left_out(out) == {"b.mp4": "it may not be read"}
        assert len(manifest.load(out)) == 1


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmp_path, small_disk):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", 200)
    disk = small_disk("200k")
    process = start(folder, disk, "--workers", "2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in said
    assert "cannot write" in said.splitlines()[-1] and "No space left on device" in said
    assert all(path.stat().st_size for path in disk.rglob("*.jpeg"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert read(folder, disk) is None
    assert len(manifest.load(disk)) == 68


def test_a_save_directory_that_may_not_be_written_to_is_one_line(tmp_path, small_disk):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "v.mp4", 6)
    disk = small_disk("1m", "ro")
    with pytest.raises(cli.UserError, match=f"{disk}"):
        read(folder, disk)


def test_a_save_directory_that_is_a_file_is_one_line(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "v.mp4", 6)
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.UserError, match="--save-dir"):
        read(folder, tmp_path / "file")
