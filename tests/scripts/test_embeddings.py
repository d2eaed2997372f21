"""Embeddings: equal to a plain forward pass, a row for each image, the same files after any interruption."""

import csv
import itertools
import json

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import read_saycam
from moco import files
from moco.analysis import embeddings, features
from moco.cli import UserError
from moco.data import loader, manifest
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers, opening
from scripts import embeddings as script
from tests.support.inputs import make_frames, save_network
from tests.support.videos import number, write_video

pytestmark = pytest.mark.usefixtures("empty_figures")

ARCH = "shufflenet_v2_x0_5"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)


def export(data, save_dir, *words):
    """Run the script on small images; the summary that it writes, or None."""
    flags = ["--image-size", 32, "--device", "cpu", "--workers", 0, "--save-dir", save_dir]
    flags += [] if "--model-path" in words else ["--model-path", "random", "--model", ARCH]
    script.main([str(word) for word in [*flags, *words, *([data] if data else [])]])
    path = save_dir / "embeddings.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(save_dir, name="images.csv"):
    with open(save_dir / name, newline="") as file:
        return list(csv.DictReader(file))


def outputs(save_dir):
    """The bytes of all embeddings, and of the table and the summary."""
    return {path.name: path.read_bytes() for path in save_dir.iterdir() if not path.name.startswith((".", "args"))}


