"""Figures: a PDF and a PNG each, whole or not at all, that show what they are given."""

import cv2
import numpy as np
import pytest

from moco import plots
from moco.cli import UserError


def picture(path):
    """The PNG at path as (H, W, 3) RGB, after a look at the PDF beside it."""
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return cv2.imread(str(path.with_suffix(".png")))[..., ::-1]


def share(page, color):
    """The share of a page's pixels that have a color like #0072B2."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(page.astype(int) - wanted).max(-1) <= 3).mean()


def entry(mean, std=0.02):
    return {"mean": mean, "std": std, "majority": 0.3, "chance": 0.25}


def test_the_training_curve_shows_what_is_known(tmp_path):
    records = [{"epoch": i, "loss": 2 - i / 10, "acc1": 5.0 * i} for i in range(8)]
    plots.training_curve(records, tmp_path / "all")
    plots.training_curve([{**record, "val_acc1": 50.0} for record in records], tmp_path / "test")
    plots.training_curve([{"epoch": 0, "acc1": 10.0}, records[1]], tmp_path / "few")  # an old file knows no loss
    pages = {name: picture(tmp_path / name) for name in ("all", "test", "few")}
    assert share(pages["all"], plots.COLORS[0]) > share(pages["few"], plots.COLORS[0]) > 0
    assert share(pages["test"], plots.COLORS[1]) > 0 == share(pages["all"], plots.COLORS[1])


def test_bars_are_as_high_as_the_accuracies(tmp_path):
    for name, mean in (("low", 0.2), ("high", 0.8)):
        plots.accuracy_bars({"TC": {"iid": entry(mean)}}, tmp_path / name)
    low, high = (share(picture(tmp_path / name), plots.COLORS[0]) for name in ("low", "high"))
    assert high == pytest.approx(4 * low, rel=0.15)


def test_every_model_has_a_color_and_may_lack_a_task(tmp_path):
    models = {f"model {i}": {"iid": entry(0.5, None)} for i in range(3)}
    models["model 1"]["exemplar"] = entry(0.4)
    plots.accuracy_bars(models, tmp_path / "bars")
    page = picture(tmp_path / "bars")
    shares = [share(page, color) for color in plots.COLORS]
    assert all(shares[:3]) and shares[1] > 1.5 * shares[0] and max(shares[3:]) < 0.001


def test_a_confusion_is_bright_where_it_is_often(tmp_path):
    bright, dark = "#fee838", "#00224e"  # the ends of cividis
    plots.confusion_matrix(np.eye(8, dtype=int) * 5, list("abcdefgh"), tmp_path / "right", "")
    plots.confusion_matrix(np.full((8, 8), 5), list("abcdefgh"), tmp_path / "even", "")
    plots.confusion_matrix(np.zeros((2, 2), int), ["a", "b"], tmp_path / "none", "")
    right, even = (picture(tmp_path / name) for name in ("right", "even"))
    assert share(right, bright) > 5 * share(even, bright)
    assert share(right, dark) > 5 * share(even, dark)
    picture(tmp_path / "none")


def test_a_grid_shows_each_picture_once_and_marks_the_wrong_ones(tmp_path):
    red = np.zeros((3, 20, 20, 3))
    red[..., 0] = 1
    plots.image_grid(red, [("a", "a")] * 3, tmp_path / "right", "all right")
    plots.image_grid(red * [[[[1]]], [[[0]]], [[[0]]]], [("a", "b")] * 3, tmp_path / "wrong", "all wrong")
    right, wrong = (picture(tmp_path / name) for name in ("right", "wrong"))
    assert share(right, "#ff0000") == pytest.approx(3 * share(wrong, "#ff0000"), rel=0.02)
    assert share(wrong, plots.COLORS[5]) > 0 == share(right, plots.COLORS[5])


def test_a_figure_that_cannot_be_written_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", full)
    with pytest.raises(UserError, match="curve.pdf: No space left"):
        plots.training_curve([{"epoch": 0, "loss": 1.0, "acc1": 1.0}], tmp_path / "curve")
    assert not list(tmp_path.iterdir())
