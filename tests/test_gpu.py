"""What the project promises of GPUs, on those of this machine: bash scripts/test.sh -m gpu."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moco import distributed
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.distributed import ProcessContext
from moco.networks import architectures
from moco.training import engine
from scripts import embeddings
from tests.support import ROOT
from tests.support.inputs import make_frames, save_network
from tests.support.training import everything, same, train_elsewhere, wait_for_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("handlers", "empty_figures")]
TRAINERS = ("temporal_classification", "moco_img", "moco_temp")
FIRST, LAST = 5, 55  # steps that must not wait for the GPU; those before allocate memory and choose algorithms


@pytest.fixture(scope="module")
def device():
    """The GPU. An error, not a skip, where the machine has one that torch cannot use."""
    device = distributed.select_device("auto")
    if device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    return device


@pytest.fixture(scope="module")
def processes(device):
    """The number of processes of a training: one per GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    return torch.cuda.device_count()


@pytest.fixture(scope="module")
def many_frames(tmp_path_factory):
    """A folder of 480 frames in three classes."""
    return make_frames(tmp_path_factory.mktemp("inputs") / "frames", n=160)


def flags(trainer, frames, save_dir, device, *more):
    """The flags of a trainer for an epoch in bf16."""
    words = [frames, "--save-dir", save_dir, "--device", device.type, "--precision", "bf16", "--image-size", 64]
    words += ["--epochs", 1, "--batch-size", 8, "--lr", 1e-4, "--workers", 2, "--print-freq", 1000]
    own = ["--model", "mobilenet_v2"] if trainer == TRAINERS[0] else ["--arch", "mobilenet_v2", "--moco-k", 480]
    return [str(word) for word in (*words, *own, *more)]


# --- one GPU computes what a CPU does


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnext50_32x4d", "vit_b_16"])
def test_features_equal_those_of_a_cpu(arch, device, tmp_path):
    frames = make_frames(tmp_path / "frames", n=2, size=224)
    save_network(tmp_path / "net.tar", architectures.build(arch, 3), arch=arch, n_out=3)
    rows = []
    for name in ("cpu", device.type):
        words = [frames, "--model-path", tmp_path / "net.tar", "--device", name, "--save-dir", tmp_path / f"on_{name}"]
        embeddings.main([*map(str, words), "--workers", "0"])
        (path,) = (tmp_path / f"on_{name}").glob("*.npy")
        rows.append(np.load(path))
    assert len(rows[0]) == 6 and rows[0].std() > 0
    np.testing.assert_allclose(*rows, rtol=0, atol=1e-4 * np.abs(rows[0]).max())


def test_batches_equal_those_of_a_cpu(device, many_frames):
    """Although the GPU is still computing when the next ones are copied to it."""
    frames = FrameFolder(many_frames)

    def batches(on):
        sampler = loader.EpochSampler(len(frames), 32)
        return loader.FrameLoader(frames, augment.RECIPES["released"], 64, sampler, on, workers=2).epoch(0)

    work, copies = torch.randn(4096, 4096, device=device), []
    for images, targets, indices in batches(device):
        for _ in range(5):
            work = work @ work / 4096
        copies.append((images.clone(), targets.clone(), indices))
        del images, targets
    for (images, *labels), (expected, *expected_labels) in zip(copies, batches("cpu"), strict=True):
        np.testing.assert_allclose(images.cpu(), expected, rtol=0, atol=1e-5)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(labels, expected_labels, strict=True))


def test_logits_in_bf16_are_close_to_those_in_float32_of_a_cpu(device):
    torch.manual_seed(0)
    network, images = architectures.build("resnext50_32x4d", 10).eval(), torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        network = engine.prepare(network, ProcessContext(device=device), torch.bfloat16)
        with engine.autocast(device, torch.bfloat16):
            logits = network(images.to(device))
    assert logits.dtype == torch.bfloat16
    assert (logits.cpu() - expected).abs().max() < 0.05 * expected.std()  # on a CPU in bf16: 0.02


