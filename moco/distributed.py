"""Devices and processes: choose a device, start or join the processes of a job, wrap a model, reduce over processes."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from moco.cli import UserError, cores, failure, guard_output, number

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
GRACE_SECONDS = 3  # after the failure of a process: for the others to end, and again after SIGTERM
WAIT_SECONDS = 20  # for the other processes of a job, before a line says so
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICE_FILE = Path("/dev/nvidia0")  # the first GPU of a machine


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
    group = parser.add_argument_group("several processes (torchrun and scripts/*.sh need none of these)")
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


def select_device(name, gpu=0):
    """The torch device for --device: 'auto' is CUDA if available, else Apple's GPU, else the CPU.

    gpu: the index of the GPU. Raises UserError if the device is not available, and for 'auto' if there is an NVIDIA GPU
    that torch cannot use, unless CUDA_VISIBLE_DEVICES hides it.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = DEVICE_FILE.exists() or os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0" if present else "")
    has_gpu = visible.strip() not in ("", "-1", "NoDevFiles")  # SLURM sets the last one in jobs without GPUs
    if not cuda and (name == "cuda" or (name == "auto" and has_gpu)):
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        raise UserError(
            f"--device {name}: torch {torch.__version__}, which is built for {build}, finds no GPU that it can use; "
            "install a build that fits the driver, which nvidia-smi shows, or give --device cpu"
        )
    if name == "mps" and not mps:
        raise UserError("--device mps: torch finds no Apple GPU; give --device cpu")
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and gpu >= torch.cuda.device_count():
        raise UserError(f"there is no GPU {gpu}: this process sees {torch.cuda.device_count()}")
    return torch.device(name, gpu) if name == "cuda" else torch.device(name)


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

    Under torchrun and scripts/step.sh, which set the variables TORCHRUN, this process is one of those they started.
    Otherwise one process per visible GPU is started here, --processes-per-node on each of --world-size nodes; a single
    one is this process itself. The default number of --workers is divided among the processes of a node.

    An error in one of several processes is printed and ends all of them within seconds. Raises UserError for flags or
    environment variables that contradict each other.
    """
    if any(name in os.environ for name in TORCHRUN[:3]):
        _check_environment(args)
        return _join(train, args if _is_slurm_task() else _divide_workers(args, int(os.environ["LOCAL_WORLD_SIZE"])))
    nodes, tasks = max(args.world_size, 1), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if nodes == 1 and tasks != "1":
        raise UserError(
            f"this SLURM step has {tasks} tasks, which do not know their ranks: start the script with scripts/step.sh, "
            "as the files beside it do, or with torchrun"
        )
    if args.rank >= nodes or (nodes > 1 and args.rank < 0):
        raise UserError(f"--rank {args.rank}: give the rank of this node among --world-size {nodes}, 0 to {nodes - 1}")
    if nodes > 1 and not args.dist_url:
        raise UserError("several nodes need --dist-url tcp://HOST:PORT, the same on all of them")
    device = select_device(args.device, args.gpu or 0)
    processes = _processes_per_node(args, device)
    if nodes * processes > 1:
        return _spawn(train, args, nodes, processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return train(args, ProcessContext(device=device))


def _check_environment(args):
    """UserError if some of torchrun's variables are missing, or flags contradict them."""
    if missing := [name for name in TORCHRUN if not os.environ.get(name)]:
        raise UserError(
            f"the environment has some of torchrun's variables, but not {', '.join(missing)}: unset "
            f"{', '.join(TORCHRUN[:3])}, or start the processes with torchrun"
        )
    for name in ("world_size", "rank", "gpu", "processes_per_node", "dist_url"):
        if getattr(args, name) not in (None, -1):
            raise UserError(f"--{name.replace('_', '-')} has no effect under torchrun and step.sh: leave it out")


def _is_slurm_task():
    """Whether this process is a task of SLURM, which gives it cores of its own, and maybe GPUs of its own."""
    return os.environ.get("SLURM_NTASKS") == os.environ["WORLD_SIZE"]


