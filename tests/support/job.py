"""A job of two processes with loader workers that ends as asked: python -m tests.support.job END [FLAGS]."""

import argparse
import multiprocessing
import os
import signal
import sys
import time

import torch
from torch import distributed as dist

from moco import cli, distributed
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from tests import support

ENDS = {  # the exit status and the message of each
    "normal": (0, ""),
    "stop": (75, ""),
    "mistake": (2, "the folder x is empty"),
    "bug": (1, "ValueError: oh"),
    "memory": (2, "CUDA out of memory. Tried to allocate 2 GiB; lower --batch-size"),
    "killed": (1, "process 1 was killed by SIGKILL; out of memory? re-run"),
}


def end(kind, rank):
    """End this process as asked; the other one waits as NCCL does, deaf to every signal but SIGKILL."""
    if kind == "stop":
        sys.exit(75)
    if kind == "normal":
        return
    dist.destroy_process_group = lambda: time.sleep(3600)
    if kind == "wait":
        time.sleep(3600)
    if rank == 0:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun would wait for 30 seconds before SIGKILL
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if kind == "mistake":
        raise cli.UserError("the folder x is empty")
    if kind == "memory":  # as torch raises it
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")
    if kind == "bug":
        raise ValueError("oh")
    os.kill(os.getpid(), signal.SIGKILL)


def train(args, context):
    """A few steps of a training."""
    frames = FrameFolder(support.GOLDEN / "images")
    sampler = loader.EpochSampler(len(frames), 4, context=context)
    batches = loader.FrameLoader(frames, augment.RECIPES["none"], 32, sampler, context.device, args.workers)
    for step, _ in enumerate(batches.epoch(0)):
        if step == 0:  # before it waits for the other process: the workers would read on, and end
            workers = [process.pid for process in multiprocessing.active_children()]
            print(f"pids {os.getpid()} {' '.join(map(str, workers))}", flush=True)
        distributed.all_reduce_sum(torch.ones(1), context)
        if step == 5:
            end(args.end, context.rank)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=[*ENDS, "wait"])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    distributed.add_flags(parser)
    return distributed.launch(train, parser.parse_args())


if __name__ == "__main__":
    cli.run(main)
