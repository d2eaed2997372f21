"""Fixtures of several tests."""

import os
import signal
import subprocess
from pathlib import Path

# Before torch is loaded, also by the processes that tests start: a second thread gains nothing on small inputs, waits
# for the first one in a busy loop, and changes the last bits of a sum.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from matplotlib.figure import Figure

from moco.distributed import STOP_SIGNALS
from moco.networks import architectures
from tests.support import forked
from tests.support.inputs import make_frames, save_network

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
LONGEST = ("test_slurm.py", "test_readme.py", "test_distributed.py", "test_loader_workers.py")


def pytest_collection_modifyitems(items):
    """The longest files first: started last, they would leave a core idle at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def frames(tmp_path):
    """A folder of three classes of eight 40x40 frames, each class with its own color."""
    return make_frames(tmp_path / "frames")


@pytest.fixture
def handlers():
    """Restores the handlers of the stop signals after a test that trains in this process."""
    before = {stop: signal.getsignal(stop) for stop in STOP_SIGNALS}
    yield
    for stop, handler in before.items():
        signal.signal(stop, handler)


@pytest.fixture
def empty_figures(request, monkeypatch):
    """Figures become empty files: drawing them takes half of the CPU time of a test that trains or decodes little.

    Not in tests marked draws.
    """
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())


@pytest.fixture
def forked_launch():
    """distributed.launch() forks its processes, which takes less time than new ones."""
    with forked.launches():
        yield


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The checkpoint of a small ResNet with random weights and the three classes of frames."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "net.tar"
    names = [f"class_{label:04d}" for label in range(3)]
    save_network(path, architectures.build("resnet18", 3), arch="resnet18", n_out=3, classes=names)
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty disk of a size, such as "200k", with further mount options, and returns it.

    The test is skipped where nothing can be mounted, as without root.
    """
    disks = []

    def mount(size, *options):
        disk = tmp_path / f"disk_{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(disk)]
        if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(command, check=False).returncode:
            pytest.skip("cannot mount a small disk here; it needs root")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:  # an error that is still referenced may keep a file of it open
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
