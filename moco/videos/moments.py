"""Tables of moments: which seconds of which videos to extract, and of which class each is."""

import csv
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
    rows = csv.DictReader(files.read_text(path).splitlines())
    if not rows.fieldnames or not {"file", "seconds"} <= set(rows.fieldnames):
        raise UserError(f"--moments {path} needs columns 'file' and 'seconds' in its first line")
    table = {}
    for row in rows:
        where = f"--moments {path}, line {rows.line_num}"
        try:
            second = float(row["seconds"])
        except (TypeError, ValueError):
            second = math.nan
        if not 0 <= second < math.inf:
            raise UserError(f"{where}: {row['seconds']} is not a number of seconds")
        name = (row.get("class") or CLASS).strip()
        if "/" in name or name.startswith(".") or name == manifest.NAME or "\0" in name:
            raise UserError(f"{where}: {name} cannot be the name of a class folder")
        table.setdefault(row["file"].strip(), {}).setdefault(name, []).append(second)
    if not table:
        raise UserError(f"--moments {path} has no rows")
    return table


def by_video(table, names):
    """{name of a video: {class: seconds}} of the videos called names; UserError for a file that is none of them."""
    moments = {}
    for given, classes in table.items():
        matching = [name for name in names if recordings.has_name(name, given)]
        if not matching:
            raise UserError(f"--moments names {given}, which is not there")
        for name in matching:
            for label, seconds in classes.items():
                moments.setdefault(name, {}).setdefault(label, []).extend(seconds)
    return moments
