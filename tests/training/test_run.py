"""A run is never lost: kills at any moment, stop signals through every launcher, full disks."""

import itertools
import random
import signal
import subprocess
import sys
import time

import pytest

import moco_img
import temporal_classification
from moco import plots
from moco.cli import UserError
from moco.networks import checkpoint
from moco.training import run
from moco.training.run import EXIT_RESUBMIT
from tests.support import ROOT
from tests.support.training import SMALL, everything, kill_at_step, running, same, train, train_elsewhere, wait_for_step

pytestmark = pytest.mark.usefixtures("handlers", "empty_figures")
EACH_STEP = ("--print-freq", 1, "--save-minutes", 0)
SAVES_FOR_EVER = """
import sys, torch
from moco.networks import checkpoint
from pathlib import Path
last = Path(sys.argv[1]) / "last.tar"
for number in range(10**6):
    checkpoint.write(last, {"number": number, "weights": torch.full((2_500_000,), number)})
    if number == 0:
        print("ready", flush=True)
"""


@pytest.mark.parametrize(
    "seconds", [0.3, *(pytest.param(0.05 + 0.03 * i, marks=pytest.mark.thorough) for i in range(25))]
)
def test_a_kill_while_saving_leaves_no_unreadable_file(tmp_path, seconds):
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.communicate()
    content = checkpoint.read(tmp_path / "last.tar")
    assert (content["weights"] == content["number"]).all()


@pytest.mark.thorough
@pytest.mark.parametrize("script", [temporal_classification, moco_img])
def test_kills_at_random_moments_with_any_number_of_workers(frames, tmp_path, script):
    flags, draws = ("--epochs", 3, *EACH_STEP), random.Random(0)
    train(frames, tmp_path / "whole", *flags, script=script)
    for i, (before, after) in enumerate(itertools.product((0, 2, 4), (0, 2, 4))):
        folder, delay = tmp_path / f"cut_{i}", draws.uniform(0, 0.05)
        kill_at_step(frames, folder, draws.randrange(1, 9), *flags, "--workers", before, script=script, delay=delay)
        again = train_elsewhere(frames, folder, *flags, "--workers", after, "--resume", script=script)
        assert again.wait(120) == 0, again.communicate()[1]
        assert same(everything(tmp_path / "whole"), everything(folder)), (i, before, after)


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(frames, small_disk):
    disk = small_disk("14m")
    with pytest.raises(UserError, match=r"cannot write .*disk.*: No space left on device; free some space"):
        train(frames, disk, "--epochs", 3)  # the files of an epoch take 1.4 and 4.2 MB
    assert checkpoint.read(disk / "last.tar")["epoch"] >= 1


def children_of(pid):
    """All processes below pid."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listing.splitlines()[1:])
    below = [child for child, parent in parents.items() if parent == pid]
    return below + [grandchild for child in below for grandchild in children_of(child)]


@pytest.mark.parametrize("launcher, stop, workers", [
    ("own", signal.SIGTERM, 2),
    ("torchrun", signal.SIGUSR2, 1),
    *(pytest.param("own", signal.SIGUSR2, workers, marks=pytest.mark.thorough) for workers in (0, 1, 2)),
    *(pytest.param("torchrun", signal.SIGTERM, workers, marks=pytest.mark.thorough) for workers in (0, 1, 2)),
])  # fmt: skip
def test_a_stop_signal_to_the_launcher_saves_on_all_processes(frames, tmp_path, launcher, stop, workers):
    """Only rank 0 prints, and no process or loader worker is left."""
    flags, options = ["--epochs", 1000, "--print-freq", 1, "--workers", workers], []
    if launcher == "own":
        flags += ["--multiprocessing-distributed", "--processes-per-node", 2]
    else:
        options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        options += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
    process = train_elsewhere(frames, tmp_path / "run", *flags, launcher=options)
    wait_for_step(tmp_path / "run", process, 3)
    family = children_of(process.pid)
    process.send_signal(stop)
    output, errors = process.communicate(timeout=200)
    status = EXIT_RESUBMIT if launcher == "own" else 1  # torchrun has its own
    assert process.returncode == status, errors
    assert output.count("24 frames in 3 classes") == output.count(f"stopped by {stop.name} after step") == 1
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert f"after step {content['step']} of epoch {content['epoch']}" in output
    assert len(family) >= (4 if workers else 2)
    assert not running(family)


HANGS = """
import os, sys, time
import temporal_classification
from moco import cli
from moco.data.folders import FrameFolder

