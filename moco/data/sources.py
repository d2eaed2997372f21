"""Where the images of a frame folder come from: search in both directions, and tables for other programs."""

import csv
from bisect import bisect_left

from moco import files
from moco.cli import UserError
from moco.data import recordings

FRAMES_TABLE, VIDEOS_TABLE = "frames.csv", "videos.csv"
KNOWN = ("child", "date", "age_months", "age_days", "part")


def describe(source):
    """A manifest.Source in words."""
    known = source.recording
    parts = [source.name] if source.frame is None else [source.name, f"frame {source.frame}"]
    parts.append(f"{source.second:.3f} s")
    if known.child:
        parts.append(f"child {known.child}")
    if known.age_months is not None:
        parts.append(f"{known.age_months:.1f} months")
    return ", ".join(parts)


def find_image(images, name):
    """The index of the image at the path name in the folder of a Manifest; UserError if there is none."""
    i = bisect_left(range(len(images)), name, key=images.path)
    if i == len(images) or images.path(i) != name:
        raise UserError(f"{images.folder} has no image {name}; give its path in that folder, or VIDEO@SECONDS")
    return i


def find_moment(images, name, second):
    """The index of the image that is nearest to a second of the video called name, in a Manifest.

    UserError if there is no such video, if it has no images, or if it ends before.
    """
    numbers = [n for n, video in enumerate(images.videos) if name in recordings.names_of(video["name"])]
    if not numbers:
        raise UserError(f"{images.folder} has no images of a video {name}")
    length = max(images.videos[n]["frames"] / images.videos[n]["rate"] for n in numbers)
    if not 0 <= second <= length:
        raise UserError(f"{name} has no second {second:g}; it is {length:.1f} seconds long")
    candidates = []
    for own in map(images.video_images, numbers):
        k = bisect_left(own, second, key=lambda i: images.source(i).second)
        candidates += own[max(0, k - 1) : k + 1]
    if not candidates:
        raise UserError(f"{images.folder} has no images of {name}")
    return min(candidates, key=lambda i: abs(images.source(i).second - second))


def write_frames_table(images):
    """Write frames.csv into the folder of a Manifest, with a row per image, and return its path."""
    columns = _columns(images)

    def rows():
        for i in range(len(images)):
            source = images.source(i)
            row = {"file": images.path(i), "class": images.classes[images.label(i)], "recording": source.name}
            yield row | {"frame": source.frame, "second": round(source.second, 3)} | _known(source.recording)

    return _write_table(
        images.folder / FRAMES_TABLE, ["file", "class", "recording", "frame", "second", *columns], rows()
    )


def write_videos_table(images):
    """Write videos.csv into the folder of a Manifest, with a row per video that has images, and return its path."""
    ends = ["frames", "seconds", "images", "first_class", "last_class"]

    def rows():
        for number, video in enumerate(images.videos):
            own = images.video_images(number)
            if own:
                _, recording, length = images.recording(number)
                row = {"file": video["name"], "frames": video["frames"], "seconds": round(length, 3)}
                first, last = (images.classes[images.label(i)] for i in (own[0], own[-1]))
                yield row | {"images": len(own), "first_class": first, "last_class": last} | _known(recording)

    return _write_table(images.folder / VIDEOS_TABLE, ["file", *_columns(images), *ends], rows())


def _known(recording):
    return {key: getattr(recording, key) for key in KNOWN} | recording.columns


def _columns(images):
    """What is known of the recordings, as names of columns; further ones of a table come last."""
    further = {column for number in range(len(images.videos)) for column in images.recording(number)[1].columns}
    return [*KNOWN, *sorted(further)]


def _write_table(path, columns, rows):
    with files.atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
