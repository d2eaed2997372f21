"""Films of a class: the published colors, classes by number and name, and mistakes."""


import av
import numpy as np
import pytest

import feature_animation_class as script
from moco.analysis import film
from moco.cli import UserError
from moco.networks import architectures, checkpoint, layers
from tests.support import golden
from tests.test_feature_animation import check_golden


def animate(data, save_dir, network, *words):
    flags = ["--model-path", network, "--image-size", 64, "--device", "cpu", "--workers", 0, "--save-dir", save_dir]
    script.main([str(word) for word in (data, *flags, *words)])


def test_maps_and_colors_are_the_published_ones():
    model = golden.model()
    weights = architectures.head(model).weight[int(np.load(golden.DATA / "inside.npz")["class_idx"])]
    check_golden(script.class_map(layers.spatial_trunk(model), weights), "class")


@pytest.mark.parametrize("name", ["class_0002", "2"])
def test_a_class_is_given_by_number_or_name(frames, tmp_path, network, name, monkeypatch):
    drawn, original = [], film.film_frames
    monkeypatch.setattr(film, "film_frames", lambda *args: drawn.extend(args[1]) or original(*args))
    animate(frames, tmp_path / "out", network, "--class-idx", name)
    assert drawn == ["class_0002"] * 24
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
