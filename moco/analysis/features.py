"""Features of images from a frozen trunk, and batch-norm statistics adapted to images, both cached on disk."""

import copy
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from moco import cli, distributed, files
from moco.cli import UserError
from moco.data import loader
from moco.data.folders import FrameFolder
from moco.networks import architectures, checkpoint

BATCH = 64  # images per forward pass: as fast as larger batches, and small in memory
INDEX = "index.jsonl"  # what each file of a cache is
THREADS = 16  # a network disk serves several requests at once


@dataclass(frozen=True)
class EvalData:
    """A folder of images and how they are read for evaluation: a center square of size pixels, no augmentation."""

    frames: FrameFolder
    size: int
    device: torch.device
    workers: int = 0

    def batches(self, images=None, batch_size=BATCH):
        """Iterate over (images (n, 3, size, size) on the device, labels (n,), indices (n,)) once, in order.

        images: indices of the images to read, (N,); None reads all. Images that cannot be read are left out.
        """
        return loader.in_order(self.frames, self.size, self.device, self.workers, images, batch_size).epoch(0)


def adapt_batch_norm(trunk, data, images, seed, cache, what="a network"):
    """Set the batch-norm statistics of trunk to those of some images in random batches. Labels are not used.

    trunk is changed in place; its previous statistics do not matter. data: EvalData. images: (N,) indices. cache:
    folder in which the statistics are kept. what: the network in words, for the index of the cache. UserError if fewer
    than two images can be read, or a statistic is not finite.
    """
    key = cache_key(data.frames, images, "statistics", seed, data.size, _digest(trunk, trunk.named_parameters()))
    path = Path(cache) / f"{key}.tar"
    if path.exists():
        statistics = checkpoint.read(path)
        for name, buffer in trunk.named_buffers():
            buffer.copy_(statistics[name])
        return
    order = np.random.default_rng(seed).permutation(images)
    with cli.Progress(len(images), "batch-norm statistics", "images") as progress, distributed.no_tf32():
        architectures.adapt_batch_norm(trunk, _batches_of_two_or_more(data.batches(order), progress))
    statistics = {name: buffer.cpu() for name, buffer in trunk.named_buffers()}
    if not all(values.isfinite().all() for values in statistics.values()):
        raise UserError("the adapted batch-norm statistics are not finite; check the model's weights")
    if progress.n == len(images):  # else an image that cannot be read now is tried again next time
        checkpoint.write(path, statistics)
        of = f"{len(images)} images in {data.frames.folder}, seed {seed}"
        add_to_index(path, f"batch-norm statistics of {what}, {data.size} pixels, of {of}")


def _batches_of_two_or_more(batches, progress):
    """The images of batches, where a batch of one image, which has no variance, is joined to its neighbor."""
    pending = None
    for images, _, indices in batches:
        progress.update(len(indices))
        if pending is not None and min(len(pending), len(images)) > 1:
            yield pending
            pending = images
        else:
            pending = images if pending is None else torch.cat([pending, images])
    if pending is None or len(pending) < 2:
        raise UserError("batch-norm statistics need at least two training images that can be read")
    yield pending


def forward(network, data, images=None, batch_size=BATCH):
    """Yield (features, labels, indices) batch by batch: [(n, C), ...] float32, (n,), (n,), as NumPy arrays.

    network: images (n, 3, H, W) to a list of features, in evaluation mode on data.device. data: EvalData. images:
    indices of the images to use, (N,); None: all. Images that cannot be read are left out. batch_size: images per
    batch; the features do not depend on it. UserError if a feature is not finite.
    """
    total = len(data.frames) if images is None else len(images)
    with cli.Progress(total, "features", "images") as progress, distributed.no_tf32():
        for pictures, labels, indices in data.batches(images, batch_size):
            with torch.inference_mode():  # in parts: the maps of a layer near the input are large
                parts = [network(part) for part in pictures.split(BATCH)]
            rows = [torch.cat(layer).cpu().numpy() for layer in zip(*parts, strict=True)]
            for each in rows:
                check_finite(each, data.frames, indices)
            progress.update(len(indices))
            yield rows, labels.cpu().numpy(), indices.numpy()


