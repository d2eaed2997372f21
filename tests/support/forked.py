"""Processes of distributed.launch() forked from one that has imported torch: the import takes 4 s of CPU time."""

import os
from contextlib import contextmanager
from multiprocessing import reduction

import pytest
from torch import multiprocessing

PRELOAD = ["torchvision", "torch._dynamo", "imagenet_finetuning", "moco_img"]  # the optimizers load torch._dynamo


class _Output:
    """The output of this process; the process that unpickles it prints there, too."""

    def __reduce__(self):
        return _print_to, (reduction.DupFd(1), reduction.DupFd(2))


def _print_to(*outputs):
    for number, output in enumerate(outputs, 1):
        os.dup2(output.detach(), number)


def _run(rank, _, function, *arguments):
    function(rank, *arguments)


def _spawn(function, args, nprocs, join):
    """torch.multiprocessing.spawn() without a new interpreter."""
    arguments = (_Output(), function, *args)
    return multiprocessing.start_processes(_run, arguments, nprocs, join, start_method="forkserver")


@contextmanager
def launches():
    """A context in which distributed.launch() forks its processes."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "spawn", _spawn)
        yield
