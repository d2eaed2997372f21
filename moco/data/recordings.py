"""Recordings: child, date and age, their order, which of them to use, and from which of them an image is."""

import argparse
import os
import re
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import numpy as np

from moco import cli, files
from moco.cli import UserError

DAYS_PER_MONTH = 30.4375
ROTATIONS = (0, 90, 180, 270)  # degrees
# SAYCam's names: child, date, age in months and days, part: S_20130417_0600_01, perhaps with a suffix.
SAYCAM_NAME = re.compile(r"([A-Za-z])_(\d{8})_(\d\d)(\d\d)_(\d+)")
# GoPro's names: camera, chapter and recording, as in GX020007; the first chapter of older cameras is GOPR0007.
GOPRO_NAME = re.compile(r"(?<![A-Za-z0-9])(GOPR|(G[HPSX])(\d\d))(\d{4})(?![A-Za-z0-9])", re.IGNORECASE)
TIME_OF_DAY = re.compile(r"\d{1,2}:\d{2}(:\d{2})? ?([ap]m)?|\d{1,2} ?[ap]m", re.IGNORECASE)
FRAMES_TABLE, VIDEOS_TABLE = "frames.csv", "videos.csv"
KNOWN = ("child", "date", "age_months", "age_days", "part")
WHOLE_NUMBERS = ("age_days", "part", "rotate")


@dataclass(frozen=True)
class Recording:
    """What is known of a recording besides its pictures; None is unknown.

    child: such as 'S'. date: ISO 8601. age_months, age_days: the age of the child, in months and in days. part: the
    number of the recording among those of its day. rotate: degrees clockwise by which its frames are rotated. columns:
    further columns of a table, by name.
    """

    child: str | None = None
    date: str | None = None
    age_months: float | None = None
    age_days: int | None = None
    part: int | None = None
    rotate: int | None = None
    columns: dict = field(default_factory=dict)

    def known(self):
        """What is known, as a dict of plain values."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


@dataclass(frozen=True)
class Source:
    """Where an image comes from; str() describes it.

    name: of the video, relative to its folder. frame: the number of the frame in the video, from 0; None if the frame
    folder was made without it. second: from the beginning of the video. recording: the Recording.
    """

    name: str
    frame: int | None
    second: float
    recording: Recording

    def __str__(self):
        known = self.recording
        parts = [self.name] if self.frame is None else [self.name, f"frame {self.frame}"]
        parts.append(f"{self.second:.3f} s")
        if known.child:
            parts.append(f"child {known.child}")
        if known.age_months is not None:
            parts.append(f"{known.age_months:.1f} months")
        return ", ".join(parts)


def natural_key(name):
    """The key of the natural order of names, in which numbers compare by value: frame_2 comes before frame_10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))]


def chapter(name):
    """(the recording that a video is of, the number of its chapter); that of the video itself, and 0, if it has none.

    GoPro cameras divide a recording into chapters: GX010007 and GX020007, or GOPR0007, GP010007 and GP020007, perhaps
    with the same words around them. A time of day may differ, as chapters begin one after another.
    """
    folder, slash, file = name.rpartition("/")
    match = GOPRO_NAME.search(file)
    if match is None:
        return name, 0
    camera, number = (match[2] or "GP").upper(), int(match[3] or 0)
    rest = TIME_OF_DAY.sub("", file[match.end() :])
    return f"{folder}{slash}{file[: match.start()]}{camera}{match[4]}{rest}", number


def sort_key(name):
    """The key of the order of videos by name: natural, with the chapters of a recording one after another."""
    recording, number = chapter(name)
    return natural_key(recording), number, natural_key(name)


def from_name(name):
    """The Recording that a file name of SAYCam's form describes, such as S_20130417_0600_01.mp4; of others, unknown.

    Days above 30 stand as they are; in age_months they never make another month.
    """
    match = SAYCAM_NAME.match(PurePosixPath(name).name)
    if match is None:
        return Recording()
    child, day, months, days, part = match.groups()
    try:
        day = date.fromisoformat(day).isoformat()
    except ValueError:  # no day of the calendar: not a name of this form
        return Recording()
    months, days = int(months), int(days)
    return Recording(
        child=child.upper(),
        date=day,
        age_months=round(months + min(days, 30) / DAYS_PER_MONTH, 3),
        age_days=round(months * DAYS_PER_MONTH) + days,
        part=int(part),
    )


