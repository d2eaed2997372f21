"""Which labeled images a classifier trains on and which it is tested on, for each seed."""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from moco import files
from moco.cli import UserError, number
from moco.data import manifest

BINARY_TASKS = (("car", "road"), ("door", "window"), ("foot", "hand"), ("chair", "table"))  # of the paper's Figure 4a
MAX_SEED = 2**32 - 1  # the largest that scikit-learn takes


def add_flags(parser):
    """Add the flags that choose images, classes and splits to parser."""
    add = parser.add_argument
    add(
        "--split",
        nargs="+",
        choices=["iid", "exemplar", "halves", "recording"],
        default=["iid"],
        help="iid: random halves; exemplar: held-out exemplars of each class; halves: train on the first half of each "
        "class in time; recording: train on half of the recordings, drawn by seed",
    )
    add("--groups", metavar="CSV", help="columns file and recording, for --split recording; else from manifest.json")
    add("--test-data", metavar="FOLDER", help="test on the images of the same classes in this folder, train on data")
    add(
        "--train-share",
        type=share,
        nargs="+",
        metavar="S",
        help="shares of the training images of each class, from 0 to 1; small ones are parts of larger ones",
    )
    add("--test-exemplars", type=number(int, 1), default=3, metavar="N", help="held-out exemplars per class")
    add("--split-file", metavar="JSON", help="use the split in this file instead: {'train': [names], 'test': [names]}")
    add("--subsample", action="store_true", help="use every tenth image of a class in time, as in the paper")
    add("--published-sampling", action="store_true", help="with --subsample: a random tenth, as in the published code")
    add(
        "--seeds",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="number of repetitions, each with a random split (halves and --split-file: the same one), from --seed on",
    )
    add("--classes", nargs="+", metavar="NAME", help="use these class folders only")
    add("--binary-tasks", action="store_true", help="the paper's four two-class tasks instead of all classes")
    add("--num-classes", type=number(int, 2), help="number of classes; read from the data, checked if given")


def share(text):
    """A number above 0 and up to 1 (an argparse type)."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


@dataclass(frozen=True)
class SplitOptions:
    """The values of the flags of add_flags, and of --seed."""

    split: tuple = ("iid",)
    test_exemplars: int = 3
    split_file: str | None = None
    groups: str | None = None
    test_data: str | None = None
    train_share: tuple | None = None
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
    into images. seeds: the seeds. left_out: names of images that are in no split because they cannot be read. share:
    the share of the training images of each class, of the split of this name; None: all, without being asked for.
    sources: where each image comes from, in words; empty where no manifest records it.
    """

    name: str
    classes: list
    images: np.ndarray
    names: list
    labels: np.ndarray
    splits: list
    seeds: list
    left_out: list = field(default_factory=list)
    split: str = ""
    share: float | None = None
    sources: list = field(default_factory=list)

    @property
    def slug(self):
        """The name as part of a file name."""
        return re.sub(r"\W+", "_", self.name).strip("_")

    def digests(self):
        """A hash of the file names of each split."""
        texts = (repr([[self.names[i] for i in side] for side in split]) for split in self.splits)
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]

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


