"""Small folders of frames and small networks for the tests."""

import cv2
import numpy as np

from moco.networks import checkpoint


def make_frames(folder, classes=("class_0000", "class_0001", "class_0002"), n=8, size=40):
    """A folder of n square frames per class, each class with its own color."""
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        color = np.roll([200, 60, 60], label) + 15 * (label // 3)
        (folder / name).mkdir(parents=True)
        for i in range(n):
            image = np.clip(random.normal(color, 30, (size, size, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"img_{i:04d}.jpeg"), image)
    return folder


def save_network(path, model, **metadata):
    """Write a checkpoint of model as the trainers do, with metadata such as arch and n_out."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    checkpoint.write(path, {"model_state_dict": state, **metadata})


def run_small(script, data, save_dir, model, *words):
    """Run an analysis script on 64x64 images on the CPU; the folder comes last, as in the published calls."""
    flags = ["--model-path", model, "--image-size", 64, "--device", "cpu", "--workers", 0, "--save-dir", save_dir]
    script.main([str(word) for word in (*flags, *words, data)])
