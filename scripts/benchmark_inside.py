"""The parts film and features of benchmark.py: the work of this project and of the published code."""

import shutil
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib import animation, pyplot
from torch.nn import functional

from moco.analysis import clip, features, units
from moco.data.frame_folder import FrameFolder
from moco.networks import architectures

matplotlib.use("Agg")
LAYERS = (1, 2, 6, 10, 14, 18)


def our_film(data, folder):
    """The film of feature_animation.py."""
    images = clip.Clip(data, clip.Crop(224), 10**9, workers=1)
    maps = clip.ClipMaps(images, lambda batch: functional.avg_pool2d(batch.mean(1), 32), 64, torch.device("cpu"))
    clip.write_film(Path(folder) / "film.mp4", images, maps, "feature 1", 5)


def published_film(data, folder):
    """The film from arrays of all frames, with matplotlib's ArtistAnimation."""
    pictures = np.stack([cv2.imread(str(path))[:, :, ::-1] for path in sorted(data.rglob("*.jpeg"))]).astype(np.float32)
    small = pictures.mean(3).reshape(len(pictures), 7, 32, 7, 32).mean((2, 4))
    large = np.stack([cv2.resize(each, (224, 224), interpolation=cv2.INTER_CUBIC) for each in small])
    heat = (255 * (large - large.min()) / np.ptp(large)).astype(np.uint8)
    overlays = matplotlib.colormaps["jet"](heat)[..., :3] + pictures / 255
    overlays = (255 * (overlays - overlays.min()) / np.ptp(overlays)).astype(np.uint8)
    figure, axes = pyplot.subplots()
    axes.set_title("feature 1")
    artists = [[axes.imshow(each, animated=True)] for each in overlays]
    made = animation.ArtistAnimation(figure, artists, interval=200, blit=True)
    if shutil.which("ffmpeg"):
        made.save(folder / "film.mp4", writer="ffmpeg")
    else:
        made.save(folder / "film.gif", writer="pillow")
    pyplot.close(figure)


def our_units(data, folder=None, layers=LAYERS):
    """Class means and top images of all units of some layers, as in selectivities.py and highly_activating_imgs.py."""
    data = features.EvalData(FrameFolder(data), 224, torch.device("cpu"))
    means = [units.ClassMeans(2) for _ in layers]
    top = [units.TopK(10) for _ in layers]
    for by_layer, labels, indices in units.layer_means(architectures.build("mobilenet_v2"), layers, data, 64):
        for rows, of_layer, top_of_layer in zip(by_layer, means, top, strict=True):
            of_layer.add(rows, labels)
            top_of_layer.add(rows, indices)


def a_pass_for_each(data):
    """The same, with one forward pass per layer."""
    for layer in LAYERS:
        our_units(data, layers=(layer,))
