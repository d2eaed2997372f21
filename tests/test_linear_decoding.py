"""Linear decoding: cached features decode like images, the trunk is not trained, results record what was done."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import linear_decoding
import read_saycam
from moco import cli, files, plots
from moco.analysis import accuracy, features, report, splits
from moco.cli import UserError
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.networks import architectures, checkpoint, opening
from tests.support import golden
from tests.support.inputs import make_frames, save_network
from tests.support.videos import write_video

pytestmark = pytest.mark.usefixtures("empty_figures")

ARCH = "shufflenet_v2_x0_5"
CPU = torch.device("cpu")


def decode(data, save_dir, *words):
    """Run the script on data with a small network and few epochs; the content of results.json."""
    small = ["--image-size", 32, "--workers", 0, "--device", "cpu", "--epochs", 3, "--save-dir", save_dir]
    linear_decoding.main([str(word) for word in (data, *small, *words)])
    return json.loads((save_dir / "results.json").read_text())


def tasks(data, *words):
    """The tasks that the script's flags ask for."""
    return splits.make_tasks(FrameFolder(data), vars(linear_decoding.parse_args([str(data), *words])))


@pytest.fixture
def network(tmp_path):
    """A checkpoint of a small network with 5 outputs."""
    torch.manual_seed(3)
    model = architectures.build(ARCH, 5)
    architectures.adapt_batch_norm(model, [torch.randn(32, 3, 32, 32)])  # its features are nearly constant otherwise
    save_network(tmp_path / "net.tar", model, arch=ARCH, n_out=5)
    return tmp_path / "net.tar"


