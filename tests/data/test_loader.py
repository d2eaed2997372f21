"""FrameFolder, loader.EpochSampler and FrameLoader: order, shares, augmentation, corrupt images."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms

from moco.cli import UserError
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.distributed import ProcessContext
from tests import support

SINGLE = ProcessContext()
PHOTOS = support.GOLDEN / "images"


@pytest.fixture(scope="module")
def frames():
    return FrameFolder(PHOTOS)


def image(path, color=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (color, 80, 70)).save(path)


def batches_of(frames, name, size, batch_size, workers=0, seed=0, views=1, source=None, context=SINGLE, **options):
    """A FrameLoader on the CPU; name: of the recipe; source: all frames unless given; options: of its sampler."""
    sampler = loader.EpochSampler(len(frames) if source is None else source, batch_size, seed, context, **options)
    return loader.FrameLoader(frames, augment.RECIPES[name], size, sampler, "cpu", workers, views)


def index_lists(batches, epoch=0, start=0):
    return [indices.tolist() for _, _, indices in batches.epoch(epoch, start)]


# --- order and shares


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(-3, 3))
def test_the_shares_of_the_processes_make_up_the_epoch(total, per_process, world, train, drop_last, seed):
    """In training without a last batch of one image per process, over which batch norm has no variance."""
    size = per_process * world
    last = total % size
    left_out = last if drop_last or last // world == 1 else last % world
    used = total - (left_out if train else 0)
    if used == 0:
        with pytest.raises(UserError, match=f"{total} images do not fill one batch"):
            loader.EpochSampler(total, size, seed, ProcessContext(0, world), train, drop_last)
        return
    contexts = [ProcessContext(rank, world) for rank in range(world)]
    ranks = [loader.EpochSampler(total, size, seed, context, train, drop_last) for context in contexts]
    shares = [list(order) for order in ranks]
    indices = ranks[0].indices()
    assert np.array_equal(np.sort(indices), np.arange(total))
    assert train or np.array_equal(indices, np.arange(total))
    for step in range(len(ranks[0])):
        parts = [each[step] for each in shares]
        positions = sorted(position for _, each, _ in parts for position in each)
        assert positions == list(range(step * size, step * size + len(positions)))
        for _, each, part in parts:
            assert np.array_equal(part, indices[list(each)])
        if train:
            assert len({len(part) for _, _, part in parts}) == 1
    assert used == sum(len(part) for each in shares for _, _, part in each)
    for order, share in zip(ranks, shares, strict=True):
        order.start = len(order) // 2
        assert len(share) == len(order)
        assert [part.tolist() for _, _, part in order] == [part.tolist() for _, _, part in share[order.start :]]


def test_the_order_depends_on_seed_and_epoch(frames):
    one, same, other = (batches_of(frames, "none", 32, 16, 0, seed) for seed in (1, 1, 2))
    assert index_lists(one) == index_lists(one) == index_lists(same)
    assert index_lists(one) != index_lists(one, epoch=1) and index_lists(one) != index_lists(other)
    assert sorted(sum(index_lists(one, 1), [])) == list(range(48))


def test_a_source_may_be_indices_or_a_function_of_the_epoch(frames):
    subset = batches_of(frames, "none", 32, 4, source=np.array([40, 3, 5, 30, 31, 2]))
    assert sorted(sum(index_lists(subset), [])) == [2, 3, 5, 30, 31, 40]
    assert index_lists(subset, 0) != index_lists(subset, 1)
    listed = batches_of(frames, "none", 32, 4, train=False, source=[40, 3, 5, 3])
    assert index_lists(listed) == [[40, 3, 5, 3]]
    drawn = batches_of(frames, "none", 32, 2, source=lambda epoch: np.array([7, 7, epoch, 1]))
    assert index_lists(drawn, 2) == [[7, 7], [2, 1]]
    (a, _, _), _ = drawn.epoch(2)
    assert torch.equal(a[0], a[1])  # without augmentation


def test_pairs_of_images_are_two_views(frames):
    pairs = batches_of(frames, "none", 224, 2, views=2, source=lambda epoch: np.array([[4, 5], [9, 8]]))
    single = batches_of(frames, "none", 224, 4, train=False, source=[4, 9, 5, 8])
    ((first, second), targets, indices), = pairs.epoch(0)  # fmt: skip
    (images, _, _), = single.epoch(0)  # fmt: skip
    assert torch.equal(torch.cat([first, second]), images) and indices.tolist() == [4, 9] and targets.tolist() == [0, 0]


def test_two_views_are_augmented_independently(frames):
    batches = batches_of(frames, "moco_v2", 32, 48, views=2)
    ((first, second), _, _), = batches.epoch(0)  # fmt: skip
    assert (first - second).abs().mean((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("options, match", [
    (dict(batch_size=9, context=ProcessContext(0, 2)), "a batch of 9 cannot be divided among 2 processes.* makes it 8"),
    (dict(batch_size=11, context=ProcessContext(0, 4)), "makes it 12"),
    (dict(batch_size=2, context=ProcessContext(0, 8)), "makes it 8"),
    (dict(batch_size=49, drop_last=True), "48 images"),
])  # fmt: skip
def test_impossible_batch_sizes_are_refused(frames, options, match):
    with pytest.raises(UserError, match=match):
        batches_of(frames, "none", 32, **options)


# --- augmentation


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_an_epoch_resumed_in_the_middle_is_bitwise_equal_with_any_number_of_workers(frames, workers):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    single = batches_of(frames, "released", 48, 10, 0, 5)
    several = batches_of(frames, "released", 48, 10, workers, 5)
    whole = {epoch: list(single.epoch(epoch)) for epoch in (3, 4)}
    next(several.epoch(3))  # an abandoned epoch
    for epoch, start in [(3, 0), (4, 2), (3, 4), (3, 1)]:
        for batches in (single, several):
            rest = list(batches.epoch(epoch, start))
            assert len(rest) == 5 - start
            for ours, theirs in zip(rest, whole[epoch][start:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()  # global generators are not used


def test_augmentation_depends_on_the_position_in_the_epoch_and_not_on_the_rank(frames):
    (whole, _, _), *_ = batches_of(frames, "released", 48, 12).epoch(0)
    halves = [next(batches_of(frames, "released", 48, 12, context=ProcessContext(r, 2)).epoch(0))[0] for r in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    repeated = batches_of(frames, "released", 48, 8, source=lambda epoch: np.full(8, 7))
    same = next(repeated.epoch(0))[0]
    assert all(not torch.equal(a, b) for i, a in enumerate(same) for b in same[:i])


def test_batches_equal_those_of_torchvision(frames):
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(loader.MEAN, loader.STD)])
    theirs = torch.stack([each for each, _ in datasets.ImageFolder(PHOTOS, plain)])
    batches = batches_of(frames, "none", 224, 20, train=False)
    images, targets, indices = (torch.cat(each) for each in zip(*batches.epoch(0), strict=True))
    assert images.dtype == torch.float32 and targets.dtype == indices.dtype == torch.int64
    assert torch.allclose(images, theirs, atol=1e-5)
    assert indices.tolist() == list(range(48)) and targets.tolist() == frames.labels().tolist()
    first = next(batches.epoch(0))[0]
    assert first.is_contiguous(memory_format=torch.channels_last)


# --- corrupt images


@pytest.fixture
def many(tmp_path):
    """150 small images in three classes."""
    for i in range(150):
        image(tmp_path / "frames" / f"c{i // 50}" / f"{i:03d}.png", i)
    return tmp_path / "frames"


def spoil(folder, i, kind="cut"):
    path = folder / f"c{i // 50}" / f"{i:03d}.png"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif kind == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"not an image"}[kind])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["cut", "empty", "text", "gone"])
def test_in_training_the_next_good_image_of_the_class_replaces_a_corrupt_one(many, capsys, kind, workers):
    frames = FrameFolder(many)
    spoil(many, 99, kind)
    batches = batches_of(frames, "none", 32, 32, workers, 0)
    for epoch in range(2):
        epoch_batches = list(batches.epoch(epoch))
        indices = torch.cat([each for _, _, each in epoch_batches])
        assert sorted(indices.tolist()) == sorted([*range(99), *range(100, 150), 50])  # 50 to 99 are a class
        assert torch.cat([each for _, each, _ in epoch_batches]).tolist() == [frames.label(i) for i in indices]
    assert list(batches.bad) == [99] and batches.bad[99]
    out = capsys.readouterr()
    assert (out.out + out.err).count("c1/099.png") == 1


def test_in_evaluation_a_corrupt_image_is_left_out(many, capsys):
    frames = FrameFolder(many)
    for i in (0, 49, *range(120, 150)):
        spoil(many, i)
    batches = batches_of(frames, "none", 32, 10, train=False)
    epoch_batches = list(batches.epoch(0))
    indices = torch.cat([each for _, _, each in epoch_batches]).tolist()
    assert indices == [*range(1, 49), *range(50, 120)] and list(batches.bad) == [0, 49, *range(120, 150)]
    assert all(len(images) == len(targets) == len(part) > 0 for images, targets, part in epoch_batches)
    assert "c0/000.png" in capsys.readouterr().out


def failure(batches):
    """The message of the error that ends an epoch."""
    try:  # pytest.raises would keep the error, and with its frames the workers, alive
        return index_lists(batches)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_of_corrupt_images_end_training_with_a_list(many, workers):
    spoil(many, 3)
    spoil(many, 77, "empty")
    message = failure(batches_of(FrameFolder(many), "none", 32, 32, workers, 0))
    assert "c0/003.png" in message and "c1/077.png: the file is empty" in message


def test_a_class_without_a_good_image_ends_training(many):
    for i in range(50, 100):
        spoil(many, i, "text")
    assert "cannot be read, too many" in failure(batches_of(FrameFolder(many), "none", 32, 150))


def test_a_training_step_without_images_is_an_error(many):
    image(many / "c3" / "150.png")
    frames = FrameFolder(many)
    spoil(many, 150)  # the only one of its class, less than one in a hundred of all
    batches = batches_of(frames, "none", 32, 151)
    assert sum(len(indices) for indices in index_lists(batches)) == 150
    assert "c3/150.png" in failure(batches_of(frames, "none", 32, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_training_and_no_image_counts_as_corrupt(many, workers, monkeypatch):
    def read(frames, i):
        raise UserError(f"cannot read {frames.path(i)}: Stale file handle; re-run to resume")

    monkeypatch.setattr(FrameFolder, "read", read)
    batches = batches_of(FrameFolder(many), "none", 32, 32, workers)
    message = failure(batches)
    assert "Stale file handle; re-run to resume" in message and "\n" not in message and not batches.bad


# --- file names that are not UTF-8


def test_names_may_be_any_bytes_and_are_printable(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/data"
    for name in (b"/\xfd/\xff\n.png", b"/b/\xe9.png", "/b/é 1.png".encode()):
        image(Path(os.fsdecode(folder + name)))
    Path(os.fsdecode(folder + b"/b/\xe9.png")).write_bytes(b"")
    frames = FrameFolder(tmp_path / "data")
    assert [frames.name(i) for i in range(3)] == ["b/é 1.png", r"b/\udce9.png", r"\udcfd/\udcff\n.png"]
    assert frames.classes == ["b", r"\udcfd"] and all(frames.path(i).exists() for i in range(3))
    assert index_lists(batches_of(frames, "none", 32, 4, train=False)) == [[0, 2]]
    assert r"b/\udce9.png: the file is empty; left out" in capsys.readouterr().out


# --- devices


@pytest.mark.parametrize("device, channels_last", [("cpu", True), ("mps", False)])
def test_what_differs_on_an_apple_gpu(frames, device, channels_last, monkeypatch):
    """Images are not channels last; an asynchronous copy would read pageable memory that is freed already."""
    batches, calls = batches_of(frames, "none", 32, 4), []
    batches.device = torch.device(device)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: calls.append((where, how)) or tensor)
    images, _, _ = next(batches.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert images.is_contiguous() != channels_last
    assert calls == [((torch.device(device),), {})] * 2  # images and targets
