"""Attention of vision transformers in the scripts, from a file as DINO writes it."""

import json

import av
import cv2
import numpy as np
import pytest
import torch

import feature_animation
import linear_combination_maps
import selectivities
from moco import pictures
from moco.analysis import film
from moco.cli import UserError
from moco.data import loader
from moco.networks import architectures, opening, vit
from tests.support.inputs import make_frames, run_small
from tests.support.networks import timm_name

ARCH = "vit_128x3x2_16"


@pytest.fixture
def dino(tmp_path):
    """The file of a small vision transformer under DINO's names, teacher and student."""
    torch.manual_seed(0)
    state = architectures.build(ARCH, 3).state_dict()
    state = {f"module.backbone.{timm_name(name)}": value for name, value in state.items() if "head" not in name}
    torch.save({"teacher": state, "student": {name: 2 * value for name, value in state.items()}}, tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


@pytest.mark.parametrize("flags, columns", [([], 1), (["--heads"], 2)])
def test_attention_is_that_of_the_teachers_class_token(tmp_path, dino, monkeypatch, flags, columns):
    frames = make_frames(tmp_path / "frames", size=64)
    drawn, shown, original = [], [], film.overlay
    monkeypatch.setattr(pictures, "image_rows", lambda rows, path, title: drawn.extend(rows))
    monkeypatch.setattr(film, "overlay", lambda *pair: shown.append(pair) or original(*pair))
    run_small(linear_combination_maps, frames, tmp_path / "out", dino, "--attention", "--batch-size", 5, *flags)
    assert len(drawn) == 5 and all(len(images) == 1 + columns for _, images, _ in drawn)
    teacher = opening.open_model(dino, key="teacher").network.eval()
    with torch.no_grad():
        normalized = torch.from_numpy((shown[0][0] / 255 - loader.MEAN) / loader.STD).float()
        attention = vit.attention_maps(teacher, normalized.permute(0, 3, 1, 2))
    expected = [attention.mean(1)] if columns == 1 else attention.unbind(1)
    for (_, heatmaps), values in zip(shown, expected, strict=True):
        coarse = heatmaps.reshape(5, 4, 16, 4, 16).mean((2, 4))
        assert np.corrcoef(coarse.ravel(), values.ravel())[0, 1] > 0.95
    assert json.loads((tmp_path / "out" / "args.json").read_text())["checkpoints"]


def test_a_film_shows_attention(tmp_path, dino):
    frames = make_frames(tmp_path / "frames", size=64)
    for path in frames.rglob("*.jpeg"):
        cv2.imwrite(str(path), cv2.imread(str(path))[:, :54])  # not a multiple of the patches
    run_small(feature_animation, frames, tmp_path / "out", dino, "--attention", "--frames", 7)
    with av.open(str(tmp_path / "out" / "intphys_feature_animation_attention.mp4")) as film:
        assert len(list(film.decode(video=0))) == 7


def test_attention_of_a_network_without_a_class_token_is_one_line(frames, tmp_path, network):
    for script in (linear_combination_maps, feature_animation):
        with pytest.raises(UserError, match="ResNet has no class token; choose a vision transformer"):
            run_small(script, frames, tmp_path / "out", network, "--attention")


def test_units_of_blocks_by_number_and_by_name(tmp_path, dino, capsys):
    frames = make_frames(tmp_path / "frames", size=64)
    chosen = (1, 3, "encoder.layers.encoder_layer_0")
    run_small(selectivities, frames, tmp_path / "out", dino, "--layer", *chosen)
    _, by_number, by_name = (np.load(tmp_path / "out" / f"selectivity_{layer}.npy") for layer in chosen)
    assert by_number.shape == by_name.shape == (128,)
    assert "has negative mean activations" in capsys.readouterr().out
