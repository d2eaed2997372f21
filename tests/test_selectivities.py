"""Selectivity: the published values of six layers, undefined cases of the published code, and the script."""

import json
import os

import numpy as np
import pytest

import selectivities as script
from moco import plots
from moco.analysis import features, units
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import layers
from tests.support import golden
from tests.support.inputs import make_frames, run_small

pytestmark = pytest.mark.usefixtures("empty_figures")

LAYERS = [1, 2, 6, 10, 14, 18]


def measure(data, save_dir, network, *words):
    """Run the script on small images; the names of the files it writes, without args.json and features."""
    run_small(script, data, save_dir, network, *words)
    return sorted(set(os.listdir(save_dir)) - {"args.json", "features"})


def selectivity(features, labels):
    """(C,) of features (N, C) of images with labels (N,)."""
    return units.selectivity(units.class_means(features, labels, labels.max() + 1)[0])[0]


def plain(features, labels):
    """The equation, unit by unit, over classes that have images, with 0 for 0 / 0."""
    found = []
    for unit in features.T.astype(np.float64):
        means = sorted(unit[labels == label].mean() for label in set(labels.tolist()))
        highest, others = means[-1], np.mean(means[:-1])
        found.append((highest - others) / (highest + others) if highest + others else 0)
    return np.array(found)


def test_six_layers_in_one_pass_are_the_published_ones(tmp_path):
    frames, expected, model = FrameFolder(golden.IMAGES), np.load(golden.DATA / "inside.npz"), golden.model()
    names, silent = [layers.layer_name(model, layer) for layer in LAYERS], []
    rows = features.extract_features(model, frames, np.arange(48), tmp_path, 224, names=names)
    for layer, means in zip(LAYERS, rows, strict=True):
        np.testing.assert_allclose(means[::6, ::8], expected[f"features_{layer}"], atol=1e-3)
        published = expected[f"selectivity_{layer}"]
        silent.append(np.isnan(published).sum())
        np.testing.assert_allclose(selectivity(means, frames.labels()), np.nan_to_num(published), atol=1e-3)
    assert silent == [13, 13, 4, 9, 8, 0]


@pytest.mark.parametrize("classes", [[0, 1], [1, 4], range(40)])
def test_selectivity_is_the_equation_over_classes_with_images(classes, monkeypatch):
    monkeypatch.setattr(units, "BLOCK", 37)
    draws = np.random.default_rng(0)
    labels = draws.permutation(np.resize(classes, 200))
    features = draws.random((200, 30), np.float32) * draws.random((41, 30), np.float32)[labels]
    features[:, 3] = 0
    features[20], labels[20] = np.nan, 2  # an image that cannot be read
    means, counts = units.class_means(features, labels, 41)
    features, labels = np.delete(features, 20, 0), np.delete(labels, 20)
    assert counts.tolist() == np.bincount(labels, minlength=41).tolist()
    found, preferred_class = units.selectivity(means)
    np.testing.assert_allclose(found, plain(features, labels), atol=1e-6)
    highest = np.argmax([features[labels == label].mean(0) for label in classes], 0)
    np.testing.assert_array_equal(preferred_class, np.array(classes)[highest])


