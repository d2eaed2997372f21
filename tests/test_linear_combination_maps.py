"""Attention maps: equal to golden, of the images and classes that were asked for."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

import linear_combination_maps as script
from moco import checkpoint, models
from moco.analysis import features, maps
from moco.cli import UserError
from moco.data import loader
from tests.support import golden

CPU = torch.device("cpu")


def draw(data, save_dir, *words):
    """Run the script; the names of the figures it leaves."""
    small = ["--image-size", 64, "--workers", 0, "--device", "cpu", "--save-dir", save_dir]
    script.main([str(word) for word in (data, *small, *words)])
    return {path.name for path in save_dir.iterdir()} - {"args.json"}


def test_maps_and_masks_are_the_published_ones():
    frames, expected = loader.FrameFolder(golden.IMAGES), np.load(golden.DATA / "maps.npz")
    model = golden.model()
    images, last_maps, predicted, indices = script.forward_maps(
        model, features.EvalData(frames, 224, CPU), np.arange(48)
    )
    assert indices.tolist() == list(range(48))
    weights = models.head(model).weight[int(expected["class_idx"])]
    heatmaps = maps.upsample(maps.class_activation_map(last_maps, weights), 224)
    masked = maps.attention_mask(heatmaps)[:, None] * images
    for found, key in ((heatmaps, "class_map"), (masked, "masked")):
        blocks = functional.avg_pool2d(found, 8)[::3].detach().numpy()
        wanted = expected[key].astype(np.float32)
        assert np.abs(blocks - wanted).max() < 2e-3 * np.ptp(wanted)
    with torch.no_grad():
        assert predicted[:4].tolist() == model(images[:4]).argmax(1).tolist()


def test_the_class_goes_by_number_or_name():
    assert checkpoint.class_number("car", ["cat", "car"], 2) == checkpoint.class_number("1", ["cat", "car"], 2) == 1
    assert checkpoint.class_number("3", None, 4) == 3
    assert checkpoint.class_number("1", ["1", "0"], 2) == 0  # a name comes first
    for text, names in (("2", ["cat", "car"]), ("-1", None), ("dog", ["cat", "car"]), ("dog", None)):
        with pytest.raises(UserError, match=f"--class-idx {text}: the model has 2 outputs, 0 to 1"):
            checkpoint.class_number(text, names, 2)


def test_images_are_drawn_by_seed_from_the_wanted_classes(frames):
    images = loader.FrameFolder(frames)
    labels = images.labels()
    assert set(labels[script.choose(images, "class_0001", "class", 99, 0)]) == {1}
    assert set(labels[script.choose(images, "class_0001", "others", 99, 0)]) == {0, 2}
    assert len(script.choose(images, None, "all", 99, 0)) == 24
    a, b, again = (script.choose(images, None, "all", 5, seed).tolist() for seed in (0, 1, 0))
    assert a == again != b
    with pytest.raises(UserError, match="has no class folder dog"):
        script.choose(images, "dog", "class", 5, 0)


def test_every_panel_has_a_file_of_its_own(frames, network, tmp_path):
    out = tmp_path / "out"
    draw(frames, out, "--model-path", network, "--class-idx", "class_0001", "--batch-size", 13)
    draw(frames, out, "--model-path", network, "--class-idx", 1, "--class-only", "--overlay")
    stem = "linear_combination_maps_class_1"
    found = draw(frames, out, "--model-path", network, "--class-idx", 1, "--others")
    assert found == {f"{stem}{end}.{kind}" for end in ("", "_class_overlay", "_others") for kind in ("pdf", "png")}
    with pytest.raises(UserError, match="class_1.pdf exists; give --overwrite"):
        draw(frames, out, "--model-path", network, "--class-idx", 1)
    page = cv2.imread(str(out / f"{stem}.png"))
    assert page.shape[1] == 12 * 150  # twelve pictures a row, an inch each


def test_a_head_that_does_not_match_the_folders_is_looked_at_by_number(frames, tmp_path):
    words = ["--model-path", "random", "--model", "resnet18", "--n_out", 7]
    assert len(draw(frames, tmp_path / "a", *words, "--class-idx", 6, "--batch-size", 2)) == 2
    with pytest.raises(UserError, match="7 outputs .* not the 3 class folders"):
        draw(frames, tmp_path / "b", *words, "--class-idx", 6, "--class-only")


def test_unreadable_images_are_left_out(frames, network, tmp_path):
    (frames / "class_0000" / "img_0003.jpeg").write_bytes(b"")
    draw(frames, tmp_path / "a", "--model-path", network, "--class-idx", 0, "--batch-size", 24)
    for path in frames.glob("class_0000/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the chosen images"):
        draw(frames, tmp_path / "b", "--model-path", network, "--class-idx", 0, "--class-only")


def test_mistakes_are_one_line(frames, network, tmp_path):
    encoder = {f"module.encoder_q.{name}": value for name, value in models.build("resnet18", 8).state_dict().items()}
    checkpoint.write(tmp_path / "moco.tar", {"state_dict": encoder, "arch": "resnet18"})
    for words, message in [
        (["--model-path", tmp_path / "none.tar"], "no checkpoint"),
        (["--model-path", network], "--class-idx 6: the model has 3 outputs, 0 to 2 .class_0000"),
        (["--model-path", network, "--n_out", 4], "has 3 outputs, not"),
        (["--model-path", tmp_path / "moco.tar"], "has no linear head; train one"),
        (["--model-path", "random", "--model", "shufflenet_v2_x0_5"], "no last spatial maps"),
    ]:
        with pytest.raises(UserError, match=message):
            draw(frames, tmp_path / "out", *words)
        assert not list((tmp_path / "out").glob("*"))
