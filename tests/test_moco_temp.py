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

pytestmark = pytest.mark.usefixtures("handlers", "one_thread")


train = partial(training.train, script=moco_temp)


def test_a_run_pairs_neighbors_and_continues_bitwise(frames, tmp_path, monkeypatch):
    """Batches of 8 frames are 4 pairs; 24 frames make 3 of them."""
    seen = []

    def objective(model, images, targets):
        seen.append(images)
        return original(model, images, targets)

    original = moco_utils.objective
    monkeypatch.setattr(moco_utils, "objective", objective)
    train(frames, tmp_path / "whole")
    assert len(seen) == 6 and all(len(view) == 4 for images in seen for view in images)
    assert len({image.sum().item() for images in seen for view in images for image in view}) == 48
    content = checkpoint.read(tmp_path / "whole" / "moco_temp_checkpoint_0001.pth.tar")
    assert content["epoch"] == 2 and content["state_dict"]["module.queue_ptr"].tolist() == [6 * 4 % 16]

    train(frames, tmp_path / "cut", "--epochs", 1)
    train(frames, tmp_path / "cut", "--resume", "--workers", 2)
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))


def test_each_view_is_another_frame(frames, tmp_path, monkeypatch):
    """Without augmentation the views are the frames themselves: neighbors, or with published draws often one frame."""
    same_frame = []

    def objective(model, images, targets):
        same_frame.extend(torch.equal(a, b) for a, b in zip(*images, strict=True))
        return original(model, images, targets)

    original = moco_utils.objective
    monkeypatch.setattr(moco_utils, "objective", objective)
    monkeypatch.setitem(moco_utils.augment.RECIPES, "moco_v1", moco_utils.augment.RECIPES["none"])
    train(frames, tmp_path / "ours")
    assert not any(same_frame)
    train(frames, tmp_path / "published", "--published-sampling")
    assert any(same_frame) and not all(same_frame)


def test_mistakes_are_one_line(frames, tmp_path):
    with pytest.raises(UserError, match="--batch-size 1 makes no pair"):
        train(frames, tmp_path / "run", "--batch-size", 1)
    with pytest.raises(UserError, match="--moco-k 16 is not a multiple of the 3 keys per step; 15 is"):
        train(frames, tmp_path / "run", "--batch-size", 6)
    with pytest.raises(UserError, match="--batch-size 32 exceeds the 24 frames; use a smaller one"):
        train(frames, tmp_path / "run", "--batch-size", 32)
    assert not (tmp_path / "run").exists()
