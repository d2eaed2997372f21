"""Batches of normalized images: the order of an epoch, worker processes, augmentation, corrupt images."""

import functools
import mmap
import multiprocessing
import multiprocessing.util
import signal
from contextlib import contextmanager
from itertools import chain

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moco import distributed, files
from moco.cli import UserError
from moco.data import augment
from moco.distributed import ProcessContext

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet statistics of RGB values from 0 to 1
MAX_BAD_SHARE = 0.01  # training fails if more than this share of the images is corrupt ...
MIN_IMAGES_FOR_SHARE = 10_000  # ... of those read so far, counted as at least this many
SHUFFLE, AUGMENT = 0, 1  # streams of random numbers: the order of an epoch, and the augmentation of its images
PREFETCH = 2  # batches that each worker makes ahead
SIGNALS = (signal.SIGINT, *distributed.STOP_SIGNALS)  # those that may be sent to all processes of a job


class FrameLoader:
    """Batches of images, augmented by recipe and normalized on device, epoch by epoch.

    A batch depends only on (seed, epoch, positions in the epoch): not on the number of workers, nor on the batch at
    which an epoch starts.

    recipe: an augment.Recipe, for square images with a side of size pixels. sampler: an EpochSampler of images in
    frames. workers: processes that read them, started by the first epoch; 0 reads in this process. views: with n > 1,
    each image comes in n independent augmentations.
    In training, the next good image of its class replaces a corrupt image, and more than 1 % of corrupt images raise a
    UserError; in evaluation corrupt images are left out.
    bad: {index: reason} of the corrupt images so far.
    """

    def __init__(self, frames, recipe, size, sampler, device, workers=0, views=1):
        self.frames = frames
        self.sampler = sampler
        self.views = views
        self.device = torch.device(device)
        self.bad = {}
        self._images_read = 0
        # While a batch is used here, the workers make the PREFETCH * workers that follow it.
        slots = shared_pixels(PREFETCH * workers + 1, views, sampler.per_process, size, size, 3)
        self._batches = BatchDataset(frames, recipe, sampler, slots)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=_identity,
            worker_init_fn=_init_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the loader draws one number per epoch: not from the model's generator
        )
        self._has_started = False
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        scale = torch.tensor([MEAN, STD], device=self.device)[:, :, None, None] * 255
        self._mean, self._std = scale.unbind(0)

    def __len__(self):
        """The number of batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch, start=0):
        """Yield the batches of an epoch from number start on.

        Each is (images, targets, indices): float32 (N, 3, size, size) on the device, a tuple of them if views > 1;
        int64 (N,) on the device; int64 (N,) on the CPU. Raises UserError for too many corrupt images and for a disk
        that fails, RuntimeError for a worker that was killed.
        """
        self.sampler.epoch = epoch
        self.sampler.start = start
        for batch in self._iterate():
            if isinstance(batch, UserError):
                raise batch
            slot, targets, indices, bad = batch
            self._count_bad(bad, len(indices))
            if len(indices) == 0:
                continue
            pixels = self._batches.slots[slot][:, : len(indices)]
            images = tuple(map(self._normalize, pixels))
            targets, indices = map(torch.from_numpy, (targets, indices))
            yield images if self.views > 1 else images[0], self._to_device(targets), indices

    def _iterate(self):
        """The DataLoader's iterator of an epoch; the first one starts the workers."""
        if self._has_started or not self._loader.num_workers:
            return iter(self._loader)
        self._has_started = True
        _end_workers_at_exit()
        # Where /dev/shm has no room for the semaphores of the queues, torch would print a traceback beside the error.
        _ = [multiprocessing.Lock() for _ in range(10 + 4 * self._loader.num_workers)]
        with _signals_blocked_in_workers():
            return iter(self._loader)

    def _normalize(self, pixels):
        """uint8 (N, size, size, 3) as normalized float32 (N, 3, size, size) on the device, channels last in memory."""
        is_mps = self.device.type == "mps"  # where channels last is slow
        layout = torch.contiguous_format if is_mps else torch.preserve_format
        images = self._to_device(pixels).permute(0, 3, 1, 2).float(memory_format=layout)
        return images.sub_(self._mean).div_(self._std)

    def _to_device(self, tensor):
        """tensor on the device; to a GPU it is copied on a stream of its own, while the last step still computes."""
        if self._copy_stream is None:
            return tensor.to(self.device)
        with torch.cuda.stream(self._copy_stream):
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copy_stream)
        tensor.record_stream(computing)  # its memory belongs to the other stream, which may not reuse it before
        return tensor

    def _count_bad(self, bad, n):
        """Count the corrupt images of a batch of n, and report each of them once."""
        self._images_read += n
        train = self.sampler.train
        for i, reason in bad:
            if i not in self.bad:
                self.bad[i] = reason
                consequence = "replaced by another image of its class" if train else "left out"
                tqdm.write(f"{self._printable(i)}: {reason}; {consequence}")
        total = len(self.frames)
        images = max(min(self._images_read, total), min(MIN_IMAGES_FOR_SHARE, total))
        if train and (len(self.bad) > MAX_BAD_SHARE * images or n == 0):  # a step without images would not be counted
            names = "\n".join(f"  {self._printable(i)}: {reason}" for i, reason in sorted(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} images of {self.frames.folder} cannot be read, too many to train on; "
                f"repair or remove them:\n{names}"
            )

    def _printable(self, i):
        return files.printable(self.frames.path(i))


