"""Tables of moments: which seconds of which videos to extract, and of which class each is."""

import math

from moco import files
from moco.cli import UserError
from moco.data import manifest, recordings

CLASS = "moments"  # of moments without a class


def read_table(path):
    """{file: {class: seconds}} of a CSV file with columns 'file' and 'seconds', and perhaps 'class'.

    file: a video's name, or its path relative to the folder of videos. UserError, which names the line, for a table
    that cannot be read so.
    """
    table = {}
    for number, row in enumerate(files.read_table(path, "file", "seconds"), 2):
        try:
            second = float(row["seconds"])
        except ValueError:
            second = math.nan
        if not 0 <= second < math.inf:
            raise UserError(f"--moments {path}, line {number}: {row['seconds']} is not a number of seconds")
        name = row.get("class") or CLASS
        if "/" in name or "\0" in name or name.startswith(".") or name == manifest.NAME:
            raise UserError(f"--moments {path}, line {number}: {name} cannot be the name of a class folder")
        table.setdefault(row["file"], {}).setdefault(name, []).append(second)
    return table


def by_video(table, names):
    """{name of a video: {class: seconds}} of the videos called names; UserError for a file that is none of them."""
    by_any_name, moments = {}, {}
    for name in names:
        for given in recordings.names_of(name):
            by_any_name.setdefault(given, []).append(name)
    for given, classes in table.items():
        if given not in by_any_name:
            raise UserError(f"--moments names {given}, which is not there")
        for name in by_any_name[given]:
            for label, seconds in classes.items():
                moments.setdefault(name, {}).setdefault(label, []).extend(seconds)
    return moments
