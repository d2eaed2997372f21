"""Films of a feature: the published colors, clips from folders and videos of any shape, and mistakes."""

import json
import os

import av
import cv2
import numpy as np
import pytest
import torch

import feature_animation as script
import read_saycam
from moco import files
from moco.analysis import clip, film
from moco.cli import UserError
from moco.data.frame_folder import FrameFolder
from moco.networks import layers, opening
from tests.support import golden
from tests.support.videos import write_video

CPU = torch.device("cpu")


def animate(data, save_dir, network, *words):
    """Run the script on small images; the frames of its film, (n, H, W, 3), and its frames per second."""
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
    trunk, images = layers.spatial_trunk(golden.model()), open_clip(golden.IMAGES, 224)
    clip_maps = clip.ClipMaps(images, script.feature_map(trunk, int(expected["feature_idx"])), 900, CPU)
    assert clip_maps.maps.shape == (48, 7, 7)
    large = np.stack([clip.upsample(small, 224, 224) for small in clip_maps.maps[::6]])
    span = clip_maps.high - clip_maps.low
    np.testing.assert_allclose(blocks(large)[..., 0], expected["feature_map"], atol=2e-3 * span)
    shown = blocks(np.stack(list(overlays(images, clip_maps))[::6])).transpose(0, 3, 1, 2)
    assert np.abs(shown - expected["feature_overlay"].astype(np.float32)).max() < 1.5


def test_a_film_of_a_folder_in_order(frames, tmp_path, network):
    images, rate = animate(frames, tmp_path, network, "--side-by-side", "--range", 0, 1e9, "--fps", 8)
    assert (tmp_path / "intphys_feature_animation_1.mp4").exists()
    assert len(images) == 24 and rate == 8
    left, right = images[:, 30:60, 10:60].mean((1, 2)), images[:, 30:60, 80:125].mean((1, 2))
    assert left.argmax(1).tolist() == [2] * 8 + [1] * 8 + [0] * 8  # OpenCV wrote blue first
    assert (right[:, 2] > left[:, 2] / 2 + 30).all()  # in this range all is at the blue end


@pytest.mark.parametrize("ending", [".webm", ".gif"])
def test_the_name_gives_the_format_and_frames_the_length(frames, tmp_path, network, ending):
    save_dir = tmp_path / "new" / "folder"
    images, _ = animate(frames, save_dir, network, "--frames", 5, "--name", f"film{ending}", "--batch-size", 2)
    assert len(images) == 5
    assert sorted(os.listdir(save_dir)) == ["args.json", f"film{ending}"]


def test_the_batch_size_does_not_matter(frames, network):
    trunk = layers.spatial_trunk(opening.open_model(network).network.eval())
    several = [clip.ClipMaps(open_clip(frames), script.feature_map(trunk, 5), size, CPU) for size in (7, 900)]
    np.testing.assert_allclose(several[0].maps, several[1].maps, atol=1e-5)
    np.testing.assert_allclose([several[0].low, several[0].high], [several[1].low, several[1].high], atol=1e-5)
    assert several[0].brightest.tolist() == several[1].brightest.tolist()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 39)])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_clip_of_a_video_has_the_images_of_read_saycam(tmp_path, size, rotate):
    (tmp_path / "videos").mkdir()
    pixels = "yuv420p" if size[1] % 2 == 0 else "yuv444p"
    video = write_video(tmp_path / "videos" / "a.mp4", 40, size=size, pixels=pixels)
    words = [] if rotate else ["--no-rotate"]
    read_saycam.main([str(tmp_path / "videos"), "--save-dir", str(tmp_path / "frames"), "--size", "64", *words])
    written = list(open_clip(tmp_path / "frames"))
    direct = open_clip(video, rotate=rotate)
    assert len(direct) == len(written) == 7
    for from_video, from_folder in zip(direct, written, strict=True):
        assert np.abs(from_video.astype(int) - from_folder).mean() < 3  # JPEG
    assert len(list(open_clip(video, limit=3))) == 3


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 101), (201, 150)])
def test_images_keep_their_aspect_ratio(tmp_path, network, height, width):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((height, width, 3), 60 * i, np.uint8))
    (image, *_) = list(open_clip(folder))
    scale = 64 / min(height, width)
    assert image.shape == (int(height * scale + 1e-9), int(width * scale + 1e-9), 3)
    images, _ = animate(folder, tmp_path / "out", network)
    assert len(images) == 3 and images.shape[1] >= image.shape[0] and images.shape[2] >= image.shape[1]


