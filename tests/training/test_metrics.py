"""Sums of losses and metrics, by hand."""

import pytest
import torch

from moco.cli import UserError
from moco.distributed import ProcessContext
from moco.training.engine import MetricSums, topk_accuracy

CPU = torch.device("cpu")


def test_accuracy_by_hand():
    logits = torch.tensor([[9.0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    targets = torch.tensor([0, 2, 1])
    assert topk_accuracy(logits, targets).item() == pytest.approx(100 / 3)
    assert topk_accuracy(logits, targets, k=5).item() == pytest.approx(200 / 3)
    assert topk_accuracy(logits[:, :3], torch.tensor([0, 2, 1]), k=5).item() == 100


def test_averages_weigh_steps_by_their_images():
    sums = MetricSums(CPU)
    sums.update(torch.tensor(1.0), {"acc1": torch.tensor(50.0)}, images=2)
    sums.update(torch.tensor(4.0), {"acc1": torch.tensor(0.0)}, images=1)
    assert sums.averages(ProcessContext()) == {"loss": 2.0, "acc1": pytest.approx(100 / 3), "images": 3}


def test_sums_do_not_depend_on_where_they_are_saved_and_loaded():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole, part = MetricSums(CPU), MetricSums(CPU)
    for i, loss in enumerate(losses):
        whole.update(loss, {"std": loss / 3}, images=3 + i % 2)
        part.update(loss, {"std": loss / 3}, images=3 + i % 2)
        saved = part.all_reduce(ProcessContext())
        part = MetricSums(CPU)
        part.load(saved)
    assert part.averages(ProcessContext()) == whole.averages(ProcessContext())


def test_the_first_step_whose_loss_is_not_finite_is_remembered():
    sums = MetricSums(CPU)
    for step, loss in enumerate([1.0, float("inf"), 2.0, float("nan")]):
        sums.update(torch.tensor(loss), {}, images=1, step=step)
    assert sums.nonfinite_step == 2
    sums.reset()
    assert sums.nonfinite_step == 0


def test_no_images_at_all_is_one_line():
    with pytest.raises(UserError, match="none of the images can be read"):
        MetricSums(CPU).averages(ProcessContext())
