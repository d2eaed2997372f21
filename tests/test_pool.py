"""The worker pool: every task runs once, in any number of processes, whichever of them crash."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from moco.cli import UserError
from moco.pool import WorkerCrash, WorkerPool
from tests import support


def square(task):
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "mistake":
        raise UserError("choose another file")
    return task * task


def square_with_progress(task, report):
    for _ in range(task):
        report(2)
    return task * task


def first_is_slow(task):
    time.sleep(0.3 * (task == 0))
    return task, os.getpid()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_map_returns_the_results_in_order(workers):
    with WorkerPool(workers) as pool:
        assert list(pool.map(square, range(1, 8))) == [1, 4, 9, 16, 25, 36, 49]
        assert list(pool.map(square, [])) == []


def test_map_keeps_the_order_when_a_later_task_finishes_first():
    with WorkerPool(2) as pool:
        assert [task for task, _ in pool.map(first_is_slow, range(6))] == list(range(6))


def test_workers_are_reused():
    with WorkerPool(2) as pool:
        processes = [{process for _, process in pool.map(first_is_slow, range(1, 9))} for _ in range(2)]
    assert processes[0] == processes[1] and len(processes[0]) == 2 and os.getpid() not in processes[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_as_completed_reports_progress(workers):
    progress = {}

    def add(index, amount):
        progress[index] = progress.get(index, 0) + amount

    with WorkerPool(workers) as pool:
        results = dict(pool.as_completed(square_with_progress, [3, 0, 5], add))
    assert results == {0: 9, 1: 0, 2: 25}
    assert progress == {0: 6, 2: 10}


def test_a_crash_costs_only_its_task():
    with WorkerPool(1) as pool:
        first, crash, *others = pool.map(square, [1, "crash", 3, 4])
    assert (first, others) == (1, [9, 16])
    assert isinstance(crash, WorkerCrash) and "SIGSEGV" in crash


@pytest.mark.parametrize(
    "task, message", [("mistake", "^choose another file$"), ("killed", "killed by signal 9 .*--workers")]
)
def test_a_user_error_or_a_killed_worker_is_one_line(task, message):
    with pytest.raises(UserError, match=message), WorkerPool(2) as pool:
        list(pool.map(square, [1, task, 3]))
    assert not multiprocessing.active_children()


def test_a_bug_in_a_task_shows_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)in square.*TypeError"), WorkerPool(1) as pool:
        list(pool.map(square, [1, None]))


def test_running_tasks_are_terminated_when_the_caller_stops():
    with WorkerPool(2) as pool:
        next(results := pool.map(square, range(100)))
        results.close()
        assert list(pool.map(square, [5])) == [25]
    assert not multiprocessing.active_children()


def test_ctrl_c_while_the_workers_start_prints_no_traceback_of_theirs(tmp_path):
    """The workers import this slow module when they start; the terminal sends Ctrl-C to all of them."""
    script = tmp_path / "slow_import.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"sys.path.insert(0, {str(support.ROOT)!r})\n"
        "from moco.pool import WorkerPool\n"
        "if __name__ == '__mp_main__':\n"
        f"    pathlib.Path({str(tmp_path / 'importing')!r}).touch()\n"
        "    time.sleep(1)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        with WorkerPool(1) as pool:\n"
        "            list(pool.map(abs, [-1]))\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "importing").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("interrupted\n", ""), err
