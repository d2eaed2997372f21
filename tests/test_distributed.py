"""Devices, processes, and the ways in which a job of several processes ends."""

import argparse
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from moco import cli, distributed, gpus, rendezvous
from moco.cli import UserError
from moco.distributed import ProcessContext
from tests import support
from tests.support.job import ENDS

pytestmark = pytest.mark.usefixtures("handlers")
TWO_PROCESSES = Namespace(
    device="cpu", gpu=None, multiprocessing_distributed=True, processes_per_node=2,
    world_size=-1, rank=-1, dist_url=None, dist_backend=None, out=None,
)  # fmt: skip


# --- several processes train as one would


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def three_steps(args, context):
    """This process's share of three steps on eight images; gradients of the first and last weights go to a file."""
    draws = torch.Generator().manual_seed(1)
    model = distributed.wrap(network(), context)
    optimizer, results = torch.optim.Adam(model.parameters(), 0.01), {}
    for step in range(3):
        images, targets = torch.randn(8, 3, 8, 8, generator=draws), torch.randint(5, (8,), generator=draws)
        images, targets = images[context.rank :: context.world_size], targets[context.rank :: context.world_size]
        optimizer.zero_grad()
        functional.cross_entropy(model(images), targets).backward()
        if step == 0:
            results["gradients"] = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    results["weights"] = [parameter.detach() for parameter in model.parameters()]
    results["ranks"] = distributed.all_reduce_sum(torch.tensor([context.rank, 1]), context)
    results |= buffers(context)
    torch.save(results, Path(args.out) / f"{context.world_size}_{context.rank}.tar")


def buffers(context):
    """The buffer of a wrapped model that differs between processes: at the start, after a step, for evaluation."""
    model = nn.Linear(2, 1)
    model.register_buffer("queue", torch.tensor([5.0 + context.rank]))
    wrapped = distributed.wrap(model, context)
    start = model.queue.clone()
    model.queue.fill_(7 + context.rank)
    wrapped(torch.ones(1, 2)).sum().backward()
    step = model.queue.clone()
    assert distributed.sync_for_eval(wrapped, context) is model
    return {"start": start.item(), "step": step.item(), "evaluation": model.queue.item()}


