"""Small trainings, in this process or another one, and comparisons of their final states."""

import subprocess
import sys
import time

import torch

import temporal_classification
from moco.networks import checkpoint
from moco.training import engine

SMALL = ["--model", "shufflenet_v2_x0_5", "--image-size", "32", "--device", "cpu", "--batch-size", "8"]
SMALL += ["--precision", "fp32", "--epochs", "2", "--workers", "0"]
SMALL_MOCO = ["-a", "shufflenet_v2_x0_5", "--image-size", "64", "--moco-k", "16", "--moco-dim", "8", "--mlp"]
SMALL_MOCO += SMALL[4:]


def train(frames, save_dir, *flags, script=temporal_classification):
    """Train in this process; the exit status."""
    try:
        return script.main([str(frames), "--save-dir", str(save_dir), *_small(script), *map(str, flags)])
    except SystemExit as end:
        return end.code


def train_elsewhere(frames, save_dir, *flags, script=temporal_classification, launcher=()):
    """Start training in another process; launcher: options of Python that run another module, which runs the script."""
    words = [str(frames), "--save-dir", str(save_dir), *_small(script), *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *launcher, script.__file__, *words], **pipes)


def _small(script):
    return SMALL if script is temporal_classification else SMALL_MOCO


def wait_for_step(save_dir, process, lines):
    """Wait until the log has that many lines; fails if the process ends before."""
    log = save_dir / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def kill_at_step(frames, save_dir, lines, *flags, script=temporal_classification, delay=0):
    """Train in another process, and kill it once the log has that many lines, and some seconds have passed."""
    process = train_elsewhere(frames, save_dir, *flags, script=script)
    wait_for_step(save_dir, process, lines)
    time.sleep(delay)
    process.kill()
    process.communicate()


def at_step(patch, number, change, module=engine, objective="classification_objective"):
    """Let the trainings in this process pass their loss in the step of a number, counted from 1, through change."""
    original, steps = getattr(module, objective), []

    def changed(*arguments):
        steps.append(1)
        loss, metrics = original(*arguments)
        return change(loss) if len(steps) == number else loss, metrics

    patch.setattr(module, objective, changed)


def die(loss):
    """A change for at_step that ends a training: its last save is that of the step before."""
    raise InterruptedError


def running(pids):
    """The states of those of the processes that run; one that has ended may not be collected yet."""
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    states = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [state for state in states if not state.startswith("Z")]


def everything(save_dir):
    """The complete state of a run as a flat dict, without times."""
    flat = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                walk(f"{name}.{i}", inner)
        elif not name.endswith(("images_per_second", "waiting")) and not name.startswith(".args"):
            flat[name] = value

    walk("", checkpoint.read(save_dir / "last.tar"))
    return flat


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        for name, value in a.items()
    )
