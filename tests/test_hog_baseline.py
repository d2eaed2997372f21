"""The HOG baseline: features equal to golden values, and the splits of linear decoding."""

import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

import hog_baseline
import linear_decoding
from moco import files
from moco.analysis import features, report
from moco.cli import UserError
from moco.data.folders import FrameFolder
from tests.support import golden

pytestmark = pytest.mark.usefixtures("empty_figures")


def classify(data, save_dir, *words):
    """Run the script; the content of results.json."""
    hog_baseline.main([str(word) for word in (data, "--save-dir", save_dir, *words)])
    return json.loads((save_dir / "results.json").read_text())


@pytest.fixture
def stripes(tmp_path):
    """Two classes of ten 64x64 images: horizontal and vertical stripes."""
    draws = np.random.default_rng(0)
    for name in ("across", "down"):
        (tmp_path / "stripes" / name).mkdir(parents=True)
        for i in range(10):
            wave = 127 + 100 * np.sin(np.arange(64) * draws.uniform(0.5, 1) + draws.uniform(0, 6))
            image = np.tile(wave[:, None], (1, 64)) + draws.normal(0, 10, (64, 64))
            image = image if name == "across" else image.T
            cv2.imwrite(str(tmp_path / "stripes" / name / f"{i}.png"), np.clip(image, 0, 255).astype(np.uint8))
    return tmp_path / "stripes"


def test_features_are_the_published_ones():
    expected = np.load(golden.DATA / "hog.npz")
    for name, row in zip(expected["files"], expected["features"], strict=True):
        _, found = hog_baseline.read_features((golden.IMAGES / name, 0, None))
        assert found.dtype == np.float32 and found.shape == (11664,)
        np.testing.assert_allclose(found, row, atol=1e-5)


def test_the_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(hog_baseline, "IMAGES_PER_WORKER", 2)
    frames, images = FrameFolder(golden.IMAGES), np.array([0, 12, 24, 36])
    alone, two = (
        hog_baseline.all_features(frames, images, workers, tmp_path / str(workers))
        for workers in (0, 2)
        if (tmp_path / str(workers)).mkdir() is None
    )
    np.testing.assert_array_equal(alone, two)
    assert alone.dtype == np.float32 and alone.shape == (4, 11664)


def test_stripes_are_classified_perfectly(stripes, tmp_path):
    found = classify(stripes, tmp_path / "out", "--seeds", 2, "--workers", 0)
    assert found["models"]["HOG"]["iid"]["each"] == [1, 1]
    assert found["chance"] == 0.5
    halves = [json.loads((tmp_path / "out" / "splits" / f"iid_{seed}.json").read_text()) for seed in (0, 1)]
    largest = [max(("across", "down"), key=lambda name: sum(name in each for each in half["train"])) for half in halves]
    shares = [np.mean([name in each for each in half["test"]]) for name, half in zip(largest, halves, strict=True)]
    assert found["majority"] == pytest.approx(np.mean(shares))


def test_splits_are_those_of_linear_decoding(stripes, tmp_path):
    classify(stripes, tmp_path / "hog", "--seed", 3, "--workers", 0)
    words = ["--model-name", "random", "--model", "shufflenet_v2_x0_5", "--image-size", "32", "--epochs", "1"]
    words += ["--seed", "3", "--workers", "0", "--compare", str(tmp_path / "hog" / "results.json")]
    linear_decoding.main([str(stripes), "--save-dir", str(tmp_path / "out"), *words])
    hog, linear = ((tmp_path / name / "splits" / "iid_3.json").read_text() for name in ("hog", "out"))
    assert hog == linear
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["models"]) == ["HOG", "random"]


def test_scores_have_a_column_for_every_class_even_without_training_images():
    rows, labels = np.eye(6, dtype=np.float32), np.array([0, 0, 2, 2, 3, 3])
    for train, trained in ((np.array([0, 2]), {0, 2}), (np.array([0, 2, 4]), {0, 2, 3})):
        classifier = hog_baseline.published(rows[train], labels[train], 0, 0)
        found = report.class_scores(classifier, rows, np.arange(6), 5)
        assert found.shape == (6, 5)
        assert set(np.flatnonzero((found > np.finfo(float).min).all(0))) == trained
        assert found[train].argmax(1).tolist() == labels[train].tolist()