def test_two_processes_train_the_network_that_one_would(tmp_path, forked_launch):
    """With half the batch each and batch norm in evaluation mode: equal gradients, and equal weights on all ranks."""
    args = Namespace(**{**vars(TWO_PROCESSES), "out": str(tmp_path)})
    assert distributed.launch(three_steps, args) == 0
    three_steps(args, ProcessContext())
    single, first, second = (torch.load(tmp_path / name) for name in ("1_0.tar", "2_0.tar", "2_1.tar"))
    assert first["ranks"].tolist() == [1, 2] and single["ranks"].tolist() == [0, 1]
    for what in ("gradients", "weights"):
        for one, a, b in zip(single[what], first[what], second[what], strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(one, a, atol=1e-5)
    # Buffers agree at the start and in evaluation, and are not broadcast in each step.
    assert [(each["start"], each["step"], each["evaluation"]) for each in (first, second)] == [(5, 7, 7), (5, 8, 7)]


# --- the ends of a job


def launcher(kind):
    """A command that starts a Python module in two processes."""
    if kind == "spawn":
        return [sys.executable, "-m"], ["--processes-per-node", "2"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"], []


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize("kind, end, workers", [
    ("spawn", "mistake", 1), ("spawn", "killed", 2), ("torchrun", "mistake", 2),
    *(pytest.param("spawn", end, workers, marks=THOROUGH) for end in ENDS for workers in (0, 1, 2)),
    *(pytest.param("torchrun", end, workers, marks=THOROUGH) for end in ENDS for workers in (0, 1, 2)),
])  # fmt: skip
def test_any_end_of_one_process_ends_the_job(kind, end, workers):
    """With its message and status, although the other process waits forever, and with all loader workers."""
    command, flags = launcher(kind)
    command = [*command, "tests.support.job", end, "--workers", str(workers), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=support.ROOT)
    status, message = ENDS[end]
    if kind == "torchrun":  # which has its own status and report
        status = min(status, 1)
        message = "SIGKILL" if end == "killed" else message
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    if end == "mistake" and kind == "spawn":
        assert done.stderr == "job.py: error: the folder x is empty\n"
    pids = [int(number) for number in re.findall(r"\d+", done.stdout)]  # lines of both processes may run together
    each = max(1, cli.cores() // 2) if workers == cli.cores() else workers  # the default is divided among processes
    assert len(pids) == 2 * (1 + each)
    wait_until_gone(pids)


def wait_until_gone(pids):
    """Wait for processes to end: the workers of a killed one check for it every five seconds."""
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)


@pytest.mark.parametrize("end", ["mistake", pytest.param("bug", marks=THOROUGH)])
def test_any_end_of_one_process_ends_its_srun_task(end):
    """srun --kill-on-bad-exit then ends the others."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
    command = [sys.executable, "-m", "tests.support.job", end, "--workers", "1", "--dist-url", rendezvous.local_url()]
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=support.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        output, errors = tasks[1].communicate(timeout=120)
        status, message = ENDS[end]
        assert tasks[1].returncode == status and message in errors
        wait_until_gone([int(word) for word in output.split()[1:]])
    finally:
        tasks[0].kill()
        tasks[0].communicate()


def test_a_mistake_in_a_process_is_raised_as_in_a_single_one():
    with pytest.raises(UserError, match="the folder x is empty"):
        distributed.launch(makes_a_mistake, TWO_PROCESSES)


def makes_a_mistake(args, context):
    raise UserError("the folder x is empty")


class Process:
    """A process whose exit status is the next of codes each time it is read."""

    def __init__(self, *codes):
        self.codes = list(codes)
        self.sentinel, _ = connection.Pipe()  # the other end is closed: it is ready

    @property
    def exitcode(self):
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

    def join(self, timeout):
        assert timeout <= distributed.GRACE_SECONDS

    def kill(self):
        pass


@pytest.mark.parametrize("processes, statuses", [
    ([Process(0), Process(0)], [0, 0]),
    ([Process(None, 0), Process(None, 0)], [0, 0]),
    ([Process(None, None, -9), Process(None)], [137, None]),
    ([Process(None), Process(2)], [None, 2]),
    ([Process(None, None, 0), Process(None, -15)], [0, 143]),
])  # fmt: skip
def test_waiting_never_misses_a_process_that_ends_meanwhile(processes, statuses):
    assert distributed._wait(processes) == statuses


def test_processes_that_do_not_end_are_killed(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=time.sleep, args=(3600,)), fork.Process(target=sys.exit, args=(3,))]
    for process in processes:
        process.start()
    assert distributed._wait(processes) == [None, 3]
    processes[0].join()
    assert processes[0].exitcode == -signal.SIGKILL


# --- which processes are started, and on which devices


def parse(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=8)
    distributed.add_flags(parser)
    return parser.parse_args(list(flags))


@pytest.fixture
def machine(monkeypatch):
    """A function that makes up GPUs and environment variables, and returns the list of current devices set."""
    for name in [*rendezvous.TORCHRUN, *(name for name in os.environ if name.startswith(("SLURM_", "CUDA_")))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "DEVICE_FILE", Path("/nonexistent"))
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(distributed, "_spawn", lambda train, args, node: ("spawn", node, args.workers))
    monkeypatch.setattr(
        distributed, "_join", lambda train, args, rank, world, local, url: ("join", rank, world, local, args.workers)
    )
    monkeypatch.setattr(rendezvous, "slurm_url", lambda environment: "tcp://node1:20000")

    def make(count, **environment):
        devices = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_90"])
        monkeypatch.setattr(torch.cuda, "set_device", devices.append)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return devices

    return make


def context_of(*flags):
    return distributed.launch(lambda args, context: context, parse(*flags))


@pytest.mark.parametrize("count, flags, node, workers", [
    (4, [], (0, 1, 4), 2),
    (4, ["--multiprocessing-distributed"], (0, 1, 4), 2),
    (4, ["--processes-per-node", "2", "--workers", "3"], (0, 1, 2), 3),
    (4, ["--device", "cpu", "--processes-per-node", "3"], (0, 1, 3), 2),
    (0, ["--processes-per-node", "16"], (0, 1, 16), 1),
    (0, ["--world-size", "2", "--rank", "1", "--dist-url", "tcp://127.0.0.1:2"], (1, 2, 1), 8),
    (4, ["--world-size", "3", "--rank", "0", "--dist-url", "tcp://127.0.0.1:2"], (0, 3, 4), 2),
])  # fmt: skip
def test_one_process_per_gpu_is_started(machine, count, flags, node, workers):
    """The default number of workers is divided among them; a given one is not."""
    machine(count)
    kind, started, _ = distributed.launch(None, parse(*flags))
    assert kind == "spawn" and (started.rank, started.nodes, started.processes) == node
    assert distributed._divide_workers(parse(*flags), started.processes).workers == workers
    assert started.url == (flags[-1] if "--dist-url" in flags else started.url) and started.url.startswith("tcp://127.")


@pytest.mark.parametrize("count, flags, device", [
    (1, [], "cuda:0"),
    (1, ["--multiprocessing-distributed"], "cuda:0"),
    (4, ["--gpu", "2"], "cuda:2"),
    (4, ["--processes-per-node", "1"], "cuda:0"),
    (4, ["--device", "cpu"], "cpu"),
    (0, ["--multiprocessing-distributed"], "cpu"),
])  # fmt: skip
def test_a_single_process_is_this_one(machine, count, flags, device):
    devices = machine(count)
    assert context_of(*flags) == ProcessContext(device=torch.device(device))
    assert devices == ([torch.device(device)] if device != "cpu" else [])


@pytest.mark.parametrize("count, flags, message", [
    (0, ["--gpu", "3"], "--gpu 3: there is no GPU with --device auto"),
    (2, ["--gpu", "0", "--device", "cpu"], "--gpu 0: there is no GPU with --device cpu"),
    (2, ["--gpu", "3"], "there is no GPU 3: this process sees 2"),
    (2, ["--gpu", "1", "--multiprocessing-distributed"], "--gpu 1 is for a single process"),
    (2, ["--gpu", "1", "--processes-per-node", "2"], "--gpu 1 is for a single process"),
    (2, ["--processes-per-node", "3"], "--processes-per-node 3 is more than the 2 visible GPUs"),
    (0, ["--rank", "1"], "--rank 1 needs --world-size"),
    (0, ["--rank", "-3"], "--rank -3"),
    (0, ["--world-size", "0"], "--world-size 0 is not a number of nodes"),
    (0, ["--world-size", "2", "--dist-url", "tcp://127.0.0.1:2"], "--rank -1: give the rank of this node"),
    (0, ["--world-size", "2", "--rank", "2", "--dist-url", "tcp://127.0.0.1:2"], "--rank 2: give the rank"),
    (0, ["--world-size", "2", "--rank", "1"], "several nodes need --dist-url"),
    (0, ["--dist-url", "foo"], "--dist-url foo is not an address"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(machine, count, flags, message):
    machine(count)
    with pytest.raises(UserError, match=message):
        distributed.launch(None, parse(*flags))


def test_a_negative_gpu_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--gpu", "-1")
    assert "argument --gpu" in capsys.readouterr().err


def test_nccl_is_refused_on_a_cpu():
    args = Namespace(**{**vars(TWO_PROCESSES), "dist_backend": "nccl"})
    with pytest.raises(UserError, match="--dist-backend nccl needs GPUs"):
        distributed._connect(args, 0, 2, 0, rendezvous.local_url())


def test_an_address_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="rank 0 cannot join the processes at 127.0.0.1: .*EADDRINUSE"):
            distributed._connect(TWO_PROCESSES, 0, 2, 0, url)


SLURM = {"SLURM_JOB_ID": 7, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_NODES": 1}
TWO_NODES = SLURM | {"SLURM_LOCALID": 0, "SLURM_STEP_NUM_NODES": 2}
TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "n", "MASTER_PORT": 1}


@pytest.mark.parametrize("count, environment, expected", [
    (2, SLURM, ("join", 1, 2, 1, 4)),
    (0, SLURM, ("join", 1, 2, 1, 4)),
    (1, SLURM, ("join", 1, 2, 0, 4)),  # --gpu-bind=single:1
    (2, SLURM | {"SLURM_GPUS_PER_TASK": 2}, ("join", 1, 2, 0, 4)),
    (2, SLURM | {"SLURM_CPUS_PER_TASK": 8}, ("join", 1, 2, 1, 8)),
    (1, TWO_NODES, ("join", 1, 2, 0, 8)),
    (4, TORCHRUN, ("join", 5, 8, 1, 2)),
    (1, TORCHRUN, ("join", 5, 8, 1, 2)),
])  # fmt: skip
def test_a_process_of_a_launcher_joins_the_others(machine, count, environment, expected):
    """On its own GPU, and with its share of the workers."""
    machine(count, **environment)
    assert distributed.launch(None, parse()) == expected


@pytest.mark.parametrize("environment, node", [
    (TWO_NODES, distributed._Node(1, 2, 4, "tcp://node1:20000")),
    (SLURM | {"SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}, None),
])  # fmt: skip
def test_a_task_alone_on_a_node_starts_one_process_per_gpu(machine, environment, node):
    machine(4, **environment)
    kind, started, _ = distributed.launch(None, parse())
    assert kind == "spawn" and started == (node or distributed._Node(0, 1, 4, started.url))


@pytest.mark.parametrize("environment", [SLURM, TORCHRUN])
@pytest.mark.parametrize("flags", [
    ["--gpu", "0"], ["--processes-per-node", "2"],
    ["--world-size", "2", "--rank", "0", "--dist-url", "tcp://127.0.0.1:2"],
])  # fmt: skip
def test_flags_without_effect_under_a_launcher_are_refused(machine, environment, flags):
    machine(2, **environment)
    with pytest.raises(UserError, match=f"{flags[0]} has no effect under (srun|torchrun)"):
        distributed.launch(None, parse(*flags))


# --- devices and models


def test_devices_that_are_not_available_are_refused(machine):
    machine(0)
    with pytest.raises(UserError, match="--device mps: torch finds no Apple GPU"):
        distributed.select_device("mps")
    with pytest.raises(UserError, match="--device cuda: torch finds no usable GPU"):
        distributed.select_device("cuda")


@pytest.mark.parametrize(
    "name, value", [("SLURM_JOB_GPUS", "0"), ("SLURM_GPUS_ON_NODE", "4"), ("CUDA_VISIBLE_DEVICES", "1")]
)
def test_auto_does_not_ignore_gpus_that_were_given(machine, monkeypatch, name, value):
    machine(0, **{name: value})
    with pytest.raises(UserError, match="torch cannot use the GPU of this machine: .*--device cpu"):
        distributed.select_device("auto")
    assert distributed.select_device("cpu").type == "cpu"


def test_auto_is_the_cpu_without_a_gpu(machine):
    machine(0)
    assert distributed.select_device("auto").type in ("cpu", "mps")


def test_a_single_process_does_not_wrap_its_model(machine, monkeypatch):
    """nn.DataParallel would compute in float16 under bf16 autocast; several GPUs get a process each."""
    machine(4)
    model = nn.Linear(1, 1)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    assert distributed.wrap(model, ProcessContext(device=torch.device("cuda", 0))) is model


def test_no_tf32_covers_matrix_products_and_restores_what_was_set():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = True
    try:
        with pytest.raises(ZeroDivisionError), distributed.no_tf32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.deterministic = before[2]
