"""Which labelled images a readout trains on and which it is tested on, once a seed."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moco.cli import UserError, number

BINARY_TASKS = (("car", "road"), ("door", "window"), ("foot", "hand"), ("chair", "table"))  # of the paper's Figure 4a


def add_flags(parser):
    """Add the flags that choose images, classes, splits and seeds to parser."""
    add = parser.add_argument
    add("--split", nargs="+", choices=["iid", "exemplar"], default=["iid"], help="random halves; test exemplars apart")
    add("--test-exemplars", type=number(int, 1), default=3, metavar="N", help="exemplars of a class that are tested")
    add("--split-file", metavar="JSON", help="your own split, {'train': [names], 'test': [names]}, instead of --split")
    add("--subsample", action="store_true", help="take every tenth image of a class in time, as the paper does")
    add("--published-sampling", action="store_true", help="with --subsample: a random tenth, as published code does")
    add("--seeds", type=number(int, 1), default=1, metavar="N", help="repeat split and readout, seeds from --seed on")
    add("--classes", nargs="+", metavar="NAME", help="use these class folders only")
    add("--binary-tasks", action="store_true", help="the paper's four two-class tasks instead of all classes")
    add("--num-classes", type=number(int, 2), help="number of classes; found in the data, and checked if given")


@dataclass
class Task:
    """Images to be told apart, and how they are split.

    name: such as 'iid'. classes: names of the classes. images: (N,) indices into the folder. names: their N files,
    relative to the folder. labels: (N,) indices into classes. splits: for every seed a pair (train, test) of arrays
    of indices into images. seeds: the seeds. left_out: names of images that are in no split, as they cannot be read.
    """

    name: str
    classes: list
    images: np.ndarray
    names: list
    labels: np.ndarray
    splits: list
    seeds: list
    left_out: list = field(default_factory=list)

    @property
    def slug(self):
        """The name as part of a file name."""
        return re.sub(r"\W+", "_", self.name)

    @property
    def majority(self):
        """The accuracy of always naming the largest class."""
        used = self.labels[np.concatenate(self.splits[0])]
        return float(np.bincount(used).max() / len(used))

    def checked(self):
        """The task itself; UserError where a split gives nothing to tell apart, or to test."""
        for train, test in self.splits:
            if len(np.unique(self.labels[train])) < 2 or not len(test):
                raise UserError(f"the split {self.name} has one class to train on, or no image to test; choose another")
        return self

    def without(self, bad):
        """The same task with splits that leave out the images for which bad (N,) is true."""
        splits = [tuple(side[~bad[side]] for side in split) for split in self.splits]
        return replace(self, splits=splits, left_out=[self.names[i] for i in np.flatnonzero(bad)]).checked()


def iid(n, seed):
    """A random half of n images to train on, the rest to test: two sorted arrays of indices."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def by_exemplar(labels, exemplars, n_test, seed):
    """All images of n_test random exemplars of each class to test, the rest to train on: two sorted arrays of indices.

    labels: (N,) class of each image. exemplars: (N,) name of its exemplar within the class; each class needs more than
    n_test of them.
    """
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        here = labels == label
        tested = rng.choice(np.unique(exemplars[here]), n_test, replace=False)
        is_test |= here & np.isin(exemplars, tested)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def exemplar(name):
    """The exemplar in a file name of Toybox's kind, '01' of 'car/car_01_rxplus_003.jpeg'; None where there is none."""
    found = re.fullmatch(r".+?_(\d+)_.+", Path(name).name)
    return found and found[1]


def every_tenth(names, labels):
    """Sorted indices of every tenth image in time of each class (labels, (N,)), beginning with its first.

    Time is the order of the file names, with the numbers in them by value.
    """
    kept = []
    for label in np.unique(labels):
        kept += sorted(np.flatnonzero(labels == label), key=lambda i: _in_time(names[i]))[::10]
    return np.sort(kept)


