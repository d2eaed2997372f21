"""Classify labeled images linearly by their histograms of oriented gradients (HOG): how far do edges alone go?

    python hog_baseline.py toybox --split iid exemplar --seeds 5 --save-dir hog

Input: a folder with one folder of images per class, all of one size. Output, in --save-dir: the printed table as
results.json and accuracies.pdf, the confusion matrix, the predictions by file name, and every split, all as
linear_decoding.py writes them; its --compare hog/results.json includes them in its own table and figure.

Features are kept on disk, 4 bytes per value; a fit loads those of its training images. For 84,000 images of 224x224
this takes 4 GB of disk, and 2 GB of memory if half of them are used for training.
"""

from collections import defaultdict
from functools import partial

import numpy as np
from skimage.feature import hog
from sklearn.linear_model import SGDClassifier

from moco import cli, files
from moco.analysis import features, report
from moco.cli import UserError
from moco.data import augment
from moco.data.folders import read_part
from moco.videos.pool import WorkerPool

BLOCK = 48  # pixels: 3x3 cells
IMAGES_PER_WORKER = 200  # of 224x224 pixels; they take as long as the start of a worker


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    report.add_flags(parser)
    return parser.parse_args(argv)


def hog_features(image):
    """The HOG of image (H, W, 3) uint8, float32 (n,): 9 orientations, 16x16 cells, 3x3 blocks; n = 11664 for 224x224.

    Each pixel contributes the gradient of its strongest color (Dalal & Triggs 2005).
    """
    return hog(image, 9, (16, 16), (3, 3), block_norm="L2", channel_axis=-1).astype(np.float32)


def read_features(location, report=None):
    """(shape, HOG) of the image at FrameFolder.location(), or the reason why it has none. report: of WorkerPool."""
    try:
        image = augment.decode(read_part(*location), location[0])
    except (augment.BadImage, OSError) as error:
        return str(error)
    if min(image.shape[:2]) < BLOCK:
        return f"it is smaller than a block of {BLOCK} pixels"
    return image.shape, hog_features(image)


def all_features(frames, images, workers, cache):
    """The HOGs (N, n) of some images of frames, as an array on disk; NaN for images that cannot be read.

    images: (N,) increasing indices. cache: folder in which features are kept. UserError if sizes differ.
    """

    def compute(needed):
        paths, locations = [frames.path(i) for i in needed], [frames.location(i) for i in needed]
        known = (read_features(frames.location(i)) for i in np.setdiff1d(images, needed))
        size = next((result[0] for result in known if not isinstance(result, str)), None)
        processes = min(workers, len(paths) // IMAGES_PER_WORKER)
        with WorkerPool(processes) as pool, cli.Progress(len(paths), "HOG", "images") as progress:
            for index, result in pool.as_completed(read_features, locations):
                progress.update()
                if isinstance(result, str):
                    progress.write(f"{paths[index]}: {result}; left out")
                    continue
                shape, row = result
                size = size or shape
                if shape != size:
                    sizes = " and ".join(f"{width}x{height}" for height, width, _ in (shape, size))
                    raise UserError(f"{paths[index]} differs in size from other images ({sizes}); HOG needs one size")
                yield needed[index : index + 1], [row[None]]

    path = cache / f"{features.cache_key(frames, images, 'hog')}.npy"
    if not path.exists():
        features.add_to_index(path, f"HOG of {len(images)} images in {frames.folder}")
    return features.compute_rows([path], frames, images, compute)[0]


def published(x, y, seed, workers):
    """A linear classifier of features x (N, C) and labels y (N,) as published: hinge loss, L2, stochastic gradients."""
    classifier = SGDClassifier(
        loss="hinge", penalty="l2", alpha=1e-4, max_iter=250, random_state=seed, n_jobs=max(workers, 1)
    )
    return classifier.fit(x, y)


def normalized(x, y, seed, workers):
    """The published classifier, fitted on features standardized by x, but for features as they are."""
    mean, factor = report.standardization(x)
    classifier = published((x - mean) * factor, y, seed, workers)
    classifier.coef_, classifier.intercept_ = report.fold(classifier.coef_, classifier.intercept_, mean, factor)
    return classifier


def main(argv=None):
    args = parse_args(argv)
    evaluation = report.Evaluation(vars(args))
    evaluation.check_names(["HOG"])
    own = {fit.__name__: partial(fit, workers=args.workers) for fit in (published, normalized)}
    fits = report.chosen_fits(args.readout, args.knn, **own)
    for task in evaluation.tasks:
        cache = files.make_output_dir(args.features_dir or evaluation.folder / "features")
        rows = all_features(evaluation.frames, task.images, args.workers, cache)
        task, scores = task.drop(np.isnan(rows[:, 0])), defaultdict(list)
        for seed, (train, test) in task.splits.items():
            x, y = rows[train], task.labels[train]
            for name, fit in fits.items():
                scores[name].append(report.class_scores(fit(x, y, seed), rows, test, len(task.classes)))
        evaluation.add("HOG", task, scores)
    files.write_args(evaluation.folder, cli.flags(args))
    evaluation.finish()


if __name__ == "__main__":
    cli.run(main)
