"""Devices and processes: choose a device, start or join the processes of a job, wrap a model, reduce over processes."""

import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from urllib.parse import urlsplit

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from moco import gpus, rendezvous
from moco.cli import UserError, cores, number, program, user_message

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
GRACE_SECONDS = 5  # between the failure of a process and the end of those that wait for it


@dataclass(frozen=True)
class ProcessContext:
    """The rank of a process among world_size processes, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def supports_fused(self):
        """Whether torch's optimizers have a fused step on this device."""
        return self.device.type != "mps"


def add_flags(parser):
    """Add the flags of PyTorch's ImageNet example, as published, to parser."""
    group = parser.add_argument_group("several processes (torchrun and srun need none of these)")
    add = group.add_argument
    add(
        "--multiprocessing-distributed",
        action="store_true",
        help="start one process per GPU on this node; the default if several GPUs are visible",
    )
    add(
        "--processes-per-node",
        type=number(int, 1),
        metavar="N",
        help="processes to start on this node; default: one per GPU, or 1 on a CPU",
    )
    add("--world-size", type=int, default=-1, metavar="NODES", help="number of nodes; -1 is one")
    add("--rank", type=int, default=-1, metavar="NODE", help="rank of this node, from 0; needed with several nodes")
    add("--dist-url", metavar="URL", help="address of rank 0, tcp://HOST:PORT; default: a free local port")
    add("--dist-backend", choices=["nccl", "gloo"], help="default: nccl on GPUs, gloo on a CPU")
    add("--gpu", type=number(int, 0), metavar="N", help="use GPU N only")


# --- devices


