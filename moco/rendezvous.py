"""How the processes of a job find each other: ranks from torchrun and SLURM's srun, and addresses to meet at."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

from moco.cli import UserError

TORCHRUN = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]


@dataclass(frozen=True)
class Task:
    """A process that a launcher, "torchrun" or "srun", started.

    rank: among all world_size processes. local_rank: among the local_world_size processes of this node. own_gpus:
    whether no other process sees the GPUs of this one. own_cores: whether cores() counts this process's share only.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    own_gpus: bool = False
    own_cores: bool = False


def current_task(environment):
    """The Task that this process is, or None if no launcher started it, or srun with a single task.

    environment: os.environ or another mapping. Raises UserError for an incomplete set of torchrun's variables.
    """
    if any(name in environment for name in TORCHRUN[:3]):
        return _torchrun_task(environment)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1:
        return None
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    return Task(
        launcher="srun",
        rank=int(environment["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_world_size=-(-tasks // nodes),
        own_gpus="SLURM_GPUS_PER_TASK" in environment,
        own_cores="SLURM_CPUS_PER_TASK" in environment,
    )


def _torchrun_task(environment):
    if missing := [name for name in TORCHRUN if not environment.get(name)]:
        present = [name for name in TORCHRUN[:3] if name in environment]
        raise UserError(
            f"{' and '.join(present)} in the environment but not {', '.join(missing)}: "
            "unset what is there, or start the processes with torchrun, which sets all"
        )
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in TORCHRUN[:3])
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK in the environment must be integers: {error}") from error
    return Task("torchrun", rank, world_size, local_rank, local_world_size)


def slurm_url(environment):
    """An address on which all tasks of a SLURM step agree: its first node, and a port derived from the job's number."""
    first = _scontrol("hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("node", first))[1]  # a node's name need not be a host name
    port = 20000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", 0))) % 20000
    return f"tcp://{address}:{port}"


def _scontrol(entity, name):
    return subprocess.run(["scontrol", "show", entity, name], capture_output=True, text=True, check=True).stdout


def local_url():
    """An address for the processes of one node: a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def check_url(url):
    """Raise UserError unless processes can meet at url."""
    try:
        parts = urlsplit(url)
        valid = (parts.hostname and parts.port) if parts.scheme == "tcp" else parts.scheme == "file" and parts.path
    except ValueError:  # for example a port that is no number
        valid = False
    if not valid:
        raise UserError(f"--dist-url {url} is not an address; give tcp://HOST:PORT, or file:///PATH on a shared disk")
    if parts.scheme == "tcp":
        try:
            socket.getaddrinfo(parts.hostname, parts.port)
        except OSError as error:  # torch would retry for minutes
            raise UserError(f"--dist-url {url}: unknown host {parts.hostname}") from error


def loopback_hint(main_host):
    """What to do if gloo may have failed because it listens where other nodes, like main_host, cannot reach it."""

    def is_loopback(host):
        try:
            return socket.gethostbyname(host).startswith("127.")
        except OSError:
            return False

    if "GLOO_SOCKET_IFNAME" not in os.environ and is_loopback(socket.gethostname()) and not is_loopback(main_host):
        return "; this host's name is a loopback address: set GLOO_SOCKET_IFNAME to the network interface to use"
    return ""
