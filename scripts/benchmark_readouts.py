"""The parts decode and hog of benchmark.py: the work of this project and of the published code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from skimage.feature import hog

import hog_baseline
from moco.data import augment
from moco.data.frame_folder import FrameFolder

ROOT = Path(__file__).resolve().parents[1]


def decode(data, folder, epochs, bn_mode, workers):
    """Run linear_decoding.py with a random MobileNetV2."""
    command = [sys.executable, "linear_decoding.py", data, "--model-name", "random", "--save-dir", folder]
    command += ["--epochs", epochs, "--bn-mode", bn_mode, "--workers", workers]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def extrapolate(rows, epochs):
    """Rows of (cached features, 1 and 3 epochs of the published loop) as two rows, the loop extrapolated to epochs."""
    ours, one, three = rows
    loop = {"name": f"trunk in {epochs} epochs"}
    for key in ("seconds", "cpu_seconds"):
        loop[key] = one[key] + (epochs - 1) * (three[key] - one[key]) / 2
        loop[f"{key}_ratio"] = loop[key] / ours[key]
    return [ours, loop | {"runs": {"1 epoch": one["runs"], "3 epochs": three["runs"]}}]


def our_features(data, folder, workers):
    """HOG features of all images in data."""
    frames = FrameFolder(data)
    return hog_baseline.all_features(frames, np.arange(len(frames)), int(workers), Path(folder))


def our_hog(data, folder):
    """HOG features, and one fit on half of the images."""
    rows = our_features(data, folder, 0)
    train = np.arange(0, len(rows), 2)
    hog_baseline.readout(rows[train], train % 4 // 2, 0, 1)


def plain_hog(data, folder):
    """The same in float64 and in memory, in a plain loop."""
    paths = sorted(Path(data).rglob("*.jpeg"))
    images = (augment.decode(path.read_bytes()) for path in paths)
    rows = np.array([hog(image, 9, (16, 16), (3, 3), block_norm="L2", channel_axis=-1) for image in images], np.float64)
    train = np.arange(0, len(rows), 2)
    hog_baseline.readout(rows[train], train % 4 // 2, 0, 1)


def nothing(data, folder):
    """Nothing, to measure the memory of the imported modules."""
