"""Export the embeddings of many images: which images, and what is known of each."""

import os
from pathlib import Path

import numpy as np

from moco import files
from moco.analysis import features, splits
from moco.cli import UserError
from moco.data import recordings
from moco.files import printable

SOURCE = ("recording", "video", "frame", "second", "child", "date", "age_months")


class ImageList:
    """The images in the column 'file' of a CSV table, relative to the table, in the form of a FrameFolder.

    Their classes are in the column 'class' or, without it, the names of their folders. rows: further columns of each
    image, {column: cell}. UserError for a table that cannot be read, and for files that do not exist.
    """

    def __init__(self, path):
        self.folder = Path(path).parent
        self.rows = files.read_table(path, "file")
        self._names = [row.pop("file") for row in self.rows]
        missing = [name for i, name in enumerate(self._names) if not self.path(i).is_file()]
        if missing:
            raise UserError(f"{path}: there is no file {missing[0]} (and {len(missing) - 1} more) in {self.folder}")
        classes = [row.pop("class", "") or self.path(i).resolve().parent.name for i, row in enumerate(self.rows)]
        self.classes = list(dict.fromkeys(classes))
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = [number[name] for name in classes]

    def __len__(self):
        return len(self._names)

    def name(self, i):
        """The file of image i as the table has it, printable."""
        return printable(self._names[i])

    def path(self, i):
        """The path of image i."""
        return self.folder / self._names[i]

    def state(self, i):
        """The size and times of the file of image i; OSError if it is missing."""
        state = os.stat(self.path(i))
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns

    def read(self, i):
        """The bytes of the file of image i; OSError if it cannot be read."""
        return self.path(i).read_bytes()

    def label(self, i):
        """The label of image i: an index into classes."""
        return self._labels[i]

    def labels(self):
        """The labels of all images, (N,)."""
        return np.array(self._labels)


def every_nth(frames, plan, n):
    """Sorted indices of every n-th image in time of each recording or, without a plan, of each class.

    plan: the manifest.Manifest of frames, or None. Time in a class is the natural order of the file names.
    """
    if plan is None:
        return splits.every_nth(frames.name, frames.labels(), n)
    return np.concatenate([np.array(plan.video_images(number)[::n], int) for number in range(len(plan.videos))])


def table(frames, plan, images):
    """Yield the rows of images.csv for some images (indices), as lists: first the names of its columns.

    frames: a FrameFolder or ImageList. plan: its manifest.Manifest, or None.
    """
    rows = getattr(frames, "rows", None)
    yield ["file", "class", *(rows[0] if rows else SOURCE if plan else ())]
    for i in images:
        row = [frames.name(i), frames.classes[frames.label(i)]]
        if rows:
            row += rows[i].values()
        elif plan:
            source = plan.source(int(i))
            known = source.recording
            row += [recordings.chapter(source.name)[0], source.name, source.frame, round(source.second, 3)]
            row += [known.child, known.date, known.age_months]
        yield row


def shard(images, i, n):
    """Part i of n of images (N,): whole batches, so that their features are those of one run to the bit."""
    n_batches = -(-len(images) // features.BATCH)
    start, end = (features.BATCH * (n_batches * part // n) for part in (i, i + 1))
    return images[start:end]
