"""Devices, processes, and the ways in which a job of several processes ends."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from moco import cli, distributed
from moco.cli import UserError
from moco.distributed import ProcessContext
from tests import support
from tests.support.job import ENDS
from tests.support.training import running

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

THOROUGH = pytest.mark.thorough
SPAWN = [sys.executable, "-m", "tests.support.job", "--processes-per-node", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
TORCHRUN += ["tests.support.job"]


@pytest.mark.parametrize("command, end, workers", [
    (SPAWN, "mistake", 1), (SPAWN, "killed", 2),
    *(pytest.param(command, end, workers, marks=THOROUGH)
      for command in (SPAWN, TORCHRUN) for end in ENDS for workers in (0, 1, 2)),
])  # fmt: skip
def test_any_end_of_one_process_ends_the_job(command, end, workers):
    """With its message and status, although the other process waits forever, and with all loader workers."""
    done = subprocess.run(
        [*command, end, "--workers", str(workers)], capture_output=True, text=True, timeout=120, cwd=support.ROOT
    )
    status, message = ENDS[end]
    if command == TORCHRUN:  # which has its own status and report
        status = min(status, 1)
        message = "SIGKILL" if end == "killed" else message
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    if end == "mistake" and command == SPAWN:
        assert done.stderr == "job.py: error: the folder x is empty\n"
    pids = [int(number) for number in re.findall(r"\d+", done.stdout)]  # lines of both processes may run together
    each = max(1, cli.cores() // 2) if workers == cli.cores() else workers  # the default is divided among processes
    assert len(pids) == 2 * (1 + each)
    wait_until_gone(pids)


def leave(args, context):
    time.sleep(60 * context.is_main)  # until it is ended
    os._exit(3)


def test_a_process_that_ends_with_a_status_is_named(forked_launch, capsys):
    assert distributed.launch(leave, TWO_PROCESSES) == 1
    assert capsys.readouterr().err == "process 1 ended with status 3; --processes-per-node 1 may show why\n"


def wait_until_gone(pids):
    """Wait for processes to end: the workers of a killed one check for it every five seconds."""
    end = time.monotonic() + 60
    while alive := running(pids):
        assert time.monotonic() < end, alive
        time.sleep(0.1)


def test_ctrl_c_ends_all_processes():
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=support.ROOT)
    with subprocess.Popen([*SPAWN, "wait", "--workers", "1"], start_new_session=True, **options) as job:
        pids = [int(number) for _ in range(2) for number in re.findall(r"\d+", job.stdout.readline())]
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(60) == 130 and re.fullmatch(r"\njob.py: interrupted; .*\n", job.stderr.read())
    assert len(pids) == 4
    wait_until_gone(pids)


STEP = f'project={support.ROOT}; source {support.ROOT}/scripts/step.sh; task 127.0.0.1 %d "$@"'


@pytest.mark.parametrize("end", ["mistake", pytest.param("bug", marks=THOROUGH), pytest.param("stop", marks=THOROUGH)])
def test_any_end_of_one_process_ends_its_slurm_task(end):
    """srun --kill-on-bad-exit then ends the others; here two tasks of scripts/step.sh without SLURM, nor scontrol."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        step = STEP % server.getsockname()[1]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_NUM_TASKS": "2", "PYTHON": sys.executable}
    tasks = [
        subprocess.Popen(
            ["bash", "-c", step, "bash", sys.executable, "-m", "tests.support.job", end, "--workers", "1"],
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=support.ROOT, start_new_session=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        output, errors = tasks[1].communicate(timeout=120)
        status, message = ENDS[end]
        assert tasks[1].returncode == status and message in errors
        wait_until_gone([int(word) for word in output.split()[1:]])
    finally:
        os.killpg(tasks[0].pid, signal.SIGKILL)
        tasks[0].communicate()


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
    for name in [*distributed.TORCHRUN, *(name for name in os.environ if name.startswith(("SLURM_", "CUDA_")))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "DEVICE_FILE", Path("/nonexistent"))
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(distributed, "_spawn", lambda _, args, nodes, processes: (nodes, max(args.rank, 0), processes))
    monkeypatch.setattr(distributed, "_join", lambda train, args: (distributed._own_gpu(), args.workers))

    def make(count, **environment):
        devices = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", devices.append)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return devices

    return make


@pytest.mark.parametrize("count, flags, started, workers", [
    (4, [], (1, 0, 4), 2),
    (4, ["--multiprocessing-distributed"], (1, 0, 4), 2),
    (4, ["--processes-per-node", "2", "--workers", "3"], (1, 0, 2), 3),
    (4, ["--device", "cpu", "--processes-per-node", "3"], (1, 0, 3), 2),
    (0, ["--processes-per-node", "16"], (1, 0, 16), 1),
    (0, ["--world-size", "2", "--rank", "1", "--dist-url", "tcp://127.0.0.1:2"], (2, 1, 1), 8),
    (4, ["--world-size", "3", "--rank", "0", "--dist-url", "tcp://127.0.0.1:2"], (3, 0, 4), 2),
])  # fmt: skip
def test_one_process_per_gpu_is_started(machine, count, flags, started, workers):
    """The default number of workers is divided among them; a given one is not."""
    machine(count)
    assert distributed.launch(None, parse(*flags)) == started
    assert distributed._divide_workers(parse(*flags), started[2]).workers == workers


@pytest.mark.parametrize("count, flags, device", [
    (1, [], "cuda:0"),
    (1, ["--multiprocessing-distributed"], "cuda:0"),
    (4, ["--gpu", "2"], "cuda:2"),
    (4, ["--processes-per-node", "1"], "cuda:0"),
    (4, ["--device", "cpu"], "cpu"),
    (0, ["--multiprocessing-distributed"], "cpu"),
])  # fmt: skip
def test_a_single_process_is_this_one(machine, count, flags, device):
    devices = machine(count, SLURM_STEP_NUM_TASKS=1, SLURM_NTASKS=1)
    context = distributed.launch(lambda args, context: context, parse(*flags))
    assert context == ProcessContext(device=torch.device(device))
    assert devices == ([torch.device(device)] if device != "cpu" else [])


RANK_5 = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "n", "MASTER_PORT": 1}
TASK = RANK_5 | {"SLURM_NTASKS": 8, "SLURM_STEP_NUM_TASKS": 8}


@pytest.mark.parametrize("count, environment, gpu, workers", [
    (4, RANK_5, 1, 2),
    (1, RANK_5, 1, 2),  # and refused
    (8, RANK_5 | {"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}, 1, 2),  # torchrun on two nodes
    (0, TASK, 1, 8),
    (4, TASK, 1, 8),
    (1, TASK, 0, 8),  # --gpu-bind=single:1
    (2, TASK | {"SLURM_GPUS_PER_TASK": 2}, 0, 8),
    (2, TASK, 1, 8),  # two GPUs for four tasks: the last two are refused
    *((8, TASK | {"SLURM_GPUS_PER_TASK": 2, "LOCAL_RANK": rank}, 2 * rank, 8) for rank in range(4)),  # --gpu-bind=none
])  # fmt: skip
def test_a_process_of_a_launcher_has_its_own_gpu_and_its_share_of_the_cores(machine, count, environment, gpu, workers):
    machine(count, **environment)
    assert distributed.launch(None, parse()) == (gpu, workers)


@pytest.mark.parametrize("count, environment, flags, message", [
    (0, {}, ["--gpu", "3"], "--gpu 3 is for one process with a GPU, here on cpu"),
    (2, {}, ["--gpu", "0", "--device", "cpu"], "--gpu 0 is for one process with a GPU, here on cpu"),
    (2, {}, ["--gpu", "3"], "there is no GPU 3: this process sees 2"),
    (2, {}, ["--gpu", "1", "--multiprocessing-distributed"], "--gpu 1 is for one process"),
    (2, {}, ["--gpu", "1", "--processes-per-node", "2"], "--gpu 1 is for one process"),
    (2, {}, ["--processes-per-node", "3"], "--processes-per-node 3 is more than the 2 visible GPUs"),
    (0, {}, ["--rank", "1"], "--rank 1: give the rank of this node among --world-size 1"),
    (0, {}, ["--world-size", "2", "--dist-url", "tcp://127.0.0.1:2"], "--rank -1: give the rank of this node"),
    (0, {}, ["--world-size", "2", "--rank", "2", "--dist-url", "tcp://127.0.0.1:2"], "--rank 2: give the rank"),
    (0, {}, ["--world-size", "2", "--rank", "1"], "several nodes need --dist-url"),
    (0, {"SLURM_STEP_NUM_TASKS": 4}, [], "SLURM step has 4 tasks, .*scripts/step.sh, .* torchrun"),  # srun --pty bash
    (2, RANK_5, ["--gpu", "0"], "--gpu has no effect under torchrun"),
    (2, TASK, ["--world-size", "2", "--rank", "0"], "--world-size has no effect under torchrun and step.sh"),
    *((0, {name: value for name, value in RANK_5.items() if name != missing}, [], f"but not {missing}: unset")
      for missing in RANK_5),
    (0, {"WORLD_SIZE": 2}, [], "but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: unset"),
])  # fmt: skip
def test_flags_and_variables_that_contradict_each_other_are_refused(machine, count, environment, flags, message):
    machine(count, **environment)
    with pytest.raises(UserError, match=message):
        distributed.launch(None, parse(*flags))


@pytest.fixture
def first_of_two(machine, monkeypatch):
    """A function that lets this process join another, which is not there."""
    machine(0, **{**RANK_5, "RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"})
    return lambda *flags: distributed._connect(parse("--device", "cpu", *flags))


@pytest.mark.parametrize("url, reason", [
    ("foo", "No rendezvous handler for ://"),
    ("tcp://127.0.0.1", "port number missing"),
    ("tcp://127.0.0.1:port", "port"),
    ("tcp://no.such.host.invalid:1234", "Name or service not known|Temporary failure in name resolution"),
])  # fmt: skip
def test_an_address_at_which_no_processes_can_meet_is_one_line(first_of_two, url, reason):
    with pytest.raises(UserError, match=f"rank 0 cannot join the processes at {url}: .*({reason})"):
        first_of_two("--dist-url", url)


def test_an_address_in_use_is_one_line(first_of_two):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"rank 0 cannot join the processes at {url}: .*EADDRINUSE"):
            first_of_two("--dist-url", url)


def test_nccl_is_refused_on_a_cpu(first_of_two):
    with pytest.raises(UserError, match="--dist-backend nccl needs GPUs"):
        first_of_two("--dist-backend", "nccl")


def test_a_process_that_waits_for_others_says_so(first_of_two, monkeypatch):
    printed, lines = threading.Event(), []

    def show(text, **_):
        lines.append(text)
        printed.set()

    monkeypatch.setattr(distributed, "print", show, raising=False)
    monkeypatch.setattr(distributed, "WAIT_SECONDS", 0)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: printed.wait(60))
    assert first_of_two().world_size == 2
    assert lines == ["rank 0 waits for the other 1 processes at tcp://127.0.0.1:1"]


# --- devices and models


def test_devices_that_are_not_available_are_refused(machine):
    machine(0)
    with pytest.raises(UserError, match="--device mps: torch finds no Apple GPU"):
        distributed.select_device("mps")
    with pytest.raises(UserError, match="--device cuda: torch .* finds no GPU that it can use"):
        distributed.select_device("cuda")


@pytest.mark.parametrize("visible, has_file, given", [
    (None, True, True), (None, False, False), ("0", False, True), ("GPU-8f2e", False, True),
    ("", True, False), ("-1", True, False), ("NoDevFiles", True, False),
])  # fmt: skip
@pytest.mark.parametrize("cuda, build", [("13.0", "CUDA 13.0"), (None, "CPUs only")])
def test_auto_does_not_ignore_a_gpu_unless_it_is_hidden(
    machine, tmp_path, monkeypatch, visible, has_file, given, cuda, build
):
    machine(0, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    monkeypatch.setattr(distributed, "DEVICE_FILE", tmp_path if has_file else tmp_path / "none")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if given:
        with pytest.raises(UserError, match=f"built for {build}, finds no GPU that it can use; .*--device cpu"):
            distributed.select_device("auto")
    else:
        assert distributed.select_device("auto").type in ("cpu", "mps")
    assert distributed.select_device("cpu").type == "cpu"


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
