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
from moco.data import augment, index, manifest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1
BAD_SHARE, BAD_SAMPLE = 0.01, 10_000  # a training ends above this share of bad images, among at least so many
SHUFFLE, DRAWS = 0, 1  # the streams of random numbers of an epoch


class FrameFolder:
    """The images of a folder, in the order of torchvision's ImageFolder, without a list of them.

    folder: a frame folder with its manifest (then nothing is kept per image), a tree with a folder for each class, or
    one flat folder of images, which is one class of the folder's name. Hidden entries and class folders without images
    do not count.
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

    def path(self, i):
        """The file of image i."""
        return self.folder / self._files.path(int(i))

    def label(self, i):
        """The index in classes of image i's class."""
        return bisect_right(self._starts, int(i)) - 1

    def labels(self):
        """The labels of all images, int64 (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def neighbors(self, i, window):
        """Indices of the other images within window steps of image i: of its video, else, unplanned, of its class."""
        if isinstance(self._files, manifest.Manifest):
            return self._files.neighbors(int(i), window)
        label = self.label(i)
        near = range(max(i - window, self._starts[label]), min(i + window + 1, self._starts[label + 1]))
        return [j for j in near if j != i]

    def others(self, i):
        """The other images of image i's class: those after it, then those before it."""
        label = self.label(i)
        return chain(range(i + 1, self._starts[label + 1]), range(self._starts[label], i))


class FrameLoader:
    """The frames in batches, epoch by epoch, augmented by recipe and normalized on device.

    What comes depends on (seed, epoch, position in the epoch) alone: not on the number of workers, nor on where an
    epoch is entered. batch_size counts the images of all processes together; process rank takes every world_size-th
    image of a batch, from the rank-th on.

    train=True shuffles, puts the next good frame of the class in the place of an image that cannot be read, and gives
    every process equally many images: of the last batch up to world_size - 1 are left out, or all of it with drop_last.
    More than 1 % of bad images end the run.
    train=False keeps the order and every image once, but for those that cannot be read, so that processes may get
    unequal numbers of images, and of batches.

    views > 1 gives so many independently augmented views of each image.
    order: the frames to take: indices, shuffled in training; or a function of the epoch that returns them in their
    order, (N,), or (N, views) with another frame for each view, as an array or as a sequence that makes arrays of the
    slices it is asked for.
    bad: {index: reason} of the images that could not be read so far.
    """

    def __init__(
        self, frames, recipe, batch_size, workers, seed, device, train=True, views=1, rank=0, world_size=1, order=None,
        drop_last=False,
    ):  # fmt: skip
        if train and batch_size % world_size:
            raise UserError(f"--batch-size {batch_size} cannot be shared out evenly over {world_size} processes")
        self.frames, self.recipe, self.views, self.train = frames, recipe, views, train
        self.device, self.bad, self._seen = torch.device(device), {}, 0
        total = len(order(0) if callable(order) else frames if order is None else order)
        self._order = EpochSampler(order, total, batch_size, seed, train, drop_last, rank, world_size)
        if len(self) == 0:
            raise UserError(f"{frames.folder}: {total} images do not fill one batch; give a smaller --batch-size")
        self._loader = torch.utils.data.DataLoader(
            BatchDataset(frames, recipe, seed, train, views),
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the loader takes a number an epoch: not from the model's generator
        )
        scale = torch.tensor([MEAN, STD], device=self.device)[:, :, None, None] * 255
        self._mean, self._std = scale.unbind(0)

    def __len__(self):
        """The number of batches of an epoch."""
        return len(self._order)

    def epoch(self, epoch, start=0):
        """The batches of an epoch from number start on.

        Each is (images, targets, indices): float32 (N, 3, size, size) on the device, a tuple of them for views > 1;
        int64 (N,) on the device; int64 (N,) on the CPU. Raises UserError when too many images cannot be read.
        """
        self._order.epoch, self._order.start = epoch, start
        iterator = iter(self._loader)
        _end_at_exit(iterator)
        for pixels, factors, targets, indices, bad in iterator:
            self._note(bad, len(indices))
            if len(indices) == 0:
                continue
            images = tuple(self._normalized(pixels[v], factors[v] if len(factors) else None) for v in range(self.views))
            yield images if self.views > 1 else images[0], targets.to(self.device, non_blocking=True), indices

    def _normalized(self, pixels, factors):
        """uint8 (N, size, size, 3) as float32 (N, 3, size, size) in ImageNet's units, channels last in memory."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        if factors is not None:
            images = augment.device_color(images, factors, self.recipe.gray_first)
        return images.sub_(self._mean).div_(self._std)

    def _note(self, bad, read):
        """Count the bad images of a batch and name those that are new."""
        self._seen += read
        for i, reason in bad:
            if i not in self.bad:
                self.bad[i] = reason
                what = "another image of its class is taken" if self.train else "left out"
                tqdm.write(f"{self.frames.path(i)}: {reason}; {what}")
        total = len(self.frames)
        too_many = len(self.bad) > BAD_SHARE * max(min(self._seen, total), min(BAD_SAMPLE, total))
        if self.train and (too_many or read == 0):  # a step without images would put the count of steps wrong
            names = "\n".join(f"  {self.frames.path(i)}: {reason}" for i, reason in sorted(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} images of {self.frames.folder} cannot be read, too many to train on; "
                f"mend or remove them:\n{names}"
            )


class EpochSampler:
    """The order of each epoch and this process's share of it, as a sampler that counts whole batches.

    source, of total frames: indices, a function of the epoch that returns them, or None for all there are.

    Nothing here refers to FrameLoader: a ring of references would leave worker processes to the garbage collector.
    """

    def __init__(self, source, total, batch_size, seed, train, drop_last, rank, world_size):
        self.source, self.total, self.batch_size, self.seed, self.train = source, total, batch_size, seed, train
        self.rank, self.world_size, self.epoch, self.start = rank, world_size, 0, 0
        last = total % batch_size
        if train:
            last = 0 if drop_last else last - last % world_size
        self.used = total - total % batch_size + last

    def __len__(self):
        return -(-self.used // self.batch_size)

    def indices(self):
        """The indices of the epoch's frames in their order, (N,) or (N, views)."""
        if callable(self.source):
            return self.source(self.epoch)
        if self.source is None:
            indices = np.arange(self.total, dtype=np.int64 if self.total >= 2**31 else np.int32)
        else:
            indices = np.array(self.source)
        if self.train:
            generator(self.seed, SHUFFLE, self.epoch).shuffle(indices)
        return indices

    def __iter__(self):
        """This process's share of every batch from number start on: (epoch, positions, indices)."""
        epoch, indices = self.epoch, self.indices()
        for first in range(self.start * self.batch_size, self.used, self.batch_size):
            share = slice(first + self.rank, min(first + self.batch_size, self.used), self.world_size)
            yield epoch, range(share.start, share.stop, share.step), indices[share]


