"""Features of images as arrays on disk, which a killed run completes; batch-norm statistics adapted to images."""

import copy
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

from moco import cli, distributed, files
from moco.cli import UserError
from moco.data import augment, loader
from moco.networks import architectures, checkpoint, layers

BATCH = 64  # images per forward pass: as fast as larger batches, and small in memory
BLOCK = 64 * BATCH  # rows or images at a time, where all are gone through
INDEX = "index.jsonl"  # what each file of a cache is
THREADS = 16  # a network disk serves several requests at once


def compute_rows(paths, frames, images, compute, dtype=np.float32):
    """Features of some images of frames as read-only arrays on disk, [(N, C), ...]; NaN for images that cannot be read.

    A row of NaN is one that is still to be computed: a missing or damaged file is made full of them, and every batch of
    BATCH consecutive rows with some is computed and written in place. So a run goes on where it was killed, its batches
    and the last bits of its features are those of an undisturbed run, and what could not be read is tried again.

    paths: of the files; a process that computes one of them keeps others waiting. images: (N,) increasing indices.
    compute(needed): yields (indices (n,), [rows (n, C), ...]) of those of the needed images that can be read, with rows
    for each path. UserError if no image can be read, a feature is not finite in dtype, or the disk is full.
    """
    with ExitStack() as locks:
        needed = _needed_rows(paths, frames, images)
        if len(needed):
            for path in sorted(set(paths)):
                locks.enter_context(files.lock(path.parent, f".{path.name}.lock", wait=True))
            needed = _needed_rows(paths, frames, images)  # of which another process may have computed some meanwhile
        for indices, blocks in compute(images[needed]) if len(needed) else ():
            for path, block in zip(paths, blocks, strict=True):
                with np.errstate(over="ignore"):
                    block = block.astype(dtype)
                check_finite(block, frames, indices)
                if open_rows(path, len(images)) is None:
                    _create(path, len(images), block.shape[1], dtype)
                # mapped anew each time: what was written through an open map would count as memory in use
                open_rows(path, len(images), "r+")[np.searchsorted(images, indices)] = block
    arrays = [open_rows(path, len(images)) for path in paths]
    if any(array is None for array in arrays):
        raise UserError(f"none of the {len(images)} images in {frames.folder} can be read")
    return arrays


def open_rows(path, n, mode="r"):
    """The array (n, C) in the file at path, mapped to memory; None if the file is missing, cut or of something else."""
    try:
        rows = files.retry_transient(path, lambda: np.load(path, mmap_mode=mode))
    except (FileNotFoundError, EOFError, ValueError):
        return None
    return rows if rows.ndim == 2 and len(rows) == n else None


def _needed_rows(paths, frames, images):
    """The rows of all batches that have a row of NaN in one of the files, unless its image still cannot be read."""
    is_missing = np.zeros(len(images), bool)
    for path in paths:
        is_missing |= open_rows(path, len(images)) is None
        for start in range(0, 0 if is_missing.all() else len(images), BLOCK):
            block = slice(start, start + BLOCK)  # of a new map each time, as above
            is_missing[block] |= np.isnan(open_rows(path, len(images))[block]).any(1)
    needed = [np.array([], int)]
    for batch in np.split(np.arange(len(images)), range(BATCH, len(images), BATCH)):
        missing = batch[is_missing[batch]]
        if len(missing) == len(batch) or any(_can_be_read(frames, images[row]) for row in missing):
            needed.append(batch)
    return np.concatenate(needed)


def _can_be_read(frames, i):
    with suppress(augment.BadImage, OSError):
        augment.decode(frames.read(i))
        return True
    return False


def _create(path, n, width, dtype):
    """Create an array (n, width) of NaN on disk, complete or not at all: a full disk shows now, not at a later row."""
    files.remove_temporary_files(path.parent, idle=600)  # of killed processes
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, width)}
    with files.atomic_write(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n, BLOCK):
            file.write(np.full((min(BLOCK, n - start), width), np.nan, dtype).data)


def check_finite(features, frames, indices):
    """UserError that names the first image whose row of features (N, C) contains NaN or infinity.

    indices: (N,) of the images in frames.
    """
    faulty = np.flatnonzero(~np.isfinite(features).all(1))
    if len(faulty):
        path, dtype = frames.path(int(indices[faulty[0]])), features.dtype
        raise UserError(f"the features of {path} are not finite in {dtype}; check the image and the model's weights")


