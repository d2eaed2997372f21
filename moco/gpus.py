"""NVIDIA GPUs: whether torch can use those of this machine, and the reason if it cannot."""

import re
from pathlib import Path

import torch

from moco.cli import UserError

DEVICE_FILE = Path("/dev/nvidia0")  # the first GPU of a machine
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def cuda_device(index):
    """The torch device of a GPU; UserError if it does not exist or is too old for this build of torch."""
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no GPU {index}: this process sees {torch.cuda.device_count()}")
    supported = re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))
    oldest = min((divmod(int(number), 10) for number in supported), default=(0, 0))
    capability = torch.cuda.get_device_capability(index)
    if capability < oldest:
        raise UserError(
            f"GPU {index} has compute capability {capability[0]}.{capability[1]}, but torch {torch.__version__} needs "
            f"{oldest[0]}.{oldest[1]}: install torch for an older CUDA, or give --device cpu"
        )
    return torch.device("cuda", index)


def is_given(environment):
    """Whether this machine or SLURM provides a GPU, unless CUDA_VISIBLE_DEVICES hides it.

    environment: os.environ or another mapping.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.strip() not in ("", "-1", "NoDevFiles")  # SLURM sets the last one in jobs without GPUs
    indices = environment.get("SLURM_JOB_GPUS") or environment.get("SLURM_STEP_GPUS")
    return bool(indices) or environment.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0") or DEVICE_FILE.exists()


def why_unusable():
    """The reason why CUDA is not available, and what to do: the end of a message."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with CUDA, or give --device cpu"
    release = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    driver = f"NVIDIA driver {release[1]}" if release else "NVIDIA driver unknown"
    return (
        f"{driver}, torch {torch.__version__} for CUDA {torch.version.cuda}; "
        "update the driver, install torch for an older CUDA, or give --device cpu"
    )
