"""One process, many GPUs or many nodes: start, rank, wrap, gather."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from moco.cli import UserError, cores, number

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@dataclass(frozen=True)
class ProcessContext:
    """Where a process stands: its rank among world_size processes, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    single_gpu: bool = (
        False  # on this GPU and no other: it was asked for, or the others may have processes of their own
    )

    @property
    def is_main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def supports_fused(self):
        """Whether torch's optimizers can take a whole step at once on this device."""
        return self.device.type != "mps"


def add_flags(parser):
    """Add the flags of PyTorch's ImageNet example, as published, to parser."""
    group = parser.add_argument_group("several processes (torchrun and srun need none of these)")
    add = group.add_argument
    add("--multiprocessing-distributed", action="store_true", help="start one process a GPU on this node (DDP)")
    add(
        "--processes-per-node",
        type=number(int, 1),
        metavar="N",
        help="processes that --multiprocessing-distributed starts; without it one a GPU, or 1 on a CPU",
    )
    add("--world-size", type=int, default=-1, metavar="NODES", help="number of nodes; -1: one")
    add("--rank", type=int, default=-1, metavar="NODE", help="rank of this node, from 0; -1: 0")
    add("--dist-url", metavar="URL", help="where the processes meet: tcp://HOST:PORT; default: a free local port")
    add("--dist-backend", choices=["nccl", "gloo"], help="default: nccl on GPUs, gloo on a CPU")
    add("--gpu", type=int, metavar="N", help="compute on this GPU alone")


def select_device(name, local_rank=0):
    """The torch device that --device names; 'auto' is a GPU where there is one, then Apple's, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; check the driver, or give --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {local_rank}: this process sees {torch.cuda.device_count()}")
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; give --device cpu")
    return torch.device(name)


def no_tf32():
    """A context in which a GPU computes convolutions and matrix products in float32, not in TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def all_like(device):
    """The devices among which one process may share work that device could do alone: all GPUs for a GPU."""
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if device.type == "cuda" else [device]


def launch(train, args):
    """Run train(args, context) in this process, in the one torchrun or srun made it, or in several started here.

    Returns the exit status. The first process that fails takes the others down: within seconds, with its message.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:  # torchrun
        ranks = tuple(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return _join(train, args, *ranks, "env://")
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun
        ranks = tuple(int(environment[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        return _join(train, args, *ranks, args.dist_url or _slurm_url(environment))
    if args.multiprocessing_distributed:
        return _spawn(train, args)
    return train(
        args, ProcessContext(device=select_device(args.device, args.gpu or 0), single_gpu=args.gpu is not None)
    )


def _slurm_url(environment):
    """A meeting point that every task of a SLURM step works out alike: its first node, a port from the job's number."""
    first = _scontrol("hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("node", first))[1]  # a node's name need not be a host's
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", 0))) % 20000
    return f"tcp://{address}:{port}"


def _scontrol(what, which):
    return subprocess.run(["scontrol", "show", what, which], capture_output=True, text=True, check=True).stdout


def _join(train, args, rank, world_size, local_rank, url):
    """Run train as one of world_size processes."""
    here = select_device(args.device, local_rank)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = args.dist_backend or ("nccl" if here.type == "cuda" else "gloo")
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size)
    try:
        return train(args, ProcessContext(rank, world_size, here, single_gpu=True))
    finally:
        dist.destroy_process_group()


def _spawn(train, args):
    """Start this node's processes, pass stop signals on to them, and wait."""
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
    here = select_device(args.device)
    count = args.processes_per_node or (torch.cuda.device_count() if here.type == "cuda" else 1)
    if nodes > 1 and not args.dist_url:
        raise UserError("several nodes need --dist-url tcp://HOST:PORT, the same on all of them")
    url = args.dist_url or f"tcp://127.0.0.1:{_free_port()}"
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, cores() // count)
    arguments = (train, args, node * count, nodes * count, url, threads, messages)
    children = multiprocessing.spawn(_child, arguments, nprocs=count, join=False)
    for stop in STOP_SIGNALS:
        signal.signal(stop, lambda number, frame: [os.kill(pid, number) for pid in children.pids()])
    try:
        while not children.join():
            pass
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        if not messages.empty():
            raise UserError(messages.get()) from error
        killed = [process for process in children.processes if process.exitcode == -signal.SIGKILL]
        if killed:
            rank = node * count + children.processes.index(killed[0])
            print(f"process {rank} was killed (out of memory?); the others were stopped, see --resume", file=sys.stderr)
            return 1
        if isinstance(error, multiprocessing.ProcessExitedException):
            return error.exit_code
        raise
    return 0


def _child(local_rank, train, args, first_rank, world_size, url, threads, messages):
    torch.set_num_threads(threads)
    try:
        sys.exit(_join(train, args, first_rank + local_rank, world_size, local_rank, url))
    except UserError as error:
        messages.put(str(error))
        sys.exit(2)


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wrap(model, context):
    """model on its device, in DDP among several processes, in DataParallel on all GPUs of a single one."""
    model = model.to(context.device)
    if context.world_size > 1 and any(weight.requires_grad for weight in model.parameters()):  # else DDP refuses it
        return nn.parallel.DistributedDataParallel(model, [context.device] if context.device.type == "cuda" else None)
    if context.device.type == "cuda" and not context.single_gpu and torch.cuda.device_count() > 1:
        return nn.DataParallel(model)
    return model


def unwrap(model):
    """The network inside DDP or DataParallel."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, parallel) else model


def all_reduce_sum(values, context):
    """The sum of the tensor values over all processes; values itself where there is one."""
    if context.world_size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def sync_for_eval(model, context):
    """The network to evaluate with: the same in every process, each of which may see any number of batches."""
    if context.world_size == 1:
        return model
    network = unwrap(model)
    for buffer in network.buffers():  # a process has the batch-norm statistics of its own share of the images
        dist.broadcast(buffer, 0)
    return network
