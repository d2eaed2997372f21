"""The trainer, run as its user runs it, and the promises of its training core."""

import json
import os
import shutil
import signal

import pytest
import torch
import torchvision
from torch import nn

import temporal_classification
from moco.cli import UserError
from moco.networks import checkpoint
from moco.training.run import EXIT_RESUBMIT
from tests.support.inputs import make_frames
from tests.support.training import at_step, die, everything, kill_at_step, same, train

pytestmark = pytest.mark.usefixtures("handlers", "empty_figures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run over the frames of the fixture of that name; also its save directory's log has every step."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_frames(folder / "frames"), folder / "run", "--print-freq", 1)
    return folder / "run"


def test_a_run_writes_what_it_promises(frames, tmp_path):
    assert train(frames, tmp_path / "run", "--print-freq", 2) in (None, 0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"args.json", "log.jsonl", "last.tar", "training_curve.pdf", "training_curve.png"} <= names
    content = checkpoint.read(tmp_path / "run" / "shufflenet_v2_x0_5_epoch_1.tar")
    assert len(content["acc1_list"]) == 2 and content["epoch"] == 1
    assert content["classes"] == ["class_0000", "class_0001", "class_0002"]
    model = torchvision.models.shufflenet_v2_x0_5()  # the published way of loading
    model.fc = nn.Linear(1024, 3)
    nn.DataParallel(model).load_state_dict(content["model_state_dict"])
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record.get("step") for record in records] == [2, None, 2, None]
    assert records[1]["images"] == 24 and records[1]["acc1"] == content["acc1_list"][0]


def test_it_learns(frames, tmp_path):
    train(frames, tmp_path / "run", "--epochs", 12, "--no-augmentation", "--lr", 0.001)
    assert max(checkpoint.read(tmp_path / "run" / "last.tar")["acc1_list"]) > 70


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(frames, tmp_path, monkeypatch, whole, steps):
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        at_step(patch, steps, die)
        train(frames, tmp_path / "cut", "--save-minutes", 0)
    train(frames, tmp_path / "cut", "--save-minutes", 0, "--resume", "--workers", 2)
    assert same(everything(whole), everything(tmp_path / "cut"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that dies in the last step, its last save being that of the step before."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        at_step(patch, 6, die)
        train(make_frames(folder / "frames"), folder / "run", "--save-minutes", 0)
    return folder / "run"


def add(tensor, value):
    tensor += value


PARTS = {
    "weights": lambda content: add(content["model_state_dict"]["module.conv1.0.weight"], 1e-3),
    "buffers": lambda content: add(content["model_state_dict"]["module.conv1.1.running_mean"], 1),
    "optimizer": lambda content: add(content["optimizer_state_dict"]["state"][0]["exp_avg"], 1),
    "epoch": lambda content: content.update(epoch=0),
    "step": lambda content: content.update(step=0),
    "records": lambda content: content.update(records=[]),
    "totals": lambda content: content.update(totals=dict.fromkeys(content["totals"], 0)),
}


@pytest.mark.parametrize("part", PARTS)
def test_leaving_a_part_of_the_state_out_is_noticed(frames, tmp_path, cut, whole, part):
    """The comparison above fails for every part that a resume needs."""
    shutil.copytree(cut, tmp_path / "cut")
    content = checkpoint.read(tmp_path / "cut" / "last.tar")
    assert (content["epoch"], content["step"]) == (1, 2)
    PARTS[part](content)
    checkpoint.write(tmp_path / "cut" / "last.tar", content)
    train(frames, tmp_path / "cut", "--save-minutes", 0, "--resume")
    assert not same(everything(whole), everything(tmp_path / "cut"))


def test_a_killed_process_loses_nothing(frames, tmp_path, whole):
    kill_at_step(frames, tmp_path / "cut", 5, "--print-freq", 1, "--save-minutes", 0, "--workers", 2)
    train(frames, tmp_path / "cut", "--print-freq", 1, "--save-minutes", 0, "--resume")
    assert same(everything(whole), everything(tmp_path / "cut"))
    losses = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path / "cut")
    ]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "cut").glob(".*.part*"))


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_signal_saves_after_the_step_and_ends_with_75(frames, tmp_path, monkeypatch, stop):
    at_step(monkeypatch, 2, lambda loss: os.kill(os.getpid(), stop) or loss)
    assert train(frames, tmp_path / "run") == EXIT_RESUBMIT
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert (content["epoch"], content["step"]) == (0, 2)


