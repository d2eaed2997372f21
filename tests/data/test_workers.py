"""Loader workers: the signals of a job, deaths, lack of memory, and the end of the program."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco import files
from moco.data import workers
from tests import support

PHOTOS = support.GOLDEN / "images"
THOROUGH = pytest.mark.thorough
OUT_OF_MEMORY = "(out of memory?); retry with fewer --workers"
START = """
import faulthandler, multiprocessing, os, signal, sys, threading, time
faulthandler.dump_traceback_later(110, exit=True)  # shows where a program hangs
import torch
from moco import cli
from moco.data import augment, loader
from moco.data.frame_folder import FrameFolder

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
photos = sys.argv[1]

def make(batch_size=4, workers=2):
    frames = FrameFolder(photos)
    sampler = loader.EpochSampler(len(frames), batch_size)
    return loader.FrameLoader(frames, augment.RECIPES["released"], 32, sampler, "cpu", workers)
"""


def run(program, *arguments, prefix=()):
    """Run a program that follows START."""
    command = [*prefix, sys.executable, "-c", START + program, str(PHOTOS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=support.ROOT)


SIGNALED = """
def main():
    batches = make()
    epoch = batches.epoch(0)
    next(epoch)
    workers = multiprocessing.active_children()
    for stop in SIGNALS:
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
    done = run(SIGNALED.format(error=error))
    assert done.returncode == status, done.stderr
    steps, *pids = map(int, done.stdout.split())
    assert steps == 11 and len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert done.stderr.count("Traceback") == status % 2, done.stderr


STARTING = """
def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return list(map(int, file.read().split()))

def send_signals():
    while not done:
        for pid in children():
            for stop in SIGNALS:
                os.kill(pid, stop)

def main():
    batches = make(8, 4)
    sender = threading.Thread(target=send_signals)
    sender.start()
    try:
        print(len(list(batches.epoch(0))))
    finally:
        done.append(True)
        sender.join()

done = []
cli.run(main)
"""


def test_signals_do_not_reach_workers_that_are_starting():
    """They are sent from before the first worker exists until the epoch ends."""
    done = run(STARTING)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


def test_the_main_process_keeps_its_signal_handlers():
    program = """
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM"))
before = signal.getsignal(signal.SIGCHLD)
batches = make()
epoch = batches.epoch(0)
next(epoch)
os.kill(os.getpid(), signal.SIGTERM)
assert signal.getsignal(signal.SIGCHLD) == before and not signal.pthread_sigmask(signal.SIG_BLOCK, [])
print(len(list(epoch)))
"""
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n11\n"), done.stderr


KILLED = """
def main():
    batches = make(2)
    epoch = batches.epoch(0)
    next(epoch)
    os.kill(multiprocessing.active_children()[int(sys.argv[3])].pid, int(sys.argv[2]))
    for number in range(10000):
        for _ in batches.epoch(number):
            pass

cli.run(main)
"""


@pytest.mark.parametrize("which, number, words", [
    (0, 9, OUT_OF_MEMORY),
    (1, 7, "--shm-size"),
    pytest.param(1, 9, OUT_OF_MEMORY, marks=THOROUGH),
    pytest.param(0, 7, "--shm-size", marks=THOROUGH),
])  # fmt: skip
def test_a_killed_worker_is_one_line(which, number, words):
    """Signal 7 is SIGBUS: what writing to full shared memory raises."""
    done = run(KILLED, number, which)
    lines = [line for line in done.stderr.splitlines() if "Unexpected bus error" not in line and line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert f"a worker process was killed by signal {number}" in lines[0] and words in lines[0]


EPOCHS = """
def main():
    for number in range(3):
        print(len(list(make(16, int(sys.argv[2])).epoch(number))))

cli.run(main)
"""


@pytest.mark.parametrize("count, status", [(0, 0), pytest.param(1, 2, marks=THOROUGH), (2, 2)])
def test_a_small_shared_memory_is_one_line(count, status):
    """As in a container with Docker's default, but smaller: no batch of 16 images fits."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    done = run(EPOCHS, count, prefix=mount)
    assert done.returncode == status, done.stderr
    if count:
        assert done.stderr.count("\n") == 1 and "--shm-size" in done.stderr and "--workers" in done.stderr


def test_a_low_limit_of_open_files_is_raised():
    done = run(EPOCHS, 2, prefix=["bash", "-c", 'ulimit -Sn 40; exec "$@"', "bash"])
    assert (done.returncode, done.stdout) == (0, "3\n" * 3), done.stderr


@pytest.mark.parametrize("text, words", [
    ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", "ulimit -n"),
    ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--shm-size"),
    ("unable to mmap 4096 bytes from file </torch_1>: Cannot allocate memory (12)", "--shm-size"),
])  # fmt: skip
def test_errors_of_shared_memory_come_back_as_a_user_error(text, words, monkeypatch):
    def fail(tensor):
        raise RuntimeError(text)

    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    assert words in str(workers.share([torch.zeros(1)]))
    text = "an error of another kind"
    with pytest.raises(RuntimeError, match=text):
        workers.share([torch.zeros(1)])


def test_workers_that_cannot_be_started_are_one_line():
    program = """
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork = fork
cli.run(lambda: next(make().epoch(0)))
"""
    done = run(program)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot start 2 worker processes: Resource temporarily unavailable" in done.stderr


def test_a_limit_that_is_high_enough_is_not_changed(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files.OPEN_FILES, 2 * files.OPEN_FILES))
    monkeypatch.setattr(resource, "setrlimit", None)
    files.raise_open_file_limit()


@pytest.mark.parametrize("hard, expected", [(500, 500), (resource.RLIM_INFINITY, files.OPEN_FILES)])
def test_the_limit_is_raised_as_far_as_allowed(monkeypatch, hard, expected):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: limits.append(values))
    files.raise_open_file_limit()
    assert limits == [(expected, hard)]
