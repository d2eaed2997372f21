"""The synthetic data set of the demo: reproducible, like head-camera videos, with labeled toys that are in no video."""

import json
import re
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from moco.cli import UserError
from moco.data import recordings
from moco.videos import extract
from scripts import make_demo_videos as world
from tests.support.videos import tree

TINY = ["--videos=2", "--episodes=2", "--seconds=0.5", "--toys=2", "--exemplars=2", "--views=4", "--workers=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.main([*TINY, "--save-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder / "world.json").read_text())


def decoded(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def test_the_seed_determines_every_byte(folder, tmp_path):
    world.main([*TINY, "--workers", "1", "--save-dir", str(tmp_path / "again")])
    assert tree(folder) == tree(tmp_path / "again")
    one, other = (world.toy(seed, "cup", 1)[0] for seed in (0, 1))
    assert one.shape != other.shape or not np.allclose(one, other)
    assert not np.array_equal(world.room(0, 0), world.room(1, 0))


def test_videos_have_the_format_of_a_head_camera(folder):
    paths = sorted((folder / "videos").iterdir())
    assert [path.name for path in paths] == ["A_20130417_0600_01.mp4", "S_20130717_0900_01.mp4"]
    for path in paths:
        with av.open(str(path)) as container:
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 640, 480)
            assert stream.average_rate == Fraction(30000, 1001)
        assert len(decoded(path)) == 2 * 15


@pytest.mark.parametrize("n", [1, 4, 9])
def test_videos_are_named_after_children_and_ages(n):
    names = [world.recording_name(k, n) for k in range(n)]
    known = [recordings.from_name(name) for name in names]
    assert names == sorted(set(names)) and all(recording.date for recording in known)
    assert {recording.child for recording in known} == set("AS"[: min(n, 2)])


def test_videos_are_upside_down(folder):
    rng, t = np.random.default_rng([0, 3, 0]), np.arange(0, 15, world.REPEATS) / float(world.RATE)
    subject = json.loads((folder / "world.json").read_text())["episodes"][0]["toy"]
    _, images = world.make_scene(rng, 0, t, tuple(subject), range(world.ROOMS), range(3, 5))
    upright = next(images)[:400].astype(int)  # above the time stamp
    filmed = decoded(folder / "videos" / "A_20130417_0600_01.mp4")[0].astype(int)
    turned = filmed[::-1, ::-1]
    assert np.abs(turned[:400] - upright).mean() < 8 < np.abs(filmed[:400] - upright).mean()


def test_the_time_stamp_is_upright_and_outside_the_crop(monkeypatch, tmp_path):
    stamped = []
    monkeypatch.setattr(world.cv2, "putText", lambda frame, text, *rest: stamped.append((frame, text)))
    monkeypatch.setattr(world, "REPEATS", 15)
    world.film(tmp_path / "bare.mp4", 0, [(0, ("cup", 3))], range(2), range(3, 5), 1.5)
    assert [text for _, text in stamped] == ["00:00", "00:00", "00:01"]
    monkeypatch.undo()
    bare = stamped[0][0]
    marked = bare.copy()
    cv2.putText(marked, "00:00", (20, world.HEIGHT - 18), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
    assert (marked != bare).any()
    assert np.array_equal(extract.crop(marked), extract.crop(bare))


def test_labeled_images_are_cropped_as_frames_are():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    difference = extract.crop(cv2.flip(image, -1)).astype(int) - world.crop(image)
    assert np.abs(difference).max() <= 1  # rounding


def test_labeled_images_have_names_like_those_of_toybox(folder):
    labeled = sorted((folder / "labeled").rglob("*.*"))
    assert len(labeled) == len(world.CATEGORIES) * 2 * 4
    for path in labeled:
        name = re.fullmatch(r"([a-z]+)_(\d\d)_(rotate|move|grow)_\d{4}\.jpeg", path.name)
        assert name[1] == path.parent.name in world.CATEGORIES
        assert name[2] in ("01", "02")
        assert cv2.imread(str(path)).shape == (224, 224, 3)


def test_no_labeled_toy_or_room_is_in_a_video(summary):
    def content(entries):
        toys = {tuple(toy) for entry in entries for toy in [entry["toy"], *entry["others"]]}
        return toys, {entry["room"] for entry in entries}

    filmed, labeled = content(summary["episodes"]), content(summary["labeled"])
    assert len(summary["episodes"]) == 4 and len(summary["labeled"]) == 64
    assert not filmed[0] & labeled[0] and not filmed[1] & labeled[1]
    assert {category for category, _ in labeled[0]} == set(world.CATEGORIES)


def test_every_category_is_filmed_equally_often():
    plan = world.plan_episodes(np.random.default_rng(0), range(11, 17), 4 * 16)
    assert [number for number, _ in plan] == list(range(64))
    categories = [category for _, (category, _) in plan]
    assert {categories.count(category) for category in world.CATEGORIES} == {8}
    assert {toy for _, (_, toy) in plan} == set(range(11, 17))


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_toys_are_drawn_within_their_size_and_turn(category):
    drawn = []
    for yaw in (0.3, 1.4):
        image = np.zeros((200, 200, 3), np.uint8)
        turn, lamp = world.rotation(yaw, 0.3, 0), np.array([0, -1, -1])
        world.draw(image, world.toy(0, category, 1), (100, 100), 50, turn, lamp, light=1)
        rows, columns = np.nonzero(image.any(-1))
        assert len(rows) > 1000 and max(np.ptp(rows), np.ptp(columns)) < 2 * 50 * 1.75
        drawn.append(image)
    assert (drawn[0] != drawn[1]).any()


def test_an_existing_world_is_not_overwritten(folder):
    with pytest.raises(UserError, match="world.json"):
        world.main([*TINY, "--save-dir", str(folder)])
