"""Films of a class: the published colors, classes by number and name, and mistakes."""

import json

import av
import numpy as np
import pytest
import torch

import feature_animation_class as script
from moco import files, plots
from moco.analysis import clip, film
from moco.cli import UserError
from moco.networks import architectures, checkpoint, layers
from tests.support import golden
from tests.test_feature_animation import blocks, open_clip, overlays

CPU = torch.device("cpu")


def animate(data, save_dir, network, *words):
    flags = ["--model-path", network, "--image-size", 64, "--device", "cpu", "--workers", 0, "--save-dir", save_dir]
    script.main([str(word) for word in (data, *flags, *words)])


def test_maps_and_colors_are_the_published_ones():
    expected, model = np.load(golden.DATA / "inside.npz"), golden.model()
    weights = architectures.head(model).weight[int(expected["class_idx"])]
    images = open_clip(golden.IMAGES, 224)
    clip_maps = clip.ClipMaps(images, script.class_maps(layers.spatial_trunk(model), weights), 900, CPU)
    large = np.stack([clip.upsample(small, 224, 224) for small in clip_maps.maps[::6]])
    np.testing.assert_allclose(
        blocks(large)[..., 0], expected["class_map"], atol=2e-3 * (clip_maps.high - clip_maps.low)
    )
    shown = blocks(np.stack(list(overlays(images, clip_maps))[::6])).transpose(0, 3, 1, 2)
    assert np.abs(shown - expected["class_overlay"].astype(np.float32)).max() < 1.5


@pytest.mark.parametrize("name", ["class_0002", "2"])
def test_a_class_is_given_by_number_or_name(frames, tmp_path, network, name, monkeypatch):
    titles = []
    monkeypatch.setattr(film, "Layout", lambda height, width, title, *_: titles.append(title) or (lambda shown: shown))
    animate(frames, tmp_path / "out", network, "--class-idx", name)
    assert titles == ["class_0002"]
    with av.open(str(tmp_path / "out" / "computers_feature_animation_2.mp4")) as container:
        assert container.streams.video[0].frames == 24


def test_an_unknown_class_is_an_error(frames, tmp_path, network):
    for name in ("3", "-1", "dog"):
        with pytest.raises(UserError, match=f"--class-idx {name}: the model has 3 outputs, 0 to 2"):
            animate(frames, tmp_path / "out", network, f"--class-idx={name}")


def test_a_model_without_a_head_has_no_classes(frames, tmp_path):
    path = tmp_path / "moco.tar"
    state = {
        f"module.encoder_q.{name}": value for name, value in architectures.build("resnet18", 3).state_dict().items()
    }
    checkpoint.write(path, {"state_dict": state, "arch": "resnet18"})
    with pytest.raises(UserError, match="moco.tar has no linear head; train one"):
        animate(frames, tmp_path / "out", path)


def test_every_run_records_flags_and_checkpoint(frames, tmp_path, network, capsys):
    animate(frames, tmp_path / "out", network, "--frames", 2, "--class-idx", 2)
    record, digest = json.loads((tmp_path / "out" / "args.json").read_text()), files.sha256(network)
    assert record["class_idx"] == "2" and record["checkpoints"] == {str(network): digest}
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("model: resnet18 ") and f"{network} (SHA-256 {digest[:12]}" in first_line


def test_a_class_name_that_no_font_can_draw_is_a_number_in_the_title(frames, tmp_path, network, monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_font", lambda text: None)
    animate(frames, tmp_path / "out", network, "--frames", 2, "--class-idx", "class_0002")
    assert "2 frames, class 2 from" in capsys.readouterr().out
