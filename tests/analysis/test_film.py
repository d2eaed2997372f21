"""Films: published colors, every format read back, odd sizes, no partial files, one frame in memory."""

import os
import tracemalloc

import av
import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

from moco import plots
from moco.analysis import film
from moco.cli import UserError

SHADES = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128), (250, 250, 20)]


def flat(shade, height=64, width=96):
    return np.full((height, width, 3), shade, np.uint8)


def read(path):
    """The frames of a film, (n, H, W, 3), and its frames per second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return images, float(stream.average_rate)


def test_jet_equals_matplotlibs():
    np.testing.assert_allclose(film.JET, matplotlib.colormaps["jet"](np.arange(256))[:, :3], atol=1e-6)


def test_color_indices_are_clipped_to_the_range():
    values = np.array([[-9, 0, 0.9999, 1, 1.5, 3, 9]], np.float32)
    assert film.color_indices(values, 1, 3).tolist() == [[0, 0, 0, 0, 63, 255, 255]]
    assert film.color_indices(values, 1, 1).tolist() == [[0] * 7]


def test_brightness_is_that_of_normalized_pixels_rescaled_over_the_clip():
    clip = np.random.default_rng(0).integers(20, 230, (5, 8, 8, 3)).astype(np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = (clip / 255 - mean) / std
    expected = (normalized - normalized.min()) / np.ptp(normalized)
    table = film.brightness(clip.min((0, 1, 2)), clip.max((0, 1, 2)), mean, std)
    np.testing.assert_allclose(table[clip, np.arange(3)], expected, atol=1e-6)


def test_the_brightness_of_a_clip_of_one_shade_is_finite():
    table = film.brightness(np.full(3, 7, np.uint8), np.full(3, 7, np.uint8), np.zeros(3), np.ones(3))
    assert np.isfinite(table).all() and 0 <= table.min() <= table.max() <= 1


def test_overlay_is_the_mean_of_image_and_colors():
    image, table = flat((0, 128, 255)), np.repeat(np.arange(256, dtype=np.float32)[:, None] / 255, 3, 1)
    under = film.overlay(image, np.full(image.shape[:2], 255, np.uint8), table)
    assert np.abs(under[0, 0] - (np.array([127.5, 0, 0]) + np.array([0, 128, 255])) / 2).max() <= 1


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif", ".MP4"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 97), (33, 32)])
def test_every_format_is_read_back(tmp_path, ending, height, width):
    path = tmp_path / f"film{ending}"
    film.write(path, (flat(shade, height, width) for shade in SHADES), 5)
    images, rate = read(path)
    assert images.shape == (len(SHADES), height + height % 2, width + width % 2, 3)
    assert rate == 5
    np.testing.assert_allclose(images.mean((1, 2)), SHADES, atol=4)
    assert os.listdir(tmp_path) == [path.name]


def test_mp4_plays_in_browsers_and_starts_with_its_index(tmp_path):
    film.write(tmp_path / "film.mp4", (flat(shade) for shade in SHADES), 29.97)
    data = (tmp_path / "film.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 1, 1)
        assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)


def test_a_gif_keeps_many_colors(tmp_path):
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[0:256:4, 0:256:4], 90), -1).astype(np.uint8)
    film.write(tmp_path / "film.gif", [ramp, ramp[::-1]], 5)
    images, _ = read(tmp_path / "film.gif")
    assert np.abs(images[1].astype(int) - ramp[::-1]).mean() < 8


@pytest.mark.parametrize("ending", list(film.CODECS))
def test_a_failure_leaves_no_partial_film(tmp_path, ending):
    def images():
        yield flat(SHADES[0])
        yield flat(SHADES[1])
        raise UserError("the third image cannot be read")

    with pytest.raises(UserError, match="the third image"):
        film.write(tmp_path / f"film{ending}", images(), 5)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", list(film.CODECS))
def test_a_film_without_frames_is_an_error(tmp_path, ending):
    with pytest.raises(ValueError, match="without frames"):
        film.write(tmp_path / f"film{ending}", [], 5)
    assert not os.listdir(tmp_path)


def test_unknown_extensions_and_frames_too_large_are_errors(tmp_path):
    for name in ("film.avi", "film", "film.mp4.txt"):
        with pytest.raises(UserError, match=f"{name} does not end in .mp4, .webm, .gif"):
            film.write(tmp_path / name, [flat(SHADES[0])], 5)
    with pytest.raises(UserError, match="20000 x 2 pixels"):
        film.write(tmp_path / "film.mp4", [flat(SHADES[0], 2, 20000)], 5)
    assert not os.listdir(tmp_path)


def test_only_a_few_frames_are_in_memory(tmp_path):
    image_bytes = flat(SHADES[0], 128, 128).nbytes
    film.write(tmp_path / "first.mp4", [flat(SHADES[0])], 5)
    tracemalloc.start()
    film.write(tmp_path / "film.mp4", (flat(SHADES[i % 5], 128, 128) for i in range(200)), 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * image_bytes


def test_the_layout_shows_images_side_by_side_with_title_and_bar():
    left, right = flat(SHADES[0], 90, 120), flat(SHADES[1], 90, 120)
    frame = film.Layout(90, 120, "feature 3", -1, 2, columns=2)(left, right)
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    for shade in SHADES[:2]:
        assert (frame == shade).all(-1).sum() == 90 * 120
    assert (frame[:20] < 100).any()  # the title
    bar = frame[:, 2 * 120 + 3 * 4 + 4]
    colors = bar[~(bar == 255).all(-1)]
    assert len(colors) == 90
    assert np.abs(colors[0] - 255 * film.JET[-1]).max() <= 1 and np.abs(colors[-1] - 255 * film.JET[0]).max() <= 1


def test_a_long_title_is_truncated_and_does_not_widen_the_frame():
    short, long = (film.Layout(64, 64, title, 0, 1).canvas for title in ("a", "a" * 200))
    assert short.shape == long.shape
    assert (long[:, -4:] == 255).all()


def test_a_full_disk_is_a_clear_error_that_leaves_nothing(small_disk):
    disk = small_disk("100k")
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3)).astype(np.uint8)
    for ending in film.CODECS:
        with pytest.raises(UserError, match=rf"cannot write .*film\{ending}: No space left on device"):
            film.write(disk / f"film{ending}", noise, 5)
    assert not os.listdir(disk)


@pytest.mark.parametrize(("title", "font"), [("Ohm ⎵ ⇀", "found"), ("\U000e0001", None), ("duck", None)])
def test_a_title_that_is_not_latin_gets_a_font_that_has_its_characters(title, font, monkeypatch):
    loaded, truetype = [], ImageFont.truetype
    monkeypatch.setattr(
        ImageFont, "truetype", lambda file, *args, **kw: loaded.append(file) or truetype(file, *args, **kw)
    )
    film.Layout(64, 64, title, 0, 1)
    files = [file for file in loaded if isinstance(file, str)]  # Pillow's own font is bytes
    assert files == ([plots.find_font(title)[1]] if font else [])