# --- training


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_training_step_waits_for_the_gpu(trainer, device, many_frames, tmp_path, monkeypatch):
    epoch, steps = loader.FrameLoader.epoch, []

    def watched(*arguments):
        for step, batch in enumerate(epoch(*arguments)):
            torch.cuda.set_sync_debug_mode("error" if FIRST <= step < LAST else "default")
            steps.append(step)
            yield batch

    monkeypatch.setattr(loader.FrameLoader, "epoch", watched)
    try:
        importlib.import_module(trainer).main(flags(trainer, many_frames, tmp_path, device, "--processes-per-node", 1))
        assert len(steps) >= LAST
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):  # which a step would have raised
            torch.ones(1, device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def uninterrupted(device, many_frames, tmp_path_factory):
    """The folder of a training with --deterministic, and its flags."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = ["--device", device.type, "--precision", "bf16", "--model", "mobilenet_v2", "--image-size", 64]
    more += ["--workers", 2, "--processes-per-node", 1, "--deterministic", "--print-freq", 1]
    process = train_elsewhere(many_frames, folder, *more)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return folder, more


def test_a_resumed_training_equals_an_uninterrupted_one(uninterrupted, many_frames, tmp_path):
    """Bit for bit, with --deterministic, after a stop signal in the first epoch."""
    folder, more = uninterrupted
    process = train_elsewhere(many_frames, tmp_path / "cut", *more)
    wait_for_step(tmp_path / "cut", process, lines=3)
    process.send_signal(signal.SIGUSR2)
    errors = process.communicate()[1]
    assert process.returncode == 75, errors
    stopped = everything(tmp_path / "cut")
    assert stopped[".epoch"] == 0 and stopped[".step"] > 0
    process = train_elsewhere(many_frames, tmp_path / "cut", *more, "--resume")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert same(everything(folder), everything(tmp_path / "cut"))


def test_a_checkpoint_opens_without_a_gpu(uninterrupted):
    code = "import sys, torch; assert not torch.cuda.is_available(); torch.load(sys.argv[1], weights_only=True)"
    for path in sorted(uninterrupted[0].glob("*.tar")):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# --- several GPUs


def train_and_save_weights(args, context):
    """A training after which each process writes its weights, and MoCo's queue."""
    prepare, models = engine.prepare, []

    def watched(*arguments):
        models.append(prepare(*arguments))
        return models[-1]

    engine.prepare = watched
    importlib.import_module("moco_img" if hasattr(args, "moco_k") else "temporal_classification").train(args, context)
    state = distributed.unwrap(models[0]).state_dict()
    own = ("running_mean", "running_var", "num_batches_tracked")  # of the images of a process
    weights = {name: value.cpu() for name, value in state.items() if not name.endswith(own)}
    torch.save(weights, Path(args.save_dir, f"rank_{context.rank}"))


@pytest.mark.parametrize("trainer", TRAINERS[:2])
def test_all_processes_have_equal_weights(trainer, device, processes, many_frames, tmp_path):
    more = ["--processes-per-node", processes, "--batch-size", 4 * processes, "--moco-k", 32 * processes]
    words = flags(trainer, many_frames, tmp_path, device, *(more[:4] if trainer == TRAINERS[0] else more))
    assert not distributed.launch(train_and_save_weights, importlib.import_module(trainer).parse_args(words))
    first, *others = (torch.load(tmp_path / f"rank_{rank}") for rank in range(processes))
    for weights in others:
        assert same(first, weights)


def fail_on_the_last_rank(args, context):
    """Collective operations for which the other processes wait after an error of the last one."""
    for step in range(10):
        if step == 2 and context.rank == context.world_size - 1:
            raise ValueError("an error on one rank")
        distributed.all_reduce_sum(torch.ones(1, device=context.device), context).item()


def test_an_error_on_one_rank_ends_all(device, processes):
    code = "import sys, temporal_classification; from moco import distributed; from tests import test_gpu; "
    code += "args = temporal_classification.parse_args(sys.argv[1:]); "
    code += "sys.exit(distributed.launch(test_gpu.fail_on_the_last_rank, args))"
    words = ["frames", "--device", device.type, "--processes-per-node", str(processes)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: an error on one rank" in done.stderr