def test_results_record_what_was_decoded(frames, network, tmp_path):
    words = ["--model-path", network, "random", "--model", ARCH, "--names", "TC", "noise", "--seeds", 2, "--knn", 3]
    found = decode(frames, tmp_path / "out", *words)
    assert found["classes"] == ["class_0000", "class_0001", "class_0002"]
    assert (found["chance"], found["seeds"]) == (1 / 3, [0, 1])
    (task,) = tasks(frames, "--seeds", "2")
    assert found["majority"] == found["models"]["TC"]["iid"]["majority"] == accuracy.majority(task)
    assert list(found["models"]) == ["TC", "noise"]
    for entry in (found["models"]["TC"]["iid"], found["models"]["TC"]["iid"]["knn"]):
        assert len(entry["each"]) == 2 and entry["mean"] == pytest.approx(np.mean(entry["each"]))
    with open(tmp_path / "out" / "predictions_TC_iid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    split = json.loads((tmp_path / "out" / "splits" / "iid_1.json").read_text())
    assert [row["file"] for row in rows if row["seed"] == "1"] == split["test"]
    hits = [row["target"] == row["prediction"] for row in rows if row["seed"] == "1"]
    assert np.mean(hits) == found["models"]["TC"]["iid"]["each"][1]
    assert all(row["file"].startswith(row["target"]) for row in rows)
    stems = ("accuracies", "confusion_TC_iid", "confusion_noise_iid")
    figures = {path.name for path in (tmp_path / "out").glob("*.p*")}
    assert figures == {f"{stem}.{ending}" for stem in stems for ending in ("pdf", "png")}


def test_the_same_command_gives_the_same_and_a_written_split_reads_back(frames, network, tmp_path):
    words = ["--model-path", network, "--seed", 4]
    first, again = (decode(frames, tmp_path / name, *words) for name in "ab")
    assert first["models"] == again["models"]
    own = decode(frames, tmp_path / "c", *words, "--split-file", tmp_path / "a" / "splits" / "iid_4.json")
    assert own["models"]["net"]["own"]["each"] == first["models"]["net"]["iid"]["each"]


@pytest.mark.parametrize(("readout", "name"), [("published", "net"), ("normalized", "net-normalized")])
def test_the_decoded_model_loads_as_published_and_predicts_the_same(frames, network, tmp_path, readout, name):
    words = ["--model-path", network, "--seeds", 2, "--lr", 0.01, "--readout", readout]
    found = decode(frames, tmp_path / "out", *words)["models"][name]["iid"]
    path = tmp_path / "out" / f"{name}_labeledS_5_iid.tar"
    content = checkpoint.read(path)
    published = {"acc1_list", "val_acc1_list", "model_state_dict", "optimizer_state_dict", "preds", "target", "images"}
    assert published <= set(content)
    assert len(content["acc1_list"]) == 3
    model = nn.DataParallel(architectures.build(ARCH, 3))
    model.load_state_dict(content["model_state_dict"])
    images = FrameFolder(frames)
    names = [images.name(i) for i in range(len(images))]
    order = np.array([names.index(name) for name in content["images"]])
    batches = loader.in_order(images, 32, CPU, 0, order, 64)
    pictures, targets, _ = next(batches.epoch(0))
    with torch.no_grad():
        preds = model.module.eval()(pictures).argmax(1)
    assert preds.tolist() == content["preds"].tolist() and len(set(preds.tolist())) > 1
    assert targets.tolist() == content["target"].tolist()
    accuracy = float((preds == targets).float().mean())
    assert found["each"][0] == pytest.approx(accuracy)
    assert content["val_acc1_list"] == pytest.approx([100 * accuracy])
    assert opening.find(path).classes == images.classes
    with open(tmp_path / "out" / f"predictions_{name}_iid.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "0"]
    assert [row["prediction"] for row in rows] == [images.classes[label] for label in preds]


def test_the_scale_of_features_changes_the_published_readout_only(tmp_path, network, capsys, monkeypatch):
    frames, results, extract = make_frames(tmp_path / "frames", n=40), [], features.extract_features
    for scale in (0.01, 1, 100):
        monkeypatch.setattr(features, "extract_features", lambda *words, scale=scale: [scale * extract(*words)[0]])
        readouts = ["--readout", "published", "normalized", "logistic"]
        found = decode(frames, tmp_path / f"{scale}", "--model-path", network, "--seeds", 2, *readouts)["models"]
        assert list(found) == ["net", "net-normalized", "net-logistic"]
        results.append([by_task["iid"]["each"] for by_task in found.values()])
        assert ("note: the root mean square of net's features is" in capsys.readouterr().out) == (scale != 1)
    published, normalized, logistic = zip(*results, strict=True)
    assert published[0] != published[1] and normalized[0] == normalized[1] == normalized[2]
    assert logistic[0] == logistic[1] == logistic[2] and min(normalized[0]) > 0.4


def test_a_share_of_the_images_is_trained_on_for_as_many_steps(frames, network, tmp_path):
    """12 images in batches of 4 for 3 epochs are 9 steps; a half of them make 2 steps an epoch, a tenth 1."""
    words = ["--train-share", 0.5, 0.1, 1, "--batch-size", 4]
    decode(frames, tmp_path / "out", "--model-path", network, *words)
    for share, epochs in ((50, 5), (10, 9), (100, 3)):
        assert len(checkpoint.read(tmp_path / "out" / f"net_labeledS_5_iid_{share}.tar")["acc1_list"]) == epochs


def test_a_seed_gives_the_same_alone_and_among_others(frames, network, tmp_path):
    both = decode(frames, tmp_path / "both", "--model-path", network, "--seeds", 2, "--lr", 0.01)
    alone = decode(frames, tmp_path / "alone", "--model-path", network, "--seed", 1, "--lr", 0.01)
    assert both["models"]["net"]["iid"]["each"][1:] == alone["models"]["net"]["iid"]["each"]
    both, alone = ((tmp_path / name / "predictions_net_iid.csv").read_text().splitlines() for name in ("both", "alone"))
    assert both[-12:] == alone[1:]


@pytest.mark.parametrize("mode", ["eval", "adapt", "train"])
def test_only_batch_norm_statistics_change_and_only_in_their_modes(frames, network, tmp_path, mode):
    before = opening.find(network).state
    decode(frames, tmp_path / "out", "--model-path", network, "--bn-mode", mode)
    after = opening.find(tmp_path / "out" / "net_labeledS_5_iid.tar").state
    moved = {name for name in before if not name.startswith("fc.") and not before[name].equal(after[name])}
    assert all(name.rsplit(".", 1)[1].startswith(("running", "num_batches")) for name in moved)
    assert bool(moved) == (mode != "eval")
    if mode == "train":  # one step an epoch
        assert {int(after[name] - before[name]) for name in moved if name.endswith("tracked")} == {3}


def test_random_weights_are_adapted_by_default(frames, tmp_path):
    for words, adapted in (([], True), (["--bn-mode", "eval"], False)):
        decode(frames, tmp_path / "out", "--model-name", "random", "--model", ARCH, "--overwrite", *words)
        state = opening.find(tmp_path / "out" / "random_labeledS_5_iid.tar").state
        assert bool(state["conv1.1.running_mean"].any()) == adapted


class AlwaysEval(nn.Module):
    """A trunk that stays in evaluation mode."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images):
        return self.trunk(images)

    def train(self, mode=True):
        return super().train(False)


def test_cached_and_uncached_decoding_are_equal(tmp_path):
    frames = FrameFolder(golden.IMAGES)
    torch.manual_seed(0)
    trunk = architectures.freeze(architectures.remove_head(architectures.build(ARCH, 5)))
    images = np.arange(len(frames))
    features.adapt_batch_norm(trunk, frames, images, 0, 64)
    (rows,) = features.extract_features(trunk, frames, images, tmp_path, 64)
    labels = torch.from_numpy(frames.labels())
    for seed in range(5):
        train = np.random.default_rng(seed).permutation(images)[:24]
        order = loader.EpochSampler(train, 24, seed)
        batches = loader.FrameLoader(frames, augment.RECIPES["none"], 64, order, CPU)
        ways = [
            linear_decoding.cached_epochs(torch.from_numpy(rows[train]), labels[train], 24, 15),
            linear_decoding.drifting_epochs(AlwaysEval(trunk), batches, labels, 15),
        ]
        scores, histories = [], []
        for epochs in ways:
            torch.manual_seed(seed)
            layer = nn.Linear(rows.shape[1], 4)
            histories.append(linear_decoding.fit(layer, epochs, 5e-4, 100)[1])
            scores.append(layer(torch.from_numpy(np.array(rows))).detach())
        torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)
        assert histories[0] == pytest.approx(histories[1], abs=0.5)
        assert histories[0][-1] > histories[0][0]


def test_unreadable_images_are_left_out_and_reported(frames, network, tmp_path, capsys):
    (frames / "class_0001" / "img_0003.jpeg").write_bytes(b"no image")
    for mode in ("eval", "train"):
        found = decode(frames, tmp_path / mode, "--model-path", network, "--bn-mode", mode)["models"]["net"]["iid"]
        assert found["left_out"] == ["class_0001/img_0003.jpeg"]
        assert found["train_images"][0] + found["test_images"][0] == 23
        assert "class_0001/img_0003.jpeg" in capsys.readouterr().out


@pytest.mark.draws
def test_compared_results_are_in_the_table_and_the_figure(frames, network, tmp_path, capsys, monkeypatch):
    decode(frames, tmp_path / "a", "--model-path", network, "--names", "one")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="another result of one .iid.; choose other"):
        patch.setattr(features, "extract_features", None)  # computing anything is an error
        words = ["--model-path", network, "--names", "one", "--compare", tmp_path / "a" / "results.json"]
        decode(frames, tmp_path / "b", *words)
    capsys.readouterr()
    found = decode(frames, tmp_path / "b", "--model-path", network, "--compare", tmp_path / "a" / "results.json")
    assert list(found["models"]) == ["one", "net"]
    capsys.readouterr()
    linear_decoding.main(["--compare", str(tmp_path / "b" / "results.json"), "--save-dir", str(tmp_path / "c")])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert rows == ["top-1", "chance", "majority", "one", "net", "majority", "differences", "one"]
    (comparison,) = found["comparisons"]  # the same model on one split
    assert (comparison["difference"], comparison["p"], comparison["test"]) == (0, 1, "McNemar, exact")
    assert (tmp_path / "c" / "accuracies.pdf").stat().st_size > 1000


def test_mistakes_are_one_line_before_any_work(frames, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "extract_features", None)  # computing anything is an error
    out = tmp_path / "out"
    for words, message in [
        ([frames], "name at least one model"),
        ([], "give a folder that has one folder of images per class"),
        ([frames, "--model-path", "none.tar"], "no checkpoint none.tar"),
        ([frames, "--model-name", "TC-S"], "there is no TC-S.tar .*; download TC-S-resnext"),
        ([frames, "--model-path", network, "--num-outs", 7], "the head of .* has 5 outputs, not 7"),
        ([frames, "--model-path", network, network], "give each a different name, without /, with --names"),
        ([frames, "--model-path", network, "--names", "a", "b"], "--names a b: 2 names for 1 models .*net.tar"),
        ([frames, "--model-path", network, "--names", "a/b"], "models named a/b: give each a different name"),
        ([frames, "--model-path", network, "--names", ""], "give each a different name"),
        ([frames, "--model-path", network, "--names", "n" * 240], "is too long for file names; give a shorter one"),
        ([frames, "--model-path", network, "--split", "exemplar"], "contains no exemplar"),
        ([frames, "--model-path", network, "--save-dir", frames / "out"], "out is inside the data folder"),
        ([frames, "--model-name", "random", "--model", "alexnet", "--image-size", 32], "alexnet|AlexNet"),
        ([frames, "--model-path", network, "--seed", 2**32 - 1, "--seeds", 2], "seeds are from 0 to 4294967295"),
        ([frames, "--model-path", network, "--test-data", frames], "frames is the folder to train on; give another"),
        (
            [frames, "--model-path", network, "--bn-mode", "train", "--readout", "logistic"],
            "normalized need fixed ones",
        ),
        ([tmp_path / "nowhere", "--model-path", network], "nowhere"),
        ([frames / "class_0000", "--model-path", network], "has one class"),
    ]:
        with pytest.raises(UserError, match=message):
            linear_decoding.main([str(word) for word in ("--save-dir", out, *words)])
        assert not (out / "results.json").exists()


def test_results_are_not_overwritten_by_default(frames, network, tmp_path):
    decode(frames, tmp_path / "out", "--model-path", network)
    with pytest.raises(UserError, match="results.json exists; give --overwrite"):
        decode(frames, tmp_path / "out", "--model-path", network)
    decode(frames, tmp_path / "out", "--model-path", network, "--overwrite")


def test_weights_that_are_not_finite_are_an_error(frames, network, tmp_path):
    content = checkpoint.read(network)
    content["model_state_dict"]["module.conv1.0.weight"][0] = float("nan")
    checkpoint.write(network, content)
    with pytest.raises(UserError, match="net.tar are not finite"):
        decode(frames, tmp_path / "out", "--model-path", network)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_classifier_that_diverges_is_an_error(frames, network, tmp_path):
    with pytest.raises(UserError, match="the scores of net on iid are not finite; lower --lr"):
        decode(frames, tmp_path / "out", "--model-path", network, "--lr", 1e37)
    assert not (tmp_path / "out" / "results.json").exists()


def test_every_run_records_flags_commit_and_checkpoints(frames, network, tmp_path, capsys):
    decode(frames, tmp_path / "out", "--model-path", network, "random", "--model", ARCH, "--epochs", 1)
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    assert record["checkpoints"] == {str(network): files.sha256(network)}
    assert record["epochs"] == 1 and record["data"] == str(frames) and record["commit"] == cli.commit()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith(f"net: {ARCH} from {network} (SHA-256 {files.sha256(network)[:12]}")
    assert second == f"random: {ARCH} with random weights, 32 pixels"


def test_an_adapted_seed_gives_the_same_alone_and_among_others(frames, network, tmp_path):
    """Its statistics are those of its own training images, not of those that other seeds train on."""
    words = ["--model-path", network, "--bn-mode", "adapt", "--lr", 0.01, "--knn", 3]
    both = decode(frames, tmp_path / "both", *words, "--seed", 5, "--seeds", 2)["models"]["net"]["iid"]
    alone = [decode(frames, tmp_path / str(seed), *words, "--seed", seed)["models"]["net"]["iid"] for seed in (5, 6)]
    assert both["each"] == [each["mean"] for each in alone]
    assert both["knn"]["each"] == [each["knn"]["mean"] for each in alone]


def test_the_published_mode_computes_in_float32(frames, network, tmp_path, monkeypatch):
    seen, fit = [], linear_decoding.fit

    def watched(*args):
        seen.append(torch.backends.cudnn.allow_tf32)
        return fit(*args)

    monkeypatch.setattr(linear_decoding, "fit", watched)
    decode(frames, tmp_path / "out", "--model-path", network, "--bn-mode", "train")
    assert seen == [False]


def test_knn_is_in_the_table_and_the_figure(frames, network, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "accuracy_bars", lambda models, *_: drawn.update(models))
    found = decode(frames, tmp_path / "out", "--model-path", network, "--knn", 3)["models"]
    knn = found["net"]["iid"]["knn"]
    assert f"net (3-NN)  {100 * knn['mean']:.1f}" in capsys.readouterr().out.splitlines()
    assert drawn["net (3-NN)"]["iid"]["mean"] == knn["mean"] and list(found) == ["net"]


def test_numbers_are_on_disk_before_the_first_figure(frames, network, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    for name in ("confusion_matrix", "accuracy_bars"):
        monkeypatch.setattr(plots, name, fail)
    with pytest.raises(MemoryError):
        decode(frames, tmp_path / "out", "--model-path", network)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["models"]["net"]["iid"]["mean"] >= 0
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and path.parent.name != "features"}
    written = {"args.json", "results.json", "predictions_net_iid.csv", "net_labeledS_5_iid.tar", "iid_0.json"}
    assert names == written


def test_results_of_other_classes_are_not_compared(frames, network, tmp_path, monkeypatch):
    decode(frames, tmp_path / "a", "--model-path", network, "--classes", "class_0000", "class_0001")
    monkeypatch.setattr(features, "extract_features", None)  # computing anything is an error
    words = ["--model-path", network, "--names", "two", "--compare", tmp_path / "a" / "results.json"]
    with pytest.raises(UserError, match="--compare: results of iid have different classes .class_0002"):
        decode(frames, tmp_path / "b", *words)


def test_file_names_that_are_not_utf8_are_in_the_predictions(frames, network, tmp_path):
    for label in range(3):
        for path in (frames / f"class_000{label}").iterdir():
            try:
                path.rename(os.fsdecode(os.fsencode(path).replace(b"img", b"\xff")))
            except OSError:
                pytest.skip("this file system takes UTF-8 names only")
    decode(frames, tmp_path / "out", "--model-path", network)
    assert rb"/\udcff_0003.jpeg" in (tmp_path / "out" / "predictions_net_iid.csv").read_bytes()


@pytest.mark.draws
def test_readouts_and_shares_are_in_one_table_and_a_figure(frames, network, tmp_path, capsys):
    words = ["--model-path", network, "--readout", "published", "logistic", "--train-share", 0.5, 1, "--seeds", 2]
    found = decode(frames, tmp_path / "out", *words, "--knn", 2)
    assert list(found["models"]) == ["net", "net-logistic"]
    entries = found["models"]["net-logistic"]
    assert list(entries) == ["iid 50%", "iid 100%"]
    (half,) = tasks(frames, "--seeds", "2", "--train-share", "0.5")
    assert entries["iid 50%"]["train_images"] == [len(train) for train, _ in half.splits.values()]
    assert entries["iid 50%"]["test_images"] == [12, 12]
    assert "knn" in found["models"]["net"]["iid 50%"] and "knn" not in entries["iid 50%"]
    assert (tmp_path / "out" / "training_images.pdf").stat().st_size > 1000
    assert {each["task"] for each in found["comparisons"]} == {"iid 50%", "iid 100%"}
    assert "net - net-logistic, iid 50%: " in capsys.readouterr().out
    plain = decode(frames, tmp_path / "plain", "--model-path", network, "--seeds", 2)["models"]["net"]["iid"]
    assert plain["each"] == found["models"]["net"]["iid 100%"]["each"] and "train_share" not in plain
    (rows,) = (np.load(path) for path in (tmp_path / "plain" / "features").glob("*.npy"))
    (task,) = tasks(frames, "--seeds", "2")
    train, test = task.splits[1]
    expected = report.logistic(rows[train], task.labels[train], 1).score(rows[test], task.labels[test])
    assert entries["iid 100%"]["each"][1] == pytest.approx(expected)


def test_a_second_folder_is_tested_on(frames, network, tmp_path):
    other = make_frames(tmp_path / "other", ["class_0000", "class_0002", "more"], 5, 48)
    found = decode(frames, tmp_path / "out", "--model-path", network, "--test-data", other, "--seeds", 2)
    entry = found["models"]["net"]["to other"]
    assert (entry["train_images"], entry["test_images"]) == ([16, 16], [10, 10])
    assert list(entry["per_class"]) == ["class_0000", "class_0002"] and "hits" in entry
    with open(tmp_path / "out" / "predictions_net_to_other.csv", newline="") as file:
        assert {row["file"].split("/")[0] for row in csv.DictReader(file)} == {"other"}


def test_the_cache_has_an_index_in_words(frames, network, tmp_path):
    words = ["--model-path", network, "random", "--model", ARCH, "--names", "TC", "noise", "--seeds", 2]
    for name in "ab":
        decode(frames, tmp_path / name, *words, "--features-dir", tmp_path / "cache")
    lines = [json.loads(line) for line in (tmp_path / "cache" / "index.jsonl").read_text().splitlines()]
    kept = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix in (".npy", ".tar")}
    assert len(lines) == len(kept) == 5 and {line["file"] for line in lines} == kept
    where = f"of 24 images in {frames}"
    network_words = f"{ARCH} from {network} (SHA-256 {files.sha256(network)[:12]})"
    assert lines[0]["what"] == f"features of {network_words}, 32 pixels, {where}"
    statistics = f"batch-norm statistics of {ARCH} with random weights, 32 pixels, of 12 images in {frames}, seed"
    assert [line["what"] for line in lines[1::2]] == [f"{statistics} 0", f"{statistics} 1"]
    adapted = f"features of {ARCH} with random weights, 32 pixels, batch norm adapted to 12 of them, {where}"
    assert [line["what"] for line in lines[2::2]] == [adapted] * 2


def test_predictions_say_which_moment_an_image_shows(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(files.make_output_dir(tmp_path / "videos") / name, 60)
    flags = ["--save-dir", str(tmp_path / "frames"), "--class-by", "video", "--size", "32", "--workers", "0"]
    read_saycam.main([str(tmp_path / "videos"), *flags])
    flags = ["--model-path", "random", "--model", "shufflenet_v2_x0_5", "--image-size", "32", "--epochs", "1"]
    linear_decoding.main([str(tmp_path / "frames"), *flags, "--workers", "0", "--save-dir", str(tmp_path / "out")])
    images = FrameFolder(tmp_path / "frames")
    expected = {images.name(i): str(images.source(i)) for i in range(len(images))}
    with open(tmp_path / "out" / "predictions_random_iid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["source"] == expected[row["file"]] for row in rows)
