"""Images in uncompressed tars, one tar per video or class: read by offset, from a memory-mapped index."""

import errno
import functools
import hashlib
import json
import os
import re
from array import array
from pathlib import Path

import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import archive, index
from moco.data.archive import BLOCK

NAME = "tars.index"
VERSION = 1
START_BITS, LENGTH_BITS = 30, 18  # of an entry of the index: tars of up to 550 GB, images of up to 134 MB
MAX_TARS = 2 ** (64 - START_BITS - LENGTH_BITS)
ABSENT = 2**64 - 1  # the entry of an image that is in no tar


def is_packed(folder):
    """Whether folder has an index of tars, or tars and neither folders nor images beside them."""
    return (folder / NAME).exists() or bool(not has_loose_images(folder) and list_tars(folder))


def has_loose_images(folder):
    """Whether folder has images or folders, which may have some."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        return any(entry.name.lower().endswith(index.EXTENSIONS) or entry.is_dir() for entry in visible)


def load(folder, images=None):
    """The PackedFolder of a folder with tars. Its index is made from the tars' headers if it is missing or damaged.

    images: the manifest.Manifest of the folder; None without one. UserError for a tar that is missing, for an index
    that cannot be stored, and for a folder that is not completely packed.
    """
    tars = list_tars(folder)
    for path in _index_paths(folder, tars):
        if (head := read_head(path)) is not None:
            if not head["complete"]:
                raise UserError(f"{folder} is not complete; to finish it: {head['command']}")
            _check_missing(folder, head["tars"], tars)
            if images is None:
                is_current = head["classes"] is not None and set(head["tars"]) == set(tars)
            else:
                is_current = head["classes"] is None and head["images"] == images.slots
            if is_current:
                return PackedFolder(folder, path)
    builder = IndexBuilder(images)
    if images is not None:
        present, tars = tars, list(images.tars())
        _check_missing(folder, tars, present)
    for tar in tars:
        builder.add(tar, archive.scan(folder / tar))
    for path in _index_paths(folder, tars):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            builder.write(path)
            return PackedFolder(folder, path)
        except (OSError, UserError) as error:
            reason = error
    raise UserError(f"cannot store the index of {folder}: {reason}")


def list_tars(folder):
    """The sorted names of the tars in folder."""
    return sorted(path.name for path in Path(folder).glob("*.tar") if not path.name.startswith("."))


def _check_missing(folder, needed, present):
    """UserError if one of the needed tars is not present."""
    if missing := sorted(set(needed) - set(present)):
        others = sorted(set(present) - set(needed))
        renamed = f" (is it {index.printable(others[0])}, renamed?)" if others else ""
        raise UserError(
            f"{folder} has no {index.printable(missing[0])}{renamed}, one of {len(missing)} missing tars; restore it, "
            f"or pack the images again into another folder"
        )


def _index_paths(folder, tars):
    """Yield where the index may be stored: in the folder, or the user's cache folder if that is not writable."""
    yield folder / NAME
    states = [os.stat(folder / tar) for tar in tars]
    key = repr([str(folder.resolve()), tars, [(state.st_size, state.st_mtime_ns) for state in states]])
    yield index.cache_folder() / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.{NAME}"


