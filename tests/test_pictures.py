"""Figures of images: each shown once, of limited size, with captions as they are."""

import numpy as np
import pytest
from matplotlib.image import AxesImage

from moco import pictures, plots
from tests.test_plots import ODD, inches, picture, share, texts


def test_a_grid_shows_each_picture_once_and_marks_the_wrong_ones(tmp_path):
    red = np.zeros((3, 20, 20, 3))
    red[..., 0] = 1
    pictures.image_grid(red, [("a", "a")] * 3, tmp_path / "right", "all right", "legend")
    pictures.image_grid(red * [[[[1]]], [[[0]]], [[[0]]]], [("a", "b")] * 3, tmp_path / "wrong", "all wrong", "legend")
    pictures.image_grid(red, [("a", None)] * 3, tmp_path / "neither", "of other classes", "legend")
    right, wrong, neither = (picture(tmp_path / name) for name in ("right", "wrong", "neither"))
    assert share(neither, plots.COLORS[0]) == share(neither, plots.COLORS[5]) == 0
    assert share(right, "#ff0000") == pytest.approx(3 * share(wrong, "#ff0000"), rel=0.02)
    assert share(wrong, plots.COLORS[5]) > 0 == share(right, plots.COLORS[5])


def test_many_images_take_time_in_proportion(tmp_path, monkeypatch):
    """Each image is drawn once for each file; Matplotlib would merge images n^2 times, and lay out n axes."""
    drawn, draw = [], AxesImage.make_image
    monkeypatch.setattr(AxesImage, "make_image", lambda self, *args: drawn.append(self) or draw(self, *args))
    images = np.zeros((300, 2, 2, 3), np.uint8)
    pictures.image_grid(images, [("a", "b")] * 300, tmp_path / "grid", "many", "legend")
    assert len(drawn) == 600
    width, height = inches(tmp_path / "grid")
    assert width == 12 and height < plots.MAX_INCHES
    assert max(picture(tmp_path / "grid").shape) <= plots.MAX_PIXELS


def test_rows_of_images_have_a_largest_size(tmp_path):
    image = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    pictures.image_rows([(["unit 3"], [image] * 250, ())], tmp_path / "rows", "title")
    assert max(inches(tmp_path / "rows")) <= plots.MAX_INCHES + 0.01
    page = picture(tmp_path / "rows")
    assert max(page.shape) <= plots.MAX_PIXELS and share(page, "#ff0000") > 0.5


def test_rows_show_their_images_from_the_left(tmp_path):
    red, blue = np.full((9, 9, 3), (255, 0, 0), np.uint8), np.full((9, 9, 3), (0, 0, 255), np.uint8)
    pictures.image_rows(
        [(["unit 1", "car"], [red, red], ["3", "1"]), (["unit 2"], [blue], ["2"])], tmp_path / "rows", ""
    )
    page = picture(tmp_path / "rows")
    assert share(page, "#ff0000") == pytest.approx(2 * share(page, "#0000ff"), rel=0.05)
    ys, xs = np.nonzero((page == (0, 0, 255)).all(-1))
    assert ys.min() > page.shape[0] // 2 and xs.max() < 0.75 * page.shape[1]


def test_captions_are_drawn_as_they_are(tmp_path, monkeypatch):
    captions, images = [(name, "x_1") for name in ODD], np.zeros((len(ODD), 4, 4, 3))
    drawn = texts(monkeypatch, lambda: pictures.image_grid(images, captions, tmp_path / "grid", "$t$", "gray: x_2"))
    assert {*ODD, "→ x_1", "$t$", "gray: x_2"} <= drawn
    rows = [([name], images[:1], ["2.5"]) for name in ODD]
    drawn = texts(monkeypatch, lambda: pictures.image_rows(rows, tmp_path / "rows", "$t$"))
    assert {*ODD, "$t$", "2.5"} <= drawn
