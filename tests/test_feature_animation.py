"""Films of a feature: the published colors, the frames of a folder in order, and mistakes."""

import os

import av
import cv2
import numpy as np
import pytest
import torch

import feature_animation as script
from moco.analysis import film
from moco.cli import UserError
from moco.data import recordings
from moco.data.folders import FrameFolder
from moco.networks import layers
from tests.support import golden

CPU = torch.device("cpu")


def animate(data, save_dir, network, *words):
    """Run the script on small images; the frames of its film, (n, H, W, 3), and its frames per second."""
    flags = ["--model-path", network, "--image-size", 64, "--device", "cpu", "--workers", 2, "--save-dir", save_dir]
    script.main([str(word) for word in (data, *flags, *words)])
    (path,) = save_dir.glob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


def check_golden(network, key):
    """Compare every sixth map and overlay of a network with the golden ones, by means over blocks of 8x8 pixels."""
    expected = np.load(golden.DATA / "inside.npz")
    images, maps, _ = film.images_and_maps(network, FrameFolder(golden.IMAGES), range(48), 224, CPU)
    heatmaps = film.upsample(maps, (224, 224))
    shown = film.overlay(images, heatmaps)
    heatmaps, shown = (each[::6].reshape(8, 28, 8, 28, 8, -1).mean((2, 4)) for each in (heatmaps, shown))
    np.testing.assert_allclose(heatmaps[..., 0], expected[f"{key}_map"], atol=2e-3 * np.ptp(heatmaps))
    assert np.abs(shown.transpose(0, 3, 1, 2) - expected[f"{key}_overlay"].astype(np.float32)).max() < 1.5


def test_maps_and_colors_are_the_published_ones():
    feature = int(np.load(golden.DATA / "inside.npz")["feature_idx"])
    check_golden(script.feature_map(layers.spatial_trunk(golden.model()), feature), "feature")


def test_a_film_of_a_folder_in_order(frames, tmp_path, network):
    images, rate = animate(frames, tmp_path, network, "--side-by-side", "--range", 0, 1e9, "--fps", 8)
    assert (tmp_path / "intphys_feature_animation_1.mp4").exists()
    assert len(images) == 24 and rate == 8
    left, right = images[:, 100:200, 20:220].mean((1, 2)), images[:, 100:200, 300:500].mean((1, 2))
    assert left.argmax(1).tolist() == [2] * 8 + [1] * 8 + [0] * 8  # OpenCV wrote blue first
    assert (right[:, 2] > left[:, 2] / 2 + 30).all()  # in this range all is at the blue end


def test_frames_without_a_manifest_are_in_the_natural_order_of_their_names(tmp_path, network):
    for k in range(1, 13):
        path = tmp_path / "frames" / f"frame_{k}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((40, 40, 3), 20 * k, np.uint8))
    images, _ = animate(tmp_path / "frames", tmp_path / "film", network, "--side-by-side")
    brightness = images[:, 100:200, 20:220].mean((1, 2, 3))
    assert len(images) == 12 and (np.diff(brightness) > 10).all()


def test_frames_give_the_length_of_a_film_and_name_its_name(frames, tmp_path, network):
    images, _ = animate(frames, tmp_path / "out", network, "--frames", 5, "--name", "a.mp4", "--batch-size", 2)
    assert len(images) == 5 and sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "args.json"]


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


def test_nothing_to_read_is_an_error_that_leaves_nothing(tmp_path, network):
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"a video")
    for data, reason in (("frames", "has no images"), ("a.mp4", "first: read_saycam.py"), ("b", "no folder")):
        with pytest.raises(UserError, match=reason):
            animate(tmp_path / data, tmp_path / "out", network)
    (tmp_path / "frames" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 images of .*frames can be read"):
        animate(tmp_path / "frames", tmp_path / "out", network)
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("feature", [-1, 512])
def test_a_feature_out_of_range_is_an_error(frames, tmp_path, network, feature):
    with pytest.raises(UserError, match=f"--feature-idx {feature}: the model has 512 features, 0 to 511"):
        animate(frames, tmp_path / "out", network, "--feature-idx", feature)


def test_mistakes_are_reported_before_any_work(frames, tmp_path, network):
    with pytest.raises(UserError, match="ShuffleNetV2 has no last spatial maps"):
        animate(frames, tmp_path / "out", "random", "--model", "shufflenet_v2_x0_5")
    for limits in ((2, 1), (1, 1), ("nan", 1)):
        with pytest.raises(UserError, match=f"--range .* {limits[1]}.*: give two numbers, the first below the second"):
            animate(frames, tmp_path / "out", network, "--range", *limits)
    for name in ("film.avi", "film", "film.gif", "films/a.mp4"):
        with pytest.raises(UserError, match=f"--name {name}: give a plain file name that ends in .mp4"):
            animate(frames, tmp_path / "out", network, "--name", name)
    with pytest.raises(UserError, match="outputs, not 7"):
        animate(frames, tmp_path / "out", network, "--n_out", 7)


def test_the_film_of_a_constant_feature_has_one_color(frames, tmp_path, network, monkeypatch, capsys):
    monkeypatch.setattr(script, "feature_map", lambda trunk, feature: lambda images: images[:, 0, ::32, ::32] * 0)
    images, _ = animate(frames, tmp_path / "out", network)
    assert len(images) == 24
    assert "the maps are constant" in capsys.readouterr().out


@pytest.mark.parametrize("fps", ["inf", "nan", "0", "1e9"])
def test_the_frame_rate_is_a_number_that_a_film_can_have(frames, tmp_path, network, fps, capsys):
    with pytest.raises(SystemExit) as error:
        animate(frames, tmp_path / "out", network, "--fps", fps)
    assert error.value.code == 2 and f"{fps} is not from 0.01 to 1000" in capsys.readouterr().err