def read_head(path):
    """The description of the index at path, a dict; None if it is missing, damaged or of another version.

    complete: whether all images are packed; else command packs the others. tars: their names. classes: {name: number of
    images}, None with a manifest. images: the number of entries, which follow after offset bytes.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
            size = os.fstat(file.fileno()).st_size
        head = json.loads(line)
        is_intact = head["version"] == VERSION and size == len(line) + 8 * head["images"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**head, "offset": len(line)} if is_intact else None


def write_index(path, entries, tars, **more):
    """Write the index of tars: a line of JSON, whose length is a multiple of 8, and the entries, uint64 (N,)."""
    head = {"version": VERSION, "complete": True, "classes": None, "images": len(entries), "tars": tars, **more}
    line = json.dumps(head).encode()
    with files.atomic_write(path) as part, open(part, "wb") as file:
        file.write(line + b" " * (-(len(line) + 1) % 8) + b"\n")
        file.write(np.asarray(entries, "<u8").tobytes())


class IndexBuilder:
    """Collects where images are in tars.

    images: the manifest.Manifest of the folder; None for images in the order of torchvision's ImageFolder, whose class
    is the first folder in their name, or the name of their tar if that has no folder.
    """

    def __init__(self, images=None):
        self._tars = []
        self._images = images
        if images is not None:
            self._slots = np.full(images.slots, ABSENT, "<u8")
            self._tar_images = images.tars()
        self._folders = {}  # without a manifest, (class, folder) -> file names and entries

    def add(self, tar, members):
        """Add the members of a tar: (name, offset, length) of each, from its first header to the end of its padding."""
        number = len(self._tars)
        if number == MAX_TARS:
            raise UserError(f"{tar} is one of more than {MAX_TARS} tars; join some of them")
        self._tars.append(tar)
        images, slots = self._images, None
        if images is not None:
            slots = {images.path(i): images.slot(i) for i in self._tar_images[tar]}
        for name, offset, length in members:
            start, blocks = offset // BLOCK, length // BLOCK
            if start >= 2**START_BITS or blocks >= 2**LENGTH_BITS:
                raise UserError(f"{tar} is too large from {index.printable(name)} on; split it")
            entry = (number << START_BITS | start) << LENGTH_BITS | blocks
            if slots is None:
                self._add_by_name(tar, name, entry)
            elif name in slots:
                self._slots[slots[name]] = entry

    def _add_by_name(self, tar, name, entry):
        """Add the entry of an image; hidden files, files that are no images and unsafe names are left out."""
        if not archive.is_safe_name(name):
            print(f"{tar}: {index.printable(name)} is not a name below the folder; left out")
        elif name.lower().endswith(index.EXTENSIONS) and not any(part.startswith(".") for part in name.split("/")):
            folder, _, file_name = name.rpartition("/")
            class_name = folder.partition("/")[0] or re.sub(r"-\d{4,}$", "", tar.removesuffix(".tar"))
            names, entries = self._folders.setdefault((class_name, folder), ([], array("Q")))
            names.append(file_name)
            entries.append(entry)

    def write(self, path):
        """Write the index to path."""
        if self._images is not None:
            return write_index(path, self._slots, self._tars)
        folders = sorted(self._folders)
        if any(folder for _, folder in folders):  # images beside the class folders belong to no class
            folders = [key for key in folders if key[1]]
        classes, entries = {}, array("Q")
        for key in folders:
            latest = dict(zip(*self._folders[key], strict=True))  # tar, too, extracts the last member of a name
            entries.extend(latest[name] for name in sorted(latest))
            classes[key[0]] = classes.get(key[0], 0) + len(latest)
        return write_index(path, entries, self._tars, classes=classes)


class PackedFolder:
    """The images in the tars of a folder, by their entries in its index: slots of a manifest, or ImageFolder's order.

    An entry has 8 bytes: the number of a tar, and the first block and the number of blocks of the image and its header.
    The index is mapped into memory that all processes share. Each keeps a limited number of tars open.
    classes: the names of the classes, printable; None with a manifest.
    """

    def __init__(self, folder, index_path):
        self._arguments = folder, index_path
        head = read_head(index_path)
        self._tars = [folder / tar for tar in head["tars"]]
        self._sizes = head["classes"]
        self._entries = np.memmap(index_path, "<u8", "r", head["offset"], (head["images"],)).view(np.ndarray)
        self._folder = folder
        self._archives = None

    def __reduce__(self):
        return PackedFolder, self._arguments

    def __len__(self):
        return len(self._entries)

    @property
    def classes(self):
        """The names of the classes, printable."""
        return [index.printable(name) for name in self._sizes]

    def class_sizes(self):
        """The number of images in each class."""
        return list(self._sizes.values())

    def slot(self, i):
        """The entry of image i without a manifest."""
        return i

    def path(self, i):
        """The name of image i without a manifest, relative to the folder."""
        tar, *position = self._locate(i)
        try:
            return self._open(tar).name(*position)
        except OSError:  # the tar is missing, cut or damaged
            return f"{tar.name}@{position[0]}"

    def member(self, slot, name):
        """The archive.Member in a slot; the path that it has as a file if it is in no tar."""
        if self._entries[slot] == ABSENT:
            return self._folder / name
        return archive.Member(*self._locate(slot), name)

    def read(self, slot, name=None):
        """The bytes of the image in a slot; OSError unless it is there and, if a name is given, has that name."""
        if self._entries[slot] == ABSENT:
            raise OSError(errno.ENOENT, "it is in no tar")
        tar, *position = self._locate(slot)
        return self._open(tar).read(*position, name)

    def _open(self, tar):
        """An open archive.Archive."""
        if self._archives is None:  # in this process; half of its files are left for other uses
            self._archives = functools.lru_cache(files.raise_open_file_limit() // 2)(archive.Archive)
        return self._archives(tar)

    def _locate(self, slot):
        """(the path of a tar, the offset of the image in a slot with its header, its length)."""
        entry = int(self._entries[slot])
        start, blocks = entry >> LENGTH_BITS, entry % 2**LENGTH_BITS
        return self._tars[start >> START_BITS], start % 2**START_BITS * BLOCK, blocks * BLOCK
