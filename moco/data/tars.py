"""Images in uncompressed tars, one for each video or class: written, found by their headers, read at their offsets."""

import errno
import functools
import io
import json
import os
import posixpath
import re
import tarfile
import zlib
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

    The index is an array in a file of the folder, mapped into memory that all processes share. It has a row for each
    tar: hash of its name, number of tars, time of modification, size; and one for each image: number of its tar, label,
    offset, size and, without a manifest, path. It is made anew when a tar has changed, and kept in memory where the
    folder cannot be written to.

    images: the manifest.Manifest of the folder, None without one. classes, counts: without a manifest, the names of the
    classes and the number of images in each. UserError for a file that is no tar, for missing tars, and for a folder
    that is not completely packed.
    """

    def __init__(self, folder, images=None):
        self._paths = [folder / name for name in list_tars(folder)]
        self._index, self._open = folder / INDEX, None
        states = [path.stat() for path in self._paths]
        hashes = [zlib.crc32(os.fsencode(path.name)) // 2 for path in self._paths]
        head = [(h, len(states), s.st_mtime_ns, s.st_size) for h, s in zip(hashes, states, strict=True)]
        self._rows = _load_index(self._index, head, images)
        if self._rows is None:
            self._make_index(folder, head, images)
        self.classes, self.counts = [], []
        if images is None:
            labels = self._rows["label"][len(head) :]
            starts = [bisect_left(labels, label) for label in range(labels[-1] + 2)] if len(labels) else [0]
            self.counts = np.diff(starts).tolist()
            tops = [self.path(start).rpartition("/")[0].partition("/")[0] for start in starts[:-1]]
            self.classes = [top or _class_of_tar(self._paths[0]) for top in tops]

    def _make_index(self, folder, head, images):
        """Find the images in the tars, and store their rows below those of head if the folder can be written to."""
        if self._index.exists():
            name = printable(self._index)
            print(f"{name} is damaged, of an earlier version, or older than the tars; it is made again")
        rows = _find_by_class(folder, self._paths) if images is None else _find_by_slot(folder, self._paths, images)
        self._rows = _load_index(self._index, head, images)
        if self._rows is None:  # else another process was faster, and uses it
            self._rows = np.zeros(len(head) + len(rows), rows.dtype)
            self._rows[[field for field, _ in ROW]][: len(head)] = np.array(head, ROW)
            self._rows[len(head) :] = rows
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
        return self._rows[len(self._paths) + k].item()

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
        is_same_kind = "path" in rows.dtype.names if images is None else len(rows) - len(head) == images.slots
        if is_same_kind and [row[:4] for row in rows[: len(head)].tolist()] == head:
            return rows
    return None


def _find_by_slot(folder, paths, images):
    """The rows of all slots of a Manifest; UserError if a tar is missing."""
    rows, left_out = np.zeros(images.slots, ROW), Counter()
    rows["tar"] = -1
    for number, (found, _) in enumerate(_scan(paths, left_out)):
        slots = {name: slot for name in found if (slot := images.slot_of(name)) is not None}
        left_out["images that the manifest does not have"] += len(found) - len(slots)
        for name, slot in slots.items():
            rows[slot] = number, 0, *found[name]
    _print_left_out(folder, left_out)
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


def _find_by_class(folder, paths):
    """The rows of the images in tars, in the order of torchvision's ImageFolder, or of the numbers in .cls."""
    by_class, left_out, has_labels = {}, Counter(), False  # class -> folder -> [(file, tar, offset, size)]
    for number, (found, labels) in enumerate(_scan(paths, left_out)):
        has_labels = has_labels or bool(labels)
        for name, position in found.items():
            label = labels.get(_key(name))
            path = f"{label}/{name}" if label and not name.startswith(f"{label}/") else name
            inner, _, file = path.rpartition("/")
            by_class.setdefault(inner.partition("/")[0], {}).setdefault(inner, []).append((file, number, *position))
    flat = by_class.pop("", {}).get("", [])
    if by_class:
        left_out["images beside the class folders"] += len(flat)
    else:
        for image in flat:
            name = _class_of_tar(paths[image[1]])
            by_class.setdefault(name, {}).setdefault(name, []).append(image)
        if len(by_class) == 1 and len({file for file, *_ in flat}) == len(flat):  # as one folder without classes
            by_class = {"": {"": flat}}
    _print_left_out(folder, left_out)
    parts = [np.zeros(0, [*ROW, ("path", "S1")])]
    is_number = has_labels and all(name.isdecimal() for name in by_class)
    for label, name in enumerate(sorted(by_class, key=int if is_number else None)):
        for inner, images in sorted(by_class[name].items()):
            times, rows = Counter(file for file, *_ in images), []
            for file, number, *position in sorted(images):  # of several tars, images may have one name
                names = [inner, paths[number].stem if times[file] > 1 else "", file]
                rows.append((number, label, *position, os.fsencode("/".join(filter(None, names)))))
            parts.append(np.array(rows, [*ROW, ("path", f"S{max(len(row[4]) for row in rows)}")]))
    return np.concatenate(parts)