def _in_time(name):
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def tasks(frames, folder, args):
    """The Tasks that the flags of add_flags in args ask for, on the labelled images of folder.

    frames: loader.FrameFolder of folder. UserError where the images or their names do not allow it.
    """
    names = [frames.name(i) for i in range(len(frames))]
    labels = np.asarray(frames.labels())
    groups = BINARY_TASKS if args.binary_tasks else [args.classes or frames.classes]
    if missing := [name for group in groups for name in group if name not in frames.classes]:
        raise UserError(f"{folder} has no class folder {missing[0]}; it has {', '.join(frames.classes)}")
    kinds = ["own"] if args.split_file else list(dict.fromkeys(args.split))
    found = []
    for group in groups:
        classes = [name for name in frames.classes if name in group]
        images, own_labels = _chosen(names, labels, frames.classes, classes, folder, args)
        own_names = [names[i] for i in images]
        for kind in kinds:
            words = ["subsample"] * args.subsample + [kind] * (kind != "iid" or not args.subsample)
            name = " ".join(words + ["/".join(classes)] * args.binary_tasks)
            split = _splits(kind, own_names, own_labels, classes, args)
            found.append(Task(name, classes, images, own_names, own_labels, split, _seeds(args)).checked())
    return found


def _seeds(args):
    return list(range(args.seed, args.seed + args.seeds))


def _chosen(names, labels, all_classes, classes, folder, args):
    """The images of these classes, a tenth of them with --subsample, and their labels within the classes."""
    if len(classes) < 2:
        raise UserError(f"{folder} gives one class, {', '.join(classes)}; a readout needs at least two class folders")
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {args.num_classes} does not fit {folder}: {len(classes)} classes are used")
    place = np.full(len(all_classes), -1)
    place[[all_classes.index(name) for name in classes]] = np.arange(len(classes))
    images = np.flatnonzero(place[labels] >= 0)
    if args.subsample and args.published_sampling:
        images = np.sort(np.random.default_rng(args.seed).permutation(images)[: len(images) // 10])
    elif args.subsample:
        images = images[every_tenth([names[i] for i in images], labels[images])]
    counts = np.bincount(place[labels[images]], minlength=len(classes))
    if counts.min() < 2:
        raise UserError(f"the class {classes[counts.argmin()]} in {folder} has {counts.min()} image(s); 2 are needed")
    return images, place[labels[images]]


def _splits(kind, names, labels, classes, args):
    """One (train, test) a seed."""
    if kind == "own":
        return [_read(args.split_file, names)] * args.seeds
    if kind == "iid":
        return [iid(len(names), seed) for seed in _seeds(args)]
    exemplars = [exemplar(name) for name in names]
    if None in exemplars:
        strange = names[exemplars.index(None)]
        raise UserError(f"--split exemplar needs names like car_01_rotate_003.jpeg; {strange} names no exemplar")
    exemplars = np.array(exemplars)
    for label, name in enumerate(classes):
        count = len(np.unique(exemplars[labels == label]))
        if count <= args.test_exemplars:
            raise UserError(f"--test-exemplars {args.test_exemplars} of {count} leaves no {name} to train on")
    return [by_exemplar(labels, exemplars, args.test_exemplars, seed) for seed in _seeds(args)]


def _read(path, names):
    """The split in a user's file as indices into names."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        sides = [[str(name) for name in content[side]] for side in ("train", "test")]
    except OSError as error:
        raise UserError(f"cannot read --split-file {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--split-file {path} is not {{'train': [names], 'test': [names]}} ({error!r})") from error
    index = {name: i for i, name in enumerate(names)}
    if unknown := [name for side in sides for name in side if name not in index]:
        raise UserError(f"--split-file {path} names {unknown[0]}, and {len(unknown) - 1} more, not among the images")
    if both := sorted(set(sides[0]) & set(sides[1])):
        raise UserError(f"--split-file {path} has {both[0]} on both sides; what is tested may not be trained on")
    if not all(sides):
        raise UserError(f"--split-file {path} leaves one side empty")
    return tuple(np.unique([index[name] for name in side]) for side in sides)
