"""Class activation maps: equal to golden values, for the images and classes of the flags."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

import linear_combination_maps as script
from moco import files, pictures, plots
from moco.analysis import features, maps
from moco.cli import UserError
from moco.data.frame_folder import FrameFolder
from moco.networks import architectures, checkpoint, opening
from tests.support import golden
from tests.support.inputs import save_network

CPU = torch.device("cpu")


def draw(data, save_dir, *words):
    """Run the script; the names of the figures in its folder."""
    small = ["--image-size", 64, "--workers", 0, "--device", "cpu", "--save-dir", save_dir]
    script.main([str(word) for word in (data, *small, *words)])
    return {path.name for path in save_dir.iterdir()} - {"args.json"}


def test_maps_and_masks_are_the_published_ones():
    frames, expected = FrameFolder(golden.IMAGES), np.load(golden.DATA / "maps.npz")
    model = golden.model()
    images, last_maps, predicted, indices = script.forward_maps(
        model, features.EvalData(frames, 224, CPU), np.arange(48)
    )
    assert indices.tolist() == list(range(48))
    weights = architectures.head(model).weight[int(expected["class_idx"])]
    heatmaps = maps.upsample(maps.class_activation_map(last_maps, weights), 224)
    masked = maps.attention_mask(heatmaps)[:, None] * images
    for found, key in ((heatmaps, "class_map"), (masked, "masked")):
        blocks = functional.avg_pool2d(found, 8)[::3].detach().numpy()
        golden_blocks = expected[key].astype(np.float32)
        assert np.abs(blocks - golden_blocks).max() < 2e-3 * np.ptp(golden_blocks)
    with torch.no_grad():
        assert predicted[:4].tolist() == model(images[:4]).argmax(1).tolist()


def test_a_class_is_given_by_number_or_name():
    assert opening.class_number("car", ["cat", "car"], 2) == opening.class_number("1", ["cat", "car"], 2) == 1
    assert opening.class_number("3", None, 4) == 3
    assert opening.class_number("1", ["1", "0"], 2) == 0  # a name comes first
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


def test_the_classes_of_an_unrelated_head_are_numbers(frames, tmp_path):
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
    encoder = {
        f"module.encoder_q.{name}": value for name, value in architectures.build("resnet18", 8).state_dict().items()
    }
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


def test_every_run_records_flags_and_checkpoint(frames, network, tmp_path, capsys):
    draw(frames, tmp_path / "out", "--model-path", network, "--class-idx", 1, "--overlay")
    record, digest = json.loads((tmp_path / "out" / "args.json").read_text()), files.sha256(network)
    assert record["overlay"] is True and record["checkpoints"] == {str(network): digest}
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("model: resnet18 ") and f"{network} (SHA-256 {digest[:12]}" in first_line


def test_the_save_folder_is_not_inside_the_data(frames, network):
    with pytest.raises(UserError, match="is inside the data folder"):
        draw(frames, frames / "class_0000" / "maps", "--model-path", network, "--class-idx", 1)
    assert not (frames / "class_0000" / "maps").exists()


def test_maps_are_computed_in_float32(frames):
    seen, model = [], architectures.freeze(architectures.build("resnet18", 3))
    model.conv1.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    script.forward_maps(model, features.EvalData(FrameFolder(frames), 64, CPU), np.arange(3))
    assert torch.backends.cudnn.allow_tf32 and seen and not any(seen)


def test_maps_that_are_not_finite_are_an_error(frames, tmp_path):
    model = architectures.build("resnet18", 3)
    model.layer4[1].conv2.weight.data[:] = torch.inf
    save_network(tmp_path / "net.tar", model, arch="resnet18", n_out=3)
    with pytest.raises(UserError, match="not finite|NaN|infinit"):
        draw(frames, tmp_path / "out", "--model-path", tmp_path / "net.tar", "--class-idx", 1)


def test_captions_number_the_classes_of_the_model(frames, network, tmp_path, monkeypatch):
    """A class that no font can draw has one number, whether it is the true or the predicted one."""
    drawn = []
    monkeypatch.setattr(pictures, "image_grid", lambda images, captions, *_: drawn.extend(captions))
    monkeypatch.setattr(plots, "find_font", lambda text: None)
    (frames / "class_0000").rename(frames / "zebra")  # a class that the model does not have
    draw(frames, tmp_path / "out", "--model-path", network, "--class-idx", 1, "--batch-size", 24)
    assert [true for true, _ in drawn] == ["1"] * 8 + ["2"] * 8 + ["3"] * 8
    assert {predicted for _, predicted in drawn} <= {"0", "1", "2"}
