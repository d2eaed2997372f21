"""Which labeled images a classifier trains on and which it is tested on, for each seed."""

import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from moco.cli import UserError, number

BINARY_TASKS = (("car", "road"), ("door", "window"), ("foot", "hand"), ("chair", "table"))  # of the paper's Figure 4a
MAX_SEED = 2**32 - 1  # the largest that scikit-learn takes


def add_flags(parser):
    """Add the flags that choose images, classes and splits to parser."""
    add = parser.add_argument
    add(
        "--split",
        nargs="+",
        choices=["iid", "exemplar"],
        default=["iid"],
        help="iid: random halves; exemplar: held-out exemplars of each class",
    )
    add("--test-exemplars", type=number(int, 1), default=3, metavar="N", help="held-out exemplars per class")
    add("--split-file", metavar="JSON", help="use the split in this file instead: {'train': [names], 'test': [names]}")
    add("--subsample", action="store_true", help="use every tenth image of a class in time, as in the paper")
    add("--published-sampling", action="store_true", help="with --subsample: a random tenth, as in the published code")
    add("--seeds", type=number(int, 1), default=1, metavar="N", help="number of random splits; seeds count from --seed")
    add("--classes", nargs="+", metavar="NAME", help="use these class folders only")
    add("--binary-tasks", action="store_true", help="the paper's four two-class tasks instead of all classes")
    add("--num-classes", type=number(int, 2), help="number of classes; read from the data, checked if given")


@dataclass(frozen=True)
class SplitOptions:
    """The values of the flags of add_flags, and of --seed."""

    split: tuple = ("iid",)
    test_exemplars: int = 3
    split_file: str | None = None
    subsample: bool = False
    published_sampling: bool = False
    seed: int = 0
    seeds: int = 1
    classes: tuple | None = None
    binary_tasks: bool = False
    num_classes: int | None = None

    @classmethod
    def from_flags(cls, flags):
        """The options among all flags of a script, {name: value}."""
        return cls(**{option.name: flags[option.name] for option in fields(cls)})

    @property
    def all_seeds(self):
        """The list of seeds."""
        return list(range(self.seed, self.seed + self.seeds))


@dataclass(frozen=True)
class Task:
    """A classification task: labeled images and their splits.

    name: such as 'iid'. classes: class names. images: (N,) indices into the folder. names: their N file names relative
    to the folder. labels: (N,) indices into classes. splits: for each seed a pair (train, test) of arrays of indices
    into images. seeds: the seeds. left_out: names of images that are in no split because they cannot be read.
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
        """The test accuracy of always predicting the largest class of the training images; mean over the seeds."""
        accuracies = []
        for train, test in self.splits:
            largest = np.bincount(self.labels[train]).argmax()
            accuracies.append(np.mean(self.labels[test] == largest))
        return float(np.mean(accuracies))

    def validate(self):
        """Return the task; UserError if a split has fewer than two classes to train on or no image to test."""
        for train, test in self.splits:
            if len(np.unique(self.labels[train])) < 2 or not len(test):
                raise UserError(f"the split {self.name} has fewer than two classes to train on, or no test images")
        return self

    def drop(self, unreadable):
        """The same task without the images for which unreadable (N,) is true; UserError as in validate()."""
        splits = [tuple(side[~unreadable[side]] for side in split) for split in self.splits]
        left_out = [self.names[i] for i in np.flatnonzero(unreadable)]
        return replace(self, splits=splits, left_out=left_out).validate()


def iid(n, seed):
    """Random halves of n images: sorted arrays of indices (train, test)."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def by_exemplar(labels, exemplars, n_test, seed):
    """Hold out all images of n_test random exemplars of each class: sorted arrays of indices (train, test).

    labels: (N,) class of each image. exemplars: (N,) name of its exemplar within the class; each class has more than
    n_test.
    """
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = labels == label
        held_out = rng.choice(np.unique(exemplars[of_class]), n_test, replace=False)
        is_test |= of_class & np.isin(exemplars, held_out)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def exemplar(name):
    """The exemplar in a file name like Toybox's, '01' of 'car/car_01_rxplus_003.jpeg'; None if there is none."""
    match = re.fullmatch(r".+?_(\d+)_.+", Path(name).name)
    return match and match[1]


def every_nth(name, labels, n):
    """Sorted indices of every n-th image in time of each class (labels, (N,)), starting with its first.

    name: function of an index that returns the image's file name. Time is the natural order of the file names: numbers
    in them compare by value.
    """
    kept = [in_time(name, of_class)[::n] for of_class in _by_class(labels)]
    return np.sort(np.concatenate(kept))


def in_time(name, images):
    """Indices of images in the natural order of their file names, as an array."""
    return np.array(sorted(images, key=lambda i: _natural_key(name(i))), int)


