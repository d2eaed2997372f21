"""The files in folders of videos: those that may be read, and why others may not."""

import os
import stat
from pathlib import Path

from moco.cli import UserError


def list_videos(folders, recursive, save_dir):
    """([(folder number, name, size in bytes)], [(folder number, name, reason)]) of files that may be read and may not.

    Names are relative to their folder, with forward slashes, and come sorted within each folder, one folder after
    another. Hidden files are passed over. Sub-folders are entered where recursive is true. What this program writes
    into save_dir is passed over.
    Only regular files inside the folder may be read: no pipe, no device, no link that leads out of it.
    """
    readable, left_out = [], []
    save_dir = os.path.realpath(save_dir)
    for number, folder in enumerate(folders):
        root = os.path.realpath(folder)
        if recursive and root == save_dir:
            raise UserError(f"--recursive would take the images in {folder} for videos; give another --save-dir")
        for name in sorted(_names(root, "", recursive, save_dir)):
            reason, size = _verdict(root, name)
            if reason:
                left_out.append((number, name, reason))
            else:
                readable.append((number, name, size))
    return readable, left_out


def _names(root, below, recursive, save_dir):
    try:
        entries = os.scandir(os.path.join(root, below))
    except OSError as error:
        raise UserError(f"cannot look into {os.path.join(root, below)}: {error.strerror}") from error
    with entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            own = root == save_dir and entry.name.startswith(("manifest.json", "filled-"))
            if entry.name.startswith(".") or own:
                continue
            if not entry.is_dir():
                yield name
            elif recursive and not entry.is_symlink() and entry.path != save_dir:
                yield from _names(root, name + "/", recursive, save_dir)


def _verdict(root, name):
    """(reason not to read a file or None, its size)."""
    path = os.path.join(root, name)
    try:
        os.fsencode(name).decode("utf-8")
        if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
            return "it is a link out of the folder", 0
        state = os.stat(path)
    except UnicodeDecodeError:
        return "its name is not UTF-8", 0
    except OSError as error:
        return f"it cannot be reached: {error.strerror}", 0
    if not stat.S_ISREG(state.st_mode):
        return "it is no regular file", 0
    if not state.st_size:
        return "it is empty", 0
    if not os.access(path, os.R_OK):
        return "it may not be read", 0
    return None, state.st_size


def printable(name):
    """A file's name that may be printed: what is no text, or would steer the terminal, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
