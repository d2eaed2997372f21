"""How far edges alone go: classify labelled images linearly by their histograms of oriented gradients (HOG).

    python hog_baseline.py toybox --split iid exemplar --seeds 5 --save-dir hog

In: a folder with a folder of images per class, all of one size. Out, in --save-dir: the printed table as results.json
and accuracies.pdf, the confusion matrix, the predictions by file name, and every split, all as linear_decoding.py
writes them, which takes hog/results.json into its own table and figure by --beside.

Features stay on disk, 4 bytes a value; a fit holds those of its training images. So 84 000 images of 224x224 take 4 GB
of disk, and 2 GB of memory when half of them train.
"""

import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from skimage.feature import hog
from sklearn.linear_model import SGDClassifier

from moco import cli, files
from moco.analysis import features
from moco.analysis.report import Report
from moco.cli import UserError
from moco.data import augment


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    Report.add_flags(parser)
    return parser.parse_args(argv)


def hog_features(path):
    """The HOG of the image at path, float32 (n,): 9 orientations, 16x16 cells, 3x3 blocks; 11664 for 224x224 pixels.

    Each pixel counts with the gradient of its strongest color (Dalal and Triggs 2005). Raises augment.BadImage.
    """
    with open(path, "rb") as file:
        image = augment.decode(file.read())
    if min(image.shape[:2]) < 48:
        raise augment.BadImage("it is smaller than the 48 pixels of a block")
    found = hog(image, 9, (16, 16), (3, 3), block_norm="L2", channel_axis=-1)
    return found.astype(np.float32)


def readable_features(path):
    """The hog_features of path, or the reason why there are none."""
    try:
        return hog_features(path)
    except (augment.BadImage, OSError) as error:
        return str(error)


def in_processes(function, tasks, workers):
    """Yield function(task) for every task in order, worked out by so many processes; 0 works in this one."""
    if not workers:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(function, tasks, chunksize=4)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (was memory short?); start again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def all_features(frames, images, workers, cache):
    """The HOGs (N, n) of some images of frames, as an array on disk; NaN for images that cannot be read.

    images: (N,) indices. cache: folder where features once computed are kept. UserError where sizes differ.
    """
    path = cache / f"{features.cache_key(frames, images, 'hog')}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    paths, rows = [frames.path(i) for i in images], None
    with files.atomic_write(path) as part, cli.Progress(len(images), "HOG", "images") as progress:
        for i, row in enumerate(in_processes(readable_features, paths, workers)):
            if isinstance(row, str):
                progress.say(f"{paths[i]}: {row}; left out")
                continue
            if rows is None:
                rows = features.empty_rows(part, len(images), len(row))
            if len(row) != rows.shape[1]:
                raise UserError(f"{paths[i]} has another size than the images before it; HOG needs them all alike")
            rows[i] = row
            progress.update()
        if rows is None:
            raise UserError(f"none of the {len(images)} images in {frames.folder} can be read")
        rows.flush()
    return np.load(path, mmap_mode="r")


def readout(x, y, seed, workers):
    """A linear classifier of features x (N, C) and labels y (N,) as published: hinge loss, L2, stochastic gradients."""
    classifier = SGDClassifier(
        loss="hinge", penalty="l2", alpha=1e-4, max_iter=250, random_state=seed, n_jobs=max(workers, 1)
    )
    return classifier.fit(x, y)


def scores(classifier, rows, test, n_classes):
    """The scores (n_test, n_classes) of the images test, some of the rows (N, C) at a time."""
    found = np.full((len(test), n_classes), -np.inf)
    for start in range(0, len(test), 2048):
        part = slice(start, start + 2048)
        margins = classifier.decision_function(rows[test[part]])
        found[part, classifier.classes_] = np.stack([-margins, margins], 1) if margins.ndim == 1 else margins
    return found


def main(argv=None):
    args = parse_args(argv)
    report = Report(args)
    report.expect(["HOG"])
    for task in report.tasks:
        rows = all_features(report.frames, task.images, args.workers, report.cache)
        task, found = task.without(np.isnan(rows[:, 0])), []
        for seed, (train, test) in zip(task.seeds, task.splits, strict=True):
            classifier = readout(rows[train], task.labels[train], seed, args.workers)
            found.append(scores(classifier, rows, test, len(task.classes)))
        report.add("HOG", task, rows, found)
    report.finish()


if __name__ == "__main__":
    cli.run(main)
