"""Where images come from: there and back for every image, tables, recordings chosen by the reader, and moments."""

import csv
import os

import cv2
import numpy as np
import pytest

import read_saycam
from moco.cli import UserError
from moco.data import manifest
from tests.support.videos import RATE, damaged, number, write_video, write_videos
from tests.support.videos import read as run

NAMES = ("S_20130417_0600_01.mp4", "S_20130720_0903_02.mp4", "A_20130814_0507_02.mp4")


def read(folder, save_dir, *flags):
    assert run(folder, save_dir, "--size", 64, *flags) is None
    return manifest.load(save_dir)


def look_up(save_dir, *flags):
    read_saycam.main(["--save-dir", str(save_dir), *map(str, flags)])


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def videos(tmp_path):
    """Videos of constant and variable rate, and one with damage."""
    folder = write_videos(tmp_path / "videos", {NAMES[0]: 120})
    times = np.cumsum(np.random.default_rng(0).integers(20, 120, 90))  # ms
    write_video(folder / NAMES[1].replace(".mp4", ".mkv"), 90, times=times, options={"bf": "0"})
    damaged(folder / NAMES[2])
    return folder


@pytest.mark.parametrize("flags", [[], ["--class-by", "video"]])
def test_every_image_is_located_there_and_back(videos, tmp_path, flags, capsys):
    """The number that an image shows is that of its frame."""
    images = read(videos, tmp_path / "out", "--seg-len", 3, *flags)
    names = [images.path(i) for i in range(len(images))]
    assert any(video["missing"] for video in images.videos)
    capsys.readouterr()
    look_up(tmp_path / "out", "--locate", *names)
    lines = capsys.readouterr().out.splitlines()
    for i, (name, line) in enumerate(zip(names, lines, strict=True)):
        source = images.source(i)
        assert source.frame == number(tmp_path / "out" / name)
        assert line.startswith(f"{name}: {source.name}, frame {source.frame}, {source.second:.3f} s, child ")
    sources = [images.source(i) for i in range(len(images))]
    look_up(tmp_path / "out", "--locate", *(f"{source.name}@{source.second}" for source in sources))
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    "name, message",
    [
        ("class_0000/img_9999.jpeg", "has no image class_0000/img_9999.jpeg"),
        ("nobody.mp4@3", "has no images of a video nobody.mp4"),
        (f"{NAMES[0]}@99", "has no second 99; it is 4.0 seconds long"),
        (f"{NAMES[0]}@-1", "has no second -1"),
        (f"{NAMES[0]}@noon", "noon is not a number of seconds"),
    ],
)
def test_what_cannot_be_located_is_one_line(tmp_path, name, message):
    read(write_videos(tmp_path / "videos", {NAMES[0]: 120}), tmp_path / "out")
    with pytest.raises(UserError, match=message):
        look_up(tmp_path / "out", "--locate", name)
    with pytest.raises(UserError, match=r"has no manifest.json"):
        look_up(tmp_path / "videos", "--locate", name)


def test_tables_have_a_row_per_image_and_per_video(videos, tmp_path):
    table = tmp_path / "recordings.csv"
    table.write_text(f"file,child,age_days,room\n{NAMES[0]},T,200,kitchen\n")
    images = read(videos, tmp_path / "out", "--recordings", table)
    look_up(tmp_path / "out", "--table")
    frames, recordings = rows(tmp_path / "out" / "frames.csv"), rows(tmp_path / "out" / "videos.csv")
    assert [row["file"] for row in frames] == [images.path(i) for i in range(len(images))]
    for i, row in enumerate(frames):
        source = images.source(i)
        assert (row["recording"], row["video"], int(row["frame"])) == (source.name, source.name, source.frame)
        assert (row["child"], row["room"]) == ("T" if source.name == NAMES[0] else source.name[0], row["room"])
    by_name = {row["file"]: row for row in recordings}
    assert len(by_name) == 3 and by_name[NAMES[0]]["room"] == "kitchen" and by_name[NAMES[0]]["age_days"] == "200"
    assert by_name[NAMES[2]]["date"] == "2013-08-14" and float(by_name[NAMES[2]]["age_months"]) == 5.23
    assert sum(int(row["images"]) for row in recordings) == len(images)
    assert float(by_name[NAMES[0]]["seconds"]) == pytest.approx(120 / float(RATE), abs=1e-3)


def test_the_chapters_of_a_recording_follow_one_another_and_are_one_in_tables(tmp_path):
    names = ["GX010001.MP4", "GX020001.MP4", "GX010002.MP4", "GX020002.MP4", "GX100002.MP4"]
    folder = write_videos(tmp_path / "videos", dict.fromkeys(names, 30))
    images = read(folder, tmp_path / "out", "--seg-len", 1)
    assert [video["name"] for video in images.videos] == names
    look_up(tmp_path / "out", "--table")
    pairs = {row["video"]: row["recording"] for row in rows(tmp_path / "out" / "frames.csv")}
    assert pairs == dict(zip(names, ["GX0001.MP4"] * 2 + ["GX0002.MP4"] * 3, strict=True))


