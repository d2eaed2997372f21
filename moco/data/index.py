"""The image files of a folder without a manifest: found by a scan, and stored beside the folder in a compact index."""

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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in ImageFolder
SETTLED = 2_000_000_000  # ns: a folder that changed more recently may change again without a new time stamp


class Index:
    """The image files of a folder and its subfolders, without a string per file.

    folders: relative names (F,). changed: their time stamps (F, 2), as _times() gives them. sizes: the number of images
    in each (F,). names: uint8, the names of all files, one after the other. ends: where each name ends (N,).
    """

    def __init__(self, folder, folders, changed, sizes, names, ends):
        self.folders = folders
        self.changed = changed
        self.sizes = sizes
        self.names = names
        self.ends = ends
        self._starts = [0, *np.cumsum(sizes).tolist()]
        by_class = {}
        for name, size in zip(folders.tolist(), sizes.tolist(), strict=True):
            top = name.split(os.sep)[0] or folder.resolve().name
            by_class[top] = by_class.get(top, 0) + size
        self._classes = {name: size for name, size in by_class.items() if size}

    def __len__(self):
        """The number of images."""
        return len(self.ends)

    @property
    def classes(self):
        """The names of the classes, printable."""
        return [printable(name) for name in self._classes]

    def class_sizes(self):
        """The number of images in each class."""
        return list(self._classes.values())

    def path(self, i):
        """The path of image i relative to the folder."""
        name = self.names[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()
        return Path(str(self.folders[bisect_right(self._starts, i) - 1]), os.fsdecode(name))


def printable(name):
    r"""A file name with the bytes that are not valid UTF-8 escaped: \udcff for the byte 0xff."""
    return name.encode(errors="backslashreplace").decode()


def load(folder):
    """The Index of a folder: the stored one if no folder has changed since, else that of a new scan."""
    for path in _index_paths(folder):
        try:
            with np.load(path) as stored:
                index = Index(folder, **stored)
            if np.array_equal(index.changed, _all_times(folder, index.folders)):
                return index
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue  # missing, out of date or damaged
    index, settled = _scan(folder)
    for path in _index_paths(folder) if settled else ():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(path) as part:
                np.savez(part, **{key: value for key, value in vars(index).items() if not key.startswith("_")})
            break
        except (OSError, UserError):
            continue  # without a stored index, the next start scans again
    return index


def _index_paths(folder):
    """Where the index of folder may be stored: beside it or, if that is not writable, in the user's cache folder."""
    folder = folder.resolve()
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return folder.parent / f".{folder.name}.index.npz", cache_folder() / f"{digest}.index.npz"


def cache_folder():
    """The folder in the user's cache for the indices of folders that are not writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "baby-vision")


def _times(folder):
    """The times of modification and of change of a folder, in nanoseconds.

    An extracted archive or a copy may set the first one back to what it was, but not the second one.
    """
    state = os.stat(folder)
    return state.st_mtime_ns, state.st_ctime_ns


def _all_times(folder, names):
    """The _times() of each of the named subfolders, int64 (F, 2)."""
    with ThreadPoolExecutor(16) as threads:
        return np.array(list(threads.map(lambda name: _times(folder / name), names)), np.int64)


def _scan(folder):
    """The Index of a folder, and whether no folder changed recently, so that a later change will show."""
    now = time.time_ns()
    try:
        root_state = os.stat(folder)
        root, subfolders = _list(folder, "")
        with ThreadPoolExecutor(16) as threads:  # a network disk answers several requests at once
            trees = threads.map(lambda name: _tree(folder, name, (_identity(root_state),)), subfolders)
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
    return index, index.changed.max() < now - SETTLED


def _tree(folder, name, parents):
    """The _list() of a subfolder and of every folder in it, sorted by name; parents: _identity() of those around it."""
    identity = _identity(os.stat(folder / name))
    if identity in parents:  # a link to a folder that contains it
        return []
    part, subfolders = _list(folder, name)
    trees = (_tree(folder, os.path.join(name, each), (*parents, identity)) for each in subfolders)
    return sorted([part, *chain.from_iterable(trees)], key=lambda part: part[0])


def _identity(state):
    return state.st_dev, state.st_ino


def _list(folder, name):
    """(name, times, names of the images in one string, their lengths) of a subfolder, and the folders in it."""
    times = _times(folder / name)
    with os.scandir(folder / name) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    images = [entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS) and entry.is_file()]
    images = [os.fsencode(each) for each in sorted(images)]
    lengths = np.array([len(each) for each in images], np.int64)
    return (name, times, b"".join(images), lengths), sorted(entry.name for entry in entries if entry.is_dir())
