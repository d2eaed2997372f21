"""What a network makes of images: pooled features of a frozen trunk, kept on disk, and maps of its classes."""

import copy
import hashlib
import os
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from moco import checkpoint, cli, distributed, files, models
from moco.cli import UserError
from moco.data import augment, loader

BATCH = 64  # images a forward pass: as fast as larger ones, and small in memory


def adapt(trunk, frames, images, size, workers, device, seed, cache):
    """Give trunk the batch-norm statistics of some images of frames, in random batches; no label is looked at.

    frames: loader.FrameFolder. images: (N,) their indices. size: side of the squares that trunk sees, in pixels. cache:
    folder where statistics once measured are kept.
    """
    path = Path(cache) / f"{cache_key(frames, images, 'statistics', seed, size, _weights(trunk))}.tar"
    if path.exists():
        found = checkpoint.read(path)
    else:
        order = np.random.default_rng(seed).permutation(images)
        batches = loader.in_order(frames, augment.Recipe("none", size), device, workers, order)
        with cli.Progress(len(images), "batch-norm statistics", "images") as progress:
            models.adapt_batch_norm(trunk.to(device), _images(batches, progress))
        found = {name: buffer.cpu() for name, buffer in trunk.named_buffers()}
        checkpoint.write(path, found)
    for name, buffer in trunk.named_buffers():
        buffer.copy_(found[name])


def _images(batches, progress):
    for images, _, indices in batches.epoch(0):
        yield images
        progress.update(len(indices))


def extract_features(trunk, frames, images, size, workers, device, cache):
    """The features (N, C) of some images of frames, float32, as an array on disk; NaN for images that cannot be read.

    trunk: images to features, in evaluation mode. images: (N,) rising indices. size: side of the squares that trunk
    sees, in pixels. cache: folder where features once computed are kept, under a key of weights, images (names, sizes,
    times of change) and transform. UserError where no image can be read, or a feature is not finite. All GPUs of this
    machine share the work.
    """
    path = Path(cache) / f"{cache_key(frames, images, 'features', size, _weights(trunk))}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    rows = None
    with files.atomic_write(path) as part, cli.Progress(len(images), "features", "images") as progress, distributed.no_tf32():
        for found, indices in _forward(trunk.eval(), frames, images, size, workers, distributed.all_like(device)):
            check_finite(found, [frames.path(i) for i in indices])
            if rows is None:
                rows = empty_rows(part, len(images), found.shape[1])
            rows[np.searchsorted(images, indices.numpy())] = found
            progress.update(len(indices))
        if rows is None:
            raise UserError(f"none of the {len(images)} images in {frames.folder} can be read")
        rows.flush()
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def _forward(trunk, frames, images, size, workers, devices):
    """The features of some images of frames as (features (n, C), indices (n,)), the devices all at work at once."""
    devices = devices[: len(images)]
    networks = [copy.deepcopy(trunk).to(device, memory_format=torch.channels_last) for device in devices]
    recipe, workers = augment.Recipe("none", size), -(-workers // len(devices))
    shares = [
        loader.in_order(frames, recipe, device, workers, share, BATCH).epoch(0)
        for device, share in zip(devices, np.array_split(images, len(devices)), strict=True)
    ]
    for batches in zip_longest(*shares):
        pairs = [(network, batch) for network, batch in zip(networks, batches, strict=True) if batch]
        found = [(network(pictures), indices) for network, (pictures, _, indices) in pairs]  # a GPU does not wait
        for rows, indices in found:
            yield rows.cpu().numpy(), indices


def check_finite(features, names):
    """UserError that names the first file whose row of features (N, C) holds NaN or infinity."""
    faulty = np.flatnonzero(~np.isfinite(features).all(1))
    if len(faulty):
        raise UserError(f"the features of {names[faulty[0]]} are not finite; look at that image, and at the weights")


def cache_key(frames, images, *facts):
    """A name for what comes out of some images (by name, size and time of change) of frames and of the facts (text)."""
    digest = hashlib.sha256(repr(facts).encode())
    for i in images:
        path = frames.path(i)
        try:
            state = path.stat()
            said = f"{state.st_size} {state.st_mtime_ns}"
        except OSError as error:  # it will be left out
            said = error.strerror
        digest.update(f"{frames.name(i)} {said}\n".encode())
    return digest.hexdigest()[:32]


def _weights(trunk):
    """A name for a network and its weights."""
    digest = hashlib.sha256(str(trunk).encode())
    for name, tensor in trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def empty_rows(path, n, width):
    """A new array (n, width) on disk at path, float32, that is NaN everywhere."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, width))
    if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file ends the process in a bus error
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    rows[:] = np.nan
    return rows


# --- maps


def class_activation_map(maps, weights):
    """How much each place speaks for a class (N, H, W): the last maps (N, C, H, W), summed with its weights (C,).

    A class activation map (Zhou et al. 2016), of which the mean over space is the class's logit without its bias.
    """
    return torch.einsum("nchw,c->nhw", maps, weights)


def upsample(maps, size):
    """Maps (N, h, w) made (N, size, size), bicubic."""
    return functional.interpolate(maps[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0]


def attention_mask(maps):
    """Masks (N, H, W) between 0 and 1 from maps (N, H, W): sigmoid(10 m / std(m)), std over all of them (the paper)."""
    return torch.sigmoid(10 * maps / maps.std().clamp(min=1e-12))


def denormalize(images):
    """Normalised images (N, 3, H, W) as pictures (N, H, W, 3) from 0 to 1."""
    mean, std = torch.tensor([loader.MEAN, loader.STD])
    return (images.permute(0, 2, 3, 1) * std + mean).clamp(0, 1)