def read(frames, i):
    while os.path.exists(sys.argv[-1]):
        time.sleep(0.01)
    return original(frames, i)

original, FrameFolder.read = FrameFolder.read, read
cli.run(lambda: temporal_classification.main(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_stop_signal_does_not_wait_for_a_batch_of_a_disk_that_hangs(frames, tmp_path, workers):
    hanging, run = tmp_path / "hanging", tmp_path / "run"
    flags = [str(frames), "--save-dir", str(run), *SMALL, "--print-freq", "1", "--workers", str(workers)]
    command = [sys.executable, "-c", HANGS, *flags, "--epochs", "1000", str(hanging)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, process, 2)
    hanging.touch()
    time.sleep(2)
    family = children_of(process.pid)
    process.send_signal(signal.SIGUSR2)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == EXIT_RESUBMIT and not errors.count("Traceback"), errors
    content = checkpoint.read(run / "last.tar")
    assert f"stopped by SIGUSR2 after step {content['step']} of epoch {content['epoch']}: saved" in output
    assert len(family) == workers and not running(family)
    epochs = ("--epochs", content["epoch"] + 1)
    train(frames, run, "--resume", *epochs)
    train(frames, tmp_path / "whole", *epochs)
    assert same(everything(run), everything(tmp_path / "whole"))


def test_the_curve_is_drawn_at_the_end_and_at_most_once_a_minute(frames, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "training_curve", lambda records, *_: drawn.append(len(records)))
    train(frames, tmp_path / "short", "--epochs", 3)
    assert drawn == [3]
    monkeypatch.setattr(run, "DRAW_CURVE_EVERY", -1)
    train(frames, tmp_path / "long", "--epochs", 3)
    assert drawn == [3, 1, 2, 3]


def test_a_replaced_run_is_never_continued(frames, tmp_path):
    train(frames, tmp_path / "run", "--epochs", 3)
    with pytest.raises(UserError, match="exists; give --resume"):
        train(frames, tmp_path / "run")
    with pytest.raises(UserError, match="not finite"):
        train(frames, tmp_path / "run", "--overwrite", "--lr", 1e30)
    assert not list((tmp_path / "run").glob("*.tar"))


def test_a_file_of_another_folder_does_not_replace_the_run_that_is_there(frames, tmp_path):
    for name in "ab":
        train(frames, tmp_path / name, "--epochs", 1)
    kept = (tmp_path / "b" / "log.jsonl").read_text()
    with pytest.raises(UserError, match="b/last.tar exists"):
        train(frames, tmp_path / "b", "--resume", tmp_path / "a" / "last.tar")
    assert (tmp_path / "b" / "log.jsonl").read_text() == kept
    train(frames, tmp_path / "c", "--resume", tmp_path / "a" / "last.tar")
    train(frames, tmp_path / "a", "--resume")
    assert same(everything(tmp_path / "a"), everything(tmp_path / "c"))


def test_a_first_epoch_cut_between_its_two_files_begins_anew(frames, tmp_path):
    train(frames, tmp_path / "whole")
    train(frames, tmp_path / "cut", "--epochs", 1)
    (tmp_path / "cut" / "last.tar").unlink()
    with pytest.raises(UserError, match="epoch_0.tar exists"):
        train(frames, tmp_path / "cut")
    train(frames, tmp_path / "cut", "--resume")
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))
