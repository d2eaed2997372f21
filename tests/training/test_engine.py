"""An objective is a function: one that nobody here knows trains, logs, resumes and has its curve."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from moco import distributed, plots
from moco.cli import UserError
from moco.distributed import ProcessContext
from moco.networks import checkpoint
from moco.training import engine
from moco.training.engine import MetricSums, topk_accuracy
from moco.training.run import Run
from tests.support import GOLDEN, ROOT, forked, simsiam
from tests.support.training import everything, same

pytestmark = pytest.mark.usefixtures("handlers")
TWO_PROCESSES = ("--multiprocessing-distributed", "--processes-per-node", "2")


def arguments(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    Run.add_flags(parser)
    parser.set_defaults(data=str(GOLDEN / "images"), batch_size=16, image_size=64, seed=3, print_freq=1, workers=0)
    parser.set_defaults(device="cpu")
    return parser.parse_args(list(map(str, flags)))


def launch(flags, train=simsiam.train):
    return distributed.launch(train, arguments(*flags))


def test_an_unknown_objective_trains_logs_and_draws_its_curve(tmp_path, monkeypatch, capsys):
    drawn = {}

    def savefig(figure, *_, **__):
        lines = {axes.get_ylabel(): [line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes}
        drawn.update(lines)
        original(figure, *_, **__)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    launch(["--save-dir", tmp_path])
    assert capsys.readouterr().out.endswith(
        f"finished: {tmp_path}/simsiam_1.tar is the network, for --model-path; curve and log are beside it\n"
    )
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "step" not in record]
    assert [record["images"] for record in epochs] == [48, 48]
    assert all(-1 <= record["loss"] <= 1 and 0 < record["std"] < 1 for record in records)
    assert drawn == {name: [[record[name] for record in epochs]] for name in ("loss", "std")}


def test_a_loss_is_shown_every_minute_however_seldom_the_log_has_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "SHOW_EVERY", -1)
    launch(["--save-dir", tmp_path, "--print-freq", 1000, "--epochs", 1])
    shown = re.findall(r"epoch 0: (\d)/3 steps.*loss -?\d", capsys.readouterr().out)
    assert shown == ["1", "2", "3", "3"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


COMPILERS = {  # what torch.compile raises without a compiler, and without Python's headers; the reason shown
    "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1": "InvalidCxxCompiler: No working",
    "CppCompileError: C++ compile error\n\nCommand:\ng++ x.h\nx.h:1:10: fatal error: no Python.h": "x.h:1:10: fatal",
}


@pytest.mark.parametrize("raised, shown", COMPILERS.items())
def test_a_compiler_that_is_missing_is_one_line_before_any_step(monkeypatch, raised, shown):
    def fails(function):
        raise RuntimeError(raised)

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=rf"--compile: torch cannot compile here \({shown}.*; install") as error:
        engine.prepare(torch.nn.Linear(1, 1), ProcessContext(), torch.float32, compiled=True)
    assert "\n" not in str(error.value)


@pytest.mark.thorough
@pytest.mark.parametrize("compiler", ["/no/such/compiler", None])
def test_a_small_function_shows_whether_torch_can_compile(tmp_path, compiler):
    code = "import torch; from moco.training import engine; engine.check_compiler('cpu')"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | ({"CXX": compiler} if compiler else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ("UserError: --compile: torch cannot compile here (InvalidCxxCompiler: " in done.stderr) == bool(compiler)


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


@pytest.mark.parametrize("metadata, flags, loss, acc1, acc5", [
    ({"n_out": 3}, {}, math.log(3), 100 / 3, 100),
    ({"n_out": 50}, {"moco_k": None}, math.log(50), 2, 10),
    ({}, {"moco_k": 65536}, math.log(65537), 100 / 65537, 500 / 65537),
])  # fmt: skip
def test_a_curve_shows_what_guessing_gives(metadata, flags, loss, acc1, acc5, monkeypatch):
    run, drawn = Run.__new__(Run), []
    run.metadata, run.flags, run.records, run.folder = {"arch": "resnet18"} | metadata, flags, [], Path("x")
    monkeypatch.setattr(plots, "training_curve", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(sys, "argv", ["/a/moco_img.py"])
    run._draw_curve()
    chance = {"loss": pytest.approx(loss), "acc1": pytest.approx(acc1), "acc5": pytest.approx(acc5)}
    assert drawn == [([], Path("x/training_curve"), "moco_img: resnet18", chance)]


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
