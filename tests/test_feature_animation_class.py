"""Films of a class: the published colors, classes by number and name, and clear mistakes."""

import av
import numpy as np
import pytest
import torch

import feature_animation_class as script
from moco import checkpoint, models
from moco.analysis import clip, film
from moco.cli import UserError
from tests.support import golden
from tests.test_feature_animation import blocks, open_clip, overlays

CPU = torch.device("cpu")


def animate(data, save_dir, network, *words):
    flags = ["--model-path", network, "--image-size", 64, "--device", "cpu", "--workers", 0, "--save-dir", save_dir]
    script.main([str(word) for word in (data, *flags, *words)])


def test_maps_and_colors_are_the_published_ones():
    expected, model = np.load(golden.DATA / "inside.npz"), golden.model()
    weights = models.head(model).weight[int(expected["class_idx"])]
    pictures = open_clip(golden.IMAGES, 224)
    look = clip.ClipMaps(pictures, script.class_maps(models.spatial_trunk(model), weights), 900, CPU)
    large = np.stack([clip.upsample(small, 224, 224) for small in look.maps[::6]])
    np.testing.assert_allclose(blocks(large)[..., 0], expected["class_map"], atol=2e-3 * (look.high - look.low))
    shown = blocks(np.stack(list(overlays(pictures, look))[::6])).transpose(0, 3, 1, 2)
    assert np.abs(shown - expected["class_overlay"].astype(np.float32)).max() < 1.5


@pytest.mark.parametrize("name", ["class_0002", "2"])
def test_a_class_goes_by_number_or_name(frames, tmp_path, network, name, monkeypatch):
    titles = []
    monkeypatch.setattr(film, "Layout", lambda height, width, title, *_: titles.append(title) or (lambda shown: shown))
    animate(frames, tmp_path / "out", network, "--class-idx", name)
    assert titles == ["class_0002"]
    with av.open(str(tmp_path / "out" / "computers_feature_animation_2.mp4")) as container:
        assert container.streams.video[0].frames == 24


def test_a_class_that_is_not_there_is_an_error(frames, tmp_path, network):
    for name in ("3", "-1", "dog"):
        with pytest.raises(UserError, match=f"--class-idx {name}: the model has 3 outputs, 0 to 2"):
            animate(frames, tmp_path / "out", network, f"--class-idx={name}")


def test_a_model_without_a_head_has_no_classes(frames, tmp_path):
    path = tmp_path / "moco.tar"
    state = {f"module.encoder_q.{name}": value for name, value in models.build("resnet18", 3).state_dict().items()}
    checkpoint.write(path, {"state_dict": state, "arch": "resnet18"})
    with pytest.raises(UserError, match="moco.tar has no linear head; train one"):
        animate(frames, tmp_path / "out", path)
