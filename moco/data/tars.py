"""Images in uncompressed tars, one for each video or class: written, found by their headers, read at their offsets."""

import errno
import functools
import hashlib
import io
import json
import os
import posixpath
import re
import tarfile
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from moco import files
from moco.cli import UserError
from moco.files import printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in ImageFolder
INDEX = "tars.index"  # see Tars; while a folder is being packed, a line of JSON that says how to complete it
ROW = [("tar", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8")]


def write(path, members):
    """Write a tar of members, (name, time of modification in seconds, bytes) each, atomically.

    UserError that names path if the disk is full.
    """
    with files.atomic_write(path) as part, tarfile.open(part, "w", encoding="utf-8") as tar:
        for name, modified, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), int(modified)
            tar.addfile(info, io.BytesIO(data))
            tar.members.clear()  # nobody lists them


def mark_incomplete(folder, command):
    """Let a folder be refused until its INDEX is removed; command: what completes it."""
    files.write_text(folder / INDEX, json.dumps({"complete": False, "command": command}) + "\n")


def list_tars(folder):
    """The sorted names of the tars in a folder."""
    return sorted(path.name for path in Path(folder).glob("*.tar") if not path.name.startswith("."))


def is_packed(folder):
    """Whether a folder has tars or their index; both, if there are folders or images beside them."""
    present = bool(list_tars(folder)), (folder / INDEX).exists()
    return all(present) if has_loose_images(folder) else any(present)


def has_loose_images(folder):
    """Whether a folder has images, or folders, which may have some."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        return any(entry.name.lower().endswith(EXTENSIONS) or entry.is_dir() for entry in visible)


def is_safe_name(name):
    """Whether the name of a member is that of a file below the folder into which its tar is extracted."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


class Tars:
    """The images in the tars of a folder: by slot of its manifest or, without one, in the order of ImageFolder.

    Without a manifest, the class of an image is what WebDataset's member .cls says, or the first folder in its name, or
    the name of its tar.

    The index is an array in a file of the folder, mapped into memory that all processes share: a row whose offset is a
    hash of the names, sizes and times of the tars, and one for each image with the number of its tar, label, offset,
    size and, without a manifest, path. It is made anew when a tar has changed, and kept in memory where the folder
    cannot be written to.

    images: the manifest.Manifest of the folder, None without one. classes, counts: without a manifest, the names of the
    classes and the number of images in each. UserError for a file that is no tar, for missing tars, and for a folder
    that is not completely packed.
    """

    def __init__(self, folder, images=None):
        self._paths = [folder / name for name in list_tars(folder)]
        self._index, self._open = folder / INDEX, None
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        head = int.from_bytes(hashlib.sha256(repr(states).encode()).digest()[:7])
        self._rows = _load_index(self._index, head, images)
        if self._rows is None:
            self._make_index(folder, head, images)
        self.classes, self.counts = [], []
        if images is None:
            labels = self._rows["label"][1:]
            starts = [bisect_left(labels, label) for label in range(labels[-1] + 2)] if len(labels) else [0]
            self.counts = np.diff(starts).tolist()
            tops = [self.path(start).rpartition("/")[0].partition("/")[0] for start in starts[:-1]]
            self.classes = [top or _class_of_tar(self._paths[0]) for top in tops]

    def _make_index(self, folder, head, images):
        """Find the images in the tars, and store their rows below that of head if the folder can be written to."""
        if self._index.exists():
            name = printable(self._index)
            print(f"{name} is damaged, of an earlier version, or older than the tars; it is made again")
        left_out = Counter()
        if images is None:
            rows = _find_by_class(self._paths, left_out)
        else:
            rows = _find_by_slot(self._paths, left_out, folder, images)
        if left_out.total():
            counts = ", ".join(f"{what} ({n})" for what, n in left_out.items() if n)
            print(f"{printable(folder)}: left out of its tars: {counts}")
        self._rows = np.zeros(1 + len(rows), rows.dtype)
        self._rows["offset"][0] = head
        self._rows[1:] = rows
        try:
            with files.atomic_write(self._index) as part, open(part, "wb") as file:
                np.save(file, self._rows)
            self._rows = np.load(self._index, mmap_mode="r")
        except (OSError, UserError):
            self._index = None

    def __getstate__(self):
        return {**vars(self), "_rows": None if self._index else self._rows, "_open": None}

    def __len__(self):
        """The number of images without a manifest."""
        return sum(self.counts)

    def _row(self, k):
        if self._rows is None:  # in another process
            self._rows = np.load(self._index, mmap_mode="r")
        return self._rows[1 + k].item()

    def slot(self, i):
        """The row of image i without a manifest."""
        return i

    def path(self, i):
        """The path of image i without a manifest, with its class unless all images are in one folder."""
        return os.fsdecode(self._row(i)[4])

    def location(self, k):
        """(path of its tar, offset there, size) of the image in row k; None if it is in none."""
        number, _, offset, size, *_ = self._row(k)
        return (self._paths[number], offset, size) if number >= 0 else None

    def read(self, tar, offset, size):
        """The bytes at a location(); OSError unless they are there, UserError if the disk fails for long.

        As many tars stay open as this process may have.
        """
        if self._open is None:  # in this process
            limit = files.raise_open_file_limit() // 2  # the others are left for other uses
            self._open = functools.lru_cache(limit)(functools.partial(open, mode="rb", buffering=0))

        def read():
            try:
                file = self._open(tar)  # closed once it is neither in the cache nor used by a thread
                return os.pread(file.fileno(), size, offset)
            except OSError:
                self._open.cache_clear()  # a stale file would stay stale
                raise

        data = files.retry_transient(tar, read)
        if len(data) < size:
            raise OSError(errno.ENODATA, f"{tar.name} has been cut since it was indexed")
        return data


def _load_index(path, head, images):
    """The rows of a stored index; None if it is missing, damaged, or of other tars.

    UserError if the folder is not completely packed.
    """
    with suppress(OSError, ValueError), open(path, "rb") as file:
        mark = json.loads(file.readline())
        if isinstance(mark, dict) and mark.get("complete") is False:
            raise UserError(f"{path.parent} is not complete; to finish it: {mark['command']}")
    with suppress(OSError, ValueError, TypeError, IndexError, EOFError):
        rows = files.retry_transient(path, lambda: np.load(path, mmap_mode="r"))
        is_same_kind = "path" in rows.dtype.names if images is None else len(rows) == 1 + images.slots
        if is_same_kind and rows["offset"][0] == head:
            return rows
    return None


def _find_by_slot(paths, left_out, folder, images):
    """The rows of all slots of a Manifest; UserError if a tar is missing."""
    rows = np.zeros(images.slots, ROW)
    rows["tar"] = -1
    for number, (found, _) in enumerate(_scan(paths, left_out)):
        slots = {name: slot for name in found if (slot := images.slot_of(name)) is not None}
        left_out["images that the manifest does not have"] += len(found) - len(slots)
        for name, slot in slots.items():
            rows[slot] = number, 0, *found[name]
    tars = {path.name for path in paths}
    missing = [
        name
        for name, own in images.tars().items()
        if name not in tars and rows["tar"][images.slot(own[0]) : images.slot(own[-1]) + 1].max() < 0
    ]
    if missing:
        raise UserError(
            f"{folder} has no {printable(missing[0])}, one of {len(missing)} missing tars; restore it, "
            f"or pack the images again into another folder"
        )
    return rows


def _find_by_class(paths, left_out):
    """The rows of the images in tars, in the order of torchvision's ImageFolder, or of the numbers in .cls."""
    found, has_labels = [], False  # (class, folder, file, number of the tar, offset, size) of each image
    for number, (images, labels) in enumerate(_scan(paths, left_out)):
        has_labels = has_labels or bool(labels)
        for name, position in images.items():
            label = labels.get(_key(name))
            inner, _, file = name.rpartition("/")
            if label and inner.partition("/")[0] != label:
                inner = f"{label}/{inner}".rstrip("/")
            found.append((inner.partition("/")[0], inner, file, number, *position))
    if any(top for top, *_ in found):
        left_out["images beside the class folders"] += sum(not top for top, *_ in found)
        found = [image for image in found if image[0]]
    else:
        tops = list(map(_class_of_tar, paths))
        if len(set(tops)) > 1 or len({file for _, _, file, *_ in found}) < len(found):  # else as one folder of images
            found = [(tops[number], tops[number], file, number, *rest) for _, _, file, number, *rest in found]
    tops = {top for top, *_ in found}
    is_number = has_labels and all(top.isdecimal() for top in tops)
    labels = {top: label for label, top in enumerate(sorted(tops, key=int if is_number else None))}
    found.sort(key=lambda image: (labels[image[0]], *image))
    times = Counter((inner, file) for _, inner, file, *_ in found)  # of several tars, images may have one name
    rows = []
    for top, inner, file, number, *position in found:
        names = [inner, paths[number].stem if times[inner, file] > 1 else "", file]
        rows.append((number, labels[top], *position, os.fsencode("/".join(filter(None, names)))))
    return np.array(rows, [*ROW, ("path", f"S{max((len(row[4]) for row in rows), default=1)}")])


def _class_of_tar(path):
    """The class of the images in a tar without folders: its name, without the number of a part of an older version."""
    name = re.sub(r"-\d{4,}$", "", path.stem)
    return name if path.with_name(f"{name}-0000.tar").exists() else path.stem


def _key(name):
    """What the files of a sample have in common for WebDataset: the name up to its first dot."""
    folder, _, file = name.rpartition("/")
    return folder, file.partition(".")[0]


def _scan(paths, left_out):
    """Yield (images, labels) of scan() for each tar, and add its Counters to left_out."""
    with ThreadPoolExecutor(16) as threads:  # a network disk answers several requests at once
        for images, labels, others in threads.map(lambda path: files.retry_transient(path, lambda: scan(path)), paths):
            left_out.update(others)
            yield images, labels


def scan(path):
    """({name: (offset, size)} of the images in the tar at path, {key: class} of its members .cls, Counter of others).

    Links have the data of what they are to, the last one of members with one name counts, as tar extracts it, and
    hidden ones are ignored. UserError if it is no tar.
    """
    found, images, labels, left_out = {}, {}, {}, Counter()
    try:
        tar = tarfile.TarFile(path)
    except tarfile.TarError as error:
        advice = "if it is a checkpoint, give a folder of images; else remove it"
        raise UserError(f"{path} is not an uncompressed tar; {advice}") from error
    with tar:
        for name, data in _members(path, tar):
            left_out["earlier ones of the same name"] += name in found
            found[name] = data
        for name in found:
            data = _resolve(found, name)
            if any(part.startswith(".") for part in name.split("/")) and is_safe_name(name):
                continue
            if name.lower().endswith(".cls") and data:
                text = os.pread(tar.fileobj.fileno(), data[1], data[0]).decode(errors="replace")
                labels[_key(name)] = text.strip().replace("/", "-")
            elif not name.lower().endswith(EXTENSIONS):
                left_out["files that are no images"] += 1
            elif not is_safe_name(name):
                left_out["names outside of the folder"] += 1
            elif not data:
                left_out["links to what is not there" if found[name] else "sparse files"] += 1
            else:
                images[name] = data
    return images, labels, left_out


def _resolve(members, name):
    """(offset, size) of a member, or of what it is a link to; None if that is not there, or sparse."""
    for _ in range(40):  # links in a row, as Linux follows them
        data = members.get(name)
        if not isinstance(data, str):
            return data
        name = data
    return None


def _members(path, tar):
    """Yield (name, (offset of the data, size), or target of a link, or None if sparse) of the members of an open tar.

    What is damaged or cut off, and what follows it or the end, is left out with a message.
    """
    file = tar.fileobj.fileno()
    end = os.fstat(file).st_size
    with suppress(tarfile.ReadError):  # the last member is cut
        while member := tar.next():
            tar.members.clear()  # each would be kept
            stored = tar.offset - member.offset_data if member.issparse() else member.size
            if member.offset_data + stored > end:
                break
            name = member.name.removeprefix("./")
            if member.issym() or member.islnk():
                start = posixpath.dirname(name) if member.issym() else ""
                yield name, posixpath.normpath(posixpath.join(start, member.linkname))
            elif member.isreg():
                yield name, None if member.issparse() else (member.offset_data, member.size)
    last = min(tar.offset, end)
    if last < tar.offset or os.pread(file, tarfile.BLOCKSIZE, last).strip(b"\0"):
        print(f"{printable(path)} is cut or damaged at byte {last}; what follows is left out")
    elif any(os.pread(file, 2**20, start).strip(b"\0") for start in range(last, end, 2**20)):
        print(f"{printable(path)} ends at byte {last}; {end - last} bytes behind that are left out")
