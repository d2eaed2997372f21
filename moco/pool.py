"""One function over many tasks, several at once, in processes of which any may crash."""

import multiprocessing
import signal
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait

from moco.cli import UserError

# A process that ends by one of these has met a file its decoder cannot stand; any other end is no fault of the file.
FAULTS = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP")}


class WorkerCrash(str):
    """Stands for the result of a task on which its process crashed: the reason in words."""


class WorkerPool:
    """Worker processes, started when first needed and kept from one set of tasks to the next; for a with statement.

    workers: how many at most; 0 works in this process.
    """

    def __init__(self, workers):
        self.workers, self.idle = workers, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for worker in self.idle:
            worker.end()

    def run(self, function, tasks):
        """Work on the tasks, several at once; yield (task number, amount, result or None for mere news of it).

        function(task, report) returns the task's result, never None, and may call report(amount) meanwhile. tasks: a
        sequence, started in its order. The result is a WorkerCrash where the process crashed. A UserError in a task,
        or a process killed from outside, ends the whole in a UserError.
        """
        if not self.workers:
            for number, task in enumerate(tasks):
                news = []
                result = function(task, news.append)
                yield number, sum(news), result
            return
        waiting, busy = deque(enumerate(tasks)), {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = self.idle.pop() if self.idle else _Worker()
                    worker.take(function, *waiting.popleft())
                    busy[worker.pipe] = worker
                for pipe in wait(list(busy)):
                    worker = busy[pipe]
                    try:
                        amount, result = pipe.recv()
                    except (EOFError, OSError):
                        amount, result = 0, worker.verdict()
                        del busy[pipe]
                    else:
                        if result is not None:
                            self.idle.append(busy.pop(pipe))
                    if isinstance(result, UserError):
                        raise result
                    yield worker.number, amount, result
        finally:
            for worker in busy.values():
                worker.process.terminate()
                worker.end()


class _Worker:
    """One process and the task it is at."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_work, args=(far_end,), daemon=True)
        self.process.start()
        far_end.close()  # so that the pipe ends with the process

    def take(self, function, number, task):
        self.number = number
        with suppress(BrokenPipeError):  # where it has died already, the next recv finds the pipe at its end
            self.pipe.send((function, task))

    def verdict(self):
        """What the end of the process says about its task."""
        self.process.join()
        status = self.process.exitcode
        if -status in FAULTS:
            return WorkerCrash(f"the decoder crashes on it ({signal.Signals(-status).name})")
        cause = f"killed by signal {-status} (was memory short?)" if status < 0 else f"ended with status {status}"
        return UserError(f"a worker process was {cause}. Start again to go on, perhaps with fewer --workers")

    def end(self):
        self.pipe.close()
        self.process.join()


def _work(pipe):
    """A worker process: tasks come through the pipe until it closes, (amount, result) goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    with suppress(EOFError, ConnectionError):  # the main process is gone: so is the need to work
        while True:
            function, task = pipe.recv()
            try:
                result = function(task, lambda amount: pipe.send((amount, None)))
            except UserError as error:
                result = error
            pipe.send((0, result))
