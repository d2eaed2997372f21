"""The image files of a folder without a manifest, found by one scan and kept beside it in a compact index."""

import hashlib
import os
import time
import zipfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from moco import files
from moco.cli import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of ImageFolder
SETTLED = 2e9  # nanoseconds: a folder younger than that may change again without a new time of change


class Index:
    """The image files below a folder, one after the other: file names as one run of bytes, each folder once.

    folders: relative names. changed: when each was last changed, in nanoseconds. sizes: the number of images in each.
    names: uint8, all file names in a row. ends: where each of them ends.
    """

    def __init__(self, folder, folders, changed, sizes, names, ends):
        self.folders, self.changed, self.sizes, self.names, self.ends = folders, changed, sizes, names, ends
        self._starts = [0, *np.cumsum(sizes).tolist()]
        by_class = {}
        for name, size in zip(folders.tolist(), sizes.tolist(), strict=True):
            top = name.split(os.sep)[0] or folder.resolve().name
            by_class[top] = by_class.get(top, 0) + size
        self._classes = {name: size for name, size in by_class.items() if size}

    @property
    def classes(self):
        return list(self._classes)

    def class_sizes(self):
        return list(self._classes.values())

    def path(self, i):
        name = self.names[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()
        return Path(str(self.folders[bisect_right(self._starts, i) - 1]), os.fsdecode(name))


def load(folder):
    """The Index of a folder: the one kept from last time if no folder has changed since, else from a new scan."""
    for place in _places(folder):
        try:
            with np.load(place) as kept:
                index = Index(folder, **kept)
            if np.array_equal(index.changed, _changed(folder, index.folders)):
                return index
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue  # not there, out of date or damaged
    index, settled = _scan(folder)
    for place in _places(folder) if settled else ():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(place) as part:
                np.savez(part, **{key: value for key, value in vars(index).items() if not key.startswith("_")})
            break
        except (OSError, UserError):
            continue  # an index that cannot be kept is made again next time
    return index


def _places(folder):
    """Where the index of folder may be kept: beside it or, where nobody may write, in the user's cache folder."""
    folder = folder.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "baby-vision")
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return folder.parent / f".{folder.name}.index.npz", cache / f"{digest}.index.npz"


def _changed(folder, folders):
    """When each folder was last changed, int64 nanoseconds."""
    with ThreadPoolExecutor(16) as threads:
        return np.array(list(threads.map(lambda name: os.stat(folder / name).st_mtime_ns, folders)), np.int64)


def _scan(folder):
    """The Index of a folder, and whether every folder was at rest, so that a later change will show."""
    now = time.time_ns()
    try:
        here = os.stat(folder)
        root, tops = _look(folder, "")
        with ThreadPoolExecutor(16) as threads:  # a network disk answers several at once
            trees = threads.map(lambda top: _tree(folder, top, ((here.st_dev, here.st_ino),)), tops)
            parts = list(chain.from_iterable(trees))
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    if any(len(lengths) for *_, lengths in parts):
        root = (*root[:2], b"", [])  # images beside the class folders belong to no class
    folders, changed, names, lengths = zip(root, *parts, strict=True)
    index = Index(
        folder,
        np.array(folders),
        np.array(changed, np.int64),
        np.array([len(each) for each in lengths], np.int64),
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum(np.concatenate(lengths), dtype=np.int64),
    )
    return index, max(changed) < now - SETTLED


def _tree(folder, name, above):
    """What _look tells of the folder called name and of every folder in it, sorted by name."""
    here = os.stat(folder / name)
    if (here.st_dev, here.st_ino) in above:  # a link to a folder that it lies in
        return []
    part, inner = _look(folder, name)
    above = (*above, (here.st_dev, here.st_ino))
    return sorted([part, *chain.from_iterable(_tree(folder, os.path.join(name, each), above) for each in inner)])


def _look(folder, name):
    """(name, time of change, image names in a row, their lengths) of one folder, and the names of the folders in it."""
    changed = os.stat(folder / name).st_mtime_ns
    with os.scandir(folder / name) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    images = [entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS) and entry.is_file()]
    images = [os.fsencode(each) for each in sorted(images)]
    lengths = np.array([len(each) for each in images], np.int64)
    return (name, changed, b"".join(images), lengths), sorted(entry.name for entry in entries if entry.is_dir())
