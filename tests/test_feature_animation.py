"""Films of a feature: the published colors, clips from folders and videos of any shape, and clear mistakes."""

import os

import av
import cv2
import numpy as np
import pytest
import torch

import feature_animation as script
import read_saycam
from moco import checkpoint, models
from moco.analysis import clip, film
from moco.cli import UserError
from moco.data import loader
from tests.support import golden
from tests.support.videos import write_video

CPU = torch.device("cpu")


def animate(data, save_dir, network, *words):
    """Run the script on small images; the pictures of its film, (n, H, W, 3), and its pictures a second."""
    flags = ["--model-path", network, "--image-size", 64, "--device", "cpu", "--workers", 2, "--save-dir", save_dir]
    script.main([str(word) for word in (data, *flags, *words)])
    (path,) = [path for path in save_dir.iterdir() if path.suffix in film.CODECS]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


def open_clip(data, size=64, limit=100, fps=5, shift=16, rotate=True):
    return clip.Clip(data, clip.Crop(size, shift, rotate), limit, fps, workers=2)


def overlays(images, clip_maps):
    """The images of the film without title and color bar."""
    brightness = film.brightness(clip_maps.darkest, clip_maps.brightest, clip.MEAN, clip.STD)
    for image, small in zip(images, clip_maps.maps, strict=True):
        indices = film.color_indices(clip.upsample(small, *image.shape[:2]), clip_maps.low, clip_maps.high)
        yield film.overlay(image, indices, brightness)


def blocks(images):
    """Means over blocks of 8x8 pixels: (n, 28, 28, ...) of (n, 224, 224, ...)."""
    return images.reshape(len(images), 28, 8, 28, 8, -1).mean((2, 4))


def test_maps_and_colors_are_the_published_ones():
    expected = np.load(golden.DATA / "inside.npz")
    trunk, pictures = models.spatial_trunk(golden.model()), open_clip(golden.IMAGES, 224)
    look = clip.ClipMaps(pictures, script.feature_map(trunk, int(expected["feature_idx"])), 900, CPU)
    assert look.maps.shape == (48, 7, 7)
    large = np.stack([clip.upsample(small, 224, 224) for small in look.maps[::6]])
    span = look.high - look.low
    np.testing.assert_allclose(blocks(large)[..., 0], expected["feature_map"], atol=2e-3 * span)
    shown = blocks(np.stack(list(overlays(pictures, look))[::6])).transpose(0, 3, 1, 2)
    assert np.abs(shown - expected["feature_overlay"].astype(np.float32)).max() < 1.5


def test_a_film_of_a_folder_in_order(frames, tmp_path, network):
    pictures, rate = animate(frames, tmp_path, network, "--side-by-side", "--range", 0, 1e9, "--fps", 8)
    assert (tmp_path / "intphys_feature_animation_1.mp4").exists()
    assert len(pictures) == 24 and rate == 8
    left, right = pictures[:, 30:60, 10:60].mean((1, 2)), pictures[:, 30:60, 80:125].mean((1, 2))
    assert left.argmax(1).tolist() == [2] * 8 + [1] * 8 + [0] * 8  # OpenCV wrote blue first
    assert (right[:, 2] > left[:, 2] / 2 + 30).all()  # under such a range all is at the blue end


@pytest.mark.parametrize("ending", [".webm", ".gif"])
def test_the_name_gives_the_format_and_frames_the_length(frames, tmp_path, network, ending):
    save_dir = tmp_path / "new" / "folder"
    pictures, _ = animate(frames, save_dir, network, "--frames", 5, "--name", f"film{ending}", "--batch-size", 2)
    assert len(pictures) == 5
    assert sorted(os.listdir(save_dir)) == ["args.json", f"film{ending}"]


def test_batches_do_not_show(frames, network):
    trunk = models.spatial_trunk(checkpoint.open_model(network).network.eval())
    looks = [clip.ClipMaps(open_clip(frames), script.feature_map(trunk, 5), size, CPU) for size in (7, 900)]
    np.testing.assert_allclose(looks[0].maps, looks[1].maps, atol=1e-5)
    np.testing.assert_allclose([looks[0].low, looks[0].high], [looks[1].low, looks[1].high], atol=1e-5)
    assert looks[0].brightest.tolist() == looks[1].brightest.tolist()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 39)])
