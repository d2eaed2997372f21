"""The worker pool: every task is done, in any number of processes, whichever of them crash; no process is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from moco.cli import UserError
from moco.videos.pool import WorkerCrash, WorkerPool
from tests import support


def square(task, report):
    if task == "mistake":
        raise UserError("choose another file")
    if isinstance(task, signal.Signals):
        os.kill(os.getpid(), task)
    return task * task


def process_of(task, report):
    time.sleep(0.3 * (task == 0))
    return os.getpid()


def meet(task, report):
    """Wait until all three tasks have started; the second one then crashes."""
    folder, number = task
    (folder / str(number)).touch()
    while not all((folder / str(other)).exists() for other in range(3)):
        time.sleep(0.01)
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def report_until_noticed(path, report):
    report(3)
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_and_its_progress_is_noticed_while_it_runs(tmp_path, workers):
    path = tmp_path / "noticed"
    with WorkerPool(workers) as pool:
        assert dict(pool.as_completed(square, range(1, 8))) == {k: (k + 1) ** 2 for k in range(7)}
        assert dict(pool.as_completed(square, [])) == {}
        list(pool.as_completed(report_until_noticed, [path], lambda index, done: done == 3 and path.touch()))


def test_workers_are_reused():
    with WorkerPool(2) as pool:
        processes = [{process for _, process in pool.as_completed(process_of, range(9))} for _ in range(2)]
    assert processes[0] == processes[1] and len(processes[0]) == 2 and os.getpid() not in processes[0]


def test_a_crash_costs_only_its_task(tmp_path):
    with WorkerPool(1) as pool:
        results = dict(pool.as_completed(square, [1, signal.SIGSEGV, 3, signal.SIGABRT]))
    assert (results[0], results[2]) == (1, 9)
    assert results[1] == "a worker process crashed on it (SIGSEGV)" and isinstance(results[1], WorkerCrash)
    assert results[3] == "a worker process crashed on it (SIGABRT)"
    with WorkerPool(3) as pool:
        results = dict(pool.as_completed(meet, [(tmp_path, number) for number in range(3)]))
        assert dict(pool.as_completed(square, [5])) == {0: 25}
    assert {number for number, result in results.items() if isinstance(result, WorkerCrash)} == {1}
    assert (results[0], results[2]) == (0, 2)


@pytest.mark.parametrize(
    "task, error, message",
    [
        ("mistake", UserError, "^choose another file$"),
        (signal.SIGKILL, UserError, "^a worker process ended by SIGKILL .*--workers"),
        (None, TypeError, "NoneType"),
    ],
)
def test_an_error_and_a_killed_worker_end_all_workers(task, error, message):
    with pytest.raises(error, match=message), WorkerPool(2) as pool:
        list(pool.as_completed(square, [1, task, *range(10**6, 10**6 + 20)]))
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, pathlib, sys, time
sys.path.insert(0, {root!r})
from moco import cli
from moco.videos.pool import WorkerPool

def touch(name):
    pathlib.Path({folder!r}, name).touch()

def work(task, report):
    touch("working")
    time.sleep(600)

def main():
    with WorkerPool(2) as pool:
        list(pool.as_completed(work, [1, 2]))

if __name__ == "__mp_main__":
    touch("importing")
    time.sleep({delay})
if __name__ == "__main__":
    cli.run(main)
"""


INTERRUPTED = "\nscript.py: interrupted; what is finished is kept, re-run to go on (a trainer with --resume)\n"


@pytest.mark.parametrize("state", ["importing", "working"])
@pytest.mark.parametrize(
    "end, whole_group, status, message",
    [
        (signal.SIGINT, True, 130, INTERRUPTED),  # as the terminal sends it
        (signal.SIGTERM, True, 130, INTERRUPTED),
        (signal.SIGTERM, False, 130, INTERRUPTED),
        (signal.SIGKILL, False, -signal.SIGKILL, None),
    ],
)
def test_no_end_of_the_main_process_leaves_a_worker_or_a_traceback(tmp_path, state, end, whole_group, status, message):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(support.ROOT), folder=str(tmp_path), delay=0.5 * (state == "importing")))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / state).exists():
        assert process.poll() is None
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, end)
    _, printed = process.communicate(timeout=60)  # the workers, too, hold the other end of the pipes
    assert process.returncode == status
    assert printed == message or (message is None and "Traceback" not in printed)
