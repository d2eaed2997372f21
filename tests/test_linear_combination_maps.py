"""Class activation maps: equal to golden values, for the images and classes of the flags."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import linear_combination_maps as script
from moco import pictures
from moco.analysis import film
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers, opening
from tests.support import golden
from tests.support.inputs import run_small

pytestmark = pytest.mark.usefixtures("empty_figures")
CPU = torch.device("cpu")


def draw(*arguments):
    """Run the script, see run_small; the names of the figures in its folder."""
    run_small(script, *arguments)
    return {path.name for path in arguments[1].iterdir()} - {"args.json"}


def test_maps_and_masks_are_the_published_ones():
    expected, model = np.load(golden.DATA / "maps.npz"), golden.model()
    images, last_maps, _ = film.images_and_maps(
        layers.spatial_trunk(model), FrameFolder(golden.IMAGES), range(48), 224, CPU, square=True
    )
    weights = architectures.head(model).weight[int(expected["class_idx"])]
    heatmaps = film.upsample(film.class_activation_map(last_maps, weights), (224, 224))
    masked = (script.masked(images, heatmaps) - loader.MEAN) / loader.STD
    for found, key in ((heatmaps, "class_map"), (masked.transpose(0, 3, 1, 2), "masked")):
        blocks = functional.avg_pool2d(torch.from_numpy(found), 8)[::3].numpy()
        golden_blocks = expected[key].astype(np.float32)
        assert np.abs(blocks - golden_blocks).max() < 2e-3 * np.ptp(golden_blocks)


def test_captions_are_the_true_and_the_predicted_class(frames, network, tmp_path, monkeypatch):
    """An image that cannot be read is left out."""
    drawn = []
    (frames / "class_0000" / "img_0003.jpeg").write_bytes(b"")
    monkeypatch.setattr(pictures, "image_grid", lambda images, captions, *_: drawn.extend(captions))
    (frames / "class_0000").rename(frames / "zebra")  # a class that the model does not have
    draw(frames, tmp_path / "out", network, "--class-idx", 1, "--batch-size", 24)
    assert [true for true, _ in drawn] == ["class_0001"] * 8 + ["class_0002"] * 8 + ["zebra"] * 7
    images, _, _ = film.images_and_maps(lambda images: images, FrameFolder(frames), range(24), 64, CPU)
    normalized = (images / 255 - loader.MEAN) / loader.STD
    with torch.no_grad():
        logits = opening.open_model(network).network.eval()(torch.from_numpy(normalized).float().permute(0, 3, 1, 2))
    assert [predicted for _, predicted in drawn] == [f"class_{k:04d}" for k in logits.argmax(1)]


def test_a_class_is_given_by_number_or_name():
    assert opening.class_number("car", ["cat", "car"], 2) == opening.class_number("1", ["cat", "car"], 2) == 1
    assert opening.class_number("3", None, 4) == 3
    assert opening.class_number("1", ["1", "0"], 2) == 0  # a name comes first
    with pytest.raises(UserError, match=r"outputs, 0 to 3; did you mean cat, car, \w+\?$"):
        opening.class_number("cats", ["dog", "cat", "car", "foot"], 4)
    for text, names in (("2", ["cat", "car"]), ("-1", None), ("dog", ["cat", "car"]), ("dog", None)):
        with pytest.raises(UserError, match=f"--class-idx {text}: the model has 2 outputs, 0 to 1"):
            opening.class_number(text, names, 2)


def test_images_are_chosen_by_seed_from_the_classes_of_the_flags(frames):
    images = FrameFolder(frames)
    labels = images.labels()
    assert set(labels[script.choose(images, "class_0001", "class", 99, 0)]) == {1}
    assert set(labels[script.choose(images, "class_0001", "others", 99, 0)]) == {0, 2}
    assert len(script.choose(images, None, "all", 99, 0)) == 24
    a, b, again = (script.choose(images, None, "all", 5, seed).tolist() for seed in (0, 1, 0))
    assert a == again != b
    with pytest.raises(UserError, match="has no class folder class_01; did you mean class_0001, class_00"):
        script.choose(images, "class_01", "class", 5, 0)


def test_every_panel_has_a_file_of_its_own(frames, network, tmp_path):
    out = tmp_path / "out"
    draw(frames, out, network, "--class-idx", "class_0001", "--batch-size", 13)
    draw(frames, out, network, "--class-idx", 1, "--class-only", "--overlay")
    stem = "linear_combination_maps_class_1"
    found = draw(frames, out, network, "--class-idx", 1, "--others")
    assert found == {f"{stem}{end}.{kind}" for end in ("", "_class_overlay", "_others") for kind in ("pdf", "png")}


def test_classes_that_are_not_the_folders_are_not_called_wrong(frames, network, tmp_path, monkeypatch, capsys):
    """Those of a head without names are numbers."""
    drawn = []
    monkeypatch.setattr(
        pictures, "image_grid", lambda images, captions, path, title, legend: drawn.append((captions, legend))
    )
    words = ["random", "--model", "resnet18", "--n_out", 7]
    draw(frames, tmp_path / "a", *words, "--class-idx", 6, "--batch-size", 2)
    for label, name in enumerate(("cat", "dog", "car")):  # the model has three episodes, of these names before
        (frames / f"class_{label:04d}").rename(frames / name)
    draw(frames, tmp_path / "a", network, "--class-idx", 2, "--batch-size", 2)
    printed = capsys.readouterr().out
    assert printed.count("note: no output of the model is a class folder of ") == 2
    assert printed.count("linear_decoding.py") == 2
    for captions, legend in drawn:
        assert [predicted for _, predicted in captions] == [None, None]
        assert legend.endswith("Below an image: its folder")
    with pytest.raises(UserError, match="7 outputs .* not the 3 class folders"):
        draw(frames, tmp_path / "b", *words, "--class-idx", 6, "--class-only")