@pytest.mark.parametrize("rotate", [True, False])
def test_a_clip_of_a_video_has_the_pictures_of_the_reader(tmp_path, size, rotate):
    (tmp_path / "videos").mkdir()
    pixels = "yuv420p" if size[1] % 2 == 0 else "yuv444p"
    video = write_video(tmp_path / "videos" / "a.mp4", 40, size=size, pixels=pixels)
    words = [] if rotate else ["--no-rotate"]
    read_saycam.main([str(tmp_path / "videos"), "--save-dir", str(tmp_path / "frames"), "--size", "64", *words])
    written = list(open_clip(tmp_path / "frames"))
    direct = open_clip(video, rotate=rotate)
    assert len(direct) == len(written) == 7
    for picture, image in zip(direct, written, strict=True):
        assert np.abs(picture.astype(int) - image).mean() < 3  # JPEG
    assert len(list(open_clip(video, limit=3))) == 3


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 101), (201, 150)])
def test_pictures_keep_their_shape(tmp_path, network, height, width):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((height, width, 3), 60 * i, np.uint8))
    (picture, *_) = list(open_clip(folder))
    scale = 64 / min(height, width)
    assert picture.shape == (int(height * scale + 1e-9), int(width * scale + 1e-9), 3)
    pictures, _ = animate(folder, tmp_path / "out", network)
    assert len(pictures) == 3 and pictures.shape[1] >= picture.shape[0] and pictures.shape[2] >= picture.shape[1]


def test_pictures_of_other_shapes_are_made_to_cover_that_of_the_first(tmp_path):
    for i, shape in enumerate([(64, 80), (90, 64), (200, 300)]):
        image = np.zeros((*shape, 3), np.uint8)
        image[shape[0] // 2 :] = 255
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    pictures = np.stack(list(open_clip(tmp_path)))
    assert pictures.shape == (3, 64, 80, 3)
    assert (pictures[:, :28] < 20).all() and (pictures[:, 36:] > 235).all()


def test_a_bad_image_is_named_once_and_left_out(frames, tmp_path, network, capsys):
    bad = loader.FrameFolder(frames).path(3)
    bad.write_bytes(b"no image")
    pictures, _ = animate(frames, tmp_path / "out", network)
    assert len(pictures) == 23
    assert capsys.readouterr().out.count(str(bad)) == 1


def test_nothing_to_read_is_an_error_that_leaves_nothing(tmp_path, network):
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for data, reason in (("frames", "has no images"), ("a.mp4", "cannot read the video"), ("b", "no folder")):
        with pytest.raises(UserError, match=reason):
            animate(tmp_path / data, tmp_path / "out", network)
    (tmp_path / "frames" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 frames of .*frames can be read"):
        animate(tmp_path / "frames", tmp_path / "out", network)
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("feature", [-1, 512])
def test_a_feature_out_of_range_is_an_error(frames, tmp_path, network, feature):
    with pytest.raises(UserError, match=f"--feature-idx {feature}: the model has 512 features, 0 to 511"):
        animate(frames, tmp_path / "out", network, "--feature-idx", feature)


def test_mistakes_are_told_before_any_work(frames, tmp_path, network):
    with pytest.raises(UserError, match="ShuffleNetV2 has no last spatial maps"):
        animate(frames, tmp_path / "out", "random", "--model", "shufflenet_v2_x0_5")
    with pytest.raises(UserError, match="film.avi does not end in .mp4, .webm, .gif"):
        animate(frames, tmp_path / "out", network, "--name", "film.avi")
    with pytest.raises(UserError, match="--range 2.0 1.0: give two finite numbers, the first below the second"):
        animate(frames, tmp_path / "out", network, "--range", 2, 1)
    with pytest.raises(UserError, match="outputs, not 7"):
        animate(frames, tmp_path / "out", network, "--n_out", 7)


def test_an_existing_film_is_kept_unless_overwrite_is_given(frames, tmp_path, network):
    out = tmp_path / "out"
    out.mkdir()
    (out / "intphys_feature_animation_1.mp4").write_bytes(b"precious")
    with pytest.raises(UserError, match="intphys_feature_animation_1.mp4 exists; give --overwrite"):
        animate(frames, out, network)
    assert (out / "intphys_feature_animation_1.mp4").read_bytes() == b"precious"
    pictures, _ = animate(frames, out, network, "--overwrite", "--frames", 2)
    assert len(pictures) == 2


def test_a_feature_that_is_the_same_everywhere_has_one_color(frames, tmp_path, network, monkeypatch, capsys):
    monkeypatch.setattr(script, "feature_map", lambda trunk, feature: lambda images: images[:, 0, ::32, ::32] * 0)
    pictures, _ = animate(frames, tmp_path / "out", network)
    assert len(pictures) == 24
    assert "feature 1 is constant over this clip" in capsys.readouterr().out


def test_maps_that_are_not_finite_are_an_error(frames, tmp_path):
    with pytest.raises(UserError, match="the maps of .* are not finite"):
        clip.ClipMaps(open_clip(frames), lambda images: images[:, 0, ::32, ::32] / 0, 8, CPU)