def test_a_finished_run_resumes_to_nothing_and_its_epochs_may_grow(frames, tmp_path, capsys, whole):
    train(frames, tmp_path / "run", "--epochs", 1)
    assert train(frames, tmp_path / "run", "--epochs", 1, "--resume") in (None, 0)
    assert "nothing to do" in capsys.readouterr().out
    train(frames, tmp_path / "run", "--epochs", 2, "--resume")
    assert same(everything(whole), everything(tmp_path / "run"))


def test_a_damaged_newest_checkpoint_is_named_and_that_of_an_epoch_continues(frames, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / "last.tar"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.raises(UserError, match="last.tar is damaged"):
        train(frames, tmp_path / "run", "--resume")
    train(frames, tmp_path / "run", "--resume", tmp_path / "run" / "shufflenet_v2_x0_5_epoch_0.tar")
    states = [everything(folder) for folder in (tmp_path / "run", whole)]
    assert same(*({k: value for k, value in state.items() if not k.startswith(".records.0")} for state in states))


def test_a_published_file_continues_with_the_flags_given_and_says_what_is_lost(frames, tmp_path, capsys, whole):
    content = checkpoint.read(whole / "last.tar")
    published = {key: content[key] for key in ("acc1_list", "model_state_dict", "optimizer_state_dict")}
    torch.save(published, tmp_path / "TC.tar")
    flags = ("--start-epoch", 16, "--epochs", 17, "--lr", 0.25)
    train(frames, tmp_path / "more", "--resume", tmp_path / "TC.tar", *flags)
    assert "stores no position" in capsys.readouterr().out
    content = checkpoint.read(tmp_path / "more" / "shufflenet_v2_x0_5_epoch_16.tar")
    assert content["acc1_list"][:2] == published["acc1_list"] and len(content["acc1_list"]) == 3
    assert content["optimizer_state_dict"]["param_groups"][0]["lr"] == content["args"]["lr"] == 0.25


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(frames, tmp_path, monkeypatch):
    at_step(monkeypatch, 5, lambda loss: loss * float("nan"))
    with pytest.raises(UserError, match="loss is not finite from step 2 of epoch 1: try a lower --lr"):
        train(frames, tmp_path / "run")
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert (content["epoch"], content["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


def test_wrong_input_is_one_line(frames, tmp_path, capsys):
    with pytest.raises(UserError, match="--n_out 5 does not fit .*frames: it has 3 classes"):
        train(frames, tmp_path / "run", "--n_out", 5)
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(frames, tmp_path / "run", "--model-path", tmp_path / "missing.tar")
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(frames, tmp_path / "run", "--resume", tmp_path / "missing.tar")
    with pytest.raises(UserError, match="cannot write to the folder .*file/run: Not a directory"):
        (tmp_path / "file").touch()
        train(tmp_path / "missing", tmp_path / "file" / "run")  # before the data are looked at
    assert not (tmp_path / "run").exists()
    train(frames, tmp_path / "run", "--batch-size", 32, "--epochs", 1)
    assert "note: --batch-size 32 exceeds the 24 frames: an epoch is a single step" in capsys.readouterr().out


def test_published_flags_and_the_two_recipes():
    args = temporal_classification.parse_args(["data"])
    assert (args.model, args.epochs, args.batch_size, args.lr, args.wd) == ("resnet50", 16, 256, 5e-4, 0)
    assert (args.print_freq, args.augmentation) == (10000, True)
    args = temporal_classification.parse_args(["data", "--recipe", "paper", "--augmentation"])
    assert (args.epochs, args.batch_size, args.augmentation) == (6, 732, False)
