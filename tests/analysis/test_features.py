"""Pooled features: equal to golden, kept under what they depend on, bad images left out; maps equal to golden."""

import os

import numpy as np
import pytest
import torch
from torch import nn

import read_saycam
from moco import distributed, models
from moco.analysis import features
from moco.cli import UserError
from moco.data import augment, loader
from tests.support import golden
from tests.support.videos import write_video

CPU = torch.device("cpu")


def every(frames):
    return np.arange(len(frames))


def mean_color():
    """A network whose features are an image's mean colors."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_pooled_features_are_the_published_ones(tmp_path):
    frames = loader.FrameFolder(golden.IMAGES)
    trunk = models.remove_head(golden.model())
    chosen = np.array([0, 7, 24, 47])
    found = features.extract_features(trunk, frames, chosen, 224, 0, CPU, tmp_path)
    assert found.dtype == np.float32
    expected = np.load(golden.DATA / "features.npz")["features"][chosen]
    np.testing.assert_allclose(found[:, ::4], expected, atol=1e-3)


def test_features_are_computed_once(frames, tmp_path, monkeypatch):
    images = loader.FrameFolder(frames)
    first = features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)
    monkeypatch.setattr(loader, "FrameLoader", None)  # whoever computes again fails
    again = features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)
    np.testing.assert_array_equal(first, again)


def test_an_image_that_is_gone_is_left_out(tmp_path):
    write_video(tmp_path / "a.mp4", 60)
    read_saycam.main([str(tmp_path), "--save-dir", str(tmp_path / "frames"), "--size", "32", "--workers", "0"])
    images = loader.FrameFolder(tmp_path / "frames")
    images.path(4).unlink()
    found = features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == [4] and len(found) == 10


def test_a_full_disk_is_one_line(frames, small_disk):
    disk, images = small_disk("8k"), loader.FrameFolder(frames)
    with pytest.raises(UserError, match="cannot write .*disk.*: No space left on device; free some space"):
        features.extract_features(nn.Flatten(), images, every(images), 32, 0, CPU, disk)
    assert not list(disk.iterdir())


@pytest.mark.parametrize("n", [2, 3, 30])
def test_several_devices_make_the_same_features(frames, tmp_path, monkeypatch, n):
    images = loader.FrameFolder(frames)
    alone = features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)[:]
    monkeypatch.setattr(distributed, "all_like", lambda device: [device] * n)
    monkeypatch.setattr(features, "BATCH", 5)
    for kept in tmp_path.glob("*.npy"):
        kept.unlink()
    shared = features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)
    np.testing.assert_allclose(shared, alone, atol=1e-6)


@pytest.mark.parametrize("change", ["weights", "network", "size", "images", "file"])
def test_features_are_computed_anew_when_anything_changes(frames, tmp_path, change):
    images, trunk, size = loader.FrameFolder(frames), nn.Sequential(mean_color(), nn.BatchNorm1d(3).eval()), 32
    chosen = every(images)
    features.extract_features(trunk, images, chosen, size, 0, CPU, tmp_path)
    if change == "weights":
        trunk[1].running_mean += 1
    if change == "network":
        trunk.append(nn.ReLU())
    if change == "size":
        size = 40
    if change == "images":
        chosen = chosen[1:]
    if change == "file":
        os.utime(images.path(3), (0, 0))
    features.extract_features(trunk, images, chosen, size, 0, CPU, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_unreadable_images_have_no_features_and_the_others_do(frames, tmp_path):
    images = loader.FrameFolder(frames)
    images.path(5).write_bytes(b"no image")
    found = features.extract_features(mean_color(), images, every(images), 32, 2, CPU, tmp_path)
    np.testing.assert_array_equal(np.isnan(found).all(1), every(images) == 5)
    assert np.isfinite(np.delete(found, 5, 0)).all()


def test_no_readable_image_is_an_error_that_leaves_nothing(frames, tmp_path):
    images = loader.FrameFolder(frames)
    for i in every(images):
        images.path(i).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 24 images"):
        features.extract_features(mean_color(), images, every(images), 32, 0, CPU, tmp_path)
    assert not list(tmp_path.glob("*.npy")) + list(tmp_path.glob(".*.npy"))


class Broken(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) / 0


def test_features_that_are_not_finite_are_an_error_that_names_the_image(frames, tmp_path):
    images = loader.FrameFolder(frames)
    with pytest.raises(UserError, match="img_0000.jpeg are not finite"):
        features.extract_features(Broken(), images, every(images), 32, 0, CPU, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_adapted_statistics_are_those_of_the_images_and_are_kept(frames, tmp_path, monkeypatch):
    images = loader.FrameFolder(frames)
    chosen = np.arange(0, len(images), 2)
    batches = loader.in_order(images, augment.Recipe("none", 32), CPU, 0, chosen, 12)
    pictures, _, _ = next(batches.epoch(0))
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    features.adapt(trunk, images, chosen, 32, 0, CPU, 0, tmp_path)
    torch.testing.assert_close(trunk[0].running_mean, pictures.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trunk[0].running_var, pictures.var((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert not trunk.training
    monkeypatch.setattr(loader, "FrameLoader", None)
    again = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    features.adapt(again, images, chosen, 32, 0, CPU, 0, tmp_path)
    torch.testing.assert_close(again.state_dict(), trunk.state_dict(), atol=0, rtol=0)


def test_a_class_map_averages_to_the_logit():
    draws = torch.Generator().manual_seed(0)
    maps, head = torch.rand(5, 6, 7, 7, generator=draws), nn.Linear(6, 3)
    logits = head(maps.mean((2, 3)))
    found = features.class_activation_map(maps, head.weight[2]).mean((1, 2)) + head.bias[2]
    torch.testing.assert_close(found, logits[:, 2])


def test_attention_is_between_0_and_1_and_one_half_where_the_map_is_0():
    maps = torch.linspace(-1, 1, 2 * 9 * 9).reshape(2, 9, 9)
    mask = features.attention_mask(maps)
    assert mask.min() < 0.01 and mask.max() > 0.99 and (mask > 0.5).equal(maps > 0)
    torch.testing.assert_close(features.attention_mask(3 * maps), mask)
    assert (features.attention_mask(torch.zeros(2, 9, 9)) == 0.5).all()


def test_pixels_undo_the_normalization(frames):
    images = loader.FrameFolder(frames)
    pictures, _, _ = next(iter(loader.in_order(images, augment.Recipe("none", 40), CPU, 0, None, 4).epoch(0)))
    expected = augment.decode(images.path(0).read_bytes()) / 255
    np.testing.assert_allclose(features.denormalize(pictures)[0], expected, atol=1e-5)