def test_extreme_selectivities():
    """A unit for one class only, one that responds equally to all, a silent one, and one whose means cancel out."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    features = np.array([[0, 0, 4, 2, 0, 0], [5] * 6, [0] * 6, [2, 2, -2, -2, -2, -2]], np.float32).T
    assert selectivity(features, labels).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="at least two classes"):
        selectivity(features, np.full(6, 3))


def test_the_script_writes_every_layer_and_the_figure(frames, tmp_path, network):
    names = measure(frames, tmp_path / "out", network, "--layer", 1, 2, 10)
    arrays = [f"selectivity_{layer}.{ending}" for layer in (1, 2, 10) for ending in ("npy", "npz")]
    assert names == sorted([*arrays, "selectivity_by_layer_1_2_10.pdf", "selectivity_by_layer_1_2_10.png"])
    for layer, n in ((1, 512), (2, 512), (10, 64)):
        array, archive = (np.load(tmp_path / f"out/selectivity_{layer}.{ending}") for ending in ("npy", "npz"))
        assert array.shape == (n,) and array.dtype == np.float32
        np.testing.assert_allclose(archive["selectivity"], array, atol=1e-6)
        assert archive["class_means"].shape == (3, n) and archive["images"].tolist() == [8, 8, 8]
        assert archive["classes"].tolist() == ["class_0000", "class_0001", "class_0002"]
        np.testing.assert_array_equal(archive["preferred_class"], archive["class_means"].argmax(0))


def test_unreadable_images_are_left_out(frames, tmp_path, network):
    images = FrameFolder(frames)
    for i in (*range(8), 9):
        images.path(i).write_bytes(b"no image")
    measure(frames, tmp_path / "out", network)
    archive = np.load(tmp_path / "out" / "selectivity_1.npz")
    assert archive["images"].tolist() == [0, 7, 8]
    assert np.isnan(archive["class_means"][0]).all() and np.isfinite(archive["selectivity"]).all()
    for i in range(8, 16):
        images.path(i).write_bytes(b"no image")
    with pytest.raises(UserError, match="only one class of .* has images that can be read"):
        measure(frames, tmp_path / "one", network)
    assert os.listdir(tmp_path / "one") == ["features"]


def test_mistakes_are_one_line(frames, tmp_path, network):
    with pytest.raises(UserError, match="is inside the data folder"):
        measure(frames, make_frames(tmp_path / "further") / "out", network, "--pca", tmp_path / "further")
    with pytest.raises(UserError, match="has one class, class_0000"):
        measure(frames / "class_0000", tmp_path / "out", network)


def test_the_covariance_is_that_of_all_known_rows(monkeypatch):
    draws = np.random.default_rng(0)
    rows = (1000 + draws.normal(size=(300, 6)) @ np.diag([5, 3, 1, 0.5, 0, 0])).astype(np.float32)
    monkeypatch.setattr(units, "BLOCK", 44)
    found = units.covariance(np.insert(rows, 50, np.nan, axis=0))
    np.testing.assert_allclose(found, np.cov(rows.T.astype(np.float64), bias=True), atol=1e-4)
    singular = np.linalg.svd(rows.astype(np.float64) - rows.mean(0, dtype=np.float64), compute_uv=False) ** 2
    share = script.variance_explained(found)
    np.testing.assert_allclose(share, np.cumsum(singular) / singular.sum(), atol=1e-6)
    assert share[-1] == pytest.approx(1)
    assert script.variance_explained(np.zeros((3, 3))).tolist() == [1, 1, 1]


def test_dimensionality_of_several_folders(frames, tmp_path, network, capsys, monkeypatch):
    seen, draw = [], plots.variance_explained
    monkeypatch.setattr(plots, "variance_explained", lambda *values: seen.append(values) or draw(*values))
    names = measure(frames, tmp_path / "out", network, "--layer", 1, 10, "--pca", frames / "class_0001")
    assert {"variance_explained_1_10.pdf", "variance_explained_1_10.png"} <= set(names)
    ((drawn, _, title),) = seen
    assert list(drawn) == ["frames", "class_0001"] and title == "net (resnet18): variance of its units"
    lines = capsys.readouterr().out.splitlines()
    for name in (f"{folder}, layer {layer}: " for folder in (frames, frames / "class_0001") for layer in (1, 10)):
        (line,) = [line for line in lines if line.startswith(name)]
        assert 1 <= int(line.removeprefix(name).split()[0]) <= 24


def test_numbers_are_on_disk_before_the_first_figure(frames, tmp_path, network, monkeypatch):
    monkeypatch.setattr(plots, "selectivity_by_layer", None)
    with pytest.raises(TypeError):
        measure(frames, tmp_path / "out", network, "--layer", 1, 2)
    arrays = [f"selectivity_{layer}.{ending}" for layer in (1, 2) for ending in ("npy", "npz")]
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "features", *arrays]


def test_cached_features_give_the_same_without_an_image_opened(frames, network, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    measure(frames, tmp_path / "first", network, "--layer", 1, 6, "--features-dir", cache)
    lines = [json.loads(line)["what"] for line in (cache / "index.jsonl").open()]
    assert [line.split(" from ")[0] for line in lines] == [
        f"layer {name} of resnet18" for name in ("penultimate", "layer2.1.relu")
    ]
    monkeypatch.setattr(loader, "FrameLoader", None)
    measure(frames, tmp_path / "again", network, "--layer", 6, 1, "--features-dir", cache)
    for layer in (1, 6):
        first, again = (dict(np.load(tmp_path / name / f"selectivity_{layer}.npz")) for name in ("first", "again"))
        np.testing.assert_equal(first, again)
