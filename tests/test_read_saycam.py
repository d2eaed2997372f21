"""The script as a user runs it: names, images, resuming, shards, flags."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from moco import cli
from moco.data import manifest, tars
from moco.data.folders import FrameFolder
from moco.videos import extract, planning
from moco.videos.probe import probe
from tests import support
from tests.support.videos import damaged, number, read, start_reading, tree, write_video, write_videos

GOLDEN = support.GOLDEN / "reader"
SMALL = ("--size", "64", "--seg-len", "2")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos of different lengths, at most 120 frames."""
    return write_videos(tmp_path_factory.mktemp("videos"), {"a": 100, "b": 37, "c": 120, "d": 6, "e": 1})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three videos and a damaged one."""
    folder = write_videos(tmp_path_factory.mktemp("mixed"), {"a": 100, "b": 37, "c": 1})
    damaged(folder / "d.mp4", 100)
    return folder


@pytest.fixture(scope="module", params=[SMALL, (*SMALL, "--pack")], ids=["files", "tars"])
def expected(mixed, tmp_path_factory, request):
    """(flags, {name: bytes} of the files that one uninterrupted run in one process writes with them)."""
    folder = tmp_path_factory.mktemp("expected")
    assert read(mixed, folder, *request.param) is None
    return request.param, tree(folder)


def test_names_and_images_are_the_published_ones(tmp_path):
    assert read(GOLDEN / "videos", tmp_path, "--fps", "5", "--seg-len", "4") is None
    golden = np.load(GOLDEN / "frames.npz")
    assert sorted(name for name in tree(tmp_path) if name.endswith("jpeg")) == list(golden["names"])
    for name, thumb in zip(golden["names"], golden["thumbs"], strict=True):
        image = cv2.imread(str(tmp_path / name))
        assert image.shape == (224, 224, 3)
        small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - thumb).mean() <= 1.5


def test_every_image_shows_the_frame_that_is_planned(videos, tmp_path):
    numbers = [k for count in (100, 37, 120, 6, 1) for k in range(0, count, 6)]
    assert read(videos, tmp_path, "--seg-len", "2") is None
    complete = manifest.load(tmp_path)
    assert [number(tmp_path / complete.path(i)) for i in range(len(complete))] == numbers
    assert [complete.path(i) for i in (0, 9, 10)] == [
        "class_0000/img_0000.jpeg", "class_0000/img_0009.jpeg", "class_0001/img_0000.jpeg",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 4])
def test_files_are_the_same_for_any_number_of_workers(mixed, expected, tmp_path, workers):
    flags, files = expected
    assert read(mixed, tmp_path, *flags, workers=workers) is None
    assert tree(tmp_path) == files


def test_files_are_the_same_for_shards_of_a_plan(mixed, expected, tmp_path):
    flags, files = expected
    assert read(mixed, tmp_path, *flags, "--plan") is None
    assert list(tree(tmp_path)) == [manifest.NAME]
    for shard in ("2/3", "0/3", "1/3"):
        with pytest.raises(cli.UserError, match=f"python read_saycam.py {mixed} --save-dir {tmp_path} .*--seg-len 2"):
            FrameFolder(tmp_path)
        assert read(mixed, tmp_path, *flags, "--shard", shard) is None
    assert tree(tmp_path) == files


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("flags", [(), ("--pack",)], ids=["files", "tars"])
def test_files_are_the_same_after_kills(tmp_path, kills, flags):
    # 100 large images take seconds, so that every kill comes long before the end.
    folder = write_videos(tmp_path / "videos", dict.fromkeys(map(str, range(2 + 2 * kills)), 100))
    killed, plain, large = tmp_path / "killed", tmp_path / "plain", ("--fps", "30", "--size", "448", *flags)
    assert read(folder, plain, *large, workers=2) is None
    draws = np.random.default_rng(0)

    def written():
        return len(tars.list_tars(killed) if killed.exists() else []) if flags else len(list(killed.rglob("*.jpeg")))

    for _ in range(kills):
        goal = written() + (1 if flags else draws.integers(1, 60))  # those written again do not count
        process = start_reading(folder, killed, *large, "--workers", "2")
        while process.poll() is None and written() < goal:
            time.sleep(0.005)
        assert process.poll() is None, "the process ended before the kill"
        process.kill()
        process.communicate()
        assert all(len(tars.scan(killed / tar)[0]) == 100 for tar in tars.list_tars(killed))
    assert not manifest.read(killed)["complete"]
    assert read(folder, killed, *large, workers=2) is None
    assert tree(killed) == tree(plain)


def test_a_video_that_is_done_is_not_read_again(videos, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(extract, "frames", lambda path, *rest: opened.append(Path(path).stem) or iter(()))
    read(videos, tmp_path, *SMALL, "--plan")
    extract.mark_done(tmp_path, 1, [], None)
    (tmp_path / ".done-4.json").write_text('\n{"video": 4, "miss')  # by a process that was killed
    # An earlier version wrote a line per video.
    (tmp_path / "filled-host-1.jsonl").write_text('\n{"video": 3, "missing": [], "reason": null}\n{"video": 2, "miss')
    read(videos, tmp_path, *SMALL)
    assert sorted(opened) == ["a", "c", "e"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [manifest.NAME, "videos.csv"]


@pytest.mark.parametrize(
    "flags, message", [(["--fps", "4"], "--fps was 5.0, not 4.0"), (["--no-rotate"], "--no-rotate was False, not True")]
)
def test_other_settings_on_the_same_folder_are_refused_by_name(videos, tmp_path, flags, message):
    read(videos, tmp_path, *SMALL, "--plan")
    before = tree(tmp_path)
    with pytest.raises(cli.UserError, match=message):
        read(videos, tmp_path, *SMALL, *flags)
    assert tree(tmp_path) == before


def test_other_videos_on_the_same_folder_are_refused_by_name(videos, tmp_path):
    folder = write_videos(tmp_path / "videos", {"new": 6})
    read(videos, tmp_path / "frames", *SMALL, "--plan")
    with pytest.raises(cli.UserError, match="new.mp4 was not there; a.mp4 was there"):
        read(folder, tmp_path / "frames", *SMALL)


def test_frames_of_unknown_origin_are_not_overwritten(videos, tmp_path):
    (tmp_path / "class_0000").mkdir()
    with pytest.raises(cli.UserError, match="has a class_0000 already"):
        read(videos, tmp_path, *SMALL)
    assert tree(tmp_path) == {}


def test_a_record_of_unknown_origin_is_refused(videos, tmp_path):
    extract.mark_done(tmp_path, 0, [], None)
    with pytest.raises(cli.UserError, match="has a .done-0.json already"):
        read(videos, tmp_path, *SMALL)


@pytest.mark.parametrize("flag", ["--fps=1/0", "--fps=0", "--fps=nan", "--seg-len=inf", "--shard=3/3", "--size=0"])
def test_an_impossible_value_of_a_flag_is_refused(videos, tmp_path, flag):
    with pytest.raises(SystemExit) as end:
        read(videos, tmp_path, flag)
    assert end.value.code == 2


def test_a_dry_run_prints_the_plan_and_writes_nothing(videos, tmp_path, capsys):
    assert read(videos, tmp_path / "frames", *SMALL, "--dry-run") is None
    printed = capsys.readouterr().out
    assert "5 videos" in printed and "264 frames" in printed and "46 images in 5 classes" in printed
    assert "expected size" in printed
    assert float(printed.split("expected size: ")[1].split()[0]) > 0
    assert not (tmp_path / "frames").exists()


def test_classes_by_name_and_by_video_are_those_of_image_folder(tmp_path):
    folders = {"S": ["cup_1.mp4", "cup_1_0.mp4", "cup.mp4", "Ball 2.mp4"], "A": ["cup_1.mp4", "ü_1.mp4"]}
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for k, name in enumerate(names):
            write_video(tmp_path / folder / name, 10 * k + 7)
    for by in ("name", "video"):
        save_dir = tmp_path / by
        assert read([tmp_path / "S", tmp_path / "A"], save_dir, "--size", "64", "--class-by", by) is None
        complete, plain = manifest.load(save_dir), ImageFolder(save_dir)
        assert complete.classes == plain.classes
        assert [str(save_dir / complete.path(i)) for i in range(len(complete))] == [path for path, _ in plain.samples]
        assert complete.counts == np.bincount(plain.targets).tolist()
    assert (tmp_path / "name" / "cup" / "cup_1_0000.jpeg").is_file()
    assert manifest.load(tmp_path / "name").classes == ["Ball 2", "cup", "ü"]
    assert (tmp_path / "video" / "cup_1.2" / "img_0000.jpeg").is_file()


def test_videos_of_several_folders_follow_one_another(tmp_path):
    for folder in ("S", "A"):
        (tmp_path / folder / "deeper").mkdir(parents=True)
        write_video(tmp_path / folder / "one.mp4", 12)
        write_video(tmp_path / folder / "deeper" / "one.mp4", 6)
    read([tmp_path / "S", tmp_path / "A"], tmp_path / "out", "--size", "64", "--recursive")
    plan = manifest.read(tmp_path / "out")
    assert [(each["folder"], each["name"]) for each in plan["videos"]] == [
        (0, "deeper/one.mp4"), (0, "one.mp4"), (1, "deeper/one.mp4"), (1, "one.mp4"),
    ]  # fmt: skip
    assert len(manifest.load(tmp_path / "out")) == 6
    read(tmp_path / "S", tmp_path / "flat", "--size", "64")
    assert [each["name"] for each in manifest.read(tmp_path / "flat")["videos"]] == ["one.mp4"]


def test_size_quality_rotation_shift_and_the_short_last_class(videos, tmp_path):
    read(videos, tmp_path / "a", "--size", "96", "--quality", "30", "--no-rotate", "--seg-len", "2", "--drop-last")
    complete = manifest.load(tmp_path / "a")
    assert complete.counts == [10, 10, 10, 10]
    image = tmp_path / "a" / complete.path(3)
    assert cv2.imread(str(image)).shape == (96, 96, 3)
    assert number(image, rotated=False) == 18
    read(videos, tmp_path / "b", "--size", "96", "--no-rotate", "--seg-len", "2.5")
    assert image.stat().st_size < 0.7 * (tmp_path / "b" / complete.path(3)).stat().st_size
    assert manifest.load(tmp_path / "b").counts[0] == 12
    with pytest.raises(cli.UserError, match="--drop-last"):
        read(videos, tmp_path / "c", "--drop-last")
    assert not (tmp_path / "c").exists()


def test_a_rate_above_the_native_one_uses_all_frames_and_prints_a_line(videos, tmp_path, capsys):
    read(videos, tmp_path, "--size", "64", "--fps", "60")
    assert "5 of 5 videos have fewer than 60 frames per second" in capsys.readouterr().out
    assert len(manifest.load(tmp_path)) == 264


def test_a_video_of_variable_rate_is_sampled_by_time(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 200))
    write_video(tmp_path / "v.mp4", 200, times=times)
    info = probe(tmp_path / "v.mp4")
    sampled = planning.sampled_frames(info, 5)[0]
    seconds = (times[sampled] - times[0]) / 1000
    assert not info.is_constant_rate()
    assert np.array_equal(np.floor(seconds * 5), np.arange(len(sampled)))
    assert np.all((times[sampled[1:] - 1] - times[0]) / 1000 < np.arange(1, len(sampled)) / 5)
    read(tmp_path, tmp_path / "out")
    assert [number(tmp_path / "out" / f"class_0000/img_{i:04d}.jpeg") for i in range(len(sampled))] == list(sampled)
