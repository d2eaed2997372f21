"""The images of frame folders, and of any other folders of images, by index."""

from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from moco.cli import UserError
from moco.data import archive, augment, index, manifest, packed, recordings


class FrameFolder:
    """The images of one or several folders in the order of torchvision's ImageFolder, without a list of their paths.

    folders: a folder, or several, whose classes follow one another and are named FOLDER/CLASS. Each is a frame folder
    with a manifest, for which nothing is stored per image; a tree with one folder per class; a flat folder of images,
    which form one class named after the folder; or any of these packed into tars, see packed. Hidden entries and class
    folders without images are ignored.
    selection: the recordings.Selection of the images to use, over all folders, which need manifests for it.
    classes: the names of the classes. counts: the number of images in each class. selected: what was selected, in
    words; None without a selection.
    Raises UserError for a folder that is missing, cannot be read or contains no image, for several folders with images
    of different size (unless one_size is false), and for a selection that nothing meets.
    """

    def __init__(self, folders, selection=None, one_size=True):
        self.folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        self.folder = self.folders[0] if len(self.folders) == 1 else ", ".join(map(str, self.folders))
        self.selected = None
        self._parts, self._tars = zip(*map(_open_images, self.folders), strict=True)
        if selection:
            self._parts, self.selected = _select(self.folders, self._parts, selection)
        self._part_starts = list(accumulate(map(len, self._parts), initial=0))
        self.classes = [name for part, names in enumerate(self._parts) for name in self._named(part, names.classes)]
        self.counts = [count for part in self._parts for count in part.class_sizes()]
        self._starts = list(accumulate(self.counts, initial=0))
        if len(self) == 0:
            raise UserError(f"{self.folder} has no images; give a folder of class folders, as read_saycam.py makes it")
        if len(self.folders) > 1 and one_size:
            self._check_sizes()

    def _named(self, part, names):
        """Names in one of the folders as they are called here: with several folders, below the folder's name."""
        if len(self.folders) == 1:
            return names
        folder = self.folders[part]
        is_unique = [each.name for each in self.folders].count(folder.name) == 1
        return [f"{folder.name if is_unique else folder.as_posix()}/{name}" for name in names]

    def _check_sizes(self):
        """UserError if the first images of the folders differ in size."""
        shapes = []
        for folder, images, start in zip(self.folders, self._parts, self._part_starts, strict=False):
            if len(images):
                with suppress(augment.BadImage, OSError):  # the loader names it
                    shapes.append((augment.decode(self.read(start)).shape, folder))
        for (height, width, _), folder in shapes[1:]:
            (first_height, first_width, _), first = shapes[0]
            if (height, width) != (first_height, first_width):
                raise UserError(
                    f"the images of {folder} are {width}x{height} pixels, those of {first} "
                    f"{first_width}x{first_height}; extract both with the same --size"
                )

    def __len__(self):
        return self._starts[-1]

    def _locate(self, i):
        """(the number of the folder of image i, its index there)."""
        part = bisect_right(self._part_starts, int(i)) - 1
        return part, int(i) - self._part_starts[part]

    def name(self, i):
        r"""The file name of image i relative to its folder, with forward slashes; with several, below their names.

        Bytes that are not valid UTF-8 are escaped (\udcff for the byte 0xff), so that every name can be printed and
        written to a text file.
        """
        return self._named(self._locate(i)[0], [index.printable(self.relative_path(i))])[0]

    def relative_path(self, i):
        """The path of image i relative to its folder, with forward slashes."""
        part, i = self._locate(i)
        return Path(self._parts[part].path(i)).as_posix()

    def path(self, i):
        """The path of image i: a Path, or an archive.Member, which has its methods stat, open and read_bytes."""
        part, i = self._locate(i)
        images, tars = self._parts[part], self._tars[part]
        return self.folders[part] / images.path(i) if tars is None else tars.member(images.slot(i), images.path(i))

    def read(self, i):
        """The bytes of the file of image i; OSError if it cannot be read."""
        part, i = self._locate(i)
        images, tars = self._parts[part], self._tars[part]
        if tars is None:
            return (self.folders[part] / images.path(i)).read_bytes()
        return tars.read(images.slot(i), None if images is tars else images.path(i))

    def state(self, i):
        """What identifies the present content of image i, without opening it: integers, of its tar too if it is in one.

        The time of change is among them: an archive or a copy sets back the time of modification. OSError if the file
        is missing.
        """
        path = self.path(i)
        member = (path.offset, path.length) if isinstance(path, archive.Member) else ()
        state = path.stat()
        return (*member, state.st_size, state.st_mtime_ns, state.st_ctime_ns)

    def source(self, i):
        """The manifest.Source of image i; None if its folder has no manifest."""
        part, i = self._locate(i)
        return self._parts[part].source(i) if isinstance(self._parts[part], manifest.Manifest) else None

    def label(self, i):
        """The label of image i: an index into classes."""
        return bisect_right(self._starts, int(i)) - 1

    def labels(self):
        """The labels of all images, int64 (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def neighbors(self, i, window):
        """Indices of the other images within window steps of image i in the same video, or class without a manifest."""
        part, local = self._locate(i)
        if isinstance(self._parts[part], manifest.Manifest):
            start = self._part_starts[part]
            return [start + j for j in self._parts[part].neighbors(local, window)]
        label = self.label(i)
        near = range(max(i - window, self._starts[label]), min(i + window + 1, self._starts[label + 1]))
        return [j for j in near if j != i]

    def same_class(self, i):
        """Indices of the other images in the class of image i: those after it, then those before it."""
        label = self.label(i)
        return chain(range(i + 1, self._starts[label + 1]), range(self._starts[label], i))


def _open_images(folder):
    """(the Manifest, Index or PackedFolder that lists the images of a folder, its PackedFolder or None)."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that contains the class folders")
    images = manifest.load(folder)
    if packed.is_packed(folder):
        tars = packed.load(folder, images)
        return tars if images is None else images, tars
    return index.load(folder) if images is None else images, None


def _select(folders, parts, selection):
    """The Manifests of folders with the images of the selected recordings only; and what was selected, in words."""
    if unplanned := [
        folder for folder, part in zip(folders, parts, strict=True) if not isinstance(part, manifest.Manifest)
    ]:
        raise UserError(f"{unplanned[0]} has no manifest.json, by which recordings are selected; extract it again")
    owners = [(part, number) for part, images in enumerate(parts) for number in range(len(images.videos))]
    known = [parts[part].recording(number) for part, number in owners]
    seconds = selection.choose(known)
    shares = [{} for _ in parts]
    for i, taken in seconds.items():
        part, number = owners[i]
        shares[part][number] = taken / known[i][2]
    kept = [images.select(share) for images, share in zip(parts, shares, strict=True)]
    return kept, recordings.describe(known, seconds)