def test_unreadable_images_are_left_out_and_other_sizes_are_an_error(stripes, tmp_path, capsys):
    (stripes / "down" / "3.png").write_bytes(b"")
    found = classify(stripes, tmp_path / "a", "--workers", 2)
    assert found["models"]["HOG"]["iid"]["left_out"] == ["down/3.png"]
    assert "3.png: the file is empty; left out" in capsys.readouterr().out
    cv2.imwrite(str(stripes / "down" / "3.png"), np.zeros((80, 64), np.uint8))
    with pytest.raises(UserError, match="differs in size from other images .64x80 and 64x64.; HOG needs one size"):
        classify(stripes, tmp_path / "b", "--workers", 0)
    cv2.imwrite(str(stripes / "down" / "3.png"), np.zeros((32, 64), np.uint8))
    assert classify(stripes, tmp_path / "d", "--workers", 0)["models"]["HOG"]["iid"]["left_out"] == ["down/3.png"]
    assert "smaller than a block of 48 pixels" in capsys.readouterr().out
    for path in stripes.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 20 images"):
        classify(stripes, tmp_path / "c", "--workers", 0)


def test_sizes_are_compared_by_side_and_not_by_area(tmp_path):
    """HOGs of 64x96 and 96x64 are equally long, and would distinguish classes by their shape."""
    for name, shape in (("tall", (96, 64)), ("wide", (64, 96))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            cv2.imwrite(str(tmp_path / "data" / name / f"{i}.png"), np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="wide/0.png differs in size from other images .96x64 and 64x96."):
        classify(tmp_path / "data", tmp_path / "out", "--workers", 0)


def test_an_image_read_later_has_the_size_of_those_read_before(stripes, tmp_path, monkeypatch):
    """An image that failed for a moment is tried again, and compared with images that are in the cache.

    A disk that fails for long ends the run.
    """
    monkeypatch.setattr(features, "BATCH", 4)
    (stripes / "across" / "0.png").write_bytes(b"")
    frames, read = FrameFolder(stripes), hog_baseline.read_features
    cv2.imwrite(str(stripes / "down" / "3.png"), np.zeros((72, 64), np.uint8))
    images, path = np.arange(20), stripes / "down" / "3.png"

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hog_baseline, "read_features", lambda each, report: "away" if each[0] == path else read(each))
    rows = hog_baseline.all_features(frames, images, 0, tmp_path)
    assert np.flatnonzero(np.isnan(rows[:, 0])).tolist() == [0, 13]
    monkeypatch.undo()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="0.png: .*; check the disk, and re-run"):
        patch.setattr(files, "WAITS", ())
        patch.setattr(Path, "read_bytes", failing)
        hog_baseline.all_features(frames, images, 0, tmp_path)
    with pytest.raises(UserError, match="3.png differs in size from other images .64x72 and 64x64."):
        hog_baseline.all_features(frames, images, 0, tmp_path)


@pytest.mark.parametrize("words", [("--seed", 2**32 - 2, "--seeds", 3), ("--split-file", "none.json")])
def test_mistakes_are_reported_before_features_are_computed(stripes, tmp_path, monkeypatch, words):
    monkeypatch.setattr(hog_baseline, "all_features", None)  # computing features is an error
    with pytest.raises(UserError, match="seeds are from 0 to 4294967295|cannot read none.json"):
        classify(stripes, tmp_path / "out", *words)


def test_the_save_folder_is_not_inside_the_data(stripes, tmp_path):
    with pytest.raises(UserError, match="is inside the data folder"):
        classify(stripes, stripes / "hog", "--workers", 0)
    assert sorted(path.name for path in stripes.iterdir()) == ["across", "down"]


def test_flags_and_nearest_neighbors_are_recorded(stripes, tmp_path, capsys):
    entry = classify(stripes, tmp_path / "out", "--knn", 3, "--workers", 0)["models"]["HOG"]["iid"]
    assert entry["knn"]["k"] == 3
    assert f"HOG (3-NN)  {100 * entry['knn']['mean']:.1f}" in capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    assert record["knn"] == 3 and record["data"] == str(stripes) and "checkpoints" not in record


def test_protocols_are_those_of_linear_decoding(stripes, tmp_path, capsys):
    words = ["--readout", "published", "logistic", "--split", "halves", "--train-share", 0.5, 1, "--workers", 0]
    found = classify(stripes, tmp_path / "out", *words)["models"]
    assert {model: list(by_task) for model, by_task in found.items()} == {
        model: ["halves 50%", "halves 100%"] for model in ("HOG", "HOG-logistic")
    }
    assert found["HOG-logistic"]["halves 100%"]["mean"] == 1
    assert "HOG - HOG-logistic, halves 100%: +0.0, p = 1" in capsys.readouterr().out
    index = [json.loads(line)["what"] for line in (tmp_path / "out" / "features" / "index.jsonl").open()]
    assert index == [f"HOG of 20 images in {stripes}"]
