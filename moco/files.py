"""Atomic writes, output folders, small text files, and args.json, the record of a run."""

import atexit
import codecs
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

import numpy as np

from moco import cli
from moco.cli import UserError

MISSING = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "NaT", "NULL", "null", "None", "<NA>")  # for R, pandas, Excel
OPEN_FILES = 10_000  # enough for hundreds of worker processes; the largest that macOS takes is 10 240
# Errors of a disk, not of a file; not every system has all of them.
_TRANSIENT = ("EIO", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "EAGAIN", "ENOTCONN", "ECONNRESET", "EHOSTDOWN")
_TRANSIENT = {getattr(errno, name, None) for name in _TRANSIENT} - {None}
WAITS = (0.1, 0.5, 1, 2, 4, 8)  # seconds before a read is repeated
RESUME = "check the disk, and re-run to resume (a trainer with --resume)"


def temporary_path(path):
    """A new name beside path for a file that is being written; with the suffix of path, which says the format."""
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    return path.with_name(f".{path.stem[:32]}.{uuid.uuid4().hex}.moco-tmp{suffix}")


def remove_temporary_files(folder, idle=0):
    """Remove the temporary files that killed processes left in folder.

    idle: seconds since a process has last written to such a file. With 0 the caller must have locked folder.
    """
    for path in Path(folder).glob(".*.moco-tmp*"):
        with suppress(FileNotFoundError):  # another process was faster
            if path.is_file() and (not idle or time.time() - path.stat().st_mtime > idle):
                path.unlink()


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, and rename it to path at the end: complete, or unchanged after an error.

    The file and its folder are flushed to disk, so that not even a power failure leaves an incomplete file. UserError
    that names path if the disk is full or not writable.
    """
    path = Path(path)
    part = temporary_path(path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name != "nt":  # where a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        part.unlink(missing_ok=True)
        _raise_user_error(error, path)


def _raise_user_error(error, path):
    """Raise a UserError that names path if error is one of writing that there is advice about, else error itself."""
    if isinstance(error, OSError) and (advice := cli.advice(error) or (RESUME if is_transient(error) else "")):
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
    raise error


def append(path, text):
    """Append text to the file at path and flush it to disk; UserError that names path if the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _raise_user_error(error, path)


def write_text(path, text):
    """Write text to path atomically, in UTF-8; file names that are not UTF-8 keep their bytes."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path, value):
    """Write value to path atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_args(folder, flags, checkpoints=None):
    """Write args.json into folder: flags, versions, commit and, if given, checkpoints as {name: SHA-256}.

    If another script has left its args.json there, such as the training whose folder an analysis writes into, the file
    is called args_SCRIPT.json.
    """
    path, script = Path(folder) / "args.json", Path(cli.program()).stem
    try:
        if read_json(path).get("script", script) != script:
            path = path.with_name(f"args_{script}.json")
    except UserError:  # there is none, or it is damaged
        pass
    record = {**flags, "script": script, "versions": cli.versions(), "commit": cli.commit()}
    write_json(path, record | ({"checkpoints": checkpoints} if checkpoints else {}))


def sha256(path):
    """The SHA-256 digest of the file at path, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_transient(error):
    """Whether an error is the disk's and not the file's."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def retry_transient(path, read):
    """read(), repeated for 16 seconds while it raises an error that is_transient.

    path: names the file in the message. read: a function that opens the file itself, as one that is open may stay
    stale. Any other error, such as that there is no such file, is raised at once. UserError for a disk that does not
    recover: a run must end there and mark nothing as done, where a damaged file is left out.
    """
    for wait in (*WAITS, 0):
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
            reason = os.strerror(error.errno)
        time.sleep(wait)
    raise UserError(f"cannot read {path}: {reason}; {RESUME}")


def printable(name):
    r"""A path as text, with control characters, and bytes that are not UTF-8, escaped: \udcff for the byte 0xff."""
    escaped = re.compile(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]")
    return escaped.sub(lambda found: found[0].encode("unicode_escape").decode(), str(name))


def decode(content):
    """Bytes as text, of UTF-8, UTF-16 with its mark or, as Excel saves it, Windows-1252; None if it is none of them."""
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ["utf-16"] if is_utf_16 else ["utf-8-sig", "cp1252"]:
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return None


def read_text(path):
    """The text of the file at path, see decode(). UserError if it cannot be read."""
    try:
        text = decode(retry_transient(path, Path(path).read_bytes))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if text is None:
        raise UserError(f"{path} is not a text file in UTF-8, UTF-16 or Windows-1252; convert it")
    return text


def read_list(path):
    """The names in the file at path, one per line, or in the column 'file' of a table. UserError if there are none."""
    text = read_text(path)
    if "file" in _header(text, _delimiter(text, ["file"])):
        return [row["file"] for _, row in read_table(path, "file")]
    names = ["\t".join(cells) for _, cells in _records(path, text, "\t")]
    if not names:
        raise UserError(f"{path} is empty; it must have one entry per line")
    return names


