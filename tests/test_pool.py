"""Tasks in processes: all done once, in any number of processes, whichever of them crash."""

import os
import signal

import pytest

from moco import pool
from moco.cli import UserError


def square(task, report):
    report(1)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "mistake":
        raise UserError("mend this")
    return task * task


def work(tasks, workers, repeats=1):
    with pool.WorkerPool(workers) as crew:
        for _ in range(repeats):
            news = list(crew.run(square, tasks))
    assert sum(amount for _, amount, _ in news) == len(tasks)
    return {number: result for number, _, result in news if result is not None}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_and_the_crew_works_again(workers):
    assert work(list(range(1, 8)), workers, repeats=2) == {k: (k + 1) ** 2 for k in range(7)}
    assert work([], workers) == {}


def test_a_crash_costs_its_task_only():
    results = work([1, "crash", 3, 4], workers=1)
    assert isinstance(results.pop(1), pool.WorkerCrash)
    assert results == {0: 1, 2: 9, 3: 16}


@pytest.mark.parametrize("task, said", [("mistake", "mend this"), ("killed", "killed by signal 9")])
def test_a_mistake_or_a_kill_from_outside_ends_all(task, said):
    with pytest.raises(UserError, match=said):
        work([1, task, 3], workers=2)
