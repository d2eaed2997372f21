"""Folders of images to batches: frames without a list of them, their order, bad images, ImageNet normalization."""

import atexit
import signal
import weakref
from bisect import bisect_right
from itertools import accumulate, chain
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from moco.cli import UserError
from moco.data import augment, augment_device, index, manifest
from moco.distributed import ProcessContext

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1
BAD_SHARE, BAD_SAMPLE = 0.01, 10_000  # a training ends above this share of bad images, among at least so many
SHUFFLE, AUGMENT = 0, 1  # the streams of random numbers of an epoch


class FrameFolder:
    """The images of a folder, in the order of torchvision's ImageFolder, without a list of their paths.

    folder: a frame folder with its manifest (then nothing is stored per image), a tree with one folder per class, or a
    flat folder of images, which is one class named after the folder. Hidden entries and class folders without images
    are ignored.
    classes: names. counts: the number of images of each class.
    Raises UserError for a folder that is missing, cannot be read or holds no image.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the folder that holds the class folders")
        self._files = manifest.load(folder)
        if self._files is None:
            self._files = index.load(self.folder)
        self.classes, self.counts = self._files.classes, self._files.class_sizes()
        self._starts = list(accumulate(self.counts, initial=0))
        if len(self) == 0:
            raise UserError(f"{folder} holds no images; give a folder of class folders, as read_saycam.py makes it")

    def __len__(self):
        return self._starts[-1]

    def name(self, i):
        """The file name of image i relative to the folder, with forward slashes."""
        return Path(self._files.path(int(i))).as_posix()

    def path(self, i):
        """The path of image i."""
        return self.folder / self._files.path(int(i))

    def label(self, i):
        """The index in classes of image i's class."""
        return bisect_right(self._starts, int(i)) - 1

    def labels(self):
        """The labels of all images, int64 (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def neighbors(self, i, window):
        """Indices of the other images within window steps of image i in the same video, or class without a manifest."""
        if isinstance(self._files, manifest.Manifest):
            return self._files.neighbors(int(i), window)
        label = self.label(i)
        near = range(max(i - window, self._starts[label]), min(i + window + 1, self._starts[label + 1]))
        return [j for j in near if j != i]

    def same_class(self, i):
        """The other images of image i's class: those after it, then those before it."""
        label = self.label(i)
        return chain(range(i + 1, self._starts[label + 1]), range(self._starts[label], i))


