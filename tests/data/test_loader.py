"""Frames without a list of them, orders and shares, draws, bad images, workers."""

import random
import subprocess
import sys
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
from moco.distributed import ProcessContext
from tests import support

SINGLE = ProcessContext()
PHOTOS = support.GOLDEN / "images"


@pytest.fixture(scope="module")
def frames():
    return loader.FrameFolder(PHOTOS)


def image(path, color=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (color, 80, 70)).save(path)


def batches_of(frames, recipe, batch_size, workers=0, seed=0, views=1, source=None, context=SINGLE, **options):
    """A FrameLoader on the CPU; source: all frames unless given; options: of its sampler."""
    sampler = loader.EpochSampler(len(frames) if source is None else source, batch_size, seed, context, **options)
    return loader.FrameLoader(frames, recipe, sampler, "cpu", workers, views)


def taken(batches, epoch=0, start=0):
    return [indices.tolist() for _, _, indices in batches.epoch(epoch, start)]


# Order and shares


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(-3, 3))
def test_processes_share_an_epoch_without_gap_or_overlap(total, per_process, world, train, drop_last, seed):
    size = per_process * world
    left = total % size
    used = total - ((left if drop_last else left % world) if train else 0)
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
        positions = sorted(position for _, places, _ in parts for position in places)
        assert positions == list(range(step * size, step * size + len(positions)))
        for _, places, part in parts:
            assert np.array_equal(part, indices[list(places)])
        if train:
            assert len({len(part) for _, _, part in parts}) == 1
    assert used == sum(len(part) for each in shares for _, _, part in each)
    for order, share in zip(ranks, shares, strict=True):
        order.start = len(order) // 2
        assert len(share) == len(order)
        assert [part.tolist() for _, _, part in order] == [part.tolist() for _, _, part in share[order.start :]]


def test_epochs_and_seeds_differ_and_repeat(frames):
    recipe = augment.Recipe("none", 32)
    one, same, other = (batches_of(frames, recipe, 16, 0, seed) for seed in (1, 1, 2))
    assert taken(one) == taken(one) == taken(same)
    assert taken(one) != taken(one, epoch=1) and taken(one) != taken(other)
    assert sorted(sum(taken(one, 1), [])) == list(range(48))


def test_a_subset_and_an_order_of_ones_own(frames):
    recipe = augment.Recipe("none", 32)
    subset = batches_of(frames, recipe, 4, 0, 0, source=np.array([40, 3, 5, 30, 31]))
    assert sorted(sum(taken(subset), [])) == [3, 5, 30, 31, 40] and taken(subset, 0) != taken(subset, 1)
    listed = batches_of(frames, recipe, 4, 0, 0, train=False, source=[40, 3, 5, 3])
    assert taken(listed) == [[40, 3, 5, 3]]
    drawn = batches_of(frames, recipe, 2, 0, 0, source=lambda epoch: np.array([7, 7, epoch, 1]))
    assert taken(drawn, 2) == [[7, 7], [2, 1]]
    (a, _, _), _ = drawn.epoch(2)
    assert torch.equal(a[0], a[1])  # without augmentation


def test_pairs_of_frames_are_two_views(frames):
    recipe = augment.Recipe("none", 224)
    pairs = batches_of(frames, recipe, 2, 0, 0, views=2, source=lambda epoch: np.array([[4, 5], [9, 8]]))
    alone = batches_of(frames, recipe, 4, 0, 0, train=False, source=[4, 9, 5, 8])
    ((first, second), targets, indices), = pairs.epoch(0)  # fmt: skip
    (images, _, _), = alone.epoch(0)  # fmt: skip
    assert torch.equal(torch.cat([first, second]), images) and indices.tolist() == [4, 9] and targets.tolist() == [0, 0]


