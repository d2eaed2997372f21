"""Maps over images of any shape, their published colors, and films of them: read back, complete or not there."""

import os
from types import SimpleNamespace

import av
import cv2
import matplotlib
import numpy as np
import pytest
import torch
from PIL import ImageFont
from torch import nn

from moco import plots
from moco.analysis import film
from moco.cli import UserError
from moco.data.folders import FrameFolder

CPU = torch.device("cpu")
SHADES = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128), (250, 250, 20)]


def means(images):
    """A network's maps: the mean of each 32x32 block and channel of images (N, 3, H, W)."""
    return nn.functional.avg_pool2d(images, 32)


def write(path, images, heatmaps=None, fps=5):
    heatmaps = np.zeros(images.shape[:3], np.float32) if heatmaps is None else heatmaps
    film.write(path, images, heatmaps, [f"frame {i}" for i in range(len(images))], fps, side_by_side=True)


def save_images(folder, *shapes):
    """Images in a folder whose upper half is black and whose lower half is white."""
    for i, shape in enumerate(shapes):
        image = np.zeros((*shape, 3), np.uint8)
        image[shape[0] // 2 :] = 255
        cv2.imwrite(str(folder / f"{i}.png"), image)
    return FrameFolder(folder)


# --- images and maps


@pytest.mark.parametrize(("height", "width"), [(100, 64), (64, 101), (201, 150)])
def test_images_keep_their_aspect_ratio_or_are_center_squares(tmp_path, height, width):
    frames, scale = save_images(tmp_path, (height, width)), 64 / min(height, width)
    images, maps, indices = film.images_and_maps(means, frames, [0], 64, CPU)
    assert images.shape == (1, int(height * scale + 1e-9), int(width * scale + 1e-9), 3)
    assert maps.shape == (1, 3, *(side // 32 for side in images.shape[1:3])) and indices.tolist() == [0]
    square, _, _ = film.images_and_maps(means, frames, [0], 64, CPU, square=True)
    assert square.shape == (1, 64, 64, 3) and (square[:, :28] < 20).all() and (square[:, 36:] > 235).all()


def test_images_of_other_shapes_are_resized_to_cover_that_of_the_first(tmp_path):
    frames = save_images(tmp_path, (64, 80), (90, 64), (200, 300))
    images, _, _ = film.images_and_maps(means, frames, range(3), 64, CPU, workers=2)
    assert images.shape == (3, 64, 80, 3)
    assert (images[:, :28] < 20).all() and (images[:, 36:] > 235).all()


def test_maps_are_those_of_normalized_images_in_order_whatever_the_batch_size(frames):
    folder, seen = FrameFolder(frames), []

    def network(images):
        seen.append((len(images), torch.backends.cudnn.allow_tf32))
        return means(images)

    images, maps, indices = film.images_and_maps(network, folder, [20, 3, 11], 40, CPU, batch_size=2, workers=2)
    assert seen == [(2, False), (1, False)] and torch.backends.cudnn.allow_tf32
    assert indices.tolist() == [20, 3, 11]
    for image, small, i in zip(images, maps, indices, strict=True):
        np.testing.assert_array_equal(image, cv2.imread(str(folder.path(i)))[..., ::-1])
        expected = (image[:32, :32].mean((0, 1)) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(small[:, 0, 0], expected, atol=1e-4)


def test_unreadable_images_are_named_once_and_left_out(frames, capsys):
    folder = FrameFolder(frames)
    for i in (0, 5):
        folder.path(i).write_bytes(b"no image")
    images, maps, indices = film.images_and_maps(means, folder, range(8), 40, CPU)
    assert len(images) == len(maps) == 6 and indices.tolist() == [1, 2, 3, 4, 6, 7]
    printed = capsys.readouterr().out
    assert all(printed.count(f"{folder.path(i)}: not an image; left out") == 1 for i in (0, 5))
    with pytest.raises(UserError, match="none of the 2 images of .*frames can be read"):
        film.images_and_maps(means, folder, [0, 5], 40, CPU)


def test_maps_that_are_not_finite_are_an_error_that_names_the_image(frames):
    folder = FrameFolder(frames)
    with pytest.raises(UserError, match=f"{folder.path(4)} are not finite"):
        film.images_and_maps(lambda images: means(images) / 0, folder, [4, 5], 40, CPU)


@torch.no_grad()
def test_the_mean_of_a_class_activation_map_is_the_logit():
    random = torch.Generator().manual_seed(0)
    last_maps, head = torch.rand(5, 6, 7, 7, generator=random), nn.Linear(6, 3)
    logits = head(last_maps.mean((2, 3)))
    found = film.class_activation_map(last_maps, head.weight[2]).mean((1, 2)) + head.bias[2]
    np.testing.assert_allclose(found, logits[:, 2], atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 128), (70, 100), (110, 128), (96, 140)])  # of the map, smaller, larger
def test_an_upsampled_map_has_the_resolution_of_its_image(shape):
    small = torch.arange(12.0).reshape(1, 3, 4)
    (large,) = film.upsample(small, shape, 32)
    assert large.shape == shape
    np.testing.assert_allclose(large[15:70:32, 15:100:32], small[0, :2, :3], atol=0.3)
    assert (large[96:] == large[95:96]).all() and (large[:, 128:] == large[:, 127:128]).all()


def test_an_attention_mask_is_between_0_and_1_and_one_half_where_the_map_is_0():
    values = np.linspace(-1, 1, 2 * 9 * 9, dtype=np.float32).reshape(2, 9, 9)
    mask = film.attention_mask(values)
    assert mask.min() < 0.01 and mask.max() > 0.99 and ((mask > 0.5) == (values > 0)).all()
    np.testing.assert_allclose(film.attention_mask(3 * values), mask, atol=1e-6)
    assert (film.attention_mask(np.zeros((2, 9, 9), np.float32)) == 0.5).all()


# --- colors


def test_an_overlay_is_the_mean_of_jet_colors_and_rescaled_images():
    random = np.random.default_rng(0)
    images = random.integers(20, 230, (5, 8, 9, 3)).astype(np.uint8)
    heatmaps = random.normal(size=(5, 8, 9)).astype(np.float32)
    normalized = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    rescaled = (normalized - normalized.min()) / np.ptp(normalized)
    for limits in ((None, None), (-0.5, 0.7)):
        low, high = (heatmaps.min(), heatmaps.max()) if limits[0] is None else limits
        jet = matplotlib.colormaps["jet"]((255 * np.clip((heatmaps - low) / (high - low), 0, 1)).astype(int))[..., :3]
        found = film.overlay(images, heatmaps, *limits)
        assert found.dtype == np.uint8 and np.abs(found - (jet + rescaled) * 127.5).max() <= 1.01


def test_an_overlay_of_constant_maps_and_images_is_finite():
    found = film.overlay(np.full((2, 4, 4, 3), 7, np.uint8), np.full((2, 4, 4), 3, np.float32))
    assert (found == found[0, 0, 0]).all() and found[0, 0, 0, 2] >= 63  # the blue end


# --- films


@pytest.mark.parametrize("name, height, width, fps", [
    ("film.mp4", 64, 96, 29.97), ("film.MP4", 63, 97, 0.01), ("film.mp4", 241, 240, 1000)
])  # fmt: skip
def test_a_film_is_read_back_and_plays_in_browsers(tmp_path, name, height, width, fps, capsys):
    """Browsers need the index first."""
    images = np.broadcast_to(np.uint8(SHADES)[:, None, None], (5, height, width, 3))
    write(tmp_path / name, images, fps=fps)
    assert "the maps are constant" in capsys.readouterr().out and os.listdir(tmp_path) == [name]
    data = (tmp_path / name).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        context, rate = stream.codec_context, float(stream.average_rate)
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 1, 1)
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert rate == pytest.approx(fps, rel=1e-4) and len(found) == 5 and found.shape[1] % 2 == found.shape[2] % 2 == 0
    np.testing.assert_allclose(found[:, 50:200, 20:200].mean((1, 2)), SHADES, atol=4)


def test_a_full_disk_is_a_clear_error_that_leaves_nothing(small_disk):
    disk = small_disk("100k")
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3)).astype(np.uint8)
    with pytest.raises(UserError, match=r"cannot write .*film\.mp4: No space left on device"):
        write(disk / "film.mp4", noise)
    assert not os.listdir(disk)