def test_images_of_other_shapes_are_resized_to_cover_that_of_the_first(tmp_path):
    for i, shape in enumerate([(64, 80), (90, 64), (200, 300)]):
        image = np.zeros((*shape, 3), np.uint8)
        image[shape[0] // 2 :] = 255
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    images = np.stack(list(open_clip(tmp_path)))
    assert images.shape == (3, 64, 80, 3)
    assert (images[:, :28] < 20).all() and (images[:, 36:] > 235).all()


def test_a_bad_image_is_reported_once_and_left_out(frames, tmp_path, network, capsys):
    bad = FrameFolder(frames).path(3)
    bad.write_bytes(b"no image")
    images, _ = animate(frames, tmp_path / "out", network)
    assert len(images) == 23
    assert capsys.readouterr().out.count(str(bad)) == 1


def test_nothing_to_read_is_an_error_that_leaves_nothing(tmp_path, network):
    (tmp_path / "frames").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for data, reason in (("frames", "has no images"), ("a.mp4", "cannot read the video"), ("b", "no file or folder")):
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


def test_mistakes_are_reported_before_any_work(frames, tmp_path, network):
    with pytest.raises(UserError, match="ShuffleNetV2 has no last spatial maps"):
        animate(frames, tmp_path / "out", "random", "--model", "shufflenet_v2_x0_5")
    with pytest.raises(UserError, match="film.avi does not end in .mp4, .webm, .gif"):
        animate(frames, tmp_path / "out", network, "--name", "film.avi")
    with pytest.raises(UserError, match="--range 2.0 1.0: give two finite numbers, the first below the second"):
        animate(frames, tmp_path / "out", network, "--range", 2, 1)
    for limits in (("nan", 1), (0, "inf"), (1, 1)):
        with pytest.raises(UserError, match="give two finite numbers"):
            script.main([str(frames), "--range", *map(str, limits)])
    with pytest.raises(UserError, match="is too long for a file name"):
        animate(frames, tmp_path / "out", network, "--name", "n" * 240 + ".mp4")
    with pytest.raises(UserError, match="films/a.mp4 is not a plain file name; give the folder with --save-dir"):
        animate(frames, tmp_path / "out", network, "--name", "films/a.mp4")
    with pytest.raises(UserError, match="is inside the data folder"):
        animate(frames, frames / "films", network)
    with pytest.raises(UserError, match="outputs, not 7"):
        animate(frames, tmp_path / "out", network, "--n_out", 7)


def test_an_existing_film_is_not_overwritten_by_default(frames, tmp_path, network):
    out = tmp_path / "out"
    out.mkdir()
    (out / "intphys_feature_animation_1.mp4").write_bytes(b"precious")
    with pytest.raises(UserError, match="intphys_feature_animation_1.mp4 exists; give --overwrite"):
        animate(frames, out, network)
    assert (out / "intphys_feature_animation_1.mp4").read_bytes() == b"precious"
    images, _ = animate(frames, out, network, "--overwrite", "--frames", 2)
    assert len(images) == 2


def test_the_film_of_a_constant_feature_has_one_color(frames, tmp_path, network, monkeypatch, capsys):
    monkeypatch.setattr(script, "feature_map", lambda trunk, feature: lambda images: images[:, 0, ::32, ::32] * 0)
    images, _ = animate(frames, tmp_path / "out", network)
    assert len(images) == 24
    assert "feature 1 is constant over this clip" in capsys.readouterr().out


def test_maps_that_are_not_finite_are_an_error(frames, tmp_path):
    with pytest.raises(UserError, match="the maps of .* are not finite"):
        clip.ClipMaps(open_clip(frames), lambda images: images[:, 0, ::32, ::32] / 0, 8, CPU)


@pytest.mark.parametrize("fps", ["inf", "nan", "0", "1e9"])
def test_the_frame_rate_is_a_number_that_a_film_can_have(frames, tmp_path, network, fps, capsys):
    with pytest.raises(SystemExit) as error:
        animate(frames, tmp_path / "out", network, "--fps", fps)
    assert error.value.code == 2 and f"{fps} is not from 0.01 to 1000" in capsys.readouterr().err


@pytest.mark.parametrize("ending", list(film.CODECS))
@pytest.mark.parametrize("fps", [0.01, 1000])
def test_the_slowest_and_the_fastest_film_can_be_written(tmp_path, ending, fps):
    film.write(tmp_path / f"film{ending}", [np.zeros((32, 32, 3), np.uint8)] * 3, fps)
    with av.open(str(tmp_path / f"film{ending}")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_every_run_records_flags_and_checkpoint(frames, tmp_path, network, capsys):
    animate(frames, tmp_path / "out", network, "--frames", 2, "--name", "a.gif")
    record, digest = json.loads((tmp_path / "out" / "args.json").read_text()), files.sha256(network)
    assert record["name"] == "a.gif" and record["checkpoints"] == {str(network): digest}
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("model: resnet18 ") and f"{network} (SHA-256 {digest[:12]}" in first_line


def test_maps_are_computed_in_float32(frames):
    seen = []

    def network(images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return images[:, 0, ::32, ::32]

    clip.ClipMaps(open_clip(frames), network, 8, CPU)
    assert torch.backends.cudnn.allow_tf32 and seen and not any(seen)


def test_a_path_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder .*room.mp4; give a video or a folder of images"):
        clip.Clip(tmp_path / "room.mp4", clip.Crop(64), 5)
