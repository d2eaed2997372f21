"""The files in folders of videos: which of them are read, and why others are not."""

import os
import stat

from moco.cli import UserError
from moco.data import manifest, recordings
from moco.videos import progress_log

OWN = (manifest.NAME, manifest.TIMES, recordings.FRAMES_TABLE, recordings.VIDEOS_TABLE)  # files in a frame folder


def list_videos(folders, recursive, save_dir):
    """The files in folders that can be read as videos, and those that are left out.

    Returns [(folder number, name, size in bytes)] and [(folder number, name, reason)]. Names are relative to their
    folder, with forward slashes, sorted within each folder, one folder after another. recursive: also those in
    sub-folders. Hidden files, and those that this program writes to save_dir, are ignored. Only regular files are read,
    also through links: no pipe, no device.
    """
    readable, left_out = [], []
    save_dir = os.path.realpath(save_dir)
    for number, folder in enumerate(folders):
        root = os.path.realpath(folder)
        if recursive and root == save_dir:
            raise UserError(f"--recursive would read the images in {folder} as videos; give another --save-dir")
        for name in sorted(_names(root, "", recursive, save_dir, {root})):
            reason, size = _check(root, name)
            if reason:
                left_out.append((number, name, reason))
            else:
                readable.append((number, name, size))
    return readable, left_out


def _names(root, below, recursive, save_dir, parents):
    """The names of the files below a folder; parents: the real paths of the folders on the way, against circles."""
    try:
        entries = os.scandir(os.path.join(root, below))
    except OSError as error:
        raise UserError(f"cannot list the folder {os.path.join(root, below)}: {error.strerror}") from error
    with entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            own = root == save_dir and (entry.name in OWN or progress_log.NAME.fullmatch(entry.name))
            if entry.name.startswith(".") or own:
                continue
            if not os.path.isdir(entry.path):
                yield name
            elif recursive and (folder := os.path.realpath(entry.path)) not in {save_dir, *parents}:
                yield from _names(root, name + "/", recursive, save_dir, {*parents, folder})


def _check(root, name):
    """(the reason why a file is not read or None, its size)."""
    path = os.path.join(root, name)
    try:
        os.fsencode(name).decode("utf-8")
        state = os.stat(path)
    except UnicodeDecodeError:
        return "its name is not UTF-8", 0
    except OSError as error:
        return f"it cannot be accessed: {error.strerror}", 0
    if not stat.S_ISREG(state.st_mode):
        return "it is not a regular file", 0
    if not state.st_size:
        return "it is empty", 0
    if not os.access(path, os.R_OK):
        return "no permission to read it", 0
    return None, state.st_size


def printable(name):
    """A file's name with control characters and undecodable bytes escaped, which would disturb the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
