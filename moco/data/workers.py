"""Worker processes of a DataLoader: signals, deaths and the end of the program, without hangs or tracebacks."""

import functools
import multiprocessing
import multiprocessing.util
import signal
import threading
from contextlib import contextmanager
from multiprocessing import connection

import cv2
import torch

from moco import distributed, files
from moco.cli import UserError

SIGNALS = (signal.SIGINT, *distributed.STOP_SIGNALS)  # those that may be sent to all processes of a job
MEMORY_FULL = (
    "the shared memory (/dev/shm) is full: give the container a larger --shm-size, "
    "or retry with fewer --workers or a smaller --batch-size"
)


class WorkerBatches:
    """The batches that a dataset makes from the jobs of a sampler, in worker processes that all passes share.

    dataset[job] returns a batch, or a UserError, which is raised here. num_workers: 0 works in this process. Raises a
    UserError, too, for workers that cannot be started or that die.
    """

    def __init__(self, dataset, sampler, num_workers, pin_memory):
        self.loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # the loader draws one number per pass: not from the model's generator
        )
        self._processes = []

    def __iter__(self):
        first = self._start() if self.loader.num_workers and not self._processes else None
        try:
            for batch in self.loader if first is None else first:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (OSError, EOFError, RuntimeError) as error:
            if reason := self._death() or _exhausted(error):
                raise UserError(reason) from error
            raise

    def _start(self):
        """Start the workers and return the iterator of the first pass."""
        _end_workers_at_exit()
        files.raise_open_file_limit()  # each tensor of a batch that waits in the queue is one
        before = multiprocessing.active_children()
        try:
            with _workers_without_signals():
                iterator = iter(self.loader)
        except OSError as error:
            reason = _exhausted(error) or f"{error.strerror}; retry with fewer --workers"
            raise UserError(f"cannot start {self.loader.num_workers} worker processes: {reason}") from error
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        return iterator

    def _death(self):
        """Why a worker died, or None if all are alive."""
        if not self._processes:
            return None
        dead = connection.wait([process.sentinel for process in self._processes], timeout=5)
        for process in self._processes:
            if process.sentinel in dead:
                process.join()  # the sentinel is ready a moment before the status is
                return _exit_reason(process.exitcode)
        return None


def _exit_reason(status):
    """The exit status of a worker in words, and what to do about it."""
    if status == -getattr(signal, "SIGBUS", 0):
        return f"a worker process was killed by signal {-status}: {MEMORY_FULL}"
    end = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    cause = "out of memory?" if status == -9 else "--workers 0 may show why"
    return f"a worker process {end} ({cause}); retry with fewer --workers"


def _exhausted(error):
    """What to do about an error that says what the system has run out of; None for other errors."""
    text = str(error)
    if "No space left" in text or "Cannot allocate" in text:
        return MEMORY_FULL
    if "Too many open files" in text or "ancdata" in text:
        return "too many open files: raise the limit with ulimit -n, or retry with fewer --workers"
    return None


@contextmanager
def _workers_without_signals():
    """Start workers that block the signals to a job, and whose deaths raise no error in the midst of other code.

    The main process handles a job's signals: it saves, and then ends the workers. They inherit the block, so that no
    signal reaches them before _init_worker() runs. The handler of SIGCHLD that torch installs raises its error wherever
    the main process is; without it, the loader raises the error within five seconds.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    child_handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, child_handler)


def _identity(batch):
    return batch


def _init_worker(_):
    """A DataLoader's worker_init_fn: no threads of OpenCV, and no signals but SIGKILL."""
    cv2.setNumThreads(0)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a fork server passes on its own mask


def share(tensors):
    """Move tensors to shared memory if this is a worker; returns None, or a UserError if that is full.

    The queue to the main process would do it as well, but in a thread: its error would be lost and the main process
    would wait forever.
    """
    if torch.utils.data.get_worker_info() is None:
        return None
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        if reason := _exhausted(error):
            return UserError(reason)
        raise
    return None


@functools.cache
def _end_workers_at_exit():
    """Kill the workers at exit, where multiprocessing would send the SIGTERM that they block, and wait for them."""
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers():
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
