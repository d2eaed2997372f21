"""What several tests share: small folders of frames, a small network, and signal handlers put back."""

import signal
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch

from moco import checkpoint, models
from moco.distributed import STOP_SIGNALS


@pytest.fixture
def frames(tmp_path):
    """A folder of three classes of eight 40x40 frames, each class of a color of its own."""
    return make_frames(tmp_path / "frames")


def make_frames(folder, classes=("class_0000", "class_0001", "class_0002"), n=8, size=40):
    """A folder of n square frames a class, each class of a color of its own."""
    draws = np.random.default_rng(0)
    for label, name in enumerate(classes):
        color = np.roll([200, 60, 60], label) + 15 * (label // 3)
        (folder / name).mkdir(parents=True)
        for i in range(n):
            image = np.clip(draws.normal(color, 30, (size, size, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"img_{i:04d}.jpeg"), image)
    return folder


@pytest.fixture
def handlers():
    """Puts the stop signals' handlers back after a test that ran a training in this process."""
    before = {stop: signal.getsignal(stop) for stop in STOP_SIGNALS}
    yield
    for stop, handler in before.items():
        signal.signal(stop, handler)


@contextmanager
def single_thread():
    """Torch computes in one thread: the number of threads changes the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The file of a small ResNet with random weights, whose three classes are those of frames."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "net.tar"
    names = [f"class_{label:04d}" for label in range(3)]
    save_network(path, models.build("resnet18", 3), arch="resnet18", n_out=3, classes=names)
    return path


def save_network(path, model, **facts):
    """Write a checkpoint of model as our trainers do, with the facts that they would know."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    checkpoint.write(path, {"model_state_dict": state, **facts})
