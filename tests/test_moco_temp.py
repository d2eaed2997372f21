"""MoCo over time, run as its user runs it: what it pairs, its files, exact resume."""

from functools import partial

import pytest
import torch

import moco_temp
import moco_utils
from moco.cli import UserError
from moco.networks import checkpoint
from tests.support import training
from tests.support.training import everything, same

pytestmark = pytest.mark.usefixtures("handlers")
train = partial(training.train, script=moco_temp)


@pytest.fixture
def seen(monkeypatch):
    """The two views, (N, 3, H, W) each, of every step of the trainings in a test."""

    def objective(model, images, targets):
        steps.append(images)
        return original(model, images, targets)

    steps, original = [], moco_utils.objective
    monkeypatch.setattr(moco_utils, "objective", objective)
    return steps


def test_a_run_pairs_neighbors_and_continues_bitwise(frames, tmp_path, seen):
    """Batches of 8 frames are 4 pairs; 24 frames make 3 of them."""
    train(frames, tmp_path / "whole")
    assert len(seen) == 6 and all(len(view) == 4 for images in seen for view in images)
    assert len({image.sum().item() for images in seen for view in images for image in view}) == 48
    content = checkpoint.read(tmp_path / "whole" / "moco_temp_checkpoint_0001.pth.tar")
    assert content["epoch"] == 2 and content["state_dict"]["module.queue_ptr"].tolist() == [6 * 4 % 16]

    train(frames, tmp_path / "cut", "--epochs", 1)
    train(frames, tmp_path / "cut", "--resume", "--workers", 2)
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))


def test_each_view_is_another_frame(frames, tmp_path, monkeypatch, seen):
    """Without augmentation the views are the frames themselves: neighbors, or with published draws often one frame."""
    monkeypatch.setitem(moco_utils.augment.RECIPES, "moco_v1", moco_utils.augment.RECIPES["none"])
    train(frames, tmp_path / "ours")
    ours = [torch.equal(a, b) for views in seen for a, b in zip(*views, strict=True)]
    seen.clear()
    train(frames, tmp_path / "published", "--published-sampling")
    published = [torch.equal(a, b) for views in seen for a, b in zip(*views, strict=True)]
    assert not any(ours) and any(published) and not all(published)


def test_mistakes_are_one_line(frames, tmp_path):
    with pytest.raises(UserError, match="--batch-size 1 makes no pair"):
        train(frames, tmp_path / "run", "--batch-size", 1)
    with pytest.raises(UserError, match="--moco-k 16 is not a multiple of the 3 keys per step; 15 is"):
        train(frames, tmp_path / "run", "--batch-size", 6)
    assert not (tmp_path / "run").exists()
