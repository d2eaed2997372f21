"""Features: equal to golden values, cached under everything they depend on, without unreadable images."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import read_saycam
from moco.analysis import features
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import architectures
from tests.support import golden
from tests.support.inputs import make_frames
from tests.support.videos import write_video

CPU = torch.device("cpu")


def open_data(folder, size=32, workers=0):
    return features.EvalData(FrameFolder(folder), size, CPU, workers)


def every(data):
    """The indices of all images."""
    return np.arange(len(data.frames))


def mean_color():
    """A network whose features are an image's mean colors."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def no_forward(monkeypatch):
    """A function after which reading images is an error."""
    return lambda: monkeypatch.setattr(loader, "FrameLoader", None)


def test_features_are_the_published_ones(tmp_path):
    trunk = architectures.remove_head(golden.model())
    chosen = np.array([0, 7, 24, 47])
    found = features.extract_features(trunk, open_data(golden.IMAGES, 224), chosen, tmp_path)
    assert found.dtype == np.float32
    expected = np.load(golden.DATA / "features.npz")["features"][chosen]
    np.testing.assert_allclose(found[:, ::4], expected, atol=1e-3)


def test_features_are_computed_once(frames, tmp_path, no_forward):
    data = open_data(frames)
    first = features.extract_features(mean_color(), data, every(data), tmp_path)
    no_forward()
    again = features.extract_features(mean_color(), data, every(data), tmp_path)
    np.testing.assert_array_equal(first, again)


def test_features_need_float32(frames, tmp_path, monkeypatch):
    """A GPU would compute convolutions in TF32 otherwise."""
    seen = []
    trunk = mean_color()
    trunk.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    data = open_data(frames)
    features.extract_features(trunk, data, every(data), tmp_path)
    norm = nn.Sequential(nn.BatchNorm2d(3), mean_color())
    norm.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    features.adapt_batch_norm(norm, data, every(data), 0, tmp_path)
    assert torch.backends.cudnn.allow_tf32 and seen and not any(seen)


def test_the_trunk_is_not_changed(frames, tmp_path):
    trunk = architectures.remove_head(architectures.build("resnet18", 3)).train()
    before = {name: (value.clone(), value.stride()) for name, value in trunk.state_dict().items()}
    data = open_data(frames)
    features.extract_features(trunk, data, every(data)[:3], tmp_path)
    for name, value in trunk.state_dict().items():
        assert value.equal(before[name][0]) and value.stride() == before[name][1]
    assert trunk.training


def test_a_missing_image_is_left_out(tmp_path):
    write_video(tmp_path / "a.mp4", 60)
    read_saycam.main([str(tmp_path), "--save-dir", str(tmp_path / "frames"), "--size", "32", "--workers", "0"])
    data = open_data(tmp_path / "frames")
    data.frames.path(4).unlink()
    found = features.extract_features(mean_color(), data, every(data), tmp_path)
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == [4] and len(found) == 10


def test_a_full_disk_is_one_line(frames, small_disk):
    disk, data = small_disk("8k"), open_data(frames)
    with pytest.raises(UserError, match="cannot write .*disk.*: No space left on device; free some space"):
        features.extract_features(nn.Flatten(), data, every(data), disk)
    assert not list(disk.iterdir())