def halves(names, labels):
    """The first half of each class in time and the second: sorted arrays of indices (train, test).

    Time is the natural order of the file names. labels: (N,) class of each image.
    """
    classes = [in_time(names.__getitem__, of_class) for of_class in _by_class(labels)]
    train = np.concatenate([images[: len(images) // 2] for images in classes])
    return np.sort(train), np.setdiff1d(np.arange(len(names)), train)


def by_recording(recordings, seed):
    """Hold out all images of half of the recordings, drawn at random: sorted arrays of indices (train, test).

    recordings: (N,) the recording of each image, at least two in all.
    """
    different = np.unique(recordings)
    held_out = np.random.default_rng(seed).choice(different, len(different) // 2, replace=False)
    is_test = np.isin(recordings, held_out)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def nested_share(train, labels, share, seed):
    """A random share of the training images (indices) of each class, at least one of each, sorted.

    labels: (N,) of all images. With one seed a smaller share is part of a larger one.
    """
    random = np.random.default_rng(seed)
    orders = [random.permutation(of_class) for of_class in _by_class(labels[train])]
    return train[np.sort(np.concatenate([order[: max(1, round(share * len(order)))] for order in orders]))]


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
    """The list of Tasks that SplitOptions ask for on the images of a FrameFolder.

    frames: with test data, of both folders. UserError if the images, their names or the seeds do not allow it.
    """
    if options.seed < 0 or options.all_seeds[-1] > MAX_SEED:
        raise UserError(f"--seed {options.seed} --seeds {options.seeds}: seeds are from 0 to {MAX_SEED}")
    if options.test_data and options.split_file:
        raise UserError("give either --test-data or --split-file")
    names = [frames.name(i) for i in range(len(frames))]
    labels = np.asarray(frames.labels())
    class_names, is_test = _test_classes(frames, options.test_data)
    known = _common_classes(class_names, is_test) if options.test_data else class_names
    groups = BINARY_TASKS if options.binary_tasks else [options.classes or known]
    if missing := [name for group in groups for name in group if name not in known]:
        raise UserError(f"{frames.folder} has no class folder {missing[0]}; it has {', '.join(known)}")
    kinds = list(dict.fromkeys(options.split))
    if options.split_file:
        kinds = ["own"]
    elif options.test_data:
        kinds = [f"to {Path(options.test_data).name}"]
    tasks = []
    for group in groups:
        classes = [name for name in known if name in group]
        images, task_labels = _select_images(frames, names, labels, class_names, classes, options)
        task_names, task_sources = [names[i] for i in images], _sources(frames, images)
        for kind in kinds:
            words = ["subsample"] * options.subsample + [kind] * (kind != "iid" or not options.subsample)
            name = " ".join(words + ["/".join(classes)] * options.binary_tasks)
            if options.test_data:
                sides = is_test[labels[images]]
                split = [(np.flatnonzero(~sides), np.flatnonzero(sides))] * options.seeds
            elif kind == "recording":
                split = _recording_splits(frames, images, task_names, task_labels, classes, options)
            else:
                split = _splits(kind, task_names, task_labels, classes, options)
            more = {"split": name, "sources": task_sources}
            task = Task(name, classes, images, task_names, task_labels, split, options.all_seeds, **more).validate()
            tasks += [_with_share(task, each) for each in options.train_share] if options.train_share else [task]
    return tasks


def _with_share(task, share):
    """The task with a share of its training images."""
    splits = [
        (nested_share(train, task.labels, share, seed), test)
        for seed, (train, test) in zip(task.seeds, task.splits, strict=True)
    ]
    return replace(task, name=f"{task.name} {100 * share:g}%", splits=splits, share=share)


def _test_classes(frames, test_data):
    """The name of each class folder, without that of its folder; whether it is in the test data, (n,) bool."""
    if not test_data:
        return frames.classes, None
    folders, names = zip(*(name.rsplit("/", 1) for name in frames.classes), strict=True)
    return list(names), np.array([folder != folders[0] for folder in folders])


def _sources(frames, images):
    """Where images come from, in words; empty if no manifest records it."""
    origins = [frames.source(i) for i in images]
    return [str(origin or "") for origin in origins] if any(origins) else []


def _common_classes(names, is_test):
    """The classes in both folders; prints the others. UserError if there are fewer than two."""
    sides = [{name for name, test in zip(names, is_test, strict=True) if test == side} for side in (False, True)]
    common = [name for name in dict.fromkeys(names) if all(name in side for side in sides)]
    for side, where in zip(sides, ("data", "--test-data"), strict=True):
        if others := sorted(side - set(common)):
            print(f"classes of {where} only, which are not used: {', '.join(others)}")
    if len(common) < 2:
        raise UserError(f"data and --test-data have {len(common)} classes in common; at least 2 are needed")
    return common


def _select_images(frames, names, labels, class_names, classes, options):
    """Indices of the images of these classes (a tenth of them with --subsample), and their labels within classes."""
    if len(classes) < 2:
        raise UserError(f"{frames.folder} has one class, {', '.join(classes)}; give at least two class folders")
    if options.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {options.num_classes} does not match {frames.folder}: {len(classes)} classes")
    new_label = np.array([classes.index(name) if name in classes else -1 for name in class_names])
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
    if kind == "halves":
        return [halves(names, labels)] * options.seeds
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


def _recording_splits(frames, images, names, labels, classes, options):
    """One (train, test) per seed by recording. Test images of classes without training images are left out."""
    recordings = _recordings(frames, images, names, options.groups)
    if len(np.unique(recordings)) < 2:
        raise UserError(f"--split recording: all images of {frames.folder} are of one recording")
    splits = []
    for seed in options.all_seeds:
        train, test = by_recording(recordings, seed)
        untrained = np.setdiff1d(labels[test], labels[train])
        if len(untrained):
            left_out = ", ".join(classes[label] for label in untrained)
            print(f"seed {seed}: no training recording has {left_out}; their test images are left out")
        splits.append((train, test[~np.isin(labels[test], untrained)]))
    return splits


def _recordings(frames, images, names, groups):
    """The recording of each image, (N,): from the table groups or, without it, from the manifest of frames."""
    if groups is None:
        plan = manifest.load(frames.folder)
        if plan is None:
            raise UserError(f"--split recording: {frames.folder} has no manifest.json; give --groups")
        first_chapters = np.array(manifest.first_chapters(plan.videos))
        return first_chapters[[plan.video(int(i)) for i in images]]
    recording = {row["file"]: row["recording"] for row in files.read_table(groups, "file", "recording")}
    if missing := [name for name in names if not recording.get(name)]:
        raise UserError(f"--groups {groups} has no recording of {missing[0]} (and {len(missing) - 1} more images)")
    return np.array([recording[name] for name in names])


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
