"""The plan of a frame folder: videos, slots, classes and neighbors in time, by arithmetic."""

import copy
import json
import os
import shlex
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import recordings

NAME = "manifest.json"
TIMES = "times.npy"  # (n, 2): frame and second of each slot of videos of variable rate
VERSION = 1


def load(folder):
    """The Manifest of a frame folder, or None without one; UserError if it is damaged or incomplete."""
    plan = read(folder)
    if plan is None:
        return None
    if not plan["complete"]:
        raise UserError(f"{folder} is not complete; to finish it: {command(plan, folder)}")
    return Manifest(plan, folder)


def read(folder):
    """The plan of a frame folder, complete or not, as a dict; None without one; UserError if it is damaged."""
    path = Path(folder) / NAME
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["version"] != VERSION:
            raise ValueError(f"its version is {plan['version']}, not {VERSION}")
        Manifest(plan, folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); read the videos again into another --save-dir") from error
    return plan


def write(folder, plan):
    """Write a plan into a frame folder, atomically."""
    files.write_json(Path(folder) / NAME, plan)


def command(plan, folder):
    """The command that extracts the remaining frames of a plan into folder."""
    words = ["python", "read_saycam.py", *plan["folders"], "--save-dir", str(folder)]
    for flag, value in plan["settings"].items():
        if value is not False and value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)


