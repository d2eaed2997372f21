"""What single units answer to: their means over space, layer by layer; over classes; and the images they like best."""

import numpy as np
import torch

from moco import cli, distributed, models
from moco.analysis import features
from moco.cli import UserError
from moco.data import augment, loader


def layer_means(model, layers, frames, size, batch_size, workers, device, sample=None):
    """Yield (means, labels, indices) batch by batch: the spatial means [(n, C), ...] of layers, float32; (n,); (n,).

    layers: see models.LayerMeans. frames: loader.FrameFolder. size: side of the squares that model sees, in pixels.
    batch_size: images per batch, on which the means do not depend. sample: indices of the frames to take; None: all.
    UserError where no image can be read, or a mean is not finite.
    """
    recipe, total = augment.Recipe("none", size), len(frames) if sample is None else len(sample)
    batches = loader.in_order(frames, recipe, device, workers, sample, batch_size)
    network = models.LayerMeans(model.eval(), layers).to(device, memory_format=torch.channels_last)
    seen = 0
    with cli.Progress(total, "units", "images") as progress, distributed.no_tf32():
        for images, labels, indices in batches.epoch(0):
            with torch.inference_mode():  # in parts: a layer near the input is large
                parts = [network(part) for part in images.split(features.BATCH)]
            means = [torch.cat(rows).cpu().numpy() for rows in zip(*parts, strict=True)]
            for rows in means:
                features.check_finite(rows, [frames.path(int(i)) for i in indices])
            seen += len(indices)
            progress.update(len(indices))
            yield means, labels.cpu().numpy(), indices.numpy()
    if not seen:
        raise UserError(f"none of the {total} images in {frames.folder} can be read")


class ClassMeans:
    """Running means of rows of features (n, C) over each of n_classes classes, in float64."""

    def __init__(self, n_classes):
        self.sums, self.counts = None, np.zeros(n_classes, int)

    def add(self, rows, labels):
        """Take in rows (n, C) with their labels (n,)."""
        if self.sums is None:
            self.sums = np.zeros((len(self.counts), rows.shape[1]))
        for label in np.unique(labels):
            self.sums[label] += rows[labels == label].sum(0, dtype=np.float64)
        self.counts += np.bincount(labels, minlength=len(self.counts))

    def means(self):
        """(n_classes, C); rows of classes without images are NaN."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts[:, None]


def selectivity(class_means):
    """(selectivity, preferred_class) of units, both (C,), from their mean activations for each class (K, C).

    Selectivity is (m - r) / (m + r), where m is the mean of the preferred class, of the highest mean (an index of
    class_means), and r the mean of the means of all other classes (Orhan, Gupta & Lake 2020, section 5). It is 0
    for a unit that answers to all classes alike and 1 for one that answers to a single class. A unit that is silent
    for all classes, or with m + r = 0, has 0. Classes whose means are NaN, having no images, do not count. ValueError
    for fewer than two that do.
    """
    known = np.flatnonzero(~np.isnan(class_means).all(1))
    if len(known) < 2:
        raise ValueError("selectivity compares at least two classes")
    means = class_means[known]
    highest = means.max(0)
    others = (means.sum(0) - highest) / (len(means) - 1)
    total = highest + others
    found = np.divide(highest - others, total, out=np.zeros_like(total), where=total != 0)
    return found, known[means.argmax(0)]


def top_k(values, indices, k):
    """The k largest of each column of values (N, C), largest first, and their indices: both (min(k, N), C).

    indices: (N, C). Of equal values the first comes first.
    """
    order = np.argsort(-values, axis=0, kind="stable")[:k]
    return np.take_along_axis(values, order, 0), np.take_along_axis(indices, order, 0)


class TopK:
    """Running top_k(): the k rows of highest value in each column, of all rows that came."""

    def __init__(self, k):
        self.k, self.values, self.indices = k, None, None

    def add(self, rows, indices):
        """Take in rows (n, C) of images with these indices (n,)."""
        columns = np.broadcast_to(indices[:, None], rows.shape)
        if self.values is not None:
            rows, columns = np.concatenate([self.values, rows]), np.concatenate([self.indices, columns])
        self.values, self.indices = top_k(rows, columns, self.k)