def test_two_views_are_two_draws(frames):
    batches = batches_of(frames, augment.Recipe("moco_v2", 32), 48, 0, 0, views=2)
    ((first, second), _, _), = batches.epoch(0)  # fmt: skip
    assert (first - second).abs().mean((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("words, match", [
    (dict(batch_size=9, context=ProcessContext(0, 2)), "--batch-size 9"),
    (dict(batch_size=49, drop_last=True), "48 images"),
])  # fmt: skip
def test_batches_that_cannot_be_made_are_refused(frames, words, match):
    with pytest.raises(UserError, match=match):
        batches_of(frames, augment.Recipe("none", 32), **words)


# Draws


@pytest.mark.parametrize("on", ["worker", "device"])
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_an_epoch_entered_in_the_middle_goes_on_bit_by_bit_whatever_the_workers(frames, workers, on):
    recipe = augment.Recipe("released", 48, on)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    alone = batches_of(frames, recipe, 10, 0, 5)
    several = batches_of(frames, recipe, 10, workers, 5)
    whole = {epoch: list(alone.epoch(epoch)) for epoch in (3, 4)}
    next(several.epoch(3))  # an epoch left at once
    for epoch, start in [(3, 0), (4, 2), (3, 4), (3, 1)]:
        for batches in (alone, several):
            rest = list(batches.epoch(epoch, start))
            assert len(rest) == 5 - start
            for ours, theirs in zip(rest, whole[epoch][start:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()  # nobody else's random numbers are touched


def test_a_sample_is_the_same_in_every_share_but_not_in_every_place(frames):
    recipe = augment.Recipe("released", 48)
    (whole, _, _), *_ = batches_of(frames, recipe, 12, 0, 0).epoch(0)
    halves = [next(batches_of(frames, recipe, 12, 0, 0, context=ProcessContext(r, 2)).epoch(0))[0] for r in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    repeated = batches_of(frames, recipe, 8, 0, 0, source=lambda epoch: np.full(8, 7))
    same = next(repeated.epoch(0))[0]
    assert all(not torch.equal(a, b) for i, a in enumerate(same) for b in same[:i])


def test_pixels_are_those_of_torchvisions_pipeline(frames):
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(loader.MEAN, loader.STD)])
    theirs = torch.stack([each for each, _ in datasets.ImageFolder(PHOTOS, plain)])
    batches = batches_of(frames, augment.Recipe("none", 224), 20, 0, 0, train=False)
    images, targets, indices = (torch.cat(each) for each in zip(*batches.epoch(0), strict=True))
    assert images.dtype == torch.float32 and targets.dtype == indices.dtype == torch.int64
    assert torch.allclose(images, theirs, atol=1e-5)
    assert indices.tolist() == list(range(48)) and targets.tolist() == frames.labels().tolist()
    first = next(batches.epoch(0))[0]
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_colors_from_the_device_are_those_from_the_worker(frames):
    ours = [next(batches_of(frames, augment.Recipe("moco_v2", 64, on), 48, 0, 0).epoch(0))[0]
            for on in ("worker", "device")]  # fmt: skip
    gray_levels = 255 * min(loader.STD)
    assert ((ours[0] - ours[1]).abs().mean((1, 2, 3)) * gray_levels).max() < 2


# Bad images


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
def test_in_training_the_next_good_frame_of_the_class_stands_in(many, capsys, kind, workers):
    frames = loader.FrameFolder(many)
    spoil(many, 99, kind)
    batches = batches_of(frames, augment.Recipe("none", 32), 32, workers, 0)
    for epoch in range(2):
        came = list(batches.epoch(epoch))
        indices = torch.cat([each for _, _, each in came])
        assert sorted(indices.tolist()) == sorted([*range(99), *range(100, 150), 50])  # the class begins again at 50
        assert all(frames.label(i) == t for _, targets, part in came for i, t in zip(part, targets, strict=True))
    assert list(batches.bad) == [99] and batches.bad[99]
    out = capsys.readouterr()
    assert (out.out + out.err).count("c1/099.png") == 1


def test_in_evaluation_a_bad_image_is_left_out(many, capsys):
    frames = loader.FrameFolder(many)
    for i in (0, 49, *range(120, 150)):
        spoil(many, i)
    batches = batches_of(frames, augment.Recipe("none", 32), 10, 0, 0, train=False)
    came = list(batches.epoch(0))
    indices = torch.cat([each for _, _, each in came]).tolist()
    assert indices == [*range(1, 49), *range(50, 120)] and list(batches.bad) == [0, 49, *range(120, 150)]
    assert all(len(images) == len(targets) == len(part) > 0 for images, targets, part in came)
    assert "c0/000.png" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_in_a_hundred_ends_the_training_with_the_list(many, workers):
    frames = loader.FrameFolder(many)
    spoil(many, 3)
    spoil(many, 77, "empty")
    batches = batches_of(frames, augment.Recipe("none", 32), 32, workers, 0)
    message = ""
    try:  # pytest.raises would keep the error and with it, in a ring of references, the workers
        list(batches.epoch(0))
    except UserError as error:
        message = str(error)
    assert "c0/003.png" in message and "c1/077.png: the file is empty" in message


def test_a_class_without_a_good_image_ends_the_training(many):
    frames = loader.FrameFolder(many)
    for i in range(50, 100):
        spoil(many, i, "text")
    with pytest.raises(UserError, match="images .* cannot be read, too many"):
        list(batches_of(frames, augment.Recipe("none", 32), 150, 0, 0).epoch(0))


def test_a_step_without_any_image_is_no_step(many):
    image(many / "c3" / "150.png")
    frames = loader.FrameFolder(many)
    spoil(many, 150)  # the only one of its class, less than one in a hundred of all
    batches = batches_of(frames, augment.Recipe("none", 32), 151, 0, 0)
    assert sum(len(indices) for indices in taken(batches)) == 150
    with pytest.raises(UserError, match="c3/150.png"):
        taken(batches_of(frames, augment.Recipe("none", 32), 1, 0, 0))


# Workers


PROGRAM = """
import multiprocessing, os, signal, sys
from moco import cli
from moco.data import augment, loader
from moco.distributed import ProcessContext

def main():
    frames = loader.FrameFolder(sys.argv[1])
    sampler = loader.EpochSampler(len(frames), 4)
    batches = loader.FrameLoader(frames, augment.Recipe("released", 32), sampler, "cpu", 2)
    epoch = batches.epoch(0)
    next(epoch)
    workers = multiprocessing.active_children()
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker.pid, stop)
    print(len(list(epoch)), *(worker.pid for worker in workers), flush=True)
    next(batches.epoch(1))
    globals()["kept"] = batches, batches.epoch(2)
    next(kept[1])
    raise {error}

cli.run(main)
"""


@pytest.mark.parametrize("error, status", [("cli.UserError('enough')", 2), ("ValueError('oh')", 1)])
def test_workers_outlive_the_jobs_signals_and_end_with_the_job(error, status):
    program = [sys.executable, "-c", PROGRAM.format(error=error), str(PHOTOS)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=support.ROOT)
    assert done.returncode == status, done.stderr
    steps, *workers = map(int, done.stdout.split())
    assert steps == 11 and len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert done.stderr.count("Traceback") == status % 2, done.stderr
