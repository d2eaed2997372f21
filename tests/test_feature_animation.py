"""Films of a feature and of a class: the published colors, the frames of a folder in order, and mistakes."""

import os

import av
import cv2
import numpy as np
import pytest
import torch

import feature_animation
import feature_animation_class
from moco.analysis import film
from moco.cli import UserError
from moco.data import recordings
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers
from tests.support import golden
from tests.support.inputs import run_small


def animate(*arguments, script=feature_animation):
    """Run a script, see run_small; the frames of its film, (n, H, W, 3), and its frames per second."""
    run_small(script, *arguments)
    (path,) = arguments[1].glob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


@pytest.mark.parametrize("kind", ["feature", "class"])
def test_maps_and_colors_are_the_published_ones(kind):
    """Of every sixth image, by means over blocks of 8x8 pixels."""
    expected, network = np.load(golden.DATA / "inside.npz"), golden.model()
    trunk, number = layers.spatial_trunk(network), int(expected[f"{kind}_idx"])
    if kind == "feature":
        function = feature_animation.feature_map(trunk, number)
    else:
        function = feature_animation_class.class_map(trunk, architectures.head(network).weight[number])
    images, maps, _ = film.images_and_maps(function, FrameFolder(golden.IMAGES), range(48), 224, torch.device("cpu"))
    heatmaps = film.upsample(maps, (224, 224))
    shown = film.overlay(images, heatmaps)
    heatmaps, shown = (each[::6].reshape(8, 28, 8, 28, 8, -1).mean((2, 4)) for each in (heatmaps, shown))
    np.testing.assert_allclose(heatmaps[..., 0], expected[f"{kind}_map"], atol=2e-3 * np.ptp(heatmaps))
    assert np.abs(shown.transpose(0, 3, 1, 2) - expected[f"{kind}_overlay"].astype(np.float32)).max() < 1.5


def test_a_film_of_a_folder_in_the_natural_order_of_its_names(tmp_path, network):
    (tmp_path / "frames").mkdir()
    for k in range(1, 13):
        cv2.imwrite(str(tmp_path / "frames" / f"frame_{k}.png"), np.full((40, 40, 3), 18 * k, np.uint8))
    words = ["--side-by-side", "--range", 0, 1e9, "--fps", 8, "--frames", 11, "--name", "a.mp4", "--batch-size", 4]
    images, rate = animate(tmp_path / "frames", tmp_path / "out", network, *words)
    assert len(images) == 11 and rate == 8 and sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "args.json"]
    left, right = images[:, 100:200, 20:220].mean((1, 2)), images[:, 100:200, 300:500].mean((1, 2))
    assert (np.diff(left.mean(1)) > 10).all()
    assert (right[:, 2] > left[:, 2] / 2 + 30).all()  # in this range all is at the blue end


def test_a_film_of_sampled_frames_plays_at_their_rate_and_says_where_they_are_from(
    frames, tmp_path, network, monkeypatch
):
    images = FrameFolder(frames)
    assert film.titles(images, [0, 1], "feature 1") == ["feature 1"] * 2  # no manifest
    monkeypatch.setattr(
        FrameFolder, "source", lambda self, i: recordings.Source("a.mp4", 15 * i, i / 2, recordings.Recording())
    )
    assert film.titles(images, [0, 7], "cat")[1] == "cat: a.mp4, frame 105, 3.500 s"
    assert animate(frames, tmp_path / "film", network, "--frames", 4)[1] == 2
    assert animate(frames, tmp_path / "film", network, "--frames", 4, "--fps", 30, "--overwrite")[1] == 30


def test_a_film_of_a_class_has_its_name_as_title(frames, tmp_path, network, monkeypatch):
    drawn, original = [], film.film_frames
    monkeypatch.setattr(film, "film_frames", lambda *args: drawn.extend(args[1]) or original(*args))
    animate(frames, tmp_path / "out", network, "--class-idx", 2, script=feature_animation_class)
    assert drawn == ["class_0002"] * 24


@pytest.mark.parametrize("words, message", [
    ("--feature-idx -1", "--feature-idx -1: the model has 512 features, 0 to 511"),
    ("--feature-idx 512", "--feature-idx 512: the model has 512 features, 0 to 511"),
    ("--range 2 1", "--range 2.0 1.0: give two numbers, the first below the second"),
    ("--range 1 1", "--range 1.0 1.0: give two numbers"),
    ("--range nan 1", "--range nan 1.0: give two numbers"),
    ("--name film", "--name film: give a plain file name that ends in .mp4"),
    ("--name film.gif", "--name film.gif: give a plain file name"),
    ("--name films/a.mp4", "--name films/a.mp4: give a plain file name"),
    ("", "none of the 24 images of .*frames can be read"),
])  # fmt: skip
def test_mistakes_are_one_line_before_any_work_and_leave_nothing(frames, tmp_path, network, words, message):
    for path in frames.rglob("*.jpeg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        animate(frames, tmp_path / "out", network, *words.split())
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("fps", ["inf", "nan", "0", "1e9"])
def test_the_frame_rate_is_a_number_that_a_film_can_have(fps, capsys):
    with pytest.raises(SystemExit) as error:
        feature_animation.parse_args(["frames", "--fps", fps])
    assert error.value.code == 2 and f"{fps} is not from 0.01 to 1000" in capsys.readouterr().err