def test_random_weights_have_statistics_of_the_images(frames, tmp_path):
    words = ["--model-path", "random", "--model", "resnet18", "--seed", 3]
    export(frames, tmp_path / "out", *words)
    torch.manual_seed(3)
    trunk = architectures.remove_head(architectures.build("resnet18"))
    images = FrameFolder(frames)
    features.adapt_batch_norm(trunk, images, np.arange(24), 3, 32)
    with torch.no_grad():
        expected = torch.cat([trunk(pictures) for pictures, *_ in features.batches(trunk, images, None, 32, 0)])
    found = np.load(tmp_path / "out" / "random_layer_penultimate.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_layers_of_several_models_are_those_of_a_plain_forward_pass(frames, network, tmp_path):
    """With torchvision's own reading of the images."""
    chosen = ("penultimate", 6, "layer3.1.relu")
    words = ["--model-path", network, "random", "--model", "resnet18", "--layer", *chosen, "--image-size", 40]
    summary = export(frames, tmp_path / "out", *words)
    entry = summary["settings"]["models"]["net"]
    assert entry["layers"] == {"penultimate": "penultimate", "6": "layer2.1.relu", "layer3.1.relu": "layer3.1.relu"}
    assert (entry["sha256"], entry["arch"]) == (files.sha256(network), "resnet18")
    assert {path.name for path in (tmp_path / "out").glob("random*.npy")} == {
        f"random_layer_{layer}.npy" for layer in chosen
    }
    names, transforms = [row["file"] for row in table(tmp_path / "out")], torchvision.transforms
    read = transforms.Compose([transforms.ToTensor(), transforms.Normalize(loader.MEAN, loader.STD)])
    images = torch.stack([read(Image.open(frames / name).convert("RGB")) for name in names])
    model = opening.open_model(network).network.eval()
    with torch.no_grad():
        expected = layers.layer_means(model, list(entry["layers"].values())[1:], images)
        model.fc = nn.Identity()
        expected = [model(images), *expected]
    for layer, values in zip(chosen, expected, strict=True):
        found = np.load(tmp_path / "out" / f"net_layer_{layer}.npy")
        assert found.dtype == np.float32 and found.std(0).mean() > 1e-3
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    """Ends a run at once."""


def test_an_interrupted_export_is_completed_to_the_same_bytes(frames, tmp_path, monkeypatch):
    """After two batches of 6, without computing them again."""
    words = ["--layer", "penultimate", "conv5", "--dtype", "float16"]
    (frames / "class_0001" / "img_0003.jpeg").write_bytes(b"no image")
    export(frames, tmp_path / "a", *words)
    network, passes = layers.layer_means, []

    def failing(*arguments):
        passes.append(1)
        if len(passes) == 3:
            raise Killed
        return network(*arguments)

    monkeypatch.setattr(layers, "layer_means", failing)
    with pytest.raises(Killed):
        export(frames, tmp_path / "b", *words)
    assert "unreadable" not in json.loads((tmp_path / "b" / "embeddings.json").read_text())
    export(frames, tmp_path / "b", *words)
    assert len(passes) == 7
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_shards_concatenated_are_one_run(tmp_path, capsys):
    """Three batches in twelve shards, of which nine are empty."""
    frames = make_frames(tmp_path / "frames", ["a", "b"], 5)
    export(frames, tmp_path / "one")
    for shard in reversed(range(12)):
        export(frames, tmp_path / "shards", "--shard", f"{shard}/12")
    folders = sorted((tmp_path / "shards").iterdir())
    assert len(folders) == 3 and folders[0].name == "shard_03_of_12"
    assert capsys.readouterr().out.count("there are no images for shard_") == 9
    name = "random_layer_penultimate.npy"
    found = np.concatenate([np.load(folder / name) for folder in folders])
    np.testing.assert_array_equal(found, np.load(tmp_path / "one" / name))
    assert [row for folder in folders for row in table(folder)] == table(tmp_path / "one")


def test_a_corrupt_image_keeps_its_row_and_is_reported(frames, tmp_path, capsys):
    corrupt = [3, *range(8, 16)]  # two whole batches, too
    images = FrameFolder(frames)
    for i in corrupt:
        images.path(i).write_bytes(b"no image")
    summary = export(frames, tmp_path / "out", "--rdm", "cosine", "--tsne")
    found = np.load(tmp_path / "out" / "random_layer_penultimate.npy")
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == np.flatnonzero(np.isnan(found).any(1)).tolist() == corrupt
    names = [images.name(i) for i in corrupt]
    assert summary["unreadable"] == names and summary["number"] == len(found) == len(table(tmp_path / "out")) == 24
    assert f"9 images cannot be read and have rows of NaN: {', '.join(names[:5])}" in capsys.readouterr().out
    matrix = np.load(tmp_path / "out" / "random_layer_penultimate_rdm_cosine.npy")
    assert np.flatnonzero(np.isnan(matrix).all(1)).tolist() == corrupt
    points = table(tmp_path / "out", "random_layer_penultimate_tsne.csv")
    assert [i for i, row in enumerate(points) if row["x"] == "nan"] == corrupt
    images.path(3).write_bytes(images.path(4).read_bytes())  # which was away for a moment
    assert export(frames, tmp_path / "out")["unreadable"] == names[1:]
    again = np.load(tmp_path / "out" / "random_layer_penultimate.npy")
    assert np.isfinite(again[3]).all() and np.flatnonzero(np.isnan(again).all(1)).tolist() == corrupt[1:]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A frame folder of two recordings of 12 frames, in classes of 5 frames; one image could not be extracted."""
    folder = tmp_path_factory.mktemp("recordings")
    for name in ("S_20130417_0600_01.mp4", "A_20140101_1215_02.mp4"):
        write_video(folder / name, 72)
    flags = ["--seg-len", "1", "--fps", "5", "--workers", "0"]
    read_saycam.main([str(folder), "--save-dir", str(folder / "frames"), *flags])
    plan = manifest.read(folder / "frames")
    plan["videos"][1]["missing"] = [[14, 15]]
    (folder / "frames" / manifest.slot_path(plan, plan["videos"][1], 14)).unlink()
    manifest.write(folder / "frames", plan)
    return folder / "frames"


def test_the_table_has_what_the_manifest_knows(extracted, tmp_path):
    export(extracted, tmp_path / "out")
    rows = table(tmp_path / "out")
    images = FrameFolder(extracted)
    assert [row["file"] for row in rows] == [images.name(i) for i in range(23)]
    assert [row["class"] for row in rows] == [images.classes[label] for label in images.labels()]
    assert list(rows[0]) == ["file", "class", *embeddings.SOURCE]
    for row in rows:  # the pictures show their frame numbers
        assert int(row["frame"]) == number(extracted / row["file"])
        assert float(row["second"]) == pytest.approx(int(row["frame"]) * 1001 / 30000, abs=1e-3)
    first = {"recording": "A_20140101_1215_02.mp4", "child": "A", "date": "2014-01-01", "age_months": "12.493"}
    second = {"recording": "S_20130417_0600_01.mp4", "child": "S", "date": "2013-04-17", "age_months": "6.0"}
    assert [{key: row[key] for key in first} for row in rows] == [first] * 12 + [second] * 11


def test_images_are_thinned_in_time(extracted, tmp_path):
    export(extracted, tmp_path / "recordings", "--every", 5)
    assert [row["frame"] for row in table(tmp_path / "recordings")] == ["0", "30", "60", "0", "36", "66"]
    for name, i in itertools.product("ab", (2, 10, 1, 30)):
        path = tmp_path / "tree" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((32, 32, 3), i, np.uint8))
    export(tmp_path / "tree", tmp_path / "classes", "--every", 2)
    assert [row["file"] for row in table(tmp_path / "classes")] == ["a/1.png", "a/10.png", "b/1.png", "b/10.png"]


def test_a_flat_folder_and_a_list_of_stimuli(frames, network, tmp_path):
    export(frames / "class_0001", tmp_path / "flat", "--model-path", network)
    assert table(tmp_path / "flat")[7] == {"file": "img_0007.jpeg", "class": "class_0001"}
    lines = ["file,looking_time,class", "class_0001/img_0007.jpeg, 2.5,toy", "class_0000/img_0000.jpeg,,", ""]
    (frames / "list.csv").write_text("\n".join(lines))
    export(None, tmp_path / "list", "--list", frames / "list.csv", "--model-path", network)
    assert table(tmp_path / "list") == [
        {"file": "class_0001/img_0007.jpeg", "class": "toy", "looking_time": "2.5"},
        {"file": "class_0000/img_0000.jpeg", "class": "class_0000", "looking_time": ""},
    ]
    listed, flat = (np.load(tmp_path / name / "net_layer_penultimate.npy") for name in ("list", "flat"))
    np.testing.assert_allclose(listed[0], flat[7], rtol=1e-4, atol=1e-6)


def test_means_of_groups_are_compared_with_other_layers_and_a_users_matrix(frames, tmp_path, capsys):
    """One of a group of four images cannot be read; one image is in no range."""
    lines = [f"class_000{i % 3}/img_000{i // 3}.jpeg,{'SA'[i % 2]},{6.2 + i // 3 if i < 23 else 40}" for i in range(24)]
    (frames / "list.csv").write_text("\n".join(["file,child,age_months", *lines]))
    (frames / "class_0000" / "img_0004.jpeg").write_bytes(b"no image")  # the first of its group in the list
    np.save(tmp_path / "looks.npy", 1 - np.eye(4))
    words = ["--list", frames / "list.csv", "--layer", "penultimate", "conv5"]
    analyses = ["--rdm", "correlation", "--tsne", "--rdm-with", tmp_path / "looks.npy"]
    export(None, tmp_path / "out", *words, "--group-by", "child", "age_months:6-10,10-20", *analyses)
    groups = [" ".join(row.values()) for row in table(tmp_path / "out", "groups.csv")]
    assert groups == ["A 6-10 6 0", "A 10-20 5 0", "S 6-10 6 0", "S 10-20 5 1"]
    assert "note: 1 images are in no range of --group-by, and in no group" in capsys.readouterr().out
    rows = np.load(tmp_path / "out" / "random_layer_penultimate.npy").astype(np.float64)
    label = np.array([2 * (i % 2 == 0) + (i // 3 >= 4) for i in range(23)])
    expected = [np.nanmean(rows[:23][label == group], 0) for group in range(4)]
    means = np.load(tmp_path / "out" / "random_layer_penultimate_groups.npy")
    np.testing.assert_allclose(means, expected, rtol=1e-6)
    matrices = [
        np.load(tmp_path / "out" / f"random_layer_{layer}_groups_rdm_correlation.npy")
        for layer in ("penultimate", "conv5")
    ]
    np.testing.assert_array_equal(matrices[0], embeddings.dissimilarity(means, "correlation"))
    found = table(tmp_path / "out", "rdm_correlations.csv")
    assert [(row["first"], row["second"], row["pairs"]) for row in found] == [
        ("random, penultimate layer", "random, layer conv5", "6"),
        ("random, penultimate layer", "looks", "6"),
        ("random, layer conv5", "looks", "6"),
    ]
    assert float(found[0]["spearman"]) == pytest.approx(embeddings.compare(*matrices, 0)[0])
    assert found[1]["spearman"] == "nan"  # the same for all pairs
    assert [row["child"] for row in table(tmp_path / "out", "random_layer_conv5_groups_tsne.csv")] == list("AASS")
    export(None, tmp_path / "out", *words, "--group-by", "child")  # no matrix of other groups is left
    assert {path.name for path in tmp_path.glob("out/*_groups*")} == {
        f"random_layer_{layer}_groups.npy" for layer in ("penultimate", "conv5")
    }


def test_a_network_whose_embeddings_are_all_the_same_has_notes_in_place_of_figures(frames, tmp_path, capsys):
    network = architectures.build("resnet18", 3)
    for layer in network.layer4.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 0.3)
    nn.init.zeros_(network.layer4[0].downsample[1].weight)
    save_network(tmp_path / "collapsed.tar", network, arch="resnet18", n_out=3)
    words = ["--model-path", tmp_path / "collapsed.tar", "random", "--model", "resnet18"]
    export(frames, tmp_path / "out", *words, "--rdm", "correlation", "--tsne")
    printed = capsys.readouterr().out
    assert "note: no t-SNE of collapsed, penultimate layer: t-SNE needs embeddings that differ" in printed
    assert "note: collapsed, penultimate layer: no embedding varies, so that correlation is not defined" in printed
    assert np.isnan(np.load(tmp_path / "out" / "collapsed_layer_penultimate_rdm_correlation.npy")).all()
    figures = ["random_layer_penultimate_rdm_correlation", "random_layer_penultimate_tsne", "rdm_correlations"]
    assert sorted(path.stem for path in tmp_path.glob("out/*.pdf")) == figures


def test_half_precision(frames, tmp_path, monkeypatch):
    for dtype in ("float32", "float16"):
        export(frames, tmp_path / dtype, "--dtype", dtype)
    single, half = (np.load(tmp_path / f"float{n}" / "random_layer_penultimate.npy") for n in (32, 16))
    np.testing.assert_array_equal(single.astype(np.float16), half)
    network = layers.layer_means
    monkeypatch.setattr(layers, "layer_means", lambda *words: [1e6 + rows for rows in network(*words)])
    with pytest.raises(UserError, match="class_0000/img_0000.jpeg are not finite in float16"):
        export(frames, tmp_path / "out", "--dtype", "float16")


def test_a_finished_export_is_kept_and_analyzed_further(frames, tmp_path, monkeypatch):
    export(frames, tmp_path / "out")
    before = outputs(tmp_path / "out")
    with pytest.raises(UserError, match="embeddings.json exists; give --overwrite"):
        export(frames, tmp_path / "out", "--layer", 1)
    assert outputs(tmp_path / "out") == before
    (tmp_path / "out" / "random_layer_penultimate.npy").write_bytes(before["random_layer_penultimate.npy"][:-4])
    export(frames, tmp_path / "out")  # a damaged array is computed again
    assert outputs(tmp_path / "out") == before
    with monkeypatch.context() as patch:
        patch.setattr(features, "write_features", None)  # computing anything is an error
        export(frames, tmp_path / "out", "--rdm", "euclidean")
    after = outputs(tmp_path / "out")
    assert before.items() <= after.items()
    new = {f"random_layer_penultimate_rdm_euclidean.{ending}" for ending in ("npy", "pdf", "png")}
    assert after.keys() - before.keys() == new
    (tmp_path / "out" / "random_layer_1_rdm_cosine.npy").write_bytes(b"of other weights")
    summary = export(frames, tmp_path / "out", "--layer", 1, "--overwrite")
    assert not list(tmp_path.glob("out/random_layer_1_*"))
    assert list(summary["settings"]["models"]["random"]["layers"]) == ["1"]


def test_models_of_equal_names_are_told_apart_by_their_folders():
    assert script.model_names(["TC-S/net.tar", "TC-A/net.tar", "random"]) == ["TC-S_net", "TC-A_net", "random"]
    with pytest.raises(UserError, match="models have equal names"):
        script.model_names(["TC-S/net.tar", "TC-S/net.tar"])


def test_mistakes_are_one_line_before_any_work(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "write_features", None)  # computing anything is an error
    monkeypatch.setattr(embeddings, "RDM_ITEMS", 20)
    (tmp_path / "gone.csv").write_text("file\nx.png\ny.png")
    np.save(tmp_path / "own.npy", np.eye(4))
    own = ["--rdm", "cosine", "--group-by", "class", "--rdm-with", tmp_path / "own.npy"]
    for data, words, message in [
        (frames, ["--rdm", "cosine"], "the matrix of 24 images would have 0.0 GB; at most 20 are compared"),
        (frames, ["--tsne", "--color-by", "age"], "--color-by age: images.csv has the columns file, class"),
        (frames, ["--group-by", "age_months:6-12"], "--group-by age_months:6-12: images.csv has the columns file, cl"),
        (frames, own, "the matrices here are 3 x 3"),
        (frames, ["--rdm-with", "own.npy"], "--rdm-with compares with the matrices of --rdm; give it, too"),
        (frames, ["--shard", "0/2", "--tsne"], "--rdm, --tsne and --group-by compare all images; give them without"),
        (frames, ["--layer", 7], "there is no layer 7"),
        (frames, ["--save-dir", frames / "out"], "is inside the data folder"),
        (None, ["--list", tmp_path / "gone.csv"], r"there is no file x.png \(and 1 more\)"),
    ]:
        with pytest.raises(UserError, match=message):
            export(data, tmp_path / "out", *words)
        assert not list(tmp_path.glob("out/*.csv"))
