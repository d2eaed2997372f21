"""Worker processes that survive the crash of one of them, and end with the main process."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from moco.cli import UserError

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP")  # in native code; others come from outside
COUNTERS = 2**16  # more tasks than that share them


class WorkerCrash(str):
    """The result of a task that crashed its worker process: the reason, in words."""


class WorkerPool:
    """Worker processes that run functions on tasks; a context manager.

    workers: the number of processes; 0 runs everything in this process. Functions, tasks and results are pickled.

    After the crash of a worker (a segmentation fault in a decoder), the tasks that ran are tried again one by one, and
    the result of one that crashes again is a WorkerCrash. A worker that is killed from outside, for example for lack of
    memory, raises a UserError. Workers end at once after an exception, Ctrl-C, SIGTERM, which here acts like Ctrl-C,
    and the death of the main process.
    """

    def __init__(self, workers):
        self.workers = workers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Processes are started by a thread, which no signal interrupts, and inherit its block of Ctrl-C.
        self._thread = ThreadPoolExecutor(1, initializer=_block_ctrl_c)
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._processes, self._done = set(), context.RawArray("q", COUNTERS)  # how much of each task is done
        self._executor = ProcessPoolExecutor(max(1, self.workers), context, _start_worker, (self._done,))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._thread.shutdown()
        self._executor.shutdown()

    def as_completed(self, function, tasks, on_progress=lambda index, done: None):
        """Yield (index, function(task, report)) for each task of a sequence, as they finish.

        Tasks start in order. The function may call report(done) with how much of its task is done, an int; then
        on_progress(index, done) is called in this process.
        """
        if not self.workers:
            for index, task in enumerate(tasks):
                yield index, function(task, partial(on_progress, index))
            return
        try:
            yield from self._as_completed(function, tasks, on_progress)
        except BaseException:
            self._thread.shutdown()
            for process in multiprocessing.active_children():
                process.terminate()
            raise

    def _as_completed(self, function, tasks, on_progress):
        waiting, running, suspects = deque(range(len(tasks))), {}, 0
        while waiting or running:
            try:
                while waiting and len(running) < (1 if suspects else self.workers):
                    task = tasks[waiting[0]], waiting[0] % COUNTERS
                    future = self._thread.submit(self._executor.submit, _run, function, *task).result()
                    self._processes.update(multiprocessing.active_children())
                    running[future] = waiting.popleft()
                finished, _ = wait(running, 0.5, FIRST_COMPLETED)
                for index in running.values():
                    on_progress(index, self._done[index % COUNTERS])
                for future in finished:
                    result = future.result()
                    suspects = max(0, suspects - 1)
                    yield running.pop(future), result
            except BrokenProcessPool:
                crash = self._restart()
                lost = [running.pop(future) for future in list(running) if future.exception()]
                if len(lost) == 1:
                    suspects = max(0, suspects - 1)
                    yield lost[0], crash
                else:
                    waiting.extendleft(reversed(lost))
                    suspects = len(lost)

    def _restart(self):
        """Replace all processes after the end of one, and return the WorkerCrash; UserError if it was killed."""
        self._executor.shutdown()  # waits for the others, which the executor terminates
        for process in self._processes:
            process.join(10)  # without which the status of one may not be known yet
        statuses = {process.exitcode for process in self._processes} - {0, None, -signal.SIGTERM}
        self._start()
        status = min(statuses, default=-signal.SIGTERM)
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if name in CRASHES:
            return WorkerCrash(f"a worker process crashed on it ({name})")
        raise UserError(f"a worker process ended by {name} (out of memory?); retry with fewer --workers")


def _block_ctrl_c():
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _start_worker(done):
    global _done
    _done = done
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(function, task, counter):
    report = partial(_done.__setitem__, counter)
    report(0)
    return function(task, report)
