"""The images of frame folders and of any other folders, as files or in tars, by index."""

import os
import tarfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import augment, manifest, recordings, tars
from moco.files import printable


class FrameFolder:
    """The images of one or several folders in the order of torchvision's ImageFolder, without a list of their paths.

    folders: a folder, or several, whose classes follow one another and are named FOLDER/CLASS. Each is a frame folder
    with a manifest; a tree with one folder per class; a flat folder of images, which form one class named after the
    folder; or any of these in tars, see tars.Tars. Hidden entries and class folders without images are ignored.
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
        self._parts, self._tars = zip(*map(_open, self.folders), strict=True)
        if selection:
            self._parts, self.selected = _select(self.folders, self._parts, selection)
        self._part_starts = list(accumulate(map(len, self._parts), initial=0))
        self.classes = [name for part, images in enumerate(self._parts) for name in self._named(part, images.classes)]
        self.counts = [count for images in self._parts for count in images.counts]
        self._starts = list(accumulate(self.counts, initial=0))
        self._orders = {}  # label -> the images of a class in time, and the position of each
        if len(self) == 0:
            raise UserError(
                f"{self.folder} has no images; give a folder of class folders, as read_saycam.py makes it from videos"
            )
        if len(self.folders) > 1 and one_size:
            self._check_sizes()

    def _named(self, part, names):
        """Names in one of the folders as they are called here: printable; with several folders, below its name."""
        names = [printable(name) for name in names]
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
        return self._named(self._locate(i)[0], [self.relative_path(i)])[0]

    def relative_path(self, i):
        """The path of image i relative to its folder, with forward slashes."""
        part, i = self._locate(i)
        return self._parts[part].path(i)

    def path(self, i):
        """The path of image i; of an image in a tar, that of the tar and the image's name below it."""
        file, _, size = self.location(i)
        return file if size is None else file / self.relative_path(i)

    def location(self, i):
        """(path of the tar that has image i, offset there, size), or (path of its file, 0, None), for read_part()."""
        part, i = self._locate(i)
        images, packed = self._parts[part], self._tars[part]
        in_tar = None if packed is None else packed.location(images.slot(i))
        return in_tar or (self.folders[part] / images.path(i), 0, None)

    def read(self, i):
        """The bytes of the file of image i; OSError if it cannot be read, UserError if the disk fails for long."""
        file, offset, size = self.location(i)
        return read_part(file) if size is None else self._tars[self._locate(i)[0]].read(file, offset, size)

    def state(self, i):
        """What identifies the present content of image i, without opening it: integers, of its tar too if it is in one.

        The time of change is among them: an archive or a copy sets back the time of modification. OSError if the file
        is missing.
        """
        file, offset, size = self.location(i)
        state = files.retry_transient(file, file.stat)
        return offset, size or 0, state.st_size, state.st_mtime_ns, state.st_ctime_ns

    def source(self, i):
        """The recordings.Source of image i; None if its folder has no manifest."""
        part, i = self._locate(i)
        return self._parts[part].source(i) if isinstance(self._parts[part], manifest.Manifest) else None

    def label(self, i):
        """The label of image i: an index into classes."""
        return bisect_right(self._starts, int(i)) - 1

    def labels(self):
        """The labels of all images, int64 (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def in_time(self):
        """Indices of all images, int64 (N,), class after class: by slot, or in the natural order of names."""
        return np.concatenate([self._in_time(label)[0] for label in range(len(self.classes))])

    def _in_time(self, label):
        """Indices of the images of a class in time, (n,), and the position of each there, in order of index, (n,)."""
        if label not in self._orders:
            order = images = range(self._starts[label], self._starts[label + 1])
            if not isinstance(self._parts[self._locate(images[0])[0]], manifest.Manifest):
                order = np.array(sorted(images, key=lambda i: recordings.natural_key(self.relative_path(i))))
            is_sorted = np.array_equal(order, images)  # as where numbers have leading zeros
            self._orders[label] = (images, range(len(images))) if is_sorted else (order, np.argsort(order))
        return self._orders[label]

    def neighbors(self, i, window):
        """Indices of the other images within window steps of image i in the same video, or class without a manifest."""
        part, local = self._locate(i)
        if isinstance(self._parts[part], manifest.Manifest):
            start = self._part_starts[part]
            return [start + j for j in self._parts[part].neighbors(local, window)]
        order, positions = self._in_time(self.label(i))
        position = positions[i - self._starts[self.label(i)]]
        return [int(j) for j in order[max(position - window, 0) : position + window + 1] if j != i]

    def same_class(self, i):
        """Indices of the other images in the class of image i: those after it, then those before it."""
        label = self.label(i)
        return chain(range(i + 1, self._starts[label + 1]), range(self._starts[label], i))


def read_part(path, offset=0, size=None):
    """The bytes of a file or, from an offset on, size bytes of it.

    OSError if they are not there, UserError if the disk fails for long.
    """

    def read():
        if size is None:
            return path.read_bytes()
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return files.retry_transient(path, read)


def _open(folder):
    """(what lists the images of a folder: its Manifest, Tars or Files; its Tars, or None)."""
    if folder.is_file():
        raise UserError(
            f"{printable(folder)} is not a folder of images; if it is a video, extract its frames first: "
            "read_saycam.py FOLDER_OF_VIDEOS --save-dir FRAMES"
        )
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that contains the class folders")
    images = manifest.load(folder)
    if tars.is_packed(folder):
        packed = tars.Tars(folder, images)
        return packed if images is None else images, packed
    images = Files(folder) if images is None else images
    if beside := tars.list_tars(folder):
        if len(images) and "/" not in images.path(0) and not tarfile.is_tarfile(folder / beside[0]):
            raise UserError(f"{folder / beside[0]} is not a tar of images; give a folder of images, not of checkpoints")
        print(f"{printable(folder)} has images or folders: {printable(beside[0])} and other tars in it are not read")
    return images, None


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


class Files:
    """The image files of a folder without a manifest, in the order of torchvision's ImageFolder.

    The folder is scanned at every start, by threads: a network disk answers several requests at once. The paths are in
    one array, which processes share. classes, counts: the names of the classes, and the number of images in each.
    """

    def __init__(self, folder):
        try:
            images, subfolders = _list(folder, "")
            with ThreadPoolExecutor(16) as threads:
                trees = list(threads.map(lambda name: _tree(folder, name, (_identity(folder),)), subfolders))
        except OSError as error:
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        sizes = {name: sum(map(len, tree)) for name, tree in zip(subfolders, trees, strict=True)}
        sizes = {name: size for name, size in sizes.items() if size}
        self._paths = np.concatenate([images[:0], *chain.from_iterable(trees)] if sizes else [images])
        sizes = sizes or {folder.resolve().name: len(images)}  # images beside class folders belong to no class
        self.classes, self.counts = list(sizes), list(sizes.values())

    def __len__(self):
        return len(self._paths)

    def path(self, i):
        """The path of image i relative to the folder."""
        return os.fsdecode(self._paths[i])


def _tree(folder, name, parents):
    """Paths of the images in each folder below a subfolder, in order; parents: _identity() of the folders around it."""
    trees, waiting = {}, [(name, parents)]
    while waiting:
        name, parents = waiting.pop()
        identity = _identity(folder / name)
        if identity not in parents:  # else a link to a folder that contains it
            trees[name], subfolders = _list(folder, name)
            waiting += [(f"{name}/{each}", (*parents, identity)) for each in subfolders]
    return [trees[name] for name in sorted(trees)]


def _identity(folder):
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def _list(folder, name):
    """The sorted paths of the images in a subfolder, relative to folder, bytes (n,), and the names of its folders."""
    with os.scandir(folder / name) as entries:
        entries = sorted((entry.name, entry) for entry in entries if not entry.name.startswith("."))
    prefix = f"{name}/" if name else ""
    images = [name for name, entry in entries if name.lower().endswith(tars.EXTENSIONS) and entry.is_file()]
    subfolders = [name for name, entry in entries if entry.is_dir()]
    return np.array([os.fsencode(prefix + image) for image in images], "S"), subfolders
