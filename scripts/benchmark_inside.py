"""What the parts film and features of benchmark.py run: this project's way, and the published ones."""

import shutil
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib import animation, pyplot
from torch.nn import functional

from moco import models
from moco.analysis import clip, film, units
from moco.data import loader

matplotlib.use("Agg")
LAYERS = (1, 2, 6, 10, 14, 18)


def our_film(data, folder):
    """The film as feature_animation.py makes it."""
    pictures = clip.Clip(data, 224, 10**9, 5, 16, True, workers=1)
    look = clip.Look(pictures, lambda images: functional.avg_pool2d(images.mean(1), 32), 64, "cpu")
    film.write(Path(folder) / "film.mp4", clip.pages(pictures, look, "feature 1", look.low, look.high), 5)


def published_film(data, folder):
    """The film from arrays of all frames, drawn by matplotlib's ArtistAnimation."""
    pictures = np.stack([cv2.imread(str(path))[:, :, ::-1] for path in sorted(data.rglob("*.jpeg"))]).astype(np.float32)
    small = pictures.mean(3).reshape(len(pictures), 7, 32, 7, 32).mean((2, 4))
    large = np.stack([cv2.resize(each, (224, 224), interpolation=cv2.INTER_CUBIC) for each in small])
    heat = (255 * (large - large.min()) / np.ptp(large)).astype(np.uint8)
    shown = matplotlib.colormaps["jet"](heat)[..., :3] + pictures / 255
    shown = (255 * (shown - shown.min()) / np.ptp(shown)).astype(np.uint8)
    figure, axes = pyplot.subplots()
    axes.set_title("feature 1")
    artists = [[axes.imshow(each, animated=True)] for each in shown]
    made = animation.ArtistAnimation(figure, artists, interval=200, blit=True)
    if shutil.which("ffmpeg"):
        made.save(folder / "film.mp4", writer="ffmpeg")
    else:
        made.save(folder / "film.gif", writer="pillow")
    pyplot.close(figure)


def our_units(data, folder=None, layers=LAYERS):
    """Class means and best images of all units of some layers, as selectivities.py and highly_activating_imgs.py."""
    frames = loader.FrameFolder(data)
    means, best = [units.ClassMeans(2) for _ in layers], [units.TopK(10) for _ in layers]
    for found, labels, indices in units.layer_means(models.build("mobilenet_v2"), layers, frames, 224, 64, 0, "cpu"):
        for rows, of_layer, best_of_layer in zip(found, means, best, strict=True):
            of_layer.add(rows, labels)
            best_of_layer.add(rows, indices)


def a_pass_for_each(data):
    """The same, one layer after another."""
    for layer in LAYERS:
        our_units(data, layers=(layer,))
