"""Ranks from the environment variables of torchrun and srun, and addresses at which processes meet."""

import pytest

from moco import rendezvous
from moco.cli import UserError
from moco.rendezvous import Task

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("environment, task", [
    ({}, None),
    ({"SLURM_JOB_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    (TORCHRUN, Task("torchrun", 5, 8, 1, 1)),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, Task("torchrun", 5, 8, 1, 4)),
    (TORCHRUN | SLURM, Task("torchrun", 5, 8, 1, 1)),
    (SLURM, Task("srun", 4, 6, 1, 3)),
    (SLURM | {"SLURM_GPUS_PER_TASK": "1"}, Task("srun", 4, 6, 1, 3, own_gpus=True)),
    (SLURM | {"SLURM_CPUS_PER_TASK": "4"}, Task("srun", 4, 6, 1, 3, own_cores=True)),
])  # fmt: skip
def test_the_task_is_read_from_the_environment(environment, task):
    assert rendezvous.current_task(environment) == task


@pytest.mark.parametrize("missing", TORCHRUN)
def test_an_incomplete_set_of_variables_is_refused(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError, match=f"in the environment but not {missing}: .*unset.*torchrun"):
        rendezvous.current_task(environment)


def test_one_variable_alone_is_refused():
    with pytest.raises(UserError, match="^WORLD_SIZE in the environment but not RANK, LOCAL_RANK, MASTER_ADDR"):
        rendezvous.current_task({"WORLD_SIZE": "2"})


def test_variables_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="must be integers: .*'first'"):
        rendezvous.current_task(TORCHRUN | {"RANK": "first"})


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:23456", "tcp://localhost:1", "file:///scratch/meet"])
def test_addresses_are_accepted(url):
    rendezvous.check_url(url)


@pytest.mark.parametrize("url", [
    "foo", "tcp://host", "tcp://:123", "tcp://host:port", "tcp://host:70000", "tcp://[::1:3", "http://host:1", "env://",
    "file://", "127.0.0.1:23456",
])  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="--dist-url .* is not an address; give tcp://HOST:PORT"):
        rendezvous.check_url(url)


def test_an_unknown_host_is_refused():
    with pytest.raises(UserError, match="unknown host no.such.host.invalid"):
        rendezvous.check_url("tcp://no.such.host.invalid:1234")


@pytest.mark.parametrize("main_host, own_address, interface, hint", [
    ("node1", "127.0.1.1", None, True),
    ("node1", "10.0.0.2", None, False),
    ("node1", "127.0.1.1", "eth0", False),
    ("localhost", "127.0.1.1", None, False),
])  # fmt: skip
def test_a_host_name_that_is_a_loopback_address_is_named(monkeypatch, main_host, own_address, interface, hint):
    addresses = {"node1": "10.0.0.1", "localhost": "127.0.0.1", "me": own_address}
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "me")
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", addresses.__getitem__)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert ("set GLOO_SOCKET_IFNAME" in rendezvous.loopback_hint(main_host)) == hint
