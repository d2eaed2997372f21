"""Images that units answer to: the published order, samples and whole sets, rows and margins, and clear mistakes."""

import json
import os

import numpy as np
import pytest

import highly_activating_imgs as script
from moco import pictures
from moco.analysis import features, units
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import opening
from tests.support import golden
from tests.support.inputs import run_small

pytestmark = pytest.mark.usefixtures("empty_figures")


def show(data, save_dir, network, *words):
    """Run the script on small images; what it says of the units, and the names of what it leaves."""
    run_small(script, data, save_dir, network, *words)
    (path,) = save_dir.glob("highly*.json")
    return json.loads(path.read_text()), sorted(os.listdir(save_dir))


def every_mean(network, frames, tmp_path, layer="penultimate"):
    model = opening.open_model(network).network
    (rows,) = features.extract_features(model, frames, np.arange(len(frames)), tmp_path, 64, names=[layer])
    return rows


def test_the_order_of_all_images_is_the_published_one(tmp_path):
    frames, expected = FrameFolder(golden.IMAGES), np.load(golden.DATA / "inside.npz")
    (rows,) = features.extract_features(golden.model(), frames, np.arange(48), tmp_path, 224, names=["features.18"])
    values, found = units.top_images(rows, np.arange(8), 48)
    order, activation = expected["order"], expected["activation"]
    np.testing.assert_allclose(values, activation, atol=1e-3)
    apart = np.abs(np.diff(activation, axis=0)) > 1e-5
    edge = np.full((1, 8), True)
    certain = np.concatenate([edge, apart]) & np.concatenate([apart, edge])
    assert certain.sum() > 200
    np.testing.assert_array_equal(found[certain], order[certain])


@pytest.mark.parametrize("k", [1, 10, 500])
def test_top_images_are_the_best_of_all_in_order(k):
    rows = np.random.default_rng(0).integers(0, 50, (300, 7)).astype(np.float32)  # with many ties
    rows[[4, 70]] = np.nan
    values, found = units.top_images(rows, [2, 6], k)
    expected = np.argsort(-np.nan_to_num(rows, nan=-1)[:, [2, 6]], axis=0, kind="stable")[: min(k, 298)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(rows[:, [2, 6]], expected, 0))


def test_the_sample_is_random_without_repeats_and_the_seed_decides():
    first = script.sample(5000, 1024, 3)
    assert len(set(first.tolist())) == 1024 and (np.diff(first) > 0).all() and first[-1] < 5000
    assert 2300 < first.mean() < 2700
    np.testing.assert_array_equal(first, script.sample(5000, 1024, 3))
    assert (first != script.sample(5000, 1024, 4)).any()
    assert script.sample(20, 1024, 3).tolist() == list(range(20))


def test_one_unit_under_its_published_name(frames, tmp_path, network):
    found, names = show(frames, tmp_path / "out", network)
    figures = [f"highly_activating_imgs_neuron_276.{ending}" for ending in ("json", "pdf", "png")]
    assert names == ["args.json", "features", *figures]
    values, images = every_mean(network, FrameFolder(frames), tmp_path)[:, 276], FrameFolder(frames)
    best = np.argsort(-values, kind="stable")[:10]
    assert found[0]["files"] == [str(images.path(i).relative_to(frames)) for i in best]
    np.testing.assert_allclose(found[0]["activations"], values[best], rtol=1e-4)


def test_several_units_have_a_row_each_with_selectivity_and_preferred_class(frames, tmp_path, network, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "image_rows", lambda rows, path, title: drawn.extend([*rows, title]))
    found, _ = show(frames, tmp_path / "out", network, "--neuron_idx", 5, 3, "--top", 4, "--layer", 10)
    images = FrameFolder(frames)
    rows = every_mean(network, images, tmp_path, "relu")
    class_means = np.stack([rows[images.labels() == label].mean(0) for label in range(3)])
    selectivity, preferred_class = units.selectivity(class_means)
    assert drawn.pop() == "net (resnet18), layer 10 from the end: highest activations"
    for unit, entry, (margin, shown, activations) in zip((5, 3), found, drawn, strict=True):
        assert entry["unit"] == unit
        assert entry["selectivity"] == pytest.approx(selectivity[unit], abs=1e-4)
        assert entry["preferred_class"] == f"class_000{preferred_class[unit]}"
        prefers = f"prefers {entry['preferred_class']}"
        assert list(margin) == [f"unit {unit}", f"selectivity {selectivity[unit]:.2f}", prefers]
        assert [float(text) for text in activations] == pytest.approx(entry["activations"], rel=0.01)
        assert [picture.shape for picture in shown] == [(64, 64, 3)] * 4


def test_the_most_selective_units_of_all_images_are_picked(frames, tmp_path, network, capsys):
    words = ["--most-selective", 3, "--top", 2, "--all", "--batch-size", 12]
    found, names = show(frames, tmp_path / "out", network, *words)
    assert "top 2 of 24 images for 3 units" in capsys.readouterr().out
    assert "highly_activating_imgs_most_selective_3.pdf" in names
    values = [entry["selectivity"] for entry in found]
    assert values == sorted(values, reverse=True)
    images = FrameFolder(frames)
    rows = every_mean(network, images, tmp_path)
    everyone = units.selectivity(np.stack([rows[images.labels() == label].mean(0) for label in range(3)]))[0]
    np.testing.assert_allclose(values, np.sort(everyone)[::-1][:3], atol=1e-4)


def test_a_sample_is_used_without_all(frames, tmp_path, network, capsys):
    show(frames, tmp_path / "out", network, "--batch-size", 12)
    assert "top 10 of 12 images" in capsys.readouterr().out


def test_fewer_images_than_top_are_reported(frames, tmp_path, network, capsys):
    FrameFolder(frames).path(1).write_bytes(b"no image")
    found, _ = show(frames / "class_0000", tmp_path / "out", network)
    assert len(found[0]["files"]) == 7 and "selectivity" not in found[0]  # one flat folder: no classes to compare
    assert "fewer images than --top 10 could be read" in capsys.readouterr().out


def test_mistakes_are_one_line_and_leave_nothing(frames, tmp_path, network, monkeypatch):
    monkeypatch.setattr(loader, "FrameLoader", None)  # whoever reads an image fails
    for words, reason in [
        (("--neuron_idx", 3, 512), "--neuron_idx 512: the layer has 512 units, 0 to 511"),
        (("--neuron_idx", -1), "--neuron_idx -1: the layer has 512 units"),
        (("--most-selective", 513), "--most-selective 513: the layer has 512 units"),
    ]:
        with pytest.raises(UserError, match=reason):
            show(frames, tmp_path / "out", network, *words)
    monkeypatch.undo()
    with pytest.raises(UserError, match="have one class; --most-selective"):
        show(frames / "class_0000", tmp_path / "out", network, "--most-selective", 2)
    assert os.listdir(tmp_path / "out") == ["features"]