def _by_class(labels):
    """The indices of the images of each class, in order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _natural_key(name):
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def make_tasks(frames, options):
    """The list of Tasks that SplitOptions ask for on the images of a loader.FrameFolder.

    UserError if the images, their names or the seeds do not allow it.
    """
    if options.seed < 0 or options.all_seeds[-1] > MAX_SEED:
        raise UserError(f"--seed {options.seed} --seeds {options.seeds}: seeds are from 0 to {MAX_SEED}")
    names = [frames.name(i) for i in range(len(frames))]
    labels = np.asarray(frames.labels())
    groups = BINARY_TASKS if options.binary_tasks else [options.classes or frames.classes]
    if missing := [name for group in groups for name in group if name not in frames.classes]:
        raise UserError(f"{frames.folder} has no class folder {missing[0]}; it has {', '.join(frames.classes)}")
    kinds = ["own"] if options.split_file else list(dict.fromkeys(options.split))
    tasks = []
    for group in groups:
        classes = [name for name in frames.classes if name in group]
        images, task_labels = _select_images(frames, names, labels, classes, options)
        task_names = [names[i] for i in images]
        for kind in kinds:
            words = ["subsample"] * options.subsample + [kind] * (kind != "iid" or not options.subsample)
            name = " ".join(words + ["/".join(classes)] * options.binary_tasks)
            split = _splits(kind, task_names, task_labels, classes, options)
            tasks.append(Task(name, classes, images, task_names, task_labels, split, options.all_seeds).validate())
    return tasks


def _select_images(frames, names, labels, classes, options):
    """Indices of the images of these classes (a tenth of them with --subsample), and their labels within classes."""
    if len(classes) < 2:
        raise UserError(f"{frames.folder} has one class, {', '.join(classes)}; give at least two class folders")
    if options.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {options.num_classes} does not match {frames.folder}: {len(classes)} classes")
    new_label = np.full(len(frames.classes), -1)
    new_label[[frames.classes.index(name) for name in classes]] = np.arange(len(classes))
    images = np.flatnonzero(new_label[labels] >= 0)
    if options.subsample and options.published_sampling:
        images = np.sort(np.random.default_rng(options.seed).permutation(images)[: len(images) // 10])
    elif options.subsample:
        images = images[every_nth(lambda i: names[images[i]], labels[images], 10)]
    counts = np.bincount(new_label[labels[images]], minlength=len(classes))
    if counts.min() < 2:
        smallest = classes[counts.argmin()]
        raise UserError(f"the class {smallest} in {frames.folder} has {counts.min()} image(s); at least 2 are needed")
    return images, new_label[labels[images]]


def _splits(kind, names, labels, classes, options):
    """One (train, test) per seed."""
    if kind == "own":
        return [_read_split_file(options.split_file, names)] * options.seeds
    if kind == "iid":
        return [iid(len(names), seed) for seed in options.all_seeds]
    exemplars = [exemplar(name) for name in names]
    if None in exemplars:
        odd = names[exemplars.index(None)]
        raise UserError(f"--split exemplar needs names like car_01_rotate_003.jpeg; {odd} contains no exemplar")
    exemplars = np.array(exemplars)
    for label, name in enumerate(classes):
        count = len(np.unique(exemplars[labels == label]))
        if count <= options.test_exemplars:
            raise UserError(f"--test-exemplars {options.test_exemplars} of {count} leaves no {name} to train on")
    return [by_exemplar(labels, exemplars, options.test_exemplars, seed) for seed in options.all_seeds]


def _read_split_file(path, names):
    """The (train, test) split in a user's JSON file (UTF-8 or UTF-16, with or without a BOM) as indices into names."""
    try:
        content = Path(path).read_bytes()
        if not content.strip():
            raise UserError(f"--split-file {path} is empty")
        sides = [json.loads(content)[side] for side in ("train", "test")]
        if not all(isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides):
            raise TypeError("not lists of file names")
    except OSError as error:
        raise UserError(f"cannot read --split-file {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--split-file {path} is not {{'train': [names], 'test': [names]}} ({error!r})") from error
    index = {name: i for i, name in enumerate(names)}
    if unknown := [name for side in sides for name in side if name not in index]:
        raise UserError(f"--split-file {path}: {unknown[0]} (and {len(unknown) - 1} more) is not among the images")
    if both := sorted(set(sides[0]) & set(sides[1])):
        raise UserError(f"--split-file {path} has {both[0]} on both sides; training images cannot be test images")
    if not all(sides):
        raise UserError(f"--split-file {path} has no {'test' if sides[0] else 'train'} images")
    return tuple(np.unique([index[name] for name in side]) for side in sides)
