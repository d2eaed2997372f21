"""One function over many tasks, several at once, in processes of which any may crash."""

import multiprocessing
import signal
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait

from moco.cli import UserError

# A process that ends by one of these has met a file its decoder cannot stand; any other end is no fault of the file.
FAULTS = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP")}


class Crashed(str):
    """Stands for the result of a task on which its process crashed: the reason in words."""


def run(function, tasks, workers):
    """Work on the tasks, several at once; yield (task number, amount, result), result None for news from within one.

    function(task, report) returns the task's result, never None, and may call report(amount) meanwhile. tasks: a
    sequence, started in its order. workers: processes; 0 works in this one. The result is a Crashed where the process
    crashed. A UserError in a task, or a process killed from outside, ends the whole in a UserError.
    """
    if not workers:
        for number, task in enumerate(tasks):
            news = []
            result = function(task, news.append)
            yield number, sum(news), result
        return
    waiting, crew = deque(enumerate(tasks)), {}
    try:
        for _ in range(min(workers, len(tasks))):
            _hire(crew, function, waiting)
        while crew:
            for pipe in wait(list(crew)):
                worker = crew[pipe]
                try:
                    amount, result = pipe.recv()
                except (EOFError, OSError):
                    amount, result = 0, worker.verdict()
                    del crew[pipe]
                    if waiting:
                        _hire(crew, function, waiting)
                if isinstance(result, UserError):
                    raise result
                number = worker.number
                if result is not None and pipe in crew:
                    if waiting:
                        worker.take(*waiting.popleft())
                    else:
                        crew.pop(pipe).dismiss()
                yield number, amount, result
    finally:
        for worker in crew.values():
            worker.process.terminate()
            worker.dismiss()


def _hire(crew, function, waiting):
    worker = _Worker(function)
    crew[worker.pipe] = worker
    worker.take(*waiting.popleft())


class _Worker:
    """One process and the task it is at."""

    def __init__(self, function):
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_work, args=(far_end, function), daemon=True)
        self.process.start()
        far_end.close()  # so that the pipe ends with the process

    def take(self, number, task):
        self.number = number
        with suppress(BrokenPipeError):  # where it has died already, the next recv finds the pipe at its end
            self.pipe.send(task)

    def verdict(self):
        """What the end of the process says about its task."""
        self.process.join()
        status = self.process.exitcode
        if -status in FAULTS:
            return Crashed(f"the decoder crashes on it ({signal.Signals(-status).name})")
        cause = f"killed by signal {-status} (was memory short?)" if status < 0 else f"ended with status {status}"
        return UserError(f"a worker process was {cause}. Start again to go on, perhaps with fewer --workers")

    def dismiss(self):
        self.pipe.close()
        self.process.join()


def _work(pipe, function):
    """A worker process: tasks come through the pipe until it closes, (amount, result) goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    with suppress(EOFError, ConnectionError):  # the main process is gone: so is the need to work
        while True:
            task = pipe.recv()
            try:
                result = function(task, lambda amount: pipe.send((amount, None)))
            except UserError as error:
                result = error
            pipe.send((0, result))
