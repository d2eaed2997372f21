"""A pool of worker processes that survives the crash of a worker."""

import multiprocessing
import signal
import traceback
from collections import deque
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

from moco.cli import UserError

# A worker that dies of one of these signals crashed in native code, on its task. Other signals come from outside.
CRASH_SIGNALS = {
    getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP")
}


class WorkerCrash(str):
    """The result of a task whose worker process crashed: the reason, in words."""


class WorkerPool:
    """Worker processes that run a function on many tasks; a context manager.

        with WorkerPool(workers) as pool:
            for result in pool.map(function, tasks):
                ...

    workers: the number of processes; 0 runs everything in this process. Workers start when they are first needed and
    are reused until the end of the with statement. Functions, tasks and results are pickled.

    A worker that crashes (a segmentation fault in a decoder) costs its task only: the result is a WorkerCrash and a
    new worker takes over. A worker that is killed from outside, for example for lack of memory, raises a UserError of
    one line, and so does a UserError in a task; any other exception in a worker raises a RuntimeError with the
    worker's traceback. In each case, and when the caller stops iterating, the running tasks are terminated.
    """

    def __init__(self, workers):
        self.workers = workers
        self._idle = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for worker in self._idle:
            worker.close()

    def map(self, function, tasks):
        """Yield function(task) for each task of a sequence, in order."""
        results, position = {}, 0
        for index, result in self.as_completed(partial(_without_progress, function), tasks):
            results[index] = result
            while position in results:
                yield results.pop(position)
                position += 1

    def as_completed(self, function, tasks, on_progress=lambda index, amount: None):
        """Yield (index, function(task, report)) for each task of a sequence, as they finish.

        Tasks start in order. The function may call report(amount) as it proceeds; on_progress(index, amount) is then
        called in this process.
        """
        if not self.workers:
            for index, task in enumerate(tasks):
                yield index, function(task, partial(on_progress, index))
            return
        waiting, busy = deque(enumerate(tasks)), {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = self._idle.pop() if self._idle else _Worker()
                    worker.submit(function, *waiting.popleft())
                    busy[worker.pipe] = worker
                for pipe in wait(list(busy)):
                    worker = busy[pipe]
                    kind, value = worker.receive()
                    if kind == "progress":
                        on_progress(worker.index, value)
                        continue
                    del busy[pipe]
                    if kind == "result":
                        self._idle.append(worker)
                    yield worker.index, value
        finally:
            for worker in busy.values():
                worker.process.terminate()
                worker.close()


def _without_progress(function, task, report):
    return function(task)


class _Worker:
    """A worker process and the index of its task."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(target=_work, args=(worker_end,), daemon=True)
        with _interrupts_blocked():
            self.process.start()
        worker_end.close()  # the pipe then ends when the process does

    def submit(self, function, index, task):
        self.index = index
        with suppress(BrokenPipeError):  # the worker is dead: receive() finds out why
            self.pipe.send((function, task))

    def receive(self):
        """("progress", amount), ("result", value) or ("crash", WorkerCrash); raises what the pool raises."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            return "crash", self.exit_reason()
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a worker process failed:\n{value}")
        return kind, value

    def exit_reason(self):
        """The WorkerCrash of a worker that crashed; raises UserError for one that was killed from outside."""
        self.process.join()
        status = self.process.exitcode
        if -status in CRASH_SIGNALS:
            return WorkerCrash(f"a worker process crashed on it ({signal.Signals(-status).name})")
        reason = f"was killed by signal {-status} (out of memory?)" if status < 0 else f"ended with status {status}"
        raise UserError(f"a worker process {reason}; retry with fewer --workers")

    def close(self):
        self.pipe.close()
        self.process.join()


@contextmanager
def _interrupts_blocked():
    """Block Ctrl-C. Processes inherit the block, so that Ctrl-C cannot end one while it imports modules."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks the signal, so it has to run already
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe):
    """The main loop of a worker process: receive (function, task) until the pipe closes, send (kind, value)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the main process, which terminates this one
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with suppress(EOFError, ConnectionError):  # the main process is gone
        while True:
            function, task = pipe.recv()
            try:
                message = "result", function(task, lambda amount: pipe.send(("progress", amount)))
            except UserError as error:
                message = "user error", str(error)
            except Exception:
                message = "error", traceback.format_exc()
            pipe.send(message)
