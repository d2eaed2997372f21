"""An objective is a function: one that nobody here knows trains, logs, resumes and has its curve."""

import argparse
import json
import os
import shutil
import signal

import pytest
import torch
from matplotlib.figure import Figure

from moco import distributed, plots
from moco.cli import UserError
from moco.distributed import ProcessContext
from moco.networks import checkpoint
from moco.training import engine
from moco.training.engine import MetricSums, topk_accuracy
from moco.training.run import EXIT_RESUBMIT, Run
from tests.support import GOLDEN, forked, simsiam
from tests.support.training import everything, same

pytestmark = pytest.mark.usefixtures("handlers", "one_thread")
TWO_PROCESSES = ("--multiprocessing-distributed", "--processes-per-node", "2")


def arguments(*flags):
    parser = argparse.ArgumentParser()
    parser.set_defaults(data=str(GOLDEN / "images"), batch_size=16, image_size=64, seed=3, epochs=2, print_freq=1)
    parser.set_defaults(device="cpu", overwrite=False)
    parser.add_argument("--save-dir")
    parser.add_argument("--workers", type=int, default=0)
    Run.add_flags(parser)
    distributed.add_flags(parser)
    return parser.parse_args(list(map(str, flags)))


def launch(flags, train=simsiam.train):
    return distributed.launch(train, arguments(*flags))


def test_an_unknown_objective_trains_logs_and_draws_its_curve(tmp_path, monkeypatch):
    drawn = {}

    def savefig(figure, *_, **__):
        lines = {axes.get_ylabel(): [line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes}
        drawn.update(lines)
        original(figure, *_, **__)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    launch(["--save-dir", tmp_path])
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "step" not in record]
    assert [record["images"] for record in epochs] == [48, 48]
    assert all(-1 <= record["loss"] <= 1 and 0 < record["std"] < 1 for record in records)
    assert drawn == {name: [[record[name] for record in epochs]] for name in ("loss", "std")}


def train_keeping_saves(args, context):
    """simsiam.train() that keeps every last.tar, as EPOCH_STEP.tar."""

    def save(run):
        original(run)
        if context.is_main:
            shutil.copy(run.folder / "last.tar", run.folder / f"{run.epoch}_{run.step}.tar")

    original = Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save)
        simsiam.train(args, context)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of an uninterrupted run in two processes, with what it has saved after every step."""
    folder = tmp_path_factory.mktemp("two") / "run"
    with forked.launches():
        assert launch(["--save-dir", folder, "--save-minutes", 0, *TWO_PROCESSES], train_keeping_saves) == 0
    return folder


def test_the_average_of_a_metric_is_over_the_images_of_all_processes(two_processes):
    content = checkpoint.read(two_processes / "last.tar")
    assert [record["images"] for record in content["records"]] == [48, 48]
    assert set(content["records"][0]) == {"epoch", "loss", "std", "images", "images_per_second", "waiting"}


def stop_after(step, monkeypatch):
    """Send SIGTERM to this process once so many steps of a run have been taken."""

    def end_step(run, *arguments):
        original(run, *arguments)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    original = Run.end_step
    monkeypatch.setattr(Run, "end_step", end_step)


def test_an_unknown_objective_resumes_bitwise(tmp_path, monkeypatch):
    launch(["--save-dir", tmp_path / "uninterrupted"])
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(SystemExit) as exit_:
            launch(["--save-dir", tmp_path / "interrupted"])
        assert exit_.value.code == EXIT_RESUBMIT
    assert checkpoint.read(tmp_path / "interrupted" / "last.tar")["step"] == 2
    launch(["--save-dir", tmp_path / "interrupted", "--resume"])
    assert same(everything(tmp_path / "uninterrupted"), everything(tmp_path / "interrupted"))


def test_an_unknown_objective_resumes_bitwise_in_two_processes(two_processes, tmp_path, capfd, forked_launch):
    interrupted = tmp_path / "interrupted"
    shutil.copytree(two_processes, interrupted)
    (interrupted / "1_2.tar").replace(interrupted / "last.tar")  # within the last epoch
    assert launch(["--save-dir", interrupted, "--resume", *TWO_PROCESSES]) == 0
    assert "continuing" in capfd.readouterr().out
    assert same(everything(two_processes), everything(interrupted))


def test_records_are_formatted_by_the_names_of_their_values():
    record = {"epoch": 1, "step": 5, "loss": 2.5, "acc1": 12.34, "std": 0.012345, "images": 9, "waiting": 0.25}
    assert engine.format_metrics(record) == "loss 2.500, top-1 12.3 %, std 0.01235, 25% waiting for data"


@pytest.mark.parametrize("records", [[], [{"epoch": 0, "loss": 1.0}], [{"epoch": 0, "acc1": 5.0}]])
def test_a_curve_of_little_is_drawn(records, tmp_path):
    plots.training_curve(records, tmp_path / "curve")
    assert (tmp_path / "curve.png").stat().st_size > 0 and (tmp_path / "curve.pdf").stat().st_size > 0


def test_the_learning_rate_falls_at_each_milestone():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    rates = []
    for epoch in range(5):
        engine.set_learning_rate(optimizer, engine.step_learning_rate(epoch, 1.0, [1, 3], 0.1))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_asks_torch_for_it(deterministic):
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        model = engine.prepare(
            torch.nn.Conv2d(3, 4, 3), distributed.ProcessContext(), torch.float32, False, deterministic
        )
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


# --- sums of losses and metrics, by hand

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
