"""The order of the images in an epoch, divided among processes, and the random numbers of an epoch."""

import numpy as np

from moco.cli import UserError
from moco.distributed import ProcessContext

SHUFFLE, AUGMENT = 0, 1  # streams of random numbers: the order of an epoch, and the augmentation of its images


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