def from_entry(video):
    """The Recording of a video's entry in a manifest: what is stored there, or else what its name says."""
    stored = {field.name: video[field.name] for field in fields(Recording) if field.name in video}
    return Recording(**stored) if stored else from_name(video["name"])


def lookup(table, name):
    """The Recording of the video called name: that of a table as read_table returns it, or else what the name says."""
    return next((table[key] for key in sorted(names_of(name)) if key in table), from_name(name))


def read_table(path):
    """{file: Recording} of a CSV file with a column 'file' and any of the other fields of a Recording.

    file: a name or a path relative to the folder of videos. Further columns are kept under their names; empty cells,
    and files.MISSING for child, date and numbers, are unknown. UserError, which names the line, for a table that cannot
    be read so.
    """
    table = {}
    for line, row in files.read_table(path, "file", numbers=("age_months", *WHOLE_NUMBERS)):
        name = row.pop("file")
        try:
            if name in table:
                raise ValueError(f"{name} is there twice")
            table[name] = _from_row({column: cell for column, cell in row.items() if cell not in (None, "")})
        except ValueError as error:
            raise UserError(f"--recordings {path}, line {line}: {error}") from error
    return table


def _from_row(cells):
    """The Recording of a row's cells that are not empty, {column: number or text}; ValueError for a wrong one."""
    known = {column: cells.pop(column) for column in KNOWN + ("rotate",) if column in cells}
    for column in WHOLE_NUMBERS:
        if not known.get(column, 0.0).is_integer():
            raise ValueError(f"{column} is {known[column]:g}, not a whole number")
    known = {column: int(value) if column in WHOLE_NUMBERS else value for column, value in known.items()}
    known = {column: value for column, value in known.items() if value not in files.MISSING}
    if known.get("rotate", 0) not in ROTATIONS:
        raise ValueError(f"rotate is {known['rotate']}, not one of {', '.join(map(str, ROTATIONS))}")
    if "date" in known:  # perhaps with a time, as pandas writes it
        known["date"] = date.fromisoformat(re.split("[ T]", known["date"])[0]).isoformat()
    if "age_days" in known:
        known.setdefault("age_months", round(known["age_days"] / DAYS_PER_MONTH, 3))
    elif "age_months" in known:
        known["age_days"] = round(known["age_months"] * DAYS_PER_MONTH)
    return Recording(columns=cells, **known)


def add_flags(parser):
    """Add the flags that choose recordings to parser; selection() reads them."""
    group = parser.add_argument_group("which recordings are used")
    add = group.add_argument
    add("--children", nargs="+", metavar="CHILD", help="recordings of these children")
    add(
        "--ages",
        type=age_range,
        metavar="FROM-TO",
        help="age range in months: 6-12 is 6 <= age < 12; -12 is below 12; 12- is 12 and above",
    )
    add("--select", nargs="+", metavar="PATTERN", help="names that match one of these shell patterns: 'S_2013*'")
    add("--exclude", nargs="+", metavar="PATTERN", help="skip recordings whose names match one of these patterns")
    add("--list", metavar="FILE", help="names listed in this file, one per line, or in a table's column 'file'")
    add(
        "--hours",
        type=cli.number(float, 1e-4),
        metavar="H",
        help="a random subset of exactly H hours, drawn with --seed; more hours contain fewer",
    )