def test_the_reader_takes_selected_recordings_only(tmp_path, capsys):
    folder = write_videos(tmp_path / "videos", dict.fromkeys(NAMES, 120))
    images = read(folder, tmp_path / "S", "--children", "S", "--ages", "6-9")
    assert {images.source(i).name for i in range(len(images))} == {NAMES[0]}
    assert "selected: 1 of 1 recordings, 4.00 seconds, child S, ages 6.0 to 6.0 months" in capsys.readouterr().out
    with pytest.raises(UserError, match="--ages was 6-9, not None"):
        read(folder, tmp_path / "S", "--children", "S")
    assert len(read(folder, tmp_path / "S", "--children", "S", "--ages", "6-9")) == len(images)  # resumes
    with pytest.raises(UserError, match="no recording is of child X"):
        read(folder, tmp_path / "X", "--children", "X")


def test_hours_are_exact_and_nested(tmp_path):
    folder = write_videos(tmp_path / "videos", dict.fromkeys(NAMES, 300))  # 10 seconds
    taken = []
    for seconds in (4, 14, 26):
        images = read(folder, tmp_path / str(seconds), "--hours", seconds / 3600, "--seed", 1)
        assert len(images) == seconds * 5
        taken.append({(images.source(i).name, images.source(i).frame) for i in range(len(images))})
    assert taken[0] < taken[1] < taken[2]
    assert len(read(folder, tmp_path / "26", "--hours", 26 / 3600, "--seed", 1)) == 130  # resumes


def test_frames_are_rotated_as_the_flag_and_the_table_say(tmp_path):
    folder, table = write_videos(tmp_path / "videos", dict.fromkeys(NAMES[:2], 30)), tmp_path / "recordings.csv"
    table.write_text(f"file,rotate\n{NAMES[1]},270\n")
    read(folder, tmp_path / "up", "--rotate", 0, "--class-by", "video")
    turned = read(folder, tmp_path / "turned", "--rotate", 90, "--recordings", table, "--class-by", "video")
    for i in range(len(turned)):
        upright, image = (cv2.imread(str(tmp_path / run / turned.path(i))).astype(int) for run in ("up", "turned"))
        turns = {NAMES[0]: 3, NAMES[1]: 1}[turned.source(i).name]  # counterclockwise
        assert np.abs(np.rot90(upright, turns) - image).mean() < 3
    table.write_text(f"file,rotate\n{NAMES[1]},45\n")
    with pytest.raises(UserError, match="line 2: rotate is 45, not one of 0, 90, 180, 270"):
        read(folder, tmp_path / "other", "--recordings", table)


def test_whole_keeps_the_frame(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mp4", 30, size=(160, 120))
    images = read(tmp_path / "videos", tmp_path / "out", "--whole", "--no-rotate")
    assert cv2.imread(str(tmp_path / "out" / images.path(0))).shape == (64, 85, 3)


def test_moments_become_classes_of_the_nearest_frames(videos, tmp_path, capsys):
    table = tmp_path / "moments.csv"
    stem = NAMES[1].removesuffix(".mp4")
    lines = [f"{NAMES[0]},1.0,ball", f"{NAMES[0]},2.51,cup", f"{NAMES[0]},0.99,cup", f"{stem},2,ball", f"{stem},99,cup"]
    table.write_text("\n".join(["file,seconds,class", *lines]))
    images = read(videos, tmp_path / "out", "--moments", table)
    assert images.classes == ["ball", "cup"] and images.counts == [2, 2]
    found = {images.path(i): images.source(i) for i in range(len(images))}
    wanted = {"S_20130417_0600_01_0000": 1.0, "S_20130720_0903_02_0000": 2.0}
    for name, source in found.items():
        assert number(tmp_path / "out" / name) == source.frame
        if name.startswith("ball/"):
            assert source.second == pytest.approx(wanted[os.path.splitext(name)[0].removeprefix("ball/")], abs=0.06)
    assert [source.frame for name, source in found.items() if name.startswith("cup/")] == [30, 75]
    assert f"left out: {stem}.mkv: it ends at " in capsys.readouterr().out
    table.write_text("file,seconds\nnobody.mp4,3\n")
    with pytest.raises(UserError, match="--moments names nobody.mp4, which is not there"):
        read(videos, tmp_path / "other", "--moments", table)


@pytest.mark.parametrize(
    "text, message",
    [
        ("file\nv.mp4", "has no column 'seconds'"),
        ("file,seconds\nv.mp4,noon", "line 2: seconds is noon, not a number"),
        ("file,seconds\nv.mp4,nan", "line 2: the moment needs a number of seconds"),
        ("file,seconds,class\nv.mp4,1,../x", "line 2: ../x cannot be the name of a class folder"),
        ("file,seconds", "has no rows"),
    ],
)
def test_a_table_of_moments_with_a_mistake_is_one_line(tmp_path, text, message):
    (tmp_path / "moments.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path, tmp_path / "out", "--moments", tmp_path / "moments.csv")


def test_a_planned_folder_of_moments_is_finished_later(videos, tmp_path):
    (tmp_path / "moments.csv").write_text(f"file,seconds,class\n{NAMES[0]},1,a\n{NAMES[0]},2,b\n")
    run(videos, tmp_path / "out", "--size", 64, "--moments", tmp_path / "moments.csv", "--plan")
    images = read(videos, tmp_path / "out", "--moments", tmp_path / "moments.csv")
    assert [number(tmp_path / "out" / images.path(i)) for i in range(2)] == [30, 60]
