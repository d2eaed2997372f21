"""The workers of a FrameLoader: the signals of a job, deaths, lack of memory, and the end of the program."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import support

PHOTOS = support.GOLDEN / "images"
THOROUGH = pytest.mark.thorough
START = """
import faulthandler, multiprocessing, os, signal, sys, threading, time
faulthandler.dump_traceback_later(110, exit=True)  # shows where a program hangs
import torch
from moco import cli
from moco.data import augment, loader
from moco.data.folders import FrameFolder

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
photos = sys.argv[1]

def make(batch_size=4, workers=2):
    frames = FrameFolder(photos)
    sampler = loader.EpochSampler(len(frames), batch_size)
    return loader.FrameLoader(frames, augment.RECIPES["released"], 32, sampler, "cpu", workers)
"""


def run(program, *arguments, prefix=()):
    """Run a program that follows START; the name of a socket among its temporary files would be too long."""
    command = [*prefix, sys.executable, "-c", START + program, str(PHOTOS), *map(str, arguments)]
    with tempfile.TemporaryDirectory(suffix="x" * 120) as folder:
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=support.ROOT, env=environment)
        assert not os.listdir(folder)
    return done


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
    received, before = [], signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    epoch = make(8, 4).epoch(0)
    sender = threading.Thread(target=send_signals)
    sender.start()
    try:
        next(epoch)
        os.kill(os.getpid(), signal.SIGTERM)
        print(1 + len(list(epoch)))
        assert received == [signal.SIGTERM] and not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.getsignal(signal.SIGCHLD) == before
    finally:
        done.append(True)
        sender.join()

done = []
cli.run(main)
"""


def test_signals_do_not_reach_workers_that_are_starting_and_the_main_process_keeps_its_handlers():
    """Workers get signals from before the first one exists until the epoch ends."""
    done = run(STARTING)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


KILLED = """
def main():
    batches = make(2)
    epoch = batches.epoch(0)
    next(epoch)
    os.kill(multiprocessing.active_children()[int(sys.argv[2])].pid, signal.SIGKILL)
    for number in range(10000):
        for _ in batches.epoch(number):
            pass

cli.run(main)
"""


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=THOROUGH)])
def test_a_killed_worker_is_one_line(which):
    done = run(KILLED, which)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "DataLoader worker" in done.stderr and "out of memory" in done.stderr and "fewer --workers" in done.stderr


EPOCHS = """
def main():
    for number in range(3):
        print(len(list(make(16, int(sys.argv[2])).epoch(number))))

cli.run(main)
"""


def run_with_shared_memory(size, workers):
    """Run EPOCHS with a /dev/shm of that size, as in a container."""
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    return run(EPOCHS, workers, prefix=mount)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=THOROUGH)])
def test_batches_take_no_shared_memory_of_a_container(workers):
    """/dev/shm has room for the semaphores of the queues, and for none of the batches of 16 images."""
    done = run_with_shared_memory("160k", workers)
    assert (done.returncode, done.stdout) == (0, "3\n" * 3), done.stderr


def test_a_full_shared_memory_is_one_line():
    done = run_with_shared_memory("4k", 2)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr and "/dev/shm" in done.stderr and "--workers" in done.stderr


def test_no_worker_outlives_a_killed_main_process():
    program = """
batches = make()
epoch = batches.epoch(0)
next(epoch)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(program)
    pids = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_workers_that_cannot_be_started_are_one_line():
    program = """
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork = fork
cli.run(lambda: next(make().epoch(0)))
"""
    done = run(program)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "Resource temporarily unavailable; " in done.stderr and "--workers" in done.stderr