def age_range(text):
    """(low, high) in months from LOW-HIGH, either of which may be missing (an argparse type)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)?-(\d+(?:\.\d+)?)?", text)
    bounds = match.groups() if match else (None, None)
    low, high = (float(bound) if bound else default for bound, default in zip(bounds, (0, 1e9), strict=True))
    if not any(bounds) or low >= high:
        raise argparse.ArgumentTypeError(f"{text} is not a range in months such as 6-12, 6- or -12")
    return low, high


def format_ages(ages):
    """The text of which age_range makes ages."""
    low, high = ages
    return f"{low:g}-" if high >= 1e9 else f"{low:g}-{high:g}"


@dataclass(frozen=True)
class Selection:
    """Which recordings to use: those that meet every condition given; see add_flags."""

    children: tuple = ()
    ages: tuple | None = None
    select: tuple = ()
    exclude: tuple = ()
    names: tuple | None = None
    hours: float | None = None
    seed: int = 0

    def choose(self, recordings):
        """{index: seconds} of the recordings to use, of a sequence of (name, Recording, seconds).

        A name in names, or a pattern, may leave out the extension and the folder. With hours, whole recordings are
        drawn in a random order that depends on seed alone, and the last one is cut short: so 10 hours contain the 1
        hour. Raises UserError for a condition that nothing meets.
        """
        keys = [names_of(name) for name, _, _ in recordings]
        children, ages = [each.child for _, each, _ in recordings], [each.age_months for _, each, _ in recordings]
        conditions = []
        if self.names is not None:
            there = set().union(*keys)
            if unknown := [name for name in self.names if name not in there]:
                raise UserError(f"--list: there is no recording {', '.join(unknown[:3])}{', ...' * (len(unknown) > 3)}")
            conditions.append([not own.isdisjoint(self.names) for own in keys])
        if self.children:
            if unknown := sorted(set(self.children) - set(children)):
                there = ", ".join(sorted(set(children) - {None})) or "none that is known"
                raise UserError(f"no recording is of child {unknown[0]}; there are {there}")
            conditions.append([child in self.children for child in children])
        if self.ages:
            if not any(age is not None for age in ages):
                raise UserError("--ages: the age of no recording is known; give their ages in a table (--recordings)")
            conditions.append([age is not None and self.ages[0] <= age < self.ages[1] for age in ages])
        if self.select:
            conditions.append(_matches(keys, self.select))
        if self.exclude:
            conditions.append([not matches for matches in _matches(keys, self.exclude)])
        seconds = {i: each[2] for i, each in enumerate(recordings) if all(condition[i] for condition in conditions)}
        if not seconds:
            raise UserError("the selection leaves no recording; see --children, --ages, --select, --exclude and --list")
        return seconds if self.hours is None else self._fill_hours(seconds)

    def _fill_hours(self, seconds):
        """The share of seconds, {index: seconds}, that fills the hours."""
        left = 3600 * self.hours
        if left > sum(seconds.values()):
            raise UserError(f"--hours {self.hours:g}: the selected recordings have {duration(sum(seconds.values()))}")
        taken = {}
        for i in np.random.default_rng(self.seed).permutation(list(seconds)).tolist():
            taken[i] = min(seconds[i], left)
            left -= taken[i]
            if left <= 0:
                break
        return dict(sorted(taken.items()))


def selection(args):
    """The Selection that the flags of add_flags ask for; None where they ask for all recordings."""
    given = {name: getattr(args, name) for name in ("children", "ages", "select", "exclude", "hours")}
    given["names"] = args.list and files.read_list(args.list)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    return Selection(**given, seed=args.seed) if given else None


def names_of(name):
    """The names by which a recording may be called: its path, its file name, and both without the extension.

    Also as a list or table has them whose encoding is that of the name, not UTF-8.
    """
    paths = {PurePosixPath(name), PurePosixPath(files.decode(os.fsencode(name)) or name)}
    return {each for path in paths for each in (str(path), path.name, str(path.with_suffix("")), path.stem)}


def _matches(keys, patterns):
    """Whether each of some recordings, sets of names, matches one of the patterns; UserError for one without match."""
    matches = np.array([[any(fnmatchcase(key, each) for key in own) for own in keys] for each in patterns], bool)
    if not matches.any(1).all():
        raise UserError(f"no recording matches the pattern {patterns[matches.any(1).argmin()]}")
    return matches.any(0)


def duration(seconds):
    """A duration in words: 2.25 hours, 4.80 minutes, 25.00 seconds."""
    unit, length = next(((unit, n) for unit, n in (("hours", 3600), ("minutes", 60)) if seconds >= n), ("seconds", 1))
    return f"{seconds / length:.2f} {unit}"


def describe(recordings, seconds):
    """What was selected, in words: of recordings, (name, Recording, seconds), the {index: seconds} of choose."""
    taken = [recordings[i][1] for i in seconds]
    parts = [f"{len(seconds)} of {len(recordings)} recordings", duration(sum(seconds.values()))]
    if children := sorted({recording.child for recording in taken if recording.child}):
        parts.append(f"{'child' if len(children) == 1 else 'children'} {', '.join(children)}")
    if ages := [recording.age_months for recording in taken if recording.age_months is not None]:
        parts.append(f"ages {min(ages):.1f} to {max(ages):.1f} months")
    return ", ".join(parts)


# --- where images are from


def find_image(images, name):
    """The index of the image at the path name in the folder of a manifest.Manifest; UserError if there is none."""
    i = images.find(name)
    if i is None:
        raise UserError(f"{images.folder} has no image {name}; give its path in that folder, or VIDEO@SECONDS")
    return i


def find_moment(images, name, second):
    """The index of the image that is nearest to a second of the video called name, in a Manifest.

    UserError if there is no such video, if it has no images, or if it ends before.
    """
    numbers = [n for n, video in enumerate(images.videos) if name in names_of(video["name"])]
    videos = [images.videos[n] for n in numbers]
    length = max((video.get("start", 0) + video["frames"] / video["rate"] for video in videos), default=0)
    if numbers and not 0 <= second <= length:
        raise UserError(f"{name} has no second {second:g}; it is {length:.1f} seconds long")
    candidates = []
    for own in map(images.video_images, numbers):
        k = bisect_left(own, second, key=lambda i: images.source(i).second)
        candidates += own[max(0, k - 1) : k + 1]
    if not candidates:
        raise UserError(f"{images.folder} has no images of a video {name}")
    return min(candidates, key=lambda i: abs(images.source(i).second - second))


def write_frames_table(images):
    """Write frames.csv into the folder of a Manifest, with a row per image, and return its path."""

    def rows():
        for i in range(len(images)):
            path, source = images.path(i), images.source(i)
            row = {"file": path, "class": path.rpartition("/")[0]}
            row |= {"recording": chapter(source.name)[0], "video": source.name}
            yield source.recording, row | {"frame": source.frame, "second": round(source.second, 3)}

    columns = ["file", "class", "recording", "video", "frame", "second"]
    return _write_table(images, FRAMES_TABLE, columns, [], rows())


def write_videos_table(images):
    """Write videos.csv into the folder of a Manifest, with a row per video that has images, and return its path."""

    def rows():
        for number, video in enumerate(images.videos):
            if own := images.video_images(number):
                name, recording, length = images.recording(number)
                row = {"file": name, "frames": video["frames"], "seconds": round(length, 3), "images": len(own)}
                first, last = (images.path(i).rpartition("/")[0] for i in (own[0], own[-1]))
                yield recording, row | {"first_class": first, "last_class": last}

    ends = ["frames", "seconds", "images", "first_class", "last_class"]
    return _write_table(images, VIDEOS_TABLE, ["file"], ends, rows())


def _write_table(images, name, first, last, rows):
    """Write rows, (Recording, dict) each, to a table with the columns first, what is known of recordings, and last."""
    further = {column for number in range(len(images.videos)) for column in images.recording(number)[1].columns}
    columns = [*first, *KNOWN, *sorted(further - {*first, *last}), *last]

    def lines():
        yield columns
        for recording, row in rows:
            row = recording.columns | {key: getattr(recording, key) for key in KNOWN} | row
            yield [row.get(column) for column in columns]

    files.write_table(images.folder / name, lines())
    return images.folder / name