def select_device(name, local_rank=0):
    """The torch device for --device: 'auto' is CUDA if available, else Apple's GPU, else the CPU.

    local_rank: the index of the GPU. Raises UserError if the device is not available, and for 'auto' if the machine
    or the job has GPUs that torch cannot use.
    """
    cuda = torch.cuda.is_available()
    if name == "auto" and not cuda and gpus.is_given(os.environ):
        raise UserError(f"torch cannot use the GPU of this machine: {gpus.why_unusable()}")
    if name == "auto":
        name = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not cuda:
            raise UserError(f"--device cuda: torch finds no usable GPU: {gpus.why_unusable()}")
        return gpus.cuda_device(local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no Apple GPU; give --device cpu")
    return torch.device(name)


@contextmanager
def no_tf32():
    """A context in which a GPU computes convolutions and matrix products in float32, not in TF32."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(cudnn.enabled, benchmark=False, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- processes


def launch(train, args):
    """Run train(args, context) in this process, or in one process per GPU, and return the exit status.

    Under torchrun, and under srun with several tasks, this process is one of those they started. Otherwise one process
    per visible GPU is started here, --processes-per-node on each of --world-size nodes; a single one is this process
    itself. The default number of --workers is divided among the processes of a node.

    An error in one of several processes is printed and ends all of them within seconds. Raises UserError for flags or
    environment variables that contradict each other.
    """
    _check_flags(args)
    if task := rendezvous.current_task(os.environ):
        return _join_task(train, args, task)
    nodes = max(args.world_size, 1)
    device = select_device(args.device, args.gpu or 0)
    processes = _processes_per_node(args, device)
    if nodes * processes > 1:
        url = args.dist_url or rendezvous.local_url()
        return _spawn(train, args, _Node(max(args.rank, 0), nodes, processes, url))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return train(args, ProcessContext(device=device))


def _check_flags(args):
    """Raise UserError for flags of add_flags() that contradict each other."""
    if args.world_size == 0 or args.world_size < -1:
        raise UserError(f"--world-size {args.world_size} is not a number of nodes; give 1 or more")
    nodes = max(args.world_size, 1)
    if nodes == 1 and args.rank > 0:
        raise UserError(f"--rank {args.rank} needs --world-size, the number of nodes")
    if not (-1 if nodes == 1 else 0) <= args.rank < nodes:
        raise UserError(f"--rank {args.rank}: give the rank of this node among --world-size {nodes}, 0 to {nodes - 1}")
    if nodes > 1 and not args.dist_url:
        raise UserError("several nodes need --dist-url tcp://HOST:PORT, the same on all of them")
    if args.dist_url:
        rendezvous.check_url(args.dist_url)


def _processes_per_node(args, device):
    """The number of processes that train on this node."""
    if args.gpu is not None:
        if args.world_size > 1 or args.multiprocessing_distributed or (args.processes_per_node or 1) > 1:
            raise UserError(
                f"--gpu {args.gpu} is for a single process; use CUDA_VISIBLE_DEVICES to choose several GPUs"
            )
        if device.type != "cuda":
            raise UserError(f"--gpu {args.gpu}: there is no GPU with --device {args.device}; leave --gpu out")
        return 1
    if device.type != "cuda":
        return args.processes_per_node or 1
    visible = torch.cuda.device_count()
    if (args.processes_per_node or 1) > visible:
        raise UserError(f"--processes-per-node {args.processes_per_node} is more than the {visible} visible GPUs")
    return args.processes_per_node or visible


def _join_task(train, args, task):
    """Run train as a process that torchrun or srun started; a task alone on its node starts one process per GPU."""
    names = ["world_size", "rank", "gpu", "processes_per_node"]
    for name in [*names, "dist_url"] if task.launcher == "torchrun" else names:
        if getattr(args, name) not in (None, -1):
            raise UserError(f"--{name.replace('_', '-')} has no effect under {task.launcher}: leave it out")
    url = "env://" if task.launcher == "torchrun" else args.dist_url or rendezvous.slurm_url(os.environ)
    if task.launcher == "srun" and task.local_world_size == 1:
        processes = _processes_per_node(args, select_device(args.device))
        if processes > 1:
            return _spawn(train, args, _Node(task.rank, task.world_size, processes, url))
    if not task.own_cores:
        args = _divide_workers(args, task.local_world_size)
    sees_one = task.launcher == "srun" and torch.cuda.device_count() == 1  # its own, by --gpu-bind
    local_rank = 0 if task.own_gpus or sees_one else task.local_rank
    return _join(train, args, task.rank, task.world_size, local_rank, url)


def _divide_workers(args, processes):
    """args with the default number of --workers, all cores, divided among the processes of this node."""
    if vars(args).get("workers") != cores():
        return args
    return Namespace(**{**vars(args), "workers": max(1, cores() // processes)})


def _join(train, args, rank, world_size, local_rank, url, report=None):
    """Run train as one of world_size processes and return its exit status.

    After an error this process ends here, once the error is reported: destroy_process_group() would wait for the other
    processes, with NCCL for up to half an hour. report: called with the error; prints it by default.
    """
    try:
        status = train(args, _connect(args, rank, world_size, local_rank, url))
    except BaseException as error:
        (report or _print_error)(error)
        _exit_now(_exit_status(error))
    dist.destroy_process_group()
    return status


def _connect(args, rank, world_size, local_rank, url):
    """Join the process group and return this process's ProcessContext; UserError if that fails."""
    device = select_device(args.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif args.dist_backend == "nccl":
        raise UserError(f"--dist-backend nccl needs GPUs, and the device is {device}; leave it out")
    backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    try:
        dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError, OSError) as error:
        host = urlsplit(url).hostname or os.environ.get("MASTER_ADDR", "localhost")
        reason = str(error).split("\n")[0]
        raise UserError(
            f"rank {rank} cannot join the processes at {host}: {reason}{rendezvous.loopback_hint(host)}"
        ) from error
    return ProcessContext(rank, world_size, device)


def _print_error(error):
    """Print an error as cli.run() and Python would."""
    if message := user_message(error):
        print(f"{program()}: error: {message}", file=sys.stderr)
    elif isinstance(error, Exception):
        traceback.print_exception(error)


def _exit_status(error):
    """The exit status of a process that an exception ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if user_message(error) else 1


def _exit_now(status):
    """End this process and its workers without waiting for anything."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass(frozen=True)
class _Node:
    """A node of a job: its rank among nodes with as many processes each, which meet at url."""

    rank: int
    nodes: int
    processes: int
    url: str

    @property
    def first_rank(self):
        return self.rank * self.processes


def _spawn(train, args, node):
    """Start the processes of this node, pass stop signals on to them, wait for them and return the exit status."""
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (train, _divide_workers(args, node.processes), node, multiprocessing.get_start_method(), errors)
    children = multiprocessing.spawn(_child, arguments, nprocs=node.processes, join=False)

    def forward(number, frame):
        for process in children.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for stop in STOP_SIGNALS:
        signal.signal(stop, forward)
    statuses = _wait(children.processes)
    return _report_failure(statuses, node.first_rank, errors) if any(statuses) else 0


def _wait(processes):
    """Wait for processes and return their exit statuses, 128 + N for signal N; None for those that got stuck.

    Once one has failed, and after Ctrl-C, those still alive GRACE_SECONDS later are killed: they wait for the others.
    """
    try:
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                break
            connection.wait(running)
    finally:
        end = time.monotonic() + GRACE_SECONDS
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    return [128 - code if code is not None and code < 0 else code for code in codes]


def _report_failure(statuses, first_rank, errors):
    """Print or raise the error that ended the processes, and return the exit status."""
    error = None if errors.empty() else errors.get()  # the first one, from which those of the others follow
    if isinstance(error, UserError):
        raise error
    if 128 + signal.SIGKILL in statuses:
        rank = first_rank + statuses.index(128 + signal.SIGKILL)
        print(f"process {rank} was killed (out of memory?); re-run with --resume to continue", file=sys.stderr)
        return 1
    if error:
        print(error, end="", file=sys.stderr)
    return next(status for status in statuses if status)


def _child(local_rank, train, args, node, start_method, errors):
    """A process of _spawn().

    start_method: of its loader workers. They would be spawned by default, and each would import torch.
    """
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(max(1, cores() // node.processes))

    def report(error):
        if message := user_message(error):
            errors.put(UserError(message))
        elif isinstance(error, Exception):
            errors.put("".join(traceback.format_exception(error)))

    rank, world_size = node.first_rank + local_rank, node.nodes * node.processes
    sys.exit(_join(train, args, rank, world_size, local_rank, node.url, report))


# --- models and tensors


def wrap(model, context):
    """model on its device, in DistributedDataParallel if there are several processes.

    All processes start from the parameters and buffers of rank 0. Later the buffers are not broadcast: batch-norm
    statistics differ between processes until sync_for_eval(), and MoCo's queue is the same in all of them anyway.
    """
    model = model.to(context.device)
    if context.world_size == 1 or not any(weight.requires_grad for weight in model.parameters()):  # DDP refuses these
        return model
    model = nn.parallel.DistributedDataParallel(model, [context.device] if context.device.type == "cuda" else None)
    model.broadcast_buffers = False  # as an argument it would skip the broadcast at the start, too
    return model


def unwrap(model):
    """The network inside DistributedDataParallel, or model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def all_reduce_sum(values, context):
    """The sum of the tensor values over all processes; values itself if there is one process."""
    if context.world_size == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def sync_for_eval(model, context):
    """The network inside model, with the buffers of rank 0 in every process.

    It is not wrapped: processes may evaluate different numbers of batches.
    """
    network = unwrap(model)
    if context.world_size > 1:
        for buffer in network.buffers():  # each process has the batch-norm statistics of its own images
            dist.broadcast(buffer, 0)
    return network