def _class_of_tar(path):
    """The class of the images in a tar without folders: its name, without the number of a part of an older version."""
    name = re.sub(r"-\d{4,}$", "", path.stem)
    return name if path.with_name(f"{name}-0000.tar").exists() else path.stem


def _key(name):
    """What the files of a sample have in common for WebDataset: the name up to its first dot."""
    folder, _, file = name.rpartition("/")
    return folder, file.partition(".")[0]


def _print_left_out(folder, left_out):
    if left_out.total():
        counts = ", ".join(f"{what} ({n})" for what, n in left_out.items() if n)
        print(f"{printable(folder)}: left out of its tars: {counts}")


def _scan(paths, left_out):
    """Yield what scan() returns for each tar, but for the Counters, which are added to left_out."""
    with ThreadPoolExecutor(16) as threads:  # a network disk answers several requests at once
        for images, labels, others in threads.map(lambda path: files.retry_transient(path, lambda: scan(path)), paths):
            left_out.update(others)
            yield images, labels


def scan(path):
    """({name: (offset, size)} of the images in the tar at path, {key: class} of its members .cls, Counter of others).

    Links have the data of what they are to, the last one of members with one name counts, as tar extracts it, and
    hidden ones are ignored. UserError if it is no tar.
    """
    found, links, images, labels, left_out = {}, {}, {}, {}, Counter()
    try:
        tar = tarfile.TarFile(path)
    except tarfile.TarError as error:
        advice = "if it is a checkpoint, give a folder of images; else remove it"
        raise UserError(f"{path} is not an uncompressed tar; {advice}") from error
    with tar:
        for name, target, *position in _members(path, tar):
            left_out["earlier ones of the same name"] += name in found or name in links
            links.pop(name, None)
            found.pop(name, None)
            (links if target else found)[name] = target or tuple(position)
        for name, target in links.items():
            if target in found:
                found[name] = found[target]
        for name in [*found, *(links.keys() - found.keys())]:
            if any(part.startswith(".") for part in name.split("/")) and is_safe_name(name):
                continue
            if name.lower().endswith(".cls") and name in found:
                text = os.pread(tar.fileobj.fileno(), found[name][1], found[name][0]).decode(errors="replace")
                labels[_key(name)] = text.strip().replace("/", "-")
            elif not name.lower().endswith(EXTENSIONS):
                left_out["files that are no images"] += 1
            elif not is_safe_name(name):
                left_out["names outside of the folder"] += 1
            elif name not in found:
                left_out["links to what is not there"] += 1
            else:
                images[name] = found[name]
    return images, labels, left_out


def _members(path, tar):
    """Yield (name, target of a link or None, offset of the data, size) of each file and link in an open tar.

    What is damaged or cut off, and what follows it or the end, is left out with a message.
    """
    file = tar.fileobj.fileno()
    end = os.fstat(file).st_size
    with suppress(tarfile.ReadError):  # the last member is cut
        while (member := tar.next()) and member.offset_data + member.size <= end:
            tar.members.clear()  # each would be kept
            name, target = member.name.removeprefix("./"), None
            if member.issym():
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                target = posixpath.normpath(member.linkname)
            if target or (member.isreg() and not member.issparse()):
                yield name, target, member.offset_data, member.size
    last = min(tar.offset, end)
    if last < tar.offset or os.pread(file, tarfile.BLOCKSIZE, last).strip(b"\0"):
        print(f"{printable(path)} is cut or damaged at byte {last}; what follows is left out")
    elif any(os.pread(file, 2**20, start).strip(b"\0") for start in range(last, end, 2**20)):
        print(f"{printable(path)} ends at byte {last}; {end - last} bytes behind that are left out")