def read_table(path, *columns, numbers=()):
    """The rows of the CSV file at path, [(number of its first line, {column: cell}), ...], without spaces around cells.

    Commas, tabs or semicolons separate cells, whichever gives columns their names; line breaks in quotes are kept, and
    columns without a name left out. Cells of the columns numbers are floats, None if missing (MISSING, infinite); with
    semicolons they may have a decimal comma. UserError, which names the line, for a file that cannot be read so, that
    lacks one of columns, or has no rows.
    """
    text = read_text(path)
    delimiter = _delimiter(text, columns)
    rows = _records(path, text, delimiter)
    line, header = next(rows, (1, []))
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{path} has no column '{missing[0]}'; its first line must name the columns")
    if twice := [column for column in header if column and header.count(column) > 1]:
        raise UserError(f"{path}, line {line}: there are two columns '{twice[0]}'")
    table = []
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: it does not have {len(header)} columns")
        row = {column: cell for column, cell in zip(header, cells, strict=True) if column}
        for column in row.keys() & set(numbers):
            cell = row[column].replace(",", ".") if delimiter == ";" else row[column]
            try:
                value = math.nan if cell in MISSING else float(cell)
            except ValueError as error:
                raise UserError(f"{path}, line {line}: {column} is {row[column]}, not a number") from error
            row[column] = value if math.isfinite(value) else None
        table.append((line, row))
    if not table:
        raise UserError(f"{path} has no rows")
    return table


def _lines(text):
    return io.StringIO(text, newline="\n" if "\n" in text else "\r")


def _header(text, delimiter):
    """The cells of the first line of a text that is not blank."""
    first = next((line for line in _lines(text) if line.strip(",; \t\r\n")), "")
    return [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))]


def _delimiter(text, columns):
    """What separates the columns of a table, by the names that its first line must have."""
    return max(",\t;", key=lambda delimiter: len(set(columns) & set(_header(text, delimiter))))


def _records(path, text, delimiter):
    """Yield (number of the first line, cells) of the records of a CSV text; blank ones are left out."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: it has a NUL byte and is no text; save it as CSV in UTF-8")
    reader = csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for cells in reader:
            cells = [cell.strip(" \t\xa0") for cell in cells]
            if any(cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; check its quotes") from error


def write_table(path, rows):
    """Write rows of cells, of which the first one names the columns, as CSV to path, atomically."""
    text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names may not be UTF-8
    with atomic_write(path) as part, open(part, "w", **text) as file:
        # A cell with the first character of csv's line break, "\r", is quoted; but lines end as those of Unix.
        csv.writer(SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))).writerows(rows)


def read_json(path):
    """The value in the JSON file at path. UserError if it cannot be read or is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged or not JSON ({error}); remove it or create it again") from error


def check_output_dir(path, data=()):
    """UserError if nothing could be written into the folder path, which need not exist yet; creates nothing.

    data: image folders. UserError if path is inside one of them, where its files would become a class.
    """
    path = Path(path)
    for folder in data:
        if path.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--save-dir {path} is inside the data folder {folder}; choose a folder outside it")
    try:
        existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        advice = "choose another --save-dir or change its permissions"
        raise UserError(f"cannot write to the folder {path}: {error.strerror}; {advice}") from error


def load_array(path):
    """The array in the .npy file at path, mapped into memory. UserError if it is missing or damaged."""
    try:
        return retry_transient(path, lambda: np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); restore it, or make it again") from error


def make_output_dir(path, data=()):
    """Create the folder path if it is missing, and return it as a Path; see check_output_dir.

    If it is still empty when the process ends, as after an error, it is removed again.
    """
    path, absolute = Path(path), Path(path).absolute()
    check_output_dir(path, data)
    for missing in [each for each in (absolute, *absolute.parents) if not each.exists()][::-1]:
        missing.mkdir(exist_ok=True)
        atexit.register(_remove_if_empty, missing)
    return path


def _remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()


def refuse_overwrite(path, overwrite):
    """path as a Path. UserError if it exists and overwrite is false."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another --save-dir")
    return path


def lock(folder, name=".run.lock", wait=False):
    """Lock folder, or what else name stands for, until the returned file is closed or this process ends.

    If another process has it locked, wait or raise a UserError. On file systems and machines without locks nothing is
    locked. If this process writes nothing else into folder, it removes the file again.
    """
    path, names = Path(folder).absolute() / name, os.listdir(folder)
    if name not in names:
        atexit.register(_remove_if_alone, path, {*names, name})
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            if not wait:
                raise UserError(
                    f"another run is writing to {folder}; wait for it, or choose another --save-dir"
                ) from error
            print(f"waiting for another run that writes to {folder}", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        elif error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return file


def _remove_if_alone(path, names):
    with suppress(OSError):
        if set(os.listdir(path.parent)) == names:
            path.unlink()


def raise_open_file_limit():
    """Raise the soft limit of files that a process may open, often 1024, to OPEN_FILES; returns the limit."""
    if resource is None:
        return 512  # that of the C library of Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return OPEN_FILES if soft < 0 else min(soft, OPEN_FILES)