def write_features(network, names, paths, frames, images, size, workers=0, dtype=np.float32):
    """compute_rows() of some layers of network, as a forward pass gives them.

    network: on the device to use, evaluated in eval mode. names: of its layers, a file in paths for each; see
    layers.layer_means. size: of the images' center squares, in pixels.
    """
    network = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)  # faster; the original stays as it is

    def compute(needed):
        with cli.Progress(len(needed), "features", "images") as progress, distributed.no_tf32():
            for pictures, _, indices in batches(network, frames, needed, size, workers):
                with torch.inference_mode():
                    means = layers.layer_means(network, names, pictures)
                progress.update(len(indices))
                yield indices.numpy(), [each.cpu().numpy() for each in means]

    return compute_rows(paths, frames, images, compute, dtype)


def batches(network, frames, images, size, workers):
    """Yield (images (n, 3, size, size) on the device of network, labels (n,), indices (n,)), in order, unaugmented."""
    device = next(network.parameters(), torch.empty(0)).device
    return loader.in_order(frames, size, device, workers, images, BATCH).epoch(0)


def extract_features(network, frames, images, cache, size, workers=0, what="a network", names=(layers.OUTPUT,)):
    """write_features() to files in the folder cache, whose names depend on everything that the features depend on.

    what: the network in words, for the index of the cache. names: of layers; what the network returns by default.
    """
    key = cache_key(frames, images, "features", size, _digest(network, network.state_dict().items()))
    paths = [Path(cache) / f"{'-'.join(filter(None, (key, name)))}.npy" for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.exists():
            of = f"{what}, of {len(images)} images in {frames.folder}"
            add_to_index(path, f"{f'layer {name}' if name else 'features'} of {of}")
    return write_features(network, names, paths, frames, images, size, workers)


def adapt_batch_norm(network, frames, images, seed, size, workers=0, cache=None, what="a network"):
    """Set the batch-norm statistics of network to those of some images in random batches. Labels are not used.

    network: changed in place, on its device; its previous statistics do not matter. images: (N,) indices. cache: folder
    in which the statistics are kept, if any. what: the network in words, for the index of the cache. UserError if fewer
    than two images can be read, or a statistic is not finite.
    """
    if cache:
        digest = _digest(network, network.named_parameters())
        path = Path(cache) / f"{cache_key(frames, images, 'statistics', seed, size, digest)}.tar"
        with suppress(checkpoint.CheckpointError):  # it is missing or damaged
            statistics = checkpoint.read(path)
            for name, buffer in network.named_buffers():
                buffer.copy_(statistics[name])
            return
    order = np.random.default_rng(seed).permutation(images)
    with cli.Progress(len(images), "batch-norm statistics", "images") as progress, distributed.no_tf32():
        pictures = _batches_of_two_or_more(batches(network, frames, order, size, workers), progress)
        architectures.adapt_batch_norm(network, pictures)
    statistics = {name: buffer.cpu() for name, buffer in network.named_buffers()}
    if not all(values.isfinite().all() for values in statistics.values()):
        raise UserError("the adapted batch-norm statistics are not finite; check the model's weights")
    if cache and progress.n == len(images):  # else an image that cannot be read now is tried again next time
        checkpoint.write(path, statistics)
        of = f"{len(images)} images in {frames.folder}, seed {seed}"
        add_to_index(path, f"batch-norm statistics of {what}, of {of}")


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


def cache_key(frames, images, *settings):
    """A file name for what is computed from some images of frames with some settings.

    It depends on the images' names and on what frames.state() says of their content; no image is opened.
    """

    def state(i):
        try:
            return frames.name(i), frames.state(i)
        except OSError as error:
            return frames.name(i), error.strerror

    digest = hashlib.sha256(repr(settings).encode())
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(images), BLOCK):
            digest.update(repr([*threads.map(state, images[start : start + BLOCK])]).encode())
    return digest.hexdigest()[:32]


def add_to_index(path, what):
    """Describe a new file of a cache by a line in the file index.jsonl beside it: {"file", "what", "date"}.

    Several processes may share a cache: lines are appended. A line may outlive its file, which can be deleted any time.
    """
    line = {"file": path.name, "what": what, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.append(path.with_name(INDEX), json.dumps(line) + "\n")


def _digest(network, tensors):
    """A hash of the structure of network and of some of its named tensors."""
    digest = hashlib.sha256(str(network).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
