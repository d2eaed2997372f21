"""Files that are whole or not there, and folders that can be written to."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from moco.cli import UserError

TEMPORARY = ".part"  # the ending of a file that is being written


@contextmanager
def atomic_write(path):
    """Give the name of a temporary file to write, and make it path once it is written: whole, or not at all.

    The data and then the folder are flushed to disk, so that not even a power cut leaves half a file under the final
    name. The temporary name keeps the ending of path, from which many writers take the format. A disk that is full or
    may not be written to is a UserError that names path.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}{TEMPORARY}{path.suffix}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        _raise_in_words(error, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


_DISK_ERRORS = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "your quota is used up: free some space and start again",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder or change its permissions",
    errno.EPERM: "choose another folder or change its permissions",
}


def _raise_in_words(error, path):
    """Raise a UserError where the disk does not take path, any other OSError as it is."""
    if error.errno in _DISK_ERRORS:
        raise UserError(f"cannot write {path}: {os.strerror(error.errno)}; {_DISK_ERRORS[error.errno]}") from error
    raise error


def append(path, text):
    """Add text to the end of the file at path, flushed to disk; a full disk is a UserError that names path."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _raise_in_words(error, path)


def _flush_folder(folder):
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(folder):
    """Remove the temporary files that a killed run left in folder."""
    for part in Path(folder).glob(f".*{TEMPORARY}*"):
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write text to path, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write value to path as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def make_output_dir(path, data=()):
    """The folder path as a Path, made if it is missing; UserError where that cannot be, or nothing may be written.

    data: folders of images, inside which path may not be: what is written there would become a class of theirs.
    """
    path = Path(path)
    for folder in data:
        if path.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--save-dir {path} is inside the data folder {folder}; choose a folder outside of it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --save-dir") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} may not be written to; choose another --save-dir")
    return path


def refuse_overwrite(path, overwrite):
    """path as a Path, if it may be written: UserError where it exists and overwrite is false."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another --save-dir")
    return path


def read_lines(path):
    """The lines of a user's text file that are not empty; UserError where it is not UTF-8 text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def lock(folder):
    """Lock folder against other processes until the returned file is closed or this process ends.

    UserError if another process has it locked. On file systems and machines without locks nothing is locked.
    """
    file = open(Path(folder) / ".run.lock", "a", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"another run is writing to {folder}; wait for it, or choose another --save-dir") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return file