def in_order(frames, size, device, workers, images=None, batch_size=64):
    """A FrameLoader for evaluation: images of frames without augmentation, once and in order, as epoch 0.

    images: their indices, (N,); None is all.
    """
    sampler = EpochSampler(len(frames) if images is None else images, batch_size, train=False)
    return FrameLoader(frames, augment.RECIPES["none"], size, sampler, device, workers)


def shared_pixels(*shape):
    """A uint8 tensor that all processes share: what a worker writes into it, the main process reads there.

    On Linux it takes no space of /dev/shm, and no file or socket carries a batch.
    """
    return torch.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=torch.uint8).reshape(shape)


class BatchDataset(Dataset):
    """The work of a worker process: read and augment the images of a batch.

    slots: shared_pixels (slots, views, N, size, size, 3), which the batches of an epoch fill in turn.
    """

    def __init__(self, frames, recipe, sampler, slots):
        self.frames = frames
        self.recipe = recipe
        self.seed, self.train, self.batch_size = sampler.seed, sampler.train, sampler.batch_size
        self.slots = slots
        self.bad = {}

    def __getitem__(self, job):
        """The batch of a job of EpochSampler, or a UserError, which torch would raise with a traceback as its message.

        Returns the number of the slot with the pixels, targets and indices int64 (N,), and the corrupt images [(index,
        reason)].
        """
        try:
            return self._batch(*job)
        except UserError as error:
            return error

    def _batch(self, epoch, positions, indices):
        slot = positions.start // self.batch_size % len(self.slots)
        pixels, size = self.slots[slot].numpy(), self.slots.shape[-2]
        read, bad = [], {}
        columns = indices[:, None] if indices.ndim == 1 else indices
        for position, sources in zip(positions, columns.tolist(), strict=True):
            images = [self._read(source, bad) for source in sources]
            if not all(images):
                continue
            random = generator(self.seed, AUGMENT, epoch, position)
            for view in range(len(pixels)):
                _, image = images[view % len(images)]
                pixels[view, len(read)] = self.recipe(image, size, random)
            read.append(images[0][0])
        targets = np.array([self.frames.label(index) for index in read], np.int64)
        return slot, targets, np.array(read, np.int64), list(bad.items())

    def _read(self, index, bad):
        """(index, image) of an image, or in training of the next good one of its class; None if there is none.

        Corrupt images are added to bad.
        """
        for candidate in chain([index], self.frames.same_class(index) if self.train else []):
            if candidate not in self.bad:
                try:
                    return candidate, augment.decode(self.frames.read(candidate), self.frames.path(candidate))
                except augment.BadImage as error:
                    self.bad[candidate] = str(error)
                except OSError as error:
                    self.bad[candidate] = error.strerror or str(error)
            bad[candidate] = self.bad[candidate]
            if len(bad) > MAX_BAD_SHARE * len(self.frames):
                return None  # training will stop: do not read the rest of a large class
        return None


