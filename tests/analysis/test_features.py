"""Features: equal to golden values, kept under everything they depend on, completed after any interruption."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import read_saycam
from moco import files
from moco.analysis import features
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import architectures
from tests.support import golden
from tests.support.inputs import make_frames
from tests.support.videos import write_video


def every(frames):
    """The indices of all images."""
    return np.arange(len(frames))


def mean_color():
    """A network whose features are an image's mean colors."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def extract(network, frames, cache, images=None, size=32):
    (rows,) = features.extract_features(network, frames, every(frames) if images is None else images, cache, size)
    return rows


@pytest.fixture
def no_forward(monkeypatch):
    """A function after which reading images is an error."""
    return lambda: monkeypatch.setattr(loader, "FrameLoader", None)


def test_features_are_the_published_ones(tmp_path):
    trunk = architectures.remove_head(golden.model())
    chosen = np.array([0, 7, 24, 47])
    found = extract(trunk, FrameFolder(golden.IMAGES), tmp_path, chosen, 224)
    assert found.dtype == np.float32
    expected = np.load(golden.DATA / "features.npz")["features"][chosen]
    np.testing.assert_allclose(found[:, ::4], expected, atol=1e-3)


def test_features_are_computed_once_without_opening_an_image_again(frames, tmp_path, no_forward, monkeypatch):
    first = extract(mean_color(), FrameFolder(frames), tmp_path)
    no_forward()
    monkeypatch.setattr(Path, "read_bytes", None)
    np.testing.assert_array_equal(first, extract(mean_color(), FrameFolder(frames), tmp_path))


def test_features_need_float32(frames, tmp_path):
    """A GPU would compute convolutions in TF32 otherwise."""
    seen, images = [], FrameFolder(frames)
    trunk = mean_color()
    trunk.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    extract(trunk, images, tmp_path)
    norm = nn.Sequential(nn.BatchNorm2d(3), mean_color())
    norm.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    features.adapt_batch_norm(norm, images, every(images), 0, 32)
    assert torch.backends.cudnn.allow_tf32 and seen and not any(seen)


def test_the_trunk_is_not_changed(frames, tmp_path):
    trunk = architectures.remove_head(architectures.build("resnet18", 3)).train()
    before = {name: (value.clone(), value.stride()) for name, value in trunk.state_dict().items()}
    extract(trunk, FrameFolder(frames), tmp_path, np.arange(3))
    for name, value in trunk.state_dict().items():
        assert value.equal(before[name][0]) and value.stride() == before[name][1]
    assert trunk.training