def extract_features(trunk, data, images, cache, what="features"):
    """The features (N, C) of some images, float32, as an array on disk; NaN for images that cannot be read.

    trunk: images to features, on data.device; evaluated in eval mode. data: EvalData. images: (N,) increasing indices.
    cache: folder in which features are kept. what: the features in words, for the index of the cache. UserError if no
    image can be read, or a feature is not finite.
    """
    key = cache_key(data.frames, images, "features", data.size, _digest(trunk, trunk.state_dict().items()))
    network = copy.deepcopy(trunk).eval().to(memory_format=torch.channels_last)  # faster; trunk keeps its layout

    def compute(missing):
        for (rows,), _, indices in forward(lambda pictures: [network(pictures)], data, missing):
            yield indices, rows

    what = f"{what}, {data.size} pixels"
    return cached_rows(Path(cache) / f"{key}.npy", data.frames, images, compute, what)


def check_finite(features, frames, indices):
    """UserError that names the first image whose row of features (N, C) contains NaN or infinity.

    indices: (N,) of the images in frames.
    """
    faulty = np.flatnonzero(~np.isfinite(features).all(1))
    if len(faulty):
        path = frames.path(int(indices[faulty[0]]))
        raise UserError(f"the features of {path} are not finite; check the image and the model's weights")


# --- cache


def cached_rows(path, frames, images, compute, what):
    """Rows of features (N, C) of some images of frames, float32, as a read-only array in the file path.

    compute(missing) yields (indices (n,), rows (n, C)) of those of the missing images that can be read; the other rows
    are NaN, and are tried again when the file is used next. what: the features in words. UserError if no image can be
    read.
    """
    kept = np.load(path, mmap_mode="r") if path.exists() else None
    missing = images if kept is None else images[np.isnan(kept[:, 0])]
    if not len(missing):
        return kept
    parts = compute(missing)
    first = next(parts, None)
    if first is None:
        if kept is None:
            raise UserError(f"none of the {len(images)} images in {frames.folder} can be read")
        return kept
    with files.atomic_write(path) as part:
        rows = _empty_rows(part, len(images), first[1].shape[1])
        if kept is not None:
            rows[:] = kept
        for indices, values in chain([first], parts):
            rows[np.searchsorted(images, indices)] = values
        rows.flush()
    if kept is None:
        add_to_index(path, f"{what}, of {len(images)} images in {frames.folder}")
    return np.load(path, mmap_mode="r")


def add_to_index(path, what):
    """Describe a new file of a cache by a line in the file index.jsonl beside it: {"file", "what", "date"}.

    Several processes may share a cache: lines are appended. A line may outlive its file, which can be deleted any time.
    """
    line = {"file": path.name, "what": what, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.append(path.with_name(INDEX), json.dumps(line) + "\n")


def _empty_rows(path, n, width):
    """A new array (n, width) on disk at path, float32, of NaN."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, width))
    if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process by SIGBUS
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    rows[:] = np.nan
    return rows


def cache_key(frames, images, *settings):
    """A file name for what is computed from some images of frames with some settings.

    It depends on the images' names, sizes and times; no image is opened for it.
    """
    digest = hashlib.sha256(repr(settings).encode())
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(images), 4096):
            for line in threads.map(lambda i: _file_state(frames, i), images[start : start + 4096]):
                digest.update(line)
    return digest.hexdigest()[:32]


def _file_state(frames, i):
    """What identifies the present content of image i, as bytes."""
    try:
        facts = frames.state(i)
    except OSError as error:
        facts = error.strerror
    return os.fsencode(f"{frames.name(i)} {facts}\n")


def _digest(network, tensors):
    """A hash of the structure of network and of some of its named tensors."""
    digest = hashlib.sha256(str(network).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