class BatchDataset(torch.utils.data.Dataset):
    """What a worker does: a batch's share of images read, augmented and put into one array."""

    def __init__(self, frames, recipe, seed, train, views):
        self.frames, self.recipe, self.seed, self.train, self.views = frames, recipe, seed, train, views
        self.bad = {}

    def __getitem__(self, job):
        """The batch of a job as EpochSampler gives it.

        Gives pixels uint8 (views, N, size, size, 3), color factors (views, N, augment.FACTORS) where the device
        applies them (else none), targets and indices (N,), and the bad images: [(index, reason)].
        """
        epoch, positions, indices = job
        recipe, size = self.recipe, self.recipe.size
        later = recipe.colors and recipe.on == "device"
        pixels = np.empty((self.views, len(indices), size, size, 3), np.uint8)
        factors = np.empty((self.views if later else 0, len(indices), augment.FACTORS), np.float32)
        came, bad = [], {}
        columns = indices[:, None] if indices.ndim == 1 else indices
        for position, sources in zip(positions, columns.tolist(), strict=True):
            images = [self._image(source, bad) for source in sources]
            if not all(images):
                continue
            draws, at = generator(self.seed, DRAWS, epoch, position), len(came)
            for view in range(self.views):
                _, image = images[view % len(images)]
                if later:
                    pixels[view, at], factors[view, at] = recipe.crop(image, draws), recipe.draw(draws)
                else:
                    pixels[view, at] = recipe(image, draws)
            came.append(images[0][0])
        n = len(came)
        targets = np.array([self.frames.label(index) for index in came], np.int64)
        arrays = pixels[:, :n], factors[:, :n], targets, np.array(came, np.int64)
        return *map(torch.from_numpy, arrays), list(bad.items())

    def _image(self, index, bad):
        """(index, image) of the wanted image, or in training of the next good one of its class; None if there is none.

        What cannot be read is added to bad.
        """
        for candidate in chain([index], self.frames.others(index) if self.train else []):
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
    """The random numbers of one sample, or of an epoch's order: Philox counts from a place of its own for each."""
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


def _as_it_is(batch):
    return batch


def _start_worker(_):
    """A worker: no threads of OpenCV's; signals to the whole job are the main process's to answer."""
    cv2.setNumThreads(0)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The main process still saves after a SIGTERM that everybody gets, and ends its workers by one of its own.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