@pytest.mark.parametrize("change", ["weights", "network", "size", "images", "file"])
def test_features_are_computed_again_when_anything_changes(frames, tmp_path, change):
    data, trunk = open_data(frames), nn.Sequential(mean_color(), nn.BatchNorm1d(3).eval())
    chosen = every(data)
    features.extract_features(trunk, data, chosen, tmp_path)
    if change == "weights":
        trunk[1].running_mean += 1
    if change == "network":
        trunk.append(nn.ReLU())
    if change == "size":
        data = open_data(frames, 40)
    if change == "images":
        chosen = chosen[1:]
    if change == "file":
        os.utime(data.frames.path(3), (0, 0))
    features.extract_features(trunk, data, chosen, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_file_that_an_archive_restored_has_another_cache_key(frames):
    """Its size and time of modification are the same, its content and its time of change are not."""
    images = FrameFolder(frames)
    path = images.path(3)
    path.write_bytes(bytes(99))
    before, key = path.stat(), features.cache_key(images, [3])
    path.write_bytes(b"?" + bytes(98))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert features.cache_key(images, [3]) != key


def test_unreadable_images_have_no_features_and_the_others_do(frames, tmp_path):
    data = open_data(frames, workers=2)
    data.frames.path(5).write_bytes(b"no image")
    found = features.extract_features(mean_color(), data, every(data), tmp_path)
    np.testing.assert_array_equal(np.isnan(found).all(1), every(data) == 5)
    assert np.isfinite(np.delete(found, 5, 0)).all()


def test_an_image_that_could_not_be_read_is_tried_again(frames, tmp_path, monkeypatch):
    """Without a trace in its file, as after an error of a network disk; the other images are not read again."""
    data, caches = open_data(frames), [tmp_path / "a", tmp_path / "b"]
    for cache in caches:
        cache.mkdir()
    expected = features.extract_features(mean_color(), data, every(data), caches[0])
    read_bytes, read = Path.read_bytes, []

    def failing(path):
        read.append(path)
        if path == data.frames.path(5) and broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    for broken, n_read in ((True, 24), (True, 1), (False, 1), (False, 0)):
        read.clear()
        found = features.extract_features(mean_color(), data, every(data), caches[1])
        assert np.flatnonzero(np.isnan(found).any(1)).tolist() == [5] * broken
        assert len(read) == n_read
    np.testing.assert_array_equal(found, expected)


def test_no_readable_image_is_an_error_that_leaves_nothing(frames, tmp_path):
    data = open_data(frames)
    for i in every(data):
        data.frames.path(i).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 24 images"):
        features.extract_features(mean_color(), data, every(data), tmp_path)
    assert not list(tmp_path.glob("*.npy")) + list(tmp_path.glob(".*.npy"))


def test_file_names_that_are_not_utf8_have_features(frames, tmp_path):
    try:
        shutil.copy(frames / "class_0000" / "img_0000.jpeg", os.fsencode(frames / "class_0000") + b"/img_\xff.jpeg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = open_data(frames)
    assert len(features.extract_features(mean_color(), data, every(data), tmp_path)) == 25


class NotFinite(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) / 0


def test_features_that_are_not_finite_are_an_error_that_names_the_image(frames, tmp_path):
    data = open_data(frames)
    with pytest.raises(UserError, match="img_0000.jpeg are not finite"):
        features.extract_features(NotFinite(), data, every(data), tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_adapted_statistics_are_those_of_the_images_and_are_cached(frames, tmp_path, no_forward):
    data = open_data(frames)
    chosen = np.arange(0, len(data.frames), 2)
    pictures, _, _ = next(data.batches(chosen, 12))
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    features.adapt_batch_norm(trunk, data, chosen, 0, tmp_path)
    torch.testing.assert_close(trunk[0].running_mean, pictures.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trunk[0].running_var, pictures.var((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert not trunk.training
    no_forward()
    again = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    again[0].running_mean += 7  # what it was before does not matter
    features.adapt_batch_norm(again, data, chosen, 0, tmp_path)
    torch.testing.assert_close(again.state_dict(), trunk.state_dict(), atol=0, rtol=0)


def test_statistics_without_an_image_that_cannot_be_read_are_not_cached(frames, tmp_path):
    data = open_data(frames)
    data.frames.path(5).write_bytes(b"no image")
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color())
    features.adapt_batch_norm(trunk, data, every(data), 0, tmp_path)
    assert trunk[0].running_mean.any() and not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(("n", "batches"), [(65, [65]), (66, [64, 2]), (129, [64, 65]), (2, [2])])
def test_a_last_batch_of_one_image_joins_the_one_before(tmp_path, n, batches):
    """One image has no variance where the maps of a network are one location large."""
    data, sizes = open_data(make_frames(tmp_path / "frames", ["a"], n, size=32)), []
    trunk = nn.Sequential(mean_color(), nn.BatchNorm1d(3))
    trunk.register_forward_hook(lambda module, images, _: sizes.append(len(images[0])))
    features.adapt_batch_norm(trunk, data, every(data), 0, tmp_path)
    assert sizes == batches
    colors = features.extract_features(mean_color(), data, every(data), tmp_path)
    np.testing.assert_allclose(trunk[1].running_mean, colors.mean(0), atol=1e-4)


def test_batch_norm_cannot_adapt_to_one_image(frames, tmp_path):
    data = open_data(frames)
    with pytest.raises(UserError, match="at least two training images"):
        features.adapt_batch_norm(nn.Sequential(mean_color(), nn.BatchNorm1d(3)), data, every(data)[:1], 0, tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_statistics_that_are_not_finite_are_an_error(frames, tmp_path):
    data = open_data(frames)
    trunk = nn.Sequential(NotFinite(), nn.BatchNorm1d(3))
    with pytest.raises(UserError, match="statistics are not finite"):
        features.adapt_batch_norm(trunk, data, every(data), 0, tmp_path)
    assert not list(tmp_path.glob("*.tar"))
