"""Which labeled images a classifier trains on and which it is tested on, for each seed."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moco import files
from moco.cli import UserError, number
from moco.data import manifest, recordings

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
        help="iid: train on half of the images, drawn at random; exemplar: held-out exemplars of each class; halves: "
        "train on the first half of each class in time; recording: train on half of the recordings, drawn at random",
    )
    add("--groups", metavar="CSV", help="columns file and recording, for --split recording; else from manifest.json")
    add("--test-data", metavar="FOLDER", help="test on the images of the same classes in this folder, train on data")
    add(
        "--train-share",
        type=number(float, 0, 1),
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


# --- splits: sorted arrays of indices (train, test) of N images


def iid(n, seed):
    """Half of n images, drawn at random, and the others."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def hold_out(groups, labels, n_test, seed):
    """Hold out all images of n_test random groups of each class.

    groups: (N,) name of the group of each image, such as its exemplar, within its class; each class has more than
    n_test. labels: (N,) class of each image.
    """
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = labels == label
        is_test |= of_class & np.isin(groups, rng.choice(np.unique(groups[of_class]), n_test, replace=False))
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def halves(name, labels):
    """The first half of each class in time, and the second; name and labels as in by_class_in_time()."""
    train = np.concatenate([images[: len(images) // 2] for images in by_class_in_time(name, labels)])
    return np.sort(train), np.setdiff1d(np.arange(len(labels)), train)


def nested_share(train, labels, share, seed):
    """A random share of the training images (indices) of each class, at least one of each, sorted.

    labels: (N,) of all images. With one seed a smaller share is part of a larger one.
    """
    random = np.random.default_rng(seed)
    orders = [random.permutation(of_class) for of_class in _by_class(labels[train])]
    return train[np.sort(np.concatenate([order[: max(1, round(share * len(order)))] for order in orders]))]


def every_nth(name, labels, n):
    """Sorted indices of every n-th image in time of each class; name and labels as in by_class_in_time()."""
    return np.sort(np.concatenate([images[::n] for images in by_class_in_time(name, labels)]))


def by_class_in_time(name, labels):
    """The indices of the images of each class in time: in the natural order of names, where numbers compare by value.

    name: function of an index that returns the image's file name. labels: (N,) class of each image.
    """
    return [
        np.array(sorted(images, key=lambda i: recordings.natural_key(name(i))), int) for images in _by_class(labels)
    ]


def _by_class(labels):
    """The indices of the images of each class, in order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def exemplar(name):
    """The exemplar in a file name like Toybox's, '01' of 'car/car_01_rxplus_003.jpeg'; None if there is none."""
    match = re.fullmatch(r".+?_(\d+)_.+", Path(name).name)
    return match and match[1]


# --- tasks: labeled images and their splits


@dataclass(frozen=True)
class Task:
    """A classification task.

    split: the name of its split, such as 'iid'. share: the share of the training images of each class; None: all,
    without being asked for. classes: class names. images: (N,) indices into a FrameFolder. names: their N file names.
    labels: (N,) indices into classes. splits: {seed: (train, test)}, arrays of indices of the N images. without_share:
    {seed: train}, the training images of which splits have a share. left_out: names of images that are in no split
    because they cannot be read.
    """

    split: str
    share: float | None
    classes: list
    images: np.ndarray
    names: list
    labels: np.ndarray
    splits: dict
    without_share: dict = field(default_factory=dict)
    left_out: tuple = ()

    @property
    def name(self):
        """The name in results, such as 'iid' or 'iid 10%'."""
        return self.split if self.share is None else f"{self.split} {100 * self.share:g}%"

    @property
    def slug(self):
        """The name as part of a file name."""
        return re.sub(r"\W+", "_", self.name).strip("_")

    def validate(self):
        """Return the task; UserError if a split has fewer than two classes to train on or no image to test."""
        for train, test in self.splits.values():
            if len(np.unique(self.labels[train])) < 2 or not len(test):
                raise UserError(f"the split {self.name} has fewer than two classes to train on, or no test images")
        return self

    def with_share(self, share):
        """The same task with a share of its training images."""
        trains = {seed: train for seed, (train, _) in self.splits.items()}
        splits = {
            seed: (nested_share(train, self.labels, share, seed), test) for seed, (train, test) in self.splits.items()
        }
        return replace(self, share=share, splits=splits, without_share=trains)

    def drop(self, unreadable):
        """The same task without the images for which unreadable (N,) is true; UserError as in validate()."""

        def kept(images):
            return images[~unreadable[images]]

        splits = {seed: (kept(train), kept(test)) for seed, (train, test) in self.splits.items()}
        without_share = {seed: kept(train) for seed, train in self.without_share.items()}
        left_out = tuple(self.names[i] for i in np.flatnonzero(unreadable))
        return replace(self, splits=splits, without_share=without_share, left_out=left_out).validate()


def make_tasks(frames, flags):
    """The Tasks on the images of a FrameFolder, with --test-data of both folders, that a script's flags ask for.

    flags: {name: value}, with those of add_flags and seed. UserError if the images, their names or the seeds do not
    allow a task.
    """
    seeds = range(flags["seed"], flags["seed"] + flags["seeds"])
    if seeds[-1] > MAX_SEED:
        raise UserError(f"--seed {flags['seed']} --seeds {flags['seeds']}: seeds are from 0 to {MAX_SEED}")
    if flags["test_data"] and flags["split_file"]:
        raise UserError("give either --test-data or --split-file")
    folder_classes, kinds, is_test = frames.classes, list(dict.fromkeys(flags["split"])), None
    known = folder_classes
    if flags["test_data"]:
        folders, folder_classes = zip(*(name.rsplit("/", 1) for name in frames.classes), strict=True)
        is_test = np.array([folder != folders[0] for folder in folders])
        known, kinds = _common_classes(folder_classes, is_test), [f"to {Path(flags['test_data']).name}"]
    elif flags["split_file"]:
        kinds = ["own"]
    tasks = []
    for group in BINARY_TASKS if flags["binary_tasks"] else [flags["classes"] or known]:
        if missing := [name for name in group if name not in known]:
            raise UserError(f"{frames.folder} has no class folder {missing[0]}; it has {', '.join(known)}")
        classes = [name for name in known if name in group]
        images, labels = _select_images(frames, folder_classes, classes, flags)
        for kind in kinds:
            words = ["subsample"] * flags["subsample"] + [kind] * (kind != "iid" or not flags["subsample"])
            split = " ".join(words + ["/".join(classes)] * flags["binary_tasks"])
            task = Task(split, None, classes, images, [frames.name(i) for i in images], labels, {})
            if is_test is None:
                task = replace(task, splits=_splits(kind, seeds, frames, task, flags)).validate()
            else:
                tested = is_test[frames.labels()[images]]
                sides = np.flatnonzero(~tested), np.flatnonzero(tested)
                task = replace(task, splits=dict.fromkeys(seeds, sides)).validate()
            tasks += map(task.with_share, flags["train_share"]) if flags["train_share"] else [task]
    return tasks


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


def _select_images(frames, folder_classes, classes, flags):
    """The images of some classes, a tenth of them with --subsample: indices, and labels within classes.

    folder_classes: the name of each class of frames, without that of its folder.
    """
    if len(classes) < 2:
        raise UserError(
            f"{frames.folder} has one class, {', '.join(classes)}; give a folder with at least two class folders, as "
            "read_saycam.py makes them with --class-by name, --class-by video or a shorter --seg-len"
        )
    if flags["num_classes"] not in (None, len(classes)):
        asked = f"--num-classes {flags['num_classes']}"
        raise UserError(f"{asked} does not match {frames.folder}: {len(classes)} classes")
    new_labels = np.array([classes.index(name) if name in classes else -1 for name in folder_classes])
    labels = new_labels[frames.labels()]
    images = np.flatnonzero(labels >= 0)
    if flags["subsample"] and flags["published_sampling"]:
        images = np.sort(np.random.default_rng(flags["seed"]).permutation(images)[: len(images) // 10])
    elif flags["subsample"]:
        images = images[every_nth(lambda i: frames.name(images[i]), labels[images], 10)]
    counts = np.bincount(labels[images], minlength=len(classes))
    if counts.min() < 2:
        smallest = classes[counts.argmin()]
        raise UserError(f"the class {smallest} in {frames.folder} has {counts.min()} image(s); at least 2 are needed")
    return images, labels[images]


def _splits(kind, seeds, frames, task, flags):
    """{seed: (train, test)} of one kind of split of the images of a task."""
    if kind == "iid":
        return {seed: iid(len(task.names), seed) for seed in seeds}
    if kind == "exemplar":
        n_test = flags["test_exemplars"]
        exemplars = _exemplars(task, n_test)
        return {seed: hold_out(exemplars, task.labels, n_test, seed) for seed in seeds}
    if kind == "recording":
        groups = _recordings(frames, task, flags["groups"])
        return {seed: _by_recording(groups, task, seed) for seed in seeds}
    if kind == "halves":
        return dict.fromkeys(seeds, halves(task.names.__getitem__, task.labels))
    return dict.fromkeys(seeds, _read_split_file(flags["split_file"], task.names))


def _exemplars(task, n_test):
    """The exemplar of each image, (N,); UserError if a class has not more than n_test of them."""
    exemplars = [exemplar(name) for name in task.names]
    if None in exemplars:
        odd = task.names[exemplars.index(None)]
        raise UserError(f"--split exemplar needs names like car_01_rotate_003.jpeg; {odd} contains no exemplar")
    exemplars = np.array(exemplars)
    for label, name in enumerate(task.classes):
        count = len(np.unique(exemplars[task.labels == label]))
        if count <= n_test:
            raise UserError(f"--test-exemplars {n_test} of {count} leaves no {name} to train on")
    return exemplars


def _recordings(frames, task, table):
    """The recording of each image, (N,), at least two in all: from a table or, without it, the manifest."""
    if table is None:
        plan = manifest.load(frames.folder)
        if plan is None:
            raise UserError(f"--split recording: {frames.folder} has no manifest.json; give --groups")
        groups = np.array(manifest.first_chapters(plan.videos))[[plan.video(int(i)) for i in task.images]]
    else:
        known = {row["file"]: row["recording"] for _, row in files.read_table(table, "file", "recording")}
        if missing := [name for name in task.names if known.get(name, "") in files.MISSING]:
            raise UserError(f"--groups {table} has no recording of {missing[0]} (and {len(missing) - 1} more images)")
        groups = np.array([known[name] for name in task.names])
    if len(np.unique(groups)) < 2:
        raise UserError(f"--split recording: all images of {frames.folder} are of one recording")
    return groups


def _by_recording(groups, task, seed):
    """Hold out half of the recordings, groups (N,), of all classes; test images of classes not trained are left out."""
    train, test = hold_out(groups, np.zeros(len(groups)), len(np.unique(groups)) // 2, seed)
    untrained = np.setdiff1d(task.labels[test], task.labels[train])
    if len(untrained):
        left_out = ", ".join(task.classes[label] for label in untrained)
        print(f"seed {seed}: no training recording has {left_out}; their test images are left out")
    return train, test[~np.isin(task.labels[test], untrained)]


def _read_split_file(path, names):
    """The (train, test) split in a user's JSON file, as indices into names."""
    content = files.read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(side), list) for side in ("train", "test")):
        raise UserError(f"--split-file {path} is not {{'train': [names], 'test': [names]}}")
    sides = [[str(name) for name in content[side]] for side in ("train", "test")]
    index = {name: i for i, name in enumerate(names)}
    if unknown := [name for side in sides for name in side if name not in index]:
        raise UserError(f"--split-file {path}: {unknown[0]} (and {len(unknown) - 1} more) is not among the images")
    if both := sorted(set(sides[0]) & set(sides[1])):
        raise UserError(f"--split-file {path} has {both[0]} on both sides; training images cannot be test images")
    return tuple(np.unique(np.array([index[name] for name in side], int)) for side in sides)
