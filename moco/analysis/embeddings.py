"""Export the embeddings of many images: which images, what is known of each, and files that are written in parts."""

import os
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from moco import files
from moco.analysis import features, splits
from moco.cli import UserError
from moco.files import printable

PART = 64 * features.BATCH  # images per part; batches never span parts, so that they do not depend on a resume
SOURCE = ("recording", "frame", "second", "child", "date", "age_months")


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
            row += [source.name, source.frame, round(source.second, 3), known.child, known.date, known.age_months]
        yield row


def _part_path(folder, part):
    return Path(folder) / f"{part:06d}.npy"


def missing_parts(folder, n, shard=(0, 1)):
    """The numbers of the parts of n images that are not in folder yet, of those of a shard (number, of how many)."""
    return [part for part in range(shard[0], -(-n // PART), shard[1]) if not _part_path(folder, part).exists()]


def write_parts(network, widths, data, images, folder, shard=(0, 1)):
    """Write the embeddings of some images to folder, in parts of PART images; existing parts are kept.

    network: images to layers of these widths, on the device of data, a features.EvalData. images: (N,) increasing
    indices. A part has a row for each image, of all layers side by side, float32; of NaN for images that cannot be
    read. UserError if an embedding is not finite.
    """
    missing = missing_parts(folder, len(images), shard)
    if not missing:
        return
    width = sum(widths)
    todo = np.concatenate([images[PART * part : PART * (part + 1)] for part in missing])

    def part_of(batch):
        return int(np.searchsorted(images, batch[2][0])) // PART

    for part, batches in groupby(features.forward(network, data, todo, features.BATCH), part_of):
        of_part = images[PART * part : PART * (part + 1)]
        block = np.full((len(of_part), width), np.nan, np.float32)
        for rows, _, indices in batches:
            block[np.searchsorted(of_part, indices)] = np.concatenate(rows, 1)
        _write_part(folder, part, block)
    for part in missing_parts(folder, len(images), shard):  # not one of their images can be read
        _write_part(folder, part, np.full((len(images[PART * part : PART * (part + 1)]), width), np.nan, np.float32))


def _write_part(folder, part, block):
    with files.atomic_write(_part_path(folder, part)) as temporary:
        np.save(temporary, block)


def join_parts(folder, paths, widths, dtype):
    """Join the parts in folder to a file (N, C) of each layer; returns the numbers of the rows that are NaN.

    paths, widths: of the layers, in the order of the columns of the parts. dtype: of the files. UserError for values
    that exceed it.
    """
    parts = sorted(Path(folder).glob("[0-9]*.npy"))  # without temporary files of a killed run
    unreadable = np.concatenate([np.isnan(np.load(part, mmap_mode="r")[:, 0]) for part in parts])
    ends = np.cumsum([0, *widths])
    for path, (first, end) in zip(paths, pairwise(ends), strict=True):
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(unreadable), int(end - first))}
        with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                with np.errstate(over="ignore"):
                    block = np.load(part, mmap_mode="r")[:, first:end].astype(dtype)
                if np.isinf(block).any():
                    raise UserError(f"{path.name} has values beyond the range of {dtype}; use --dtype float32")
                file.write(np.ascontiguousarray(block).data)
    return np.flatnonzero(unreadable)