def test_layers_are_computed_in_one_pass_into_a_file_each(frames, tmp_path):
    images, network, passes = FrameFolder(frames), architectures.build("resnet18", 3).eval(), []
    network.conv1.register_forward_hook(lambda *_: passes.append(1))
    names = ["layer1.0.relu", "relu", "penultimate"]
    rows = features.extract_features(network, images, every(images), tmp_path, 32, names=names)
    assert [each.shape for each in rows] == [(24, 64), (24, 64), (24, 512)] and len(passes) == 1
    again = features.extract_features(network, images, every(images), tmp_path, 32, names=names[::-1])
    for one, other in zip(rows, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(passes) == 1 and len(list(tmp_path.glob("*.npy"))) == 3


def test_a_missing_image_is_left_out(tmp_path):
    write_video(tmp_path / "a.mp4", 60)
    read_saycam.main([str(tmp_path), "--save-dir", str(tmp_path / "frames"), "--size", "32", "--workers", "0"])
    frames = FrameFolder(tmp_path / "frames")
    frames.path(4).unlink()
    found = extract(mean_color(), frames, tmp_path)
    assert np.flatnonzero(np.isnan(found).all(1)).tolist() == [4] and len(found) == 10


def test_a_full_disk_is_one_line_and_leaves_nothing(frames, small_disk):
    disk = small_disk("40k")
    with pytest.raises(UserError, match="cannot write .*disk.*: No space left on device; free some space"):
        extract(nn.Flatten(), FrameFolder(frames), disk)
    assert not list(disk.glob("*.npy")) + list(disk.glob(".*.npy"))


@pytest.mark.parametrize("change", ["weights", "network", "size", "images", "file", "restored"])
def test_features_are_computed_again_when_anything_changes(frames, tmp_path, change):
    images, trunk, chosen, size = FrameFolder(frames), nn.Sequential(mean_color(), nn.BatchNorm1d(3).eval()), None, 32
    extract(trunk, images, tmp_path)
    path = images.path(3)
    if change == "weights":
        trunk[1].running_mean += 1
    if change == "network":
        trunk.append(nn.ReLU())
    if change == "size":
        size = 40
    if change == "images":
        chosen = every(images)[1:]
    if change == "file":
        os.utime(path, (0, 0))
    if change == "restored":  # from an archive: size and time of modification stay
        before = path.stat()
        while path.stat().st_ctime_ns == before.st_ctime_ns:
            path.write_bytes(images.path(4).read_bytes()[: before.st_size].ljust(before.st_size, b"?"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    extract(trunk, images, tmp_path, chosen, size)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_an_image_that_could_not_be_read_is_tried_again(frames, tmp_path, monkeypatch):
    """Without a trace in its file, as after an error of a network disk; batches without it are not read again."""
    monkeypatch.setattr(features, "BATCH", 10)
    images, caches = FrameFolder(frames), [files.make_output_dir(tmp_path / name) for name in "ab"]
    expected = extract(mean_color(), images, caches[0])
    read_bytes, read = Path.read_bytes, []

    def failing(path):
        read.append(path)
        if path == images.path(5) and broken:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    for broken, n_read in ((True, 24), (True, 1), (False, 2 + 10), (False, 0)):
        read.clear()
        found = extract(mean_color(), images, caches[1])
        assert np.flatnonzero(np.isnan(found).any(1)).tolist() == [5] * broken
        assert len(read) == n_read
    np.testing.assert_array_equal(found, expected)


def test_no_readable_image_is_an_error_that_leaves_no_array(frames, tmp_path):
    images = FrameFolder(frames)
    for i in every(images):
        images.path(i).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 24 images"):
        extract(mean_color(), images, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_file_names_that_are_not_utf8_have_features(frames, tmp_path):
    try:
        shutil.copy(frames / "class_0000" / "img_0000.jpeg", os.fsencode(frames / "class_0000") + b"/img_\xff.jpeg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(extract(mean_color(), FrameFolder(frames), tmp_path)) == 25


class NotFinite(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) / 0


def test_features_that_are_not_finite_are_an_error_that_names_the_image(frames, tmp_path):
    with pytest.raises(UserError, match="img_0000.jpeg are not finite"):
        extract(NotFinite(), FrameFolder(frames), tmp_path)
    assert not list(tmp_path.glob("*.npy"))


# --- interruptions


def forked(function, *args):
    """A started process that calls a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def sizeable(kill_at=None):
    """A network with 160 features that kills its process in a forward pass, by number."""
    torch.manual_seed(0)
    network, passes = nn.Sequential(nn.Conv2d(3, 40, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()), []

    def count(*_):
        passes.append(1)
        if len(passes) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    network[1].register_forward_hook(count)
    return network


def array(cache):
    (path,) = cache.glob("*.npy")
    return path


def test_a_killed_run_is_completed_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)
    monkeypatch.setattr(features, "BLOCK", 8)
    images = FrameFolder(make_frames(tmp_path / "frames", ["a"], 101))
    images.path(13).write_bytes(b"no image")
    once, cache = (files.make_output_dir(tmp_path / name) for name in ("once", "cache"))
    expected = extract(sizeable(), images, once)
    fsync = os.fsync
    for kill_at, n in (("creation", None), (1, None), (3, 8), (9, 8 + 32 - 1), (1, 39)):
        if kill_at == "creation":
            monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        process = forked(extract, sizeable(kill_at), images, cache)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        monkeypatch.setattr(os, "fsync", fsync)
        if n is None:
            assert not list(cache.glob("[!.]*.npy"))
        else:
            assert np.count_nonzero(np.isfinite(np.load(array(cache))).all(1)) == n
    passes = []
    network = sizeable()
    network.register_forward_hook(lambda *_: passes.append(1))
    extract(network, images, cache)
    assert len(passes) == 26 - 10 and array(cache).read_bytes() == array(once).read_bytes()
    assert np.flatnonzero(np.isnan(expected).any(1)).tolist() == [13]


def test_a_batch_that_was_half_written_is_computed_again(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 5)
    expected = extract(nn.Flatten(), FrameFolder(frames), tmp_path).copy()
    np.load(array(tmp_path), mmap_mode="r+")[7, 100:] = np.nan
    np.testing.assert_array_equal(extract(nn.Flatten(), FrameFolder(frames), tmp_path), expected)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\0v", b"<html>", None])
def test_a_damaged_file_of_a_cache_is_computed_again(frames, tmp_path, damage):
    images = FrameFolder(frames)
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    features.adapt_batch_norm(trunk, images, every(images), 0, 32, 0, tmp_path)
    extract(trunk, images, tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.glob("[!.]*.[nt]*")}
    for path, content in kept.items():
        path.write_bytes(content[:-4] if damage is None else damage)
    features.adapt_batch_norm(trunk, images, every(images), 0, 32, 0, tmp_path)
    extract(trunk, images, tmp_path)
    assert len(kept) == 2 and {path: path.read_bytes() for path in tmp_path.glob("[!.]*.[nt]*")} == kept


def test_a_disk_that_fails_for_long_ends_a_run_which_a_second_one_completes(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)
    monkeypatch.setattr(files, "WAITS", ())
    images, read = FrameFolder(frames), Path.read_bytes
    expected = extract(mean_color(), images, tmp_path).copy()
    array(tmp_path).unlink()

    def fail(path):
        if path == images.path(9):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="img_0001.jpeg: .*; check the disk, and re-run"),
    ):
        patch.setattr(Path, "read_bytes", fail)
        extract(mean_color(), images, tmp_path)
    assert np.isnan(np.load(array(tmp_path))).any(1).sum() == 16
    np.testing.assert_array_equal(extract(mean_color(), images, tmp_path), expected)


def test_a_second_process_waits_for_the_first_and_finds_its_work(frames, tmp_path, monkeypatch):
    fork, images, network = multiprocessing.get_context("fork"), FrameFolder(frames), mean_color()
    computing, waiting = fork.Event(), fork.Event()
    network.register_forward_hook(lambda *_: computing.set() or waiting.wait(60) and None)
    monkeypatch.setattr(files, "print", lambda *words, **_: waiting.set(), raising=False)
    first = forked(extract, network, images, tmp_path)
    assert computing.wait(60)
    again = mean_color()
    again.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    second = forked(extract, again, images, tmp_path)
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert waiting.is_set() and np.isfinite(np.load(array(tmp_path))).all()


def test_memory_does_not_grow_with_the_rows(frames, tmp_path):
    def compute(needed):
        for start in range(0, len(needed), features.BATCH):
            indices = needed[start : start + features.BATCH]
            yield indices, [np.outer(indices, np.ones(128)) + 1]

    def measure():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        features.compute_rows([tmp_path / "a.npy"], FrameFolder(frames), np.arange(200_000), compute)  # 100 MB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000

    process = forked(measure)
    process.join()
    assert process.exitcode == 0
    assert np.load(tmp_path / "a.npy", mmap_mode="r")[-1, 127] == 200_000


# --- batch-norm statistics


def test_adapted_statistics_are_those_of_the_images_and_are_cached(frames, tmp_path, no_forward):
    images = FrameFolder(frames)
    chosen = np.arange(0, len(images), 2)
    pictures, _, _ = next(features.batches(mean_color(), images, chosen, 32, 0))
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    features.adapt_batch_norm(trunk, images, chosen, 0, 32, 0, tmp_path)
    torch.testing.assert_close(trunk[0].running_mean, pictures.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trunk[0].running_var, pictures.var((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert not trunk.training
    no_forward()
    again = nn.Sequential(nn.BatchNorm2d(3), mean_color()).eval()
    again[0].running_mean += 7  # what it was before does not matter
    features.adapt_batch_norm(again, images, chosen, 0, 32, 0, tmp_path)
    torch.testing.assert_close(again.state_dict(), trunk.state_dict(), atol=0, rtol=0)


def test_statistics_without_an_image_that_cannot_be_read_are_not_cached(frames, tmp_path):
    images = FrameFolder(frames)
    images.path(5).write_bytes(b"no image")
    trunk = nn.Sequential(nn.BatchNorm2d(3), mean_color())
    features.adapt_batch_norm(trunk, images, every(images), 0, 32, 0, tmp_path)
    assert trunk[0].running_mean.any() and not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(("n", "batches"), [(65, [65]), (66, [64, 2]), (129, [64, 65]), (2, [2])])
def test_a_last_batch_of_one_image_joins_the_one_before(tmp_path, n, batches):
    """One image has no variance where the maps of a network are one location large."""
    images, sizes = FrameFolder(make_frames(tmp_path / "frames", ["a"], n, size=32)), []
    trunk = nn.Sequential(mean_color(), nn.BatchNorm1d(3))
    trunk.register_forward_hook(lambda module, images, _: sizes.append(len(images[0])))
    features.adapt_batch_norm(trunk, images, every(images), 0, 32)
    assert sizes == batches
    np.testing.assert_allclose(trunk[1].running_mean, extract(mean_color(), images, tmp_path).mean(0), atol=1e-4)


def test_batch_norm_cannot_adapt_to_one_image(frames):
    images = FrameFolder(frames)
    with pytest.raises(UserError, match="at least two training images"):
        features.adapt_batch_norm(nn.Sequential(mean_color(), nn.BatchNorm1d(3)), images, every(images)[:1], 0, 32)


def test_statistics_that_are_not_finite_are_an_error(frames, tmp_path):
    images = FrameFolder(frames)
    with pytest.raises(UserError, match="statistics are not finite"):
        trunk = nn.Sequential(NotFinite(), nn.BatchNorm1d(3))
        features.adapt_batch_norm(trunk, images, every(images), 0, 32, 0, tmp_path)
    assert not list(tmp_path.glob("*.tar"))