def test_a_frame_shows_images_side_by_side_with_title_and_color_bar():
    columns = [np.broadcast_to(np.uint8(shade), (1, 90, 120, 3)) for shade in SHADES[:2]]
    (frame,) = film.film_frames(columns, ["feature 3"], -1, 2)
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    for shade in SHADES[:2]:
        assert (frame == shade).all(-1).sum() == 180 * 240  # enlarged to 224 pixels or more
    assert (frame[:20] < 100).any()  # the title
    bar = frame[:, 2 * 240 + 3 * 4 + 4]
    colors = bar[~(bar == 255).all(-1)]
    assert len(colors) == 180
    assert np.abs(colors[0] - 255 * plots.jet()[-1]).max() <= 1 and np.abs(colors[-1] - 255 * plots.jet()[0]).max() <= 1


def test_each_frame_has_its_whole_title_in_latin_letters_or_codes():
    image = np.zeros((5, 64, 64, 3), np.uint8)
    text, font = f"feature 276: S_20130417_0600_01.mp4, 6.000 s {90 * 'a'}", ImageFont.load_default(12)
    lines = film._wrap(text, font, 224)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 224 for line in lines) and film._wrap("", font, 224) == []
    assert any("S_20130417_0600_01.mp4" in line for line in lines)
    titles = ["a" * 200, "\udcff犬", r"\udcff\u72ac", "é", "e"]
    long, code, written, same, short = film.film_frames([image], titles, 0, 1)
    assert (long[:, -4:] == 255).all() and long.shape == short.shape
    assert (code == written).all() and not (same == short).all()


@pytest.mark.parametrize("names, seconds, rate", [
    ("aaa", (0, 0.2, 0.4), 5),
    ("aaaab", (1, 1.25, 1.5, 2.5, 0), 4),  # without one that cannot be read, and another video
    ("aa", (0, 3600), 0.01),
    ("ab", (0, 1), 5),
])  # fmt: skip
def test_a_film_plays_at_the_rate_of_its_frames(names, seconds, rate):
    sources = [SimpleNamespace(name=name, second=second) for name, second in zip(names, seconds, strict=True)]
    frames = SimpleNamespace(source=sources.__getitem__)
    assert film.frame_rate(frames, range(len(names))) == pytest.approx(rate)
    assert film.frame_rate(SimpleNamespace(source=lambda i: None), range(3)) == 5
