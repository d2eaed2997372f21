"""Whether torch can use the NVIDIA GPUs of a machine, with made-up drivers and devices."""

import pytest
import torch

from moco import gpus
from moco.cli import UserError

PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.3.0
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


@pytest.mark.parametrize(
    "text, driver", [(PROPRIETARY, "535.104.05"), (OPEN, "580.65.06"), ("", "unknown"), (None, "unknown")]
)
def test_driver_and_cuda_are_named(tmp_path, monkeypatch, text, driver):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if text is not None:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
    reason = gpus.why_unusable()
    assert f"NVIDIA driver {driver}, torch {torch.__version__} for CUDA 13.0" in reason and "--device cpu" in reason


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in gpus.why_unusable()


@pytest.mark.parametrize("environment, device_file, given", [
    ({}, True, True),
    ({}, False, False),
    ({"SLURM_JOB_GPUS": "0,1"}, False, True),
    ({"SLURM_JOB_GPUS": "0"}, False, True),
    ({"SLURM_GPUS_ON_NODE": "4"}, False, True),
    ({"SLURM_GPUS_ON_NODE": "0"}, False, False),
    ({"SLURM_JOB_GPUS": ""}, False, False),
    ({"CUDA_VISIBLE_DEVICES": "0"}, False, True),
    ({"CUDA_VISIBLE_DEVICES": "GPU-8f2e"}, False, True),
    ({"CUDA_VISIBLE_DEVICES": ""}, True, False),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, True, False),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "3"}, True, False),
])  # fmt: skip
def test_a_gpu_is_given_by_the_machine_or_slurm_unless_hidden(tmp_path, monkeypatch, environment, device_file, given):
    path = tmp_path / "nvidia0"
    if device_file:
        path.touch()
    monkeypatch.setattr(gpus, "DEVICE_FILE", path)
    assert gpus.is_given(environment) == given


@pytest.mark.parametrize("capability, archs, works", [
    ((7, 0), ["sm_75", "sm_80", "sm_120"], False),
    ((7, 5), ["sm_75", "sm_80", "sm_120"], True),
    ((12, 0), ["sm_75", "sm_80", "sm_120"], True),
    ((7, 0), ["sm_50", "sm_70", "compute_70"], True),
    ((9, 0), ["sm_90a"], True),
])  # fmt: skip
def test_a_gpu_too_old_for_torch_is_refused(monkeypatch, capability, archs, works):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    if works:
        assert gpus.cuda_device(0) == torch.device("cuda", 0)
    else:
        with pytest.raises(UserError, match=r"GPU 0 has compute capability 7\.0, but torch .* needs 7\.5"):
            gpus.cuda_device(0)
    with pytest.raises(UserError, match="there is no GPU 1: this process sees 1"):
        gpus.cuda_device(1)