def _own_gpu():
    """The index of this process's GPU among those it sees: in a SLURM task all of the node, or only its own."""
    local_rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    visible = torch.cuda.device_count()
    if not _is_slurm_task():
        return local_rank
    if visible >= processes:  # several each with --gpus-per-task
        return local_rank * (visible // processes)
    return 0 if visible == 1 or "SLURM_GPUS_PER_TASK" in os.environ else local_rank


def _processes_per_node(args, device):
    """The number of processes that train on this node."""
    asked, visible = args.processes_per_node or 0, torch.cuda.device_count() if device.type == "cuda" else 0
    several = args.world_size > 1 or args.multiprocessing_distributed or asked > 1
    if args.gpu is not None and (several or not visible):
        raise UserError(
            f"--gpu {args.gpu} is for one process with a GPU, here on {device.type}: leave it out; "
            "CUDA_VISIBLE_DEVICES chooses several GPUs"
        )
    if visible and asked > visible:
        raise UserError(f"--processes-per-node {asked} is more than the {visible} visible GPUs")
    return 1 if args.gpu is not None else asked or visible or 1


def _divide_workers(args, processes):
    """args with the default number of --workers, all cores, divided among the processes of this node."""
    if vars(args).get("workers") != cores():
        return args
    return Namespace(**{**vars(args), "workers": max(1, cores() // processes)})


def _connect(args):
    """Join the processes of the variables TORCHRUN and return this one's ProcessContext; UserError if that fails."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = select_device(args.device, _own_gpu())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif args.dist_backend == "nccl":
        raise UserError(f"--dist-backend nccl needs GPUs, and the device is {device}; leave it out")
    backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    address = args.dist_url or f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = f"rank {rank} waits for the other {world_size - 1} processes at {address}"
    reminder = threading.Timer(WAIT_SECONDS, print, [waiting], {"file": sys.stderr, "flush": True})
    reminder.start()
    try:
        if host := urlsplit(address).hostname:
            socket.getaddrinfo(host, None)  # torch would look for an unknown host for half an hour
        dist.init_process_group(backend, init_method=args.dist_url or "env://", rank=rank, world_size=world_size)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        hint = "; GLOO_SOCKET_IFNAME names the network to use" if "127." in str(error) and "127." not in address else ""
        raise UserError(f"rank {rank} cannot join the processes at {address}: {reason}{hint}") from error
    finally:
        reminder.cancel()
    return ProcessContext(rank, world_size, device)


def _join(train, args, errors=None):
    """Run train as one of the processes of the variables TORCHRUN and return its exit status.

    errors: a queue for the exit status and what is to be printed about an error, which is printed here by default.
    After it this process ends here: destroy_process_group() would wait for the others, with NCCL for half an hour.
    """
    try:
        status = train(args, _connect(args))
    except BaseException as error:
        status, text = failure(error)
        if errors:
            errors.put((status, text))
            time.sleep(status == 1)  # if it follows from the end of another process, that one is to end first
        else:
            print(text, end="", file=sys.stderr)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()
    return status


def _spawn(train, args, nodes, processes):
    """Start the processes of this node, pass stop signals on to them, wait for them and return the exit status."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"WORLD_SIZE": nodes * processes, "LOCAL_WORLD_SIZE": processes}
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (train, _divide_workers(args, processes), variables, multiprocessing.get_start_method(), errors)
    children = multiprocessing.spawn(_child, arguments, nprocs=processes, join=False)

    def forward(number, frame):
        for process in children.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for stop in STOP_SIGNALS:
        signal.signal(stop, forward)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # else join() says which ones it ends
    try:
        while not children.join(grace_period=GRACE_SECONDS):
            pass
    except multiprocessing.ProcessExitedException as first:
        if first.exit_code > 0 and not errors.empty():
            status, text = errors.get()  # the others follow from the first
            print(text, end="", file=sys.stderr)
            return status
        what, hint = f"ended with status {first.exit_code}", "--processes-per-node 1 may show why"
        if first.exit_code < 0:
            what = f"was killed by {signal.Signals(-first.exit_code).name}"
            hint = f"{'out of memory? ' if what.endswith('SIGKILL') else ''}re-run with --resume to continue"
        rank = max(args.rank, 0) * processes + first.error_index
        print(f"process {rank} {what}; {hint}", file=sys.stderr)
        return 1
    finally:  # after Ctrl-C
        for process in children.processes:
            process.join(GRACE_SECONDS)
            process.kill()
    return 0


def _child(local_rank, train, args, variables, start_method, errors):
    """A process of _spawn().

    start_method: of its loader workers. They would be spawned by default, and each would import torch.
    """
    guard_output()
    variables = variables | {"LOCAL_RANK": local_rank}
    variables["RANK"] = max(args.rank, 0) * variables["LOCAL_WORLD_SIZE"] + local_rank
    os.environ.update({name: str(value) for name, value in variables.items()})
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(max(1, cores() // variables["LOCAL_WORLD_SIZE"]))
    sys.exit(_join(train, args, errors))


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
