"""The instrumented part of check_gpu.py: trainers run with observations of their networks and steps.

    python -m scripts.check_gpu_training '[["moco_img", ["frames", "--epochs", "1"], {"syncs": true}]]'

Input: JSON list of [trainer, flags, options of observe()]; under torchrun in every process. Output: one line of JSON
per run.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn

from moco import distributed
from moco.data import augment_device, loader
from moco.training import engine

FIRST, LAST = 5, 55  # steps without host sync; the ones before allocate memory and choose algorithms
ERROR = "error of check_gpu on one process"
BYTES = 2**27  # of the tensors that collectives are measured on: the gradients of a ResNeXt-50 in float32


class Observer:
    """Replacements for functions of the trainers that call them and collect what they see.

    dtypes: of the outputs of linear layers. channels_last: whether the inputs of convolutions are. networks: as
    prepared. steps: number of batches. color_times: pairs of _now() around the augmentation on the device.
    """

    prepare = staticmethod(engine.prepare)
    epoch = staticmethod(loader.FrameLoader.epoch)
    color = staticmethod(augment_device.color)

    def __init__(self, syncs, failing_rank, hooks):
        self.syncs = syncs
        self.is_failing = os.environ.get("RANK") == str(failing_rank)
        self.hooks = hooks
        self.dtypes = set()
        self.channels_last = set()
        self.color_times = []
        self.networks = []
        self.steps = 0

    def watch_prepare(self, *arguments, **options):
        network = self.prepare(*arguments, **options)
        for module in network.modules() if self.hooks else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self.watch_module)
        self.networks.append(distributed.unwrap(network))
        return network

    def watch_module(self, module, inputs, output):
        if isinstance(module, nn.Linear):
            self.dtypes.add(str(output.dtype).removeprefix("torch."))
        else:
            self.channels_last.add(inputs[0].is_contiguous(memory_format=torch.channels_last))

    def watch_epoch(self, *arguments):
        for step, batch in enumerate(self.epoch(*arguments)):
            self.steps += 1
            if step == 1 and self.is_failing:
                raise RuntimeError(ERROR)
            if self.syncs:
                torch.cuda.set_sync_debug_mode("error" if FIRST <= step < LAST else "default")
            yield batch

    def watch_color(self, images, *arguments):
        start = _now(images.device)
        images = self.color(images, *arguments)
        self.color_times.append((start, _now(images.device)))
        return images


def observe(trainer, flags, syncs=False, failing_rank=None):
    """Run the main of a trainer; returns a dict of observations.

    syncs: raise an error on a host sync in one of the steps FIRST to LAST. failing_rank: the process that raises an
    error in its second step.
    """
    seen = Observer(syncs, failing_rank, hooks="--compile" not in flags)  # hooks would split the graph
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        mock.patch.object(engine, "prepare", seen.watch_prepare),
        mock.patch.object(loader.FrameLoader, "epoch", lambda *arguments: seen.watch_epoch(*arguments)),
        mock.patch.object(augment_device, "color", seen.watch_color),
    ):
        status = importlib.import_module(trainer).main(flags)
    return {
        "status": status or 0,
        "steps": seen.steps,
        "dtypes": sorted(seen.dtypes),
        "channels_last": sorted(seen.channels_last),
        "weights": digest(seen.networks[-1]),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "color_ms": [_elapsed(*pair) for pair in seen.color_times],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def _now(device):
    """The present of the device: an event in its stream for a GPU, else the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start, end):
    """Milliseconds between two results of _now."""
    if isinstance(start, float):
        return 1000 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def digest(network):
    """A hash of the parameters of network and of MoCo's queue, without the batch-norm statistics of each process."""
    content = hashlib.sha256()
    for name, value in network.state_dict().items():
        if "running_" not in name and "num_batches" not in name:
            content.update(value.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def collectives(flags):
    """Milliseconds of an all-reduce and an all-gather of BYTES among the processes of torchrun."""
    device = distributed.select_device(flags[0], int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tensor = torch.zeros(BYTES // 4, device=device)
    part = tensor[: len(tensor) // dist.get_world_size()].clone()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    measured = {}
    for name, call in {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "all_gather": lambda: dist.all_gather(parts, part),
    }.items():
        times = []
        for _ in range(5):
            start = _now(device)
            call()
            times.append(_elapsed(start, _now(device)))
        measured[f"{name}_ms"] = sorted(times)[2]
    dist.destroy_process_group()
    return measured


def main(runs):
    for trainer, flags, options in json.loads(runs):
        try:
            seen = collectives(flags) if trainer == "collectives" else observe(trainer, flags, **options)
        except Exception as error:  # the others are still to be run
            seen = {"error": f"{type(error).__name__}: {error}"}
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        print(json.dumps({"trainer": trainer, **seen}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
