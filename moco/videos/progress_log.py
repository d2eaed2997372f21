"""Progress logs: which videos of a plan are done.

While frames are extracted, each process appends a line to a file of its own for every video whose images are all on
disk. So several machines can share the work on a network disk, and an interrupted run can be resumed.
"""

import ctypes
import json
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

from moco import files
from moco.data import manifest

NAME = re.compile(r"filled-.*\.jsonl")


def mark_done(folder, plan, number, missing, reason):
    """Record that all images of a video are on disk, except for the missing runs of slots; reason may be None.

    The images are flushed to disk first, so that a power failure cannot leave a record of images that do not exist.
    """
    if not plan["settings"].get("pack"):  # a tar was flushed before it was renamed
        _flush(folder, plan, plan["videos"][number], missing)
    line = json.dumps({"video": number, "missing": missing, "reason": reason})
    # The line break comes first, because a killed process may have written half a line.
    files.append(Path(folder) / f"filled-{platform.node()}-{os.getpid()}.jsonl", f"\n{line}")


def _flush(folder, plan, entry, missing):
    """Flush the images of a video, except for the missing runs of slots, and their folders to disk."""
    if sys.platform == "linux":
        _flush_file_system(folder)
        return
    gone = {slot for first, end in missing for slot in range(first, end)}
    slots = range(entry["first_slot"], entry["first_slot"] + entry["slots"])
    paths = [Path(folder) / manifest.slot_path(plan, entry, slot) for slot in slots if slot not in gone]
    for path in paths:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    if os.name != "nt":  # a folder cannot be opened there
        for parent in sorted({path.parent for path in paths}):
            _call_with_descriptor(os.fsync, parent)


def _flush_file_system(folder):
    """Flush the file system of a folder; raises OSError."""
    # os.sync would wait for all disks of a shared machine. On a single disk both take 18 ms for 900 images, which one
    # fsync per image makes 1.3 s.
    syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    if _call_with_descriptor(syncfs, folder):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def _call_with_descriptor(function, folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return function(descriptor)
    finally:
        os.close(descriptor)


def completed_videos(folder):
    """{number of a video: its line in the progress logs} for the videos whose images are all on disk."""
    lines = {}
    for name in names(folder):
        try:
            content = (Path(folder) / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue  # another process has just completed the plan
        for text in content.splitlines():
            with suppress(ValueError):  # a killed process may have written half a line
                line = json.loads(text)
                lines[line["video"]] = line
    return lines


def names(folder):
    """The names of the progress logs in a frame folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_file())


def remove(folder):
    """Remove the progress logs in a frame folder."""
    for name in names(folder):
        (Path(folder) / name).unlink(missing_ok=True)
