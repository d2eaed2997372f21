"""Several processes train one network: equal parameters, equal gradients, and a death that takes all down."""

import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from moco import checkpoint, distributed
from moco.cli import UserError
from moco.distributed import ProcessContext
from tests.support.training import train_elsewhere

pytestmark = pytest.mark.usefixtures("handlers")
TWO_PROCESSES = Namespace(
    device="cpu", gpu=None, multiprocessing_distributed=True, processes_per_node=2,
    world_size=-1, rank=-1, dist_url=None, dist_backend=None, out=None,
)  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def three_steps(args, context):
    """This process's share of three steps on eight images; gradients of the first and last weights go to a file."""
    draws = torch.Generator().manual_seed(1)
    model = distributed.wrap(network(), context)
    optimizer, found = torch.optim.Adam(model.parameters(), 0.01), {}
    for step in range(3):
        images, targets = torch.randn(8, 3, 8, 8, generator=draws), torch.randint(5, (8,), generator=draws)
        images, targets = images[context.rank :: context.world_size], targets[context.rank :: context.world_size]
        optimizer.zero_grad()
        functional.cross_entropy(model(images), targets).backward()
        if step == 0:
            found["gradients"] = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    found["weights"] = [parameter.detach() for parameter in model.parameters()]
    found["ranks"] = distributed.all_reduce_sum(torch.tensor([context.rank, 1]), context)
    torch.save(found, Path(args.out) / f"{context.world_size}_{context.rank}.tar")


def test_two_processes_train_the_network_that_one_would(tmp_path):
    """With half the batch each, batch norm as in evaluation: the same gradients, the same weights on all ranks."""
    args = Namespace(**{**vars(TWO_PROCESSES), "out": str(tmp_path)})
    assert distributed.launch(three_steps, args) == 0
    three_steps(args, ProcessContext())
    single, first, second = (torch.load(tmp_path / name) for name in ("1_0.tar", "2_0.tar", "2_1.tar"))
    assert first["ranks"].tolist() == [1, 2] and single["ranks"].tolist() == [0, 1]
    for what in ("gradients", "weights"):
        for one, a, b in zip(single[what], first[what], second[what], strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(one, a, atol=1e-5)


def dies(args, context):
    """Process 1 is killed while the other waits for it."""
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.all_reduce_sum(torch.ones(1), context)


def makes_a_mistake(args, context):
    raise UserError("the folder x is empty")


def test_a_process_that_dies_takes_the_others_down_in_seconds(capfd):
    start = time.monotonic()
    assert distributed.launch(dies, TWO_PROCESSES) == 1
    assert time.monotonic() - start < 30
    assert "process 1 was killed" in capfd.readouterr().err


def test_a_mistake_in_a_process_is_the_users_one_line():
    with pytest.raises(UserError, match="the folder x is empty"):
        distributed.launch(makes_a_mistake, TWO_PROCESSES)


def test_two_processes_train_one_network(frames, tmp_path):
    """Only rank 0 prints and writes, and every image counts once."""
    two = ("--multiprocessing-distributed", "--processes-per-node", 2, "--epochs", 1)
    output, errors = train_elsewhere(frames, tmp_path / "run", *two).communicate(timeout=120)
    assert output.count("24 frames in 3 classes") == 1, errors
    assert checkpoint.read(tmp_path / "run" / "last.tar")["records"][0]["images"] == 24


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="--device mps: torch sees no Apple GPU"):
        distributed.select_device("mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
            distributed.select_device("cuda")


def test_several_nodes_need_a_meeting_point():
    args = Namespace(**{**vars(TWO_PROCESSES), "world_size": 2})
    with pytest.raises(UserError, match="several nodes need --dist-url"):
        distributed.launch(makes_a_mistake, args)


def test_a_gpu_that_was_asked_for_works_alone(monkeypatch):
    """Else all GPUs of a node help; here they are made up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model = nn.Linear(1, 1)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    assert isinstance(distributed.wrap(model, ProcessContext(device=torch.device("cuda", 0))), nn.DataParallel)
    assert distributed.wrap(model, ProcessContext(device=torch.device("cuda", 0), single_gpu=True)) is model
