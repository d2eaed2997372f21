"""Figures: a PDF and a PNG each, written atomically, of limited size, with every name legible."""

import re
import string
import warnings

import cv2
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure

from moco import plots
from moco.cli import UserError


def picture(path):
    """The PNG at path as (H, W, 3) RGB; the PDF must exist, too."""
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return cv2.imread(str(path.with_suffix(".png")))[..., ::-1]


def inches(path):
    """The size (width, height) of the page of a PDF, in inches."""
    box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+) *\]", path.with_suffix(".pdf").read_bytes())
    return float(box[1]) / 72, float(box[2]) / 72


def share(page, color):
    """The share of a page's pixels with a color like #0072B2."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(page.astype(int) - wanted).max(-1) <= 3).mean()


def entry(mean, std=0.02):
    return {"mean": mean, "std": std, "majority": 0.3, "chance": 0.25}


def test_the_training_curve_shows_the_known_values(tmp_path):
    records = [{"epoch": i, "loss": 2 - i / 10, "acc1": 5.0 * i} for i in range(8)]
    plots.training_curve(records, tmp_path / "all")
    plots.training_curve([{**record, "val_acc1": 50.0} for record in records], tmp_path / "test")
    plots.training_curve([{"epoch": 0, "acc1": 10.0}, records[1]], tmp_path / "few")  # an old file knows no loss
    pages = {name: picture(tmp_path / name) for name in ("all", "test", "few")}
    assert share(pages["all"], plots.COLORS[0]) > share(pages["few"], plots.COLORS[0]) > 0
    assert share(pages["test"], plots.COLORS[1]) > 0 == share(pages["all"], plots.COLORS[1])


def test_bars_are_as_high_as_the_accuracies(tmp_path, monkeypatch):
    """A model may lack a task."""
    models = {"low": {"iid": entry(0.2)}, "high": {"iid": entry(0.8, None), "exemplar": entry(0.4, None)}}
    errors, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, *at, **style: errors.append(at) or errorbar(axes, *at, **style))
    assert {"top-1 accuracy (%),", "mean ± sd over 3 splits"} <= texts(
        monkeypatch, lambda: plots.accuracy_bars(models, tmp_path / "bars", "sd over 3 splits")
    )
    low, high = (share(picture(tmp_path / "bars"), color) for color in plots.COLORS[:2])
    assert high == pytest.approx(6 * low, rel=0.15)
    assert len(errors) == 1  # none for a single split


def test_a_model_has_one_color_in_every_figure(tmp_path):
    for name, others in (("one", ["HOG"]), ("two", ["TC-normalized", "TC (5-NN)", "random", "HOG"])):
        plots.accuracy_bars({each: {"iid": entry(0.5)} for each in ["TC", *others]}, tmp_path / name)
    one, two = ([share(picture(tmp_path / name), color) > 0.01 for color in plots.COLORS] for name in ("one", "two"))
    assert np.flatnonzero(one).tolist() == [0, 5] and np.flatnonzero(two).tolist() == [0, 5, 6]


def test_a_confusion_is_bright_where_it_is_often(tmp_path):
    bright, dark = "#fee838", "#00224e"  # the ends of cividis
    plots.confusion_matrix(np.eye(8, dtype=int) * 5, list("abcdefgh"), tmp_path / "right", "")
    plots.confusion_matrix(np.full((8, 8), 5), list("abcdefgh"), tmp_path / "even", "")
    plots.confusion_matrix(np.zeros((700, 700), int), [f"n{i:08d}" for i in range(700)], tmp_path / "none", "ImageNet")
    right, even = (picture(tmp_path / name) for name in ("right", "even"))
    assert share(right, bright) > 5 * share(even, bright)
    assert share(right, dark) > 5 * share(even, dark)
    assert max(inches(tmp_path / "none")) < 18 and max(picture(tmp_path / "none").shape) < 18 * 150  # fits on a page


def test_a_figure_that_cannot_be_written_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match="curve.pdf: No space left"):
        plots.training_curve([{"epoch": 0, "loss": 1.0, "acc1": 1.0}], tmp_path / "curve")
    assert not list(tmp_path.iterdir())


def texts(monkeypatch, draw):
    """The strings that draw() puts into a figure, and the warnings of Matplotlib are errors."""
    drawn, render = set(), RendererAgg.draw_text
    math = []

    def record(self, gc, x, y, string, prop, angle, ismath=False, mtext=None):
        drawn.add(string)
        math.append(ismath)
        return render(self, gc, x, y, string, prop, angle, ismath, mtext)

    monkeypatch.setattr(RendererAgg, "draw_text", record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw()
    assert not any(math)
    return drawn


ODD = ["_car", "$5_a^2$", "a$b", "x^2", "50 %", "\\alpha"]


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    """Matplotlib takes text between dollars for mathematics, and leaves labels that start with _ out of legends."""
    models = {name: {name: entry(0.5)} for name in ODD}
    assert set(ODD) <= texts(monkeypatch, lambda: plots.accuracy_bars(models, tmp_path / "bars"))
    counts = np.eye(len(ODD), dtype=int)
    assert {*ODD, "$x$"} <= texts(monkeypatch, lambda: plots.confusion_matrix(counts, ODD, tmp_path / "matrix", "$x$"))
    curves = {name: {1: np.linspace(0.1, 1, 200)} for name in ODD}
    drawn = texts(monkeypatch, lambda: plots.variance_explained(curves, tmp_path / "variance", "$t$"))
    assert {f"{name}, layer 1" for name in ODD} | {"1", "10", "100", "90 %", "$t$"} <= drawn
    units = {layer: np.linspace(0, 0.5, 9) for layer in (1, 2)}
    drawn = texts(monkeypatch, lambda: plots.selectivity_by_layer(units, tmp_path / "selectivity", "$t$"))
    assert {"$t$", "line and number: mean over units", "0.25", "layer, counted from the end"} <= drawn
    rho = np.array([[1, 0.5, np.nan], [0.5, 1, 0.2], [np.nan, 0.2, 1]])
    intervals = np.full((3, 3, 2), np.nan)
    intervals[0, 1] = 0.4, 0.6
    drawn = texts(monkeypatch, lambda: plots.correlations(rho, intervals, ODD[:3], tmp_path / "rho", "$t$"))
    assert {*ODD[:3], "0.50", "0.40 to 0.60", "0.20", "$t$"} <= drawn


def test_a_character_is_drawn_from_the_first_font_that_has_it_or_as_its_code(tmp_path, monkeypatch):
    """DejaVu Sans lacks the bracket, and STIX has it; no font has lone surrogates, which are bytes of file names."""
    assert plots.drawable(["a ⎵ b", "Café", "img_\udcff", "a\tb"]) == ["a ⎵ b", "Café", r"img_\udcff", r"a\tb"]
    names = ["car", "a ⎵ b", "img_\udcff", "_x"]
    draw = lambda: plots.confusion_matrix(np.eye(4), names, tmp_path / "matrix", "a\udcff")  # noqa: E731
    assert {"a ⎵ b", r"img_\udcff", r"a\udcff"} <= texts(monkeypatch, draw)  # a missing character would be a warning
    monkeypatch.setattr(plots, "_fonts", lambda: (["DejaVu Sans"], set(map(ord, string.printable))))
    assert plots.drawable(["猫", "犬"]) == [r"\u732b", r"\u72ac"]


def test_fonts_that_are_gone_or_damaged_cost_no_figure(tmp_path, monkeypatch):
    """Matplotlib keeps a list of the fonts of a machine, which may be old."""
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    stale = {plots.FONTS[2]: tmp_path / "damaged.ttf", plots.FONTS[3]: tmp_path / "gone.ttf"}
    findfont = font_manager.findfont
    monkeypatch.setattr(
        font_manager, "findfont", lambda name, **options: str(stale.get(name) or findfont(name, **options))
    )
    monkeypatch.setattr(plots, "_fonts", plots._fonts.__wrapped__)
    assert plots._fonts()[0][:2] == list(plots.FONTS[:2]) and not stale.keys() & set(plots._fonts()[0])
    plots.confusion_matrix(np.eye(2), ["a", "b"], tmp_path / "matrix", "title")
    assert share(picture(tmp_path / "matrix"), "#fee838") > 0


@pytest.mark.filterwarnings("error")
def test_long_names_are_shortened_in_the_middle_and_a_legend_of_many_fits(tmp_path):
    names = [f"{240 * 'a'}{i:02d}" for i in range(64)]
    shown = plots.drawable(names)
    assert len(set(shown)) == 64 and max(map(len, shown)) <= plots.LABEL_LENGTH
    plots.accuracy_bars({name: {"iid": entry(0.5)} for name in names}, tmp_path / "bars")
    plots.variance_explained({name: {1: np.linspace(0, 1, 9)} for name in names}, tmp_path / "variance", "title")
    for name in ("bars", "variance"):
        page = picture(tmp_path / name)
        assert (page[:4] == 255).all() and (page[-4:] == 255).all()  # nothing runs over the edge
    assert share(picture(tmp_path / "bars"), plots.COLORS[1]) > 0


def test_a_dissimilarity_matrix_is_ordered_by_class_and_averaged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "MAX_CELLS", 3)
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, image, **style: drawn.append(image) or imshow(self, image, **style)
    )
    matrix = np.arange(49.0).reshape(7, 7)
    matrix[3] = matrix[:, 3] = np.nan
    labels = np.array([1, 0, 1, 0, 0, 1, 1])
    plots.dissimilarity(matrix, labels, ["a", "b"], tmp_path / "rdm", "title", ("1 - cosine", 100))
    order = [1, 4, 0, 2, 5, 6]
    expected = [[matrix[np.ix_(rows, columns)].mean() for columns in np.reshape(order, (3, 2))]
                for rows in np.reshape(order, (3, 2))]  # fmt: skip
    np.testing.assert_allclose(drawn[0], expected)
    picture(tmp_path / "rdm")


def test_points_have_a_legend_or_a_color_scale_and_labels(tmp_path, monkeypatch):
    points = np.random.default_rng(0).normal(size=(90, 2))
    points[7] = np.nan
    plots.scatter(points, ["_a", "b", "c"] * 30, tmp_path / "groups", "title", "class")
    plots.scatter(points, [f"class {i}" for i in range(90)], tmp_path / "many", "title", "class")
    plots.scatter(points, ["", *map(str, range(89))], tmp_path / "numbers", "title", "age_months")
    pages = {name: picture(tmp_path / name) for name in ("groups", "many", "numbers")}
    for color in plots.COLORS[:3]:
        assert share(pages["groups"], color) > 20 * share(pages["many"], color)
    names = [f"point {i}" for i in range(90)]
    drawn = texts(monkeypatch, lambda: plots.scatter(points, ["a"] * 90, tmp_path / "labels", "title", "class", names))
    assert set(names) - drawn == {"point 7"}
    assert share(pages["many"], "#440154") > 0 < share(pages["numbers"], "#440154")  # the first color of the scale


def test_accuracies_by_number_of_training_images_have_a_line_a_model(tmp_path):
    curves = {"iid": {"TC": [(10, 0.3, 0.1), (100, 0.6, 0.02)], "HOG": [(10, 0.2, None), (100, 0.4, None)]}}
    plots.accuracy_by_training_images(curves | {"halves": {"HOG": [(5, 0.1, None)]}}, tmp_path / "lines")
    page = picture(tmp_path / "lines")
    assert share(page, plots.COLORS[0]) > 0 < share(page, plots.BASELINES["HOG"])
