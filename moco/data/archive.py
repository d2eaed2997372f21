"""One uncompressed tar of images: written, scanned, and read at an offset."""

import errno
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moco import files

BLOCK = 512  # bytes of a header; the size of each file in a tar is rounded up to a multiple of it


def is_safe_name(name):
    """Whether the name of a member is that of a file below the folder into which its tar is extracted."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not (os.name == "nt" and {*name} & {*"\\:"})


def write(path, members):
    """Write a tar of members, (name, time of modification in seconds, bytes) each, atomically.

    Returns (name, offset, length) of each, see packed.IndexBuilder.add. UserError that names path if the disk is full.
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
    """Yield (name, offset, length) of each file in the tar at path, see packed.IndexBuilder.add.

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
                yield name, position, length
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
    name = member.name.removeprefix("./") if member.isreg() and not member.issparse() else None
    return name, member.offset_data - position, member.size, tar.offset - position


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
    return os.fsdecode(prefix + b"/" + name if prefix else name).removeprefix("./"), BLOCK, size


class Archive:
    """An open tar. Its file is closed as soon as no thread uses it.

    offset, length: of a member, as scan() and write() give them.
    """

    _file = None

    def __init__(self, path):
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)

    def __del__(self):
        if self._file:
            self._file.close()

    def read(self, offset, length, name=None):
        """The content of a member; OSError unless it is complete and, if a name is given, has that name."""
        actual, data = self._member(offset, length)
        if name not in (None, actual):
            raise self._changed()
        return data

    def name(self, offset, length):
        """The name of a member; OSError unless it is complete."""
        return self._member(offset, length)[0]

    def _member(self, offset, length):
        data = os.pread(self._file.fileno(), length, offset)
        try:
            name, start, size, _ = _parse_header(data[:BLOCK], io.BytesIO(data))
        except tarfile.TarError as error:
            raise self._changed() from error
        if name is None or len(data) < start + size:
            raise self._changed()
        return name, data[start : start + size]

    def _changed(self):
        return OSError(errno.EIO, f"{self._path.name} is cut, damaged or changed since it was indexed")


@dataclass(frozen=True)
class Member:
    """An image in a tar, with some methods of a pathlib.Path; str() is the path of its tar, and its name there."""

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
        return Archive(self.tar).read(self.offset, self.length, self.name)

    def open(self, mode="rb"):
        """A file in memory with the bytes of the image."""
        return io.BytesIO(self.read_bytes())