def make(settings, folders, videos, left_out):
    """The plan of a frame folder before any frame is extracted.

    settings: flags by name, of which class-by, fps, seg-len and drop-last are used here. folders: where the videos are.
    videos: dicts of name, folder (its number), slots and any further entries, in the order in which they are read.
    left_out: dicts of name, folder, reason. Each video gets its first slot and, where classes go by video or by name,
    its class and the prefix of its image names; videos are then sorted by class and image name.
    """
    by = "moment" if settings.get("moments") else settings["class-by"]
    per_class, classes = None, []
    if by == "time":
        per_class = max(1, round(settings["fps"] * settings["seg-len"]))
        if settings["drop-last"]:
            left = sum(video["slots"] for video in videos) // per_class * per_class
            for video in videos:
                video["slots"] = min(video["slots"], left)
                left -= video["slots"]
    else:
        for video in videos:
            stem = PurePosixPath(video["name"]).stem
            if by != "moment":
                video["class"] = stem if by == "video" else stem.split("_")[0] or stem
            if video["class"] == NAME:  # of the file beside the class folders
                video["class"] += "_"
            video["prefix"] = "img" if by == "video" else stem.replace(".", "-")  # WebDataset ends names at a dot
        key, mark = ("class", ".") if by == "video" else ("prefix", "-")
        for group in _by_class(videos) if by == "moment" else [videos]:
            for video, name in zip(group, unique([video[key] for video in group], mark), strict=True):
                video[key] = name
        videos, refused = _in_order(videos)
        left_out = left_out + refused
    starts = list(accumulate((video["slots"] for video in videos), initial=0))
    for video, start in zip(videos, starts, strict=False):
        video.update(first_slot=start, missing=[])
        if not classes or video.get("class") != classes[-1]["name"]:
            classes.append({"name": video.get("class"), "first_slot": start})
    longest = min(per_class, starts[-1]) if per_class else _longest(videos)
    return {
        "version": VERSION,
        "complete": False,
        "settings": settings,
        "folders": folders,
        "slots": starts[-1],
        "per_class": per_class,
        "class_digits": _digits(-(-starts[-1] // per_class)) if per_class else None,
        "image_digits": _digits(longest),
        "classes": None if per_class else classes,
        "videos": videos,
        "left_out": left_out,
    }


def _digits(count):
    """Digits for count numbered names: at least four, as in the published names."""
    return max(4, len(str(count - 1)))


def _longest(videos):
    return max((video["slots"] for video in videos), default=0)


def _in_order(videos):
    """(videos in the order of their image names, those without usable image names as entries of left_out).

    More than a thousand images of a_1.mp4 would mix with those of a_1_0.mp4: a_1_0999, a_1_0_0000, a_1_1000.
    """
    digits = _digits(_longest(videos))

    def names(video):
        return [f"{video['class']}/{video['prefix']}_{n:0{digits}d}.jpeg" for n in (0, max(0, video["slots"] - 1))]

    kept, refused = [], []
    for video in sorted(videos, key=lambda video: (video["class"], names(video)[0])):
        reason = None
        if max(len(os.fsencode(name)) for name in names(video)[0].split("/")) > 255:
            reason = "its name is too long for image names"
        elif kept and kept[-1]["class"] == video["class"] and names(kept[-1])[1] > names(video)[0]:
            reason = f"its image names would mix with those of {kept[-1]['name']}; rename it"
        if reason:
            refused.append({"folder": video["folder"], "name": video["name"], "reason": reason})
        else:
            kept.append(video)
    return kept, refused


def _by_class(videos):
    """Lists of the videos of one class."""
    return [[video for video in videos if video["class"] == name] for name in {video["class"] for video in videos}]


def unique(names, mark="."):
    """The names, each once: one that equals an earlier one gets a mark and a number that no other one has."""
    given, result = set(names), {}
    for name in names:
        candidate, number = name, 1
        while candidate in result or (number > 1 and candidate in given):
            number += 1
            candidate = f"{name}{mark}{number}"
        result[candidate] = None
    return list(result)


def first_chapters(videos):
    """For each entry of a plan the number of the first one of the same recording, see recordings.chapter."""
    first = {}
    keys = [(video["folder"], recordings.chapter(video["name"])[0]) for video in videos]
    return [first.setdefault(key, number) for number, key in enumerate(keys)]


def left_out(plan):
    """[(name, reason)] of all files and videos that were left out, completely or in part."""
    return [(each["name"], each["reason"]) for each in plan["left_out"] + plan["videos"] if "reason" in each]


def seconds(plan, video):
    """The length of what the plan takes of a video; it may leave out the end."""
    interval = video["step"] / video["rate"] if video.get("step") else 1 / plan["settings"]["fps"]
    return min(video["frames"] / video["rate"], video["slots"] * interval)


def class_names(plan):
    """Names of the class folders of a plan, in order."""
    if plan["per_class"]:
        return [_class_name(plan, number) for number in range(-(-plan["slots"] // plan["per_class"]))]
    return [each["name"] for each in plan["classes"]]


class Manifest:
    """A complete frame folder as a sequence of images, in the order of torchvision's ImageFolder.

    A slot is the position of an image in the plan, whether it could be decoded or not; image i is in the i-th slot of
    those with an image. Everything else follows by arithmetic.

    folder: where the images are. slots: the number of slots. videos: their entries in the plan. classes, counts: names
    of the class folders with images, and the number of images in each.
    """

    def __init__(self, plan, folder="."):
        self.folder = Path(folder)
        self._plan = plan
        self.slots = plan["slots"]
        self.videos = plan["videos"]
        self._video_starts = [video["first_slot"] for video in self.videos]
        runs = [tuple(run) for video in self.videos for run in video["missing"]]
        per_class, self._class_names = plan["per_class"], class_names(plan)
        starts = [*range(0, self.slots, per_class)] if per_class else [each["first_slot"] for each in plan["classes"]]
        for rising in (self._video_starts, starts, [edge for first, end in runs for edge in (first, end)]):
            edges = [0, *rising, self.slots]
            if not all(isinstance(slot, int) for slot in edges) or edges != sorted(edges):
                raise ValueError("its slots do not follow one another")
        self._class_starts = [*starts, self.slots]
        has_image = np.ones(self.slots, bool)
        for first, end in runs:
            has_image[first:end] = False
        self._set_images(np.flatnonzero(has_image).astype(np.int32))

    def _set_images(self, slots):
        """slots: those of the images, int32 (N,), rising."""
        self._slots = slots
        counts = np.diff(self._before(self._class_starts))
        self.classes = [name for name, count in zip(self._class_names, counts, strict=True) if count]
        self.counts = counts[counts > 0].tolist()

    def _before(self, slots):
        """The number of images before each of some slots."""
        return np.searchsorted(self._slots, np.asarray(slots, np.int32))  # of its type: else it would be copied

    def __len__(self):
        """The number of images."""
        return len(self._slots)

    def select(self, shares):
        """The Manifest of some videos only; shares: {number of a video: share of its slots, from the first}."""
        ends = [each["first_slot"] + round(shares.get(n, 0) * each["slots"]) for n, each in enumerate(self.videos)]
        videos = np.searchsorted(self._video_starts, self._slots, "right") - 1
        selected = copy.copy(self)
        selected._set_images(self._slots[self._slots < np.array(ends)[videos]])
        return selected

    def slot(self, i):
        """The slot of image i."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return int(self._slots[i])

    def video(self, i):
        """The number of the video that image i was taken from, in the order of the plan."""
        return bisect_right(self._video_starts, self.slot(i)) - 1

    def path(self, i):
        """The file of image i, relative to the folder, with forward slashes."""
        return self._slot_path(self.slot(i))

    def _slot_path(self, slot):
        return slot_path(self._plan, self.videos[bisect_right(self._video_starts, slot) - 1], slot)

    def slot_of(self, path):
        """The slot of a path relative to the folder, with or without an image; None if there is none."""
        prefix, _, number = path.removesuffix(".jpeg").rpartition("_")
        if prefix not in self._prefix_starts or not number.isdecimal():
            return None
        slot = self._prefix_starts[prefix] + int(number)
        return slot if slot < self.slots and self._slot_path(slot) == path else None

    def find(self, path):
        """The index of the image with a path, relative to the folder; None if there is none."""
        slot = self.slot_of(path)
        i = len(self) if slot is None else int(self._before(slot))
        return i if i < len(self) and self.slot(i) == slot else None

    @cached_property
    def _prefix_starts(self):
        """{what file names have before their number: the slot of number 0}."""
        if self._plan["per_class"]:
            return {f"{name}/img": start for name, start in zip(self._class_names, self._class_starts, strict=False)}
        return {f"{video['class']}/{video['prefix']}": video["first_slot"] for video in self.videos}

    def video_images(self, number):
        """The range of the images of a video, by its number in videos."""
        first = self.videos[number]["first_slot"]
        return range(*self._before([first, first + self.videos[number]["slots"]]).tolist())

    def neighbors(self, i, window):
        """Indices of the other images of image i's video that are at most window slots away from it."""
        slot, video = self.slot(i), self.videos[self.video(i)]
        first = max(slot - window, video["first_slot"])
        end = min(slot + window + 1, video["first_slot"] + video["slots"])
        return [j for j in range(*self._before([first, end]).tolist()) if j != i]

    def recording(self, number):
        """(name, recordings.Recording, seconds) of a video, by its number in videos."""
        video = self.videos[number]
        return video["name"], self._recordings[number], seconds(self._plan, video)

    @cached_property
    def _recordings(self):
        return [recordings.from_entry(video) for video in self.videos]

    @cached_property
    def _times(self):
        return files.load_array(self.folder / TIMES)

    def frames(self, number):
        """The numbers of a video's frames in its slots, int64 (slots,); None if an earlier version planned it so."""
        video = self.videos[number]
        if "times_from" in video:
            return self._times[video["times_from"] :][: video["slots"], 0].astype(np.int64)
        return np.arange(video["slots"]) * video["step"] if video.get("step") else None

    def source(self, i):
        """The recordings.Source of image i."""
        number = self.video(i)
        video = self.videos[number]
        k = self.slot(i) - video["first_slot"]
        if "times_from" in video:
            frame, second = self._times[video["times_from"] + k].tolist()
            frame = int(frame)
        elif video.get("step"):
            frame = k * video["step"]
            second = video.get("start", 0) + frame / video["rate"]
        else:  # variable rate, and no times.npy yet
            frame, second = None, k / self._plan["settings"]["fps"]
        return recordings.Source(video["name"], frame, second, self._recordings[number])

    def tars(self):
        """{name of a tar: range of its images} of the packed folder, for each video with images."""
        images = map(self.video_images, range(len(self.videos)))
        return {name: each for name, each in zip(video_tars(self.videos), images, strict=True) if each}


def video_tars(videos):
    """The name of the tar for the images of each of some videos, entries of a plan."""
    return tar_names([PurePosixPath(video["name"]).stem for video in videos])


def tar_names(names):
    """A tar for each of some names; what precedes a colon in the name of a tar would be a host for tar."""
    return [f"{name}.tar" for name in unique([name.replace(":", "-") for name in names])]


def slot_path(plan, video, slot):
    """The relative path of the image in a video's slot; names sort in the order of slots."""
    if plan["per_class"]:
        number, position = divmod(slot, plan["per_class"])
        return f"{_class_name(plan, number)}/img_{position:0{plan['image_digits']}d}.jpeg"
    return f"{video['class']}/{video['prefix']}_{slot - video['first_slot']:0{plan['image_digits']}d}.jpeg"


def _class_name(plan, number):
    return f"class_{number:0{plan['class_digits']}d}"