class EpochSampler:
    """The order of each epoch and this process's share of it, in whole batches.

    source: which frames, one of
        a number n: all of range(n);
        indices (N,);
        a function of the epoch that returns the frames in their order, (N,), or (N, views) with another frame for each
        view, as an array or as any sequence whose slices are arrays.
    The first two are shuffled by (seed, epoch) in training.
    batch_size: images per step, over all processes of context; its rank takes every world_size-th image of a batch.
    train: shuffle, and give every process equally many images: of the last batch up to world_size - 1 are left out, or
    all of it with drop_last. Otherwise every image comes once and in order, so that processes may get unequal numbers.
    epoch, start: the epoch and the first batch that iteration gives.
    Raises UserError for a batch size that does not divide, or more than there is.
    """

    def __init__(self, source, batch_size, seed=0, context=ProcessContext(), train=True, drop_last=False):
        if train and batch_size % context.world_size:
            raise UserError(f"--batch-size {batch_size} is not a multiple of the {context.world_size} processes")
        self.source, self.batch_size, self.seed, self.train = source, batch_size, seed, train
        self.rank, self.world_size, self.epoch, self.start = context.rank, context.world_size, 0, 0
        self.total = source if isinstance(source, int) else len(source(0) if callable(source) else source)
        last = self.total % batch_size
        if train:
            last = 0 if drop_last else last - last % self.world_size
        self.used = self.total - self.total % batch_size + last
        if self.used == 0:
            raise UserError(f"{self.total} images do not fill one batch; give a smaller --batch-size")

    def __len__(self):
        """The number of batches of an epoch."""
        return -(-self.used // self.batch_size)

    def indices(self):
        """The indices of the epoch's frames in their order, (N,) or (N, views)."""
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
        """This process's share of every batch from start on: (epoch, positions in the epoch, indices)."""
        epoch, indices = self.epoch, self.indices()
        for first in range(self.start * self.batch_size, self.used, self.batch_size):
            share = slice(first + self.rank, min(first + self.batch_size, self.used), self.world_size)
            yield epoch, range(share.start, share.stop, share.step), indices[share]


class FrameLoader:
    """Batches of frames, epoch by epoch, augmented by recipe and normalized on device.

    What comes depends on (seed, epoch, position in the epoch) alone, not on the number of workers, nor on where an
    epoch is entered.

    sampler: the EpochSampler of frames. views > 1: that many independently augmented views of each image.
    In training the next good frame of the class replaces an image that cannot be read, and more than 1 % of corrupt
    images end the run; in evaluation they are left out.
    bad: {index: reason} of the images that could not be read so far.
    """

    def __init__(self, frames, recipe, sampler, device, workers=0, views=1):
        self.frames, self.recipe, self.sampler, self.views = frames, recipe, sampler, views
        self.device, self.bad, self._seen = torch.device(device), {}, 0
        self._loader = torch.utils.data.DataLoader(
            BatchDataset(frames, recipe, sampler.seed, sampler.train, views),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the loader draws one number per epoch: not from the model's generator
        )
        scale = torch.tensor([MEAN, STD], device=self.device)[:, :, None, None] * 255
        self._mean, self._std = scale.unbind(0)

    def __len__(self):
        """The number of batches of an epoch."""
        return len(self.sampler)

    def epoch(self, epoch, start=0):
        """The batches of an epoch from number start on.

        Each is (images, targets, indices): float32 (N, 3, size, size) on the device, a tuple of them for views > 1;
        int64 (N,) on the device; int64 (N,) on the CPU. Raises UserError when too many images cannot be read.
        """
        self.sampler.epoch, self.sampler.start = epoch, start
        iterator = iter(self._loader)
        _end_at_exit(iterator)
        for pixels, factors, targets, indices, bad in iterator:
            self._count_bad(bad, len(indices))
            if len(indices) == 0:
                continue
            images = tuple(self._normalize(pixels[v], factors[v] if len(factors) else None) for v in range(self.views))
            yield images if self.views > 1 else images[0], targets.to(self.device, non_blocking=True), indices

    def _normalize(self, pixels, factors):
        """uint8 (N, size, size, 3) as float32 (N, 3, size, size) in ImageNet's units, channels last in memory."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        if factors is not None:
            images = augment_device.color(images, factors, self.recipe.gray_first)
        return images.sub_(self._mean).div_(self._std)

    def _count_bad(self, bad, read):
        """Count the corrupt images of a batch and name those that are new."""
        self._seen += read
        train = self.sampler.train
        for i, reason in bad:
            if i not in self.bad:
                self.bad[i] = reason
                consequence = "replaced by another image of its class" if train else "left out"
                tqdm.write(f"{self.frames.path(i)}: {reason}; {consequence}")
        total = len(self.frames)
        too_many = len(self.bad) > BAD_SHARE * max(min(self._seen, total), min(BAD_SAMPLE, total))
        if train and (too_many or read == 0):  # a step without images would put the count of steps wrong
            names = "\n".join(f"  {self.frames.path(i)}: {reason}" for i, reason in sorted(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} images of {self.frames.folder} cannot be read, too many to train on; "
                f"repair or remove them:\n{names}"
            )


def in_order(frames, recipe, device, workers, images=None, batch_size=64):
    """A FrameLoader that gives some images of frames once and in order, for evaluation; one epoch, number 0.

    images: their indices, (N,); None takes all.
    """
    sampler = EpochSampler(len(frames) if images is None else images, batch_size, train=False)
    return FrameLoader(frames, recipe, sampler, device, workers)


class BatchDataset(torch.utils.data.Dataset):
    """What a worker does: a batch's share of images read, augmented and put into one array."""

    def __init__(self, frames, recipe, seed, train, views):
        self.frames, self.recipe, self.seed, self.train, self.views = frames, recipe, seed, train, views
        self.bad = {}

    def __getitem__(self, job):
        """The batch of a job, (epoch, positions, indices) of EpochSampler.

        Returns pixels uint8 (views, N, size, size, 3), color factors (views, N, augment.FACTORS) where the device
        applies them (else none), targets and indices (N,), and the corrupt images: [(index, reason)].
        """
        epoch, positions, indices = job
        recipe, size = self.recipe, self.recipe.size
        on_device = recipe.has_color and recipe.on == "device"
        pixels = np.empty((self.views, len(indices), size, size, 3), np.uint8)
        factors = np.empty((self.views if on_device else 0, len(indices), augment.FACTORS), np.float32)
        read, bad = [], {}
        columns = indices[:, None] if indices.ndim == 1 else indices
        for position, sources in zip(positions, columns.tolist(), strict=True):
            images = [self._read(source, bad) for source in sources]
            if not all(images):
                continue
            random, n = generator(self.seed, AUGMENT, epoch, position), len(read)
            for view in range(self.views):
                _, image = images[view % len(images)]
                if on_device:
                    pixels[view, n], factors[view, n] = recipe.crop(image, random), recipe.sample_color_params(random)
                else:
                    pixels[view, n] = recipe(image, random)
            read.append(images[0][0])
        n = len(read)
        targets = np.array([self.frames.label(index) for index in read], np.int64)
        arrays = pixels[:, :n], factors[:, :n], targets, np.array(read, np.int64)
        return *map(torch.from_numpy, arrays), list(bad.items())

    def _read(self, index, bad):
        """(index, image) of a frame, or in training of the next good one of its class; None if there is none.

        Images that cannot be read are added to bad.
        """
        for candidate in chain([index], self.frames.same_class(index) if self.train else []):
            if candidate not in self.bad:
                try:
                    return candidate, augment.decode(self.frames.path(candidate).read_bytes())
                except augment.BadImage as error:
                    self.bad[candidate] = str(error)
                except OSError as error:
                    self.bad[candidate] = error.strerror or str(error)
            bad[candidate] = self.bad[candidate]
            if len(bad) > BAD_SHARE * len(self.frames):
                return None  # enough for the run to end; a folder may hold a million more of them
        return None


def generator(seed, stream, epoch, position=0):
    """The random numbers of one sample, or of an epoch's order: each has its own range of Philox's counter."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=[0, position, epoch, stream]))


_ITERATORS = weakref.WeakSet()  # torch's, each of which may have workers


def _end_at_exit(iterator):
    """Let the workers end with this process, before torch's own way, which waits five seconds for each."""
    if hasattr(iterator, "_shutdown_workers"):
        _ITERATORS.add(iterator)
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # what is registered last runs first


def _end_workers():
    for iterator in _ITERATORS:
        iterator._shutdown_workers()


def _identity(batch):
    return batch


def _start_worker(_):
    """A worker: no threads of OpenCV's; signals to the whole job are the main process's to answer."""
    cv2.setNumThreads(0)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The main process still saves after a SIGTERM that everybody gets, and ends its workers by one of its own.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