class EpochSampler:
    """The order of the images in each epoch, and the part of each batch that this process gets.

    source: the images, as one of
        a number n: all of range(n);
        indices (N,);
        a function of the epoch that returns the indices in order, (N,), or (N, views) with a different image for each
        view, as an array or as a sequence whose slices are arrays.
    The first two are shuffled by (seed, epoch) in training.
    batch_size: images per step over all processes; rank r of context gets every world_size-th image of a batch, from
    the r-th on.
    train: shuffle, and give all processes the same number of images: up to world_size - 1 images of an incomplete last
    batch are left out. All of it is left out with drop_last, or if it has a single image for each process, for which
    batch norm has no variance. Otherwise every image comes once and in order, and processes may get different numbers.
    per_process: the most images that this process gets of a batch.
    epoch, start: the epoch to iterate over, and the number of its first batch.
    Raises UserError for a batch size that is not a multiple of the processes or larger than the number of images.
    """

    def __init__(self, source, batch_size, seed=0, context=ProcessContext(), train=True, drop_last=False):
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.train = train
        self.rank = context.rank
        self.world_size = context.world_size
        self.epoch = 0
        self.start = 0
        if train and batch_size % self.world_size:
            nearest = max(1, round(batch_size / self.world_size)) * self.world_size
            raise UserError(
                f"a batch of {batch_size} cannot be divided among {self.world_size} processes: give a --batch-size "
                f"that makes it {nearest}"
            )
        self.total = source if isinstance(source, int) else len(source(0) if callable(source) else source)
        last = self.total % batch_size
        if train:
            last -= last % self.world_size
            if drop_last or last == self.world_size:
                last = 0
        self.used = self.total - self.total % batch_size + last
        self.per_process = -(-min(batch_size, self.used) // self.world_size)
        if self.used == 0:
            raise UserError(f"{self.total} images do not fill one batch; give more images or a smaller --batch-size")

    def __len__(self):
        """The number of batches in an epoch."""
        return -(-self.used // self.batch_size)

    def indices(self):
        """The indices of the epoch's images in order, (N,) or (N, views)."""
        if callable(self.source):
            return self.source(self.epoch)
        if isinstance(self.source, int):
            indices = np.arange(self.total, dtype=np.int64 if self.total >= 2**31 else np.int32)
        else:
            indices = np.array(self.source)
        if self.train:
            generator(self.seed, SHUFFLE, self.epoch).shuffle(indices)
        return indices

    def __iter__(self):
        """This process's part of each batch from start on: (epoch, positions in the epoch, indices)."""
        epoch, indices = self.epoch, self.indices()
        for first in range(self.start * self.batch_size, self.used, self.batch_size):
            share = slice(first + self.rank, min(first + self.batch_size, self.used), self.world_size)
            yield epoch, range(share.start, share.stop, share.step), indices[share]


def generator(seed, stream, epoch, position=0):
    """The random numbers of one image, or of the order of an epoch: each has its own range of Philox's counter."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=[0, position, epoch, stream]))


@contextmanager
def _signals_blocked_in_workers():
    """Start workers that block the signals to a job, and whose deaths raise no error in the midst of other code.

    The main process handles a job's signals: it saves, and then ends the workers. They inherit the block, so that no
    signal reaches them before _init_worker() runs. The handler of SIGCHLD that torch installs raises its error wherever
    the main process is; without it, the loader raises the error within five seconds.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    child_handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, child_handler)


def _init_worker(_):
    """A DataLoader's worker_init_fn: no threads of OpenCV, and no signals but SIGKILL."""
    cv2.setNumThreads(0)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a fork server passes on its own mask


def _identity(batch):
    return batch


@functools.cache
def _end_workers_at_exit():
    """Kill the workers at exit, where multiprocessing would send the SIGTERM that they block, and wait for them."""
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers():
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
