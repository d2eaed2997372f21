"""Activations of single units: their means over space layer by layer, over classes, and their top images."""

from functools import partial

import numpy as np
import torch

from moco.analysis import features
from moco.cli import UserError
from moco.networks import layers as inner


def layer_means(model, layers, data, batch_size, images=None, cache=None, what="a network"):
    """Yield (means, labels, indices) batch by batch: spatial means [(n, C), ...] of layers, float32; (n,); (n,).

    layers: see inner.layer_name. data: features.EvalData. batch_size: images per batch; the means do not
    depend on it. images: indices of the images to use; None: all. cache: folder in which the means are kept; None:
    nowhere. what: model in words, for the index of the cache. UserError if no image can be read, or a mean is not
    finite.
    """
    total = len(data.frames) if images is None else len(images)
    model = model.eval().to(data.device, memory_format=torch.channels_last)
    names = [inner.layer_name(model, layer) for layer in layers]
    if cache is None:
        batches = features.forward(partial(inner.layer_means, model, names), data, images, batch_size)
    else:
        what = f"means of the layers {', '.join(map(str, layers))} of {what}"
        images = np.arange(total) if images is None else images
        batches = _cached_means(_Joined(model, names), data, images, batch_size, cache, what)
    seen = 0
    for means, labels, indices in batches:
        seen += len(indices)
        yield means, labels, indices
    if not seen:
        raise UserError(f"none of the {total} images in {data.frames.folder} can be read")


class _Joined(torch.nn.Module):
    """Layers of a network side by side: images (N, 3, H, W) to (N, sum of C)."""

    def __init__(self, network, names):
        super().__init__()
        self.network = network
        self.names = names

    def extra_repr(self):
        return f"layers: {self.names}"

    def forward(self, images):
        return torch.cat(inner.layer_means(self.network, self.names, images), 1)


def _cached_means(network, data, images, batch_size, cache, what):
    """features.forward() of a _Joined network, by way of a file in cache."""
    rows = features.extract_features(network, data, images, cache, what)
    ends = np.cumsum(inner.widths(network.network, network.names, data.size))[:-1]
    for start in range(0, len(images), batch_size):
        block, indices = rows[start : start + batch_size], images[start : start + batch_size]
        known = ~np.isnan(block[:, 0])
        labels = np.array([data.frames.label(i) for i in indices[known]], int)
        yield np.split(block[known], ends, axis=1), labels, indices[known]


class ClassMeans:
    """Running means of rows of features (n, C) over each of n_classes classes, in float64."""

    def __init__(self, n_classes):
        self.sums = None
        self.counts = np.zeros(n_classes, int)

    def add(self, rows, labels):
        """Add rows (n, C) with their labels (n,)."""
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

    Selectivity is (m - r) / (m + r), where m is the mean activation for the preferred class, which has the highest
    mean, and r the mean of the means of all other classes (Orhan, Gupta & Lake 2020, section 5). It is 0 for a unit
    that responds equally to all classes and 1 for one that responds to a single class; 0 is also the value of a unit
    that is silent for all classes, or with m + r = 0. Classes without images, whose means are NaN, are ignored.
    preferred_class is an index into class_means. ValueError for fewer than two classes with images.
    """
    known = np.flatnonzero(~np.isnan(class_means).all(1))
    if len(known) < 2:
        raise ValueError("selectivity compares at least two classes")
    means = class_means[known]
    highest = means.max(0)
    others = (means.sum(0) - highest) / (len(means) - 1)
    total = highest + others
    values = np.divide(highest - others, total, out=np.zeros_like(total), where=total != 0)
    return values, known[means.argmax(0)]


def top_k(values, indices, k):
    """The k largest of each column of values (N, C), largest first, and their indices: both (min(k, N), C).

    indices: (N, C). The order of equal values is kept.
    """
    order = np.argsort(-values, axis=0, kind="stable")[:k]
    return np.take_along_axis(values, order, 0), np.take_along_axis(indices, order, 0)


class TopK:
    """Running top_k(): the k highest values in each column of all rows added so far, and their indices."""

    def __init__(self, k):
        self.k = k
        self.values = self.indices = None

    def add(self, rows, indices):
        """Add rows (n, C) of the images with these indices (n,)."""
        columns = np.broadcast_to(indices[:, None], rows.shape)
        if self.values is not None:
            rows, columns = np.concatenate([self.values, rows]), np.concatenate([self.indices, columns])
        self.values, self.indices = top_k(rows, columns, self.k)
