"""Images in uncompressed tars, one tar per video or class: read by offset, from a memory-mapped index."""

import errno
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import index

try:
    import resource
except ImportError:  # Windows
    resource = None

NAME = "tars.index"
VERSION = 1
BLOCK = 512  # bytes of a tar header; the size of each file in a tar is rounded up to a multiple of it
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
            if set(head["tars"]) == set(tars) if images is None else head["images"] == images.slots:
                return PackedFolder(folder, path)
    builder = IndexBuilder(images)
    if images is not None:
        present, tars = tars, list(images.tars())
        _check_missing(folder, tars, present)
    for tar in tars:
        builder.add(tar, scan(folder / tar))
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
        if not is_safe(name):
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
            latest = dict(
                zip(*self._folders[key], strict=True)
            )  # of several members of one name, tar extracts the last
            entries.extend(latest[name] for name in sorted(latest))
            classes[key[0]] = classes.get(key[0], 0) + len(latest)
        return write_index(path, entries, self._tars, classes=classes)


def is_safe(name):
    """Whether the name of a member is that of a file below the folder into which its tar is extracted."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not (os.name == "nt" and {*name} & {*"\\:"})


def write_tar(path, members):
    """Write a tar of members, (name, time of modification in seconds, bytes) each, atomically.

    Returns (name, offset, length) of each, see IndexBuilder.add. UserError that names path if the disk is full.
    """
    written, offset = [], 0
    with files.atomic_write(path) as part, open(part, "wb") as file:
        for name, modified, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), int(modified)
            header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            padding = -len(data) % BLOCK
            file.write(header + data + bytes(padding))
            written.append((name, offset, len(header) + len(data) + padding))
            offset += written[-1][2]
        file.write(bytes(2 * BLOCK))  # the end of an archive
    return written


def scan(path):
    """Yield (name, offset, length) of each file in the tar at path, see IndexBuilder.add.

    What is damaged or cut off is left out with a message, and so is what follows.
    """
    with open(path, "rb") as file:
        position, size = 0, os.fstat(file.fileno()).st_size
        while position < size:
            try:
                name, _, _, length = _parse_header(os.pread(file.fileno(), BLOCK, position), file, position)
            except tarfile.TarError:
                length = size
            if length == 0:  # the end of the archive
                return
            if position + length > size:
                print(f"{path} is cut or damaged at byte {position}; the images from there on are left out")
                return
            if name is not None:
                yield name.removeprefix("./"), position, length
            position += length


def _parse_header(block, file, position=0):
    """(name, start of the data, their size, length with header and padding) of the member of a tar at a position.

    block: its first block. file: the tar, read for other headers than plain ones. The name is None for folders and
    links, the length 0 at the end of the archive. Raises tarfile.TarError.
    """
    if plain := _parse_plain(block):
        return *plain, BLOCK + plain[2] + -plain[2] % BLOCK
    file.seek(position)
    tar = tarfile.TarFile(fileobj=file)
    member = tar.firstmember
    if member is None:
        return None, 0, 0, 0
    is_file = member.isreg() and not member.issparse()
    return member.name if is_file else None, member.offset_data - position, member.size, tar.offset - position


def _parse_plain(block):
    """(name, BLOCK, size) of a file from its header, None for other headers; tarfile takes five times as long."""
    if len(block) < BLOCK or block[257:265] != b"ustar\x0000" or block[156:157] != b"0":
        return None
    try:
        if sum(block) - sum(block[148:156]) + 8 * 32 != int(block[148:154], 8):
            return None
        size = int(block[124:135], 8)
    except ValueError:
        return None
    name, prefix = (block[first:end].split(b"\0", 1)[0] for first, end in ((0, 100), (345, 500)))
    return os.fsdecode(prefix + b"/" + name if prefix else name), BLOCK, size


def _content(data, tar, name=None):
    """The content of the member of a tar that data begin with; OSError unless it is complete and has that name."""
    try:
        actual, start, size, _ = _parse_header(data[:BLOCK], io.BytesIO(data))
    except tarfile.TarError:
        actual = None
    if actual is None or name not in (None, actual.removeprefix("./")) or len(data) < start + size:
        raise OSError(errno.EIO, f"{tar.name} is cut, damaged or changed since {NAME} was made")
    return data[start : start + size]


@dataclass(frozen=True)
class Member:
    """An image in a tar, as a path: str() is its tar's path and its name."""

    tar: Path
    offset: int
    length: int
    name: str

    def __str__(self):
        return f"{self.tar}/{self.name}"

    def stat(self):
        """The os.stat_result of the tar."""
        return os.stat(self.tar)

    def read_bytes(self):
        """The bytes of the image; OSError if they cannot be read."""
        with open(self.tar, "rb") as file:
            return _content(os.pread(file.fileno(), self.length, self.offset), self.tar, self.name)

    def open(self, mode="rb"):
        """A file in memory with the bytes of the image."""
        return io.BytesIO(self.read_bytes())


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
        self._entries = np.memmap(index_path, "<u8", "r", head["offset"], (head["images"],))
        self._folder = folder
        self._open = functools.lru_cache(_max_open_tars())(_OpenTar)

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
        tar, offset, length = self._locate(i)
        try:
            data = self._open(tar).read(offset, length)
            return _parse_header(data[:BLOCK], io.BytesIO(data))[0].removeprefix("./")
        except (OSError, tarfile.TarError, AttributeError):
            return f"{tar.name}@{offset}"  # the tar is missing, cut or damaged

    def member(self, slot, name):
        """The Member in a slot; the path it would have as a file if it is in no tar."""
        if self._entries[slot] == ABSENT:
            return self._folder / name
        return Member(*self._locate(slot), name)

    def read(self, slot, name=None):
        """The bytes of the image in a slot; OSError if it is not there or not of that name."""
        if self._entries[slot] == ABSENT:
            raise OSError(errno.ENOENT, "it is in no tar")
        tar, offset, length = self._locate(slot)
        return _content(self._open(tar).read(offset, length), tar, name)

    def _locate(self, slot):
        """(the path of a tar, the offset of the image in a slot with its header, its length)."""
        entry = int(self._entries[slot])
        start, blocks = entry >> LENGTH_BITS, entry % 2**LENGTH_BITS
        return self._tars[start >> START_BITS], start % 2**START_BITS * BLOCK, blocks * BLOCK


class _OpenTar:
    """An open file, closed as soon as no thread uses it."""

    _file = None

    def __init__(self, path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)

    def read(self, offset, length):
        """Up to length bytes from an offset on."""
        return os.pread(self._file.fileno(), length, offset)

    def __del__(self):
        if self._file:
            self._file.close()


def _max_open_tars():
    """Half of the files that a process may open: the other half is for the batches of worker processes."""
    return 256 if resource is None else max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 20_000) // 2)
