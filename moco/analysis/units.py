"""Statistics of units from their activations: class means, selectivity, top images, covariance; without rows of NaN.

Activations are arrays (N, C), a row for each image, in memory or on disk; they are read some thousand rows at a time.
"""

import numpy as np

BLOCK = 4096  # rows


def _known_rows(rows):
    """Yield parts of rows (N, C) without those of NaN: their numbers (n,), and the rows (n, C) in float64."""
    for start in range(0, len(rows), BLOCK):
        block = np.array(rows[start : start + BLOCK], np.float64)
        known = np.flatnonzero(~np.isnan(block[:, 0]))
        yield start + known, block[known]


def class_means(rows, labels, n_classes):
    """Means (n_classes, C) of rows (N, C) with labels (N,) over each class, and the number of rows (n_classes,).

    Means of classes without images are NaN.
    """
    sums, counts = np.zeros((n_classes, rows.shape[1])), np.zeros(n_classes, int)
    for numbers, block in _known_rows(rows):
        for label in np.unique(labels[numbers]):
            of_class = labels[numbers] == label
            sums[label] += block[of_class].sum(0)
            counts[label] += of_class.sum()
    with np.errstate(invalid="ignore"):
        return sums / counts[:, None], counts


def selectivity(class_means):
    """(selectivity, preferred_class) of units, both (C,), from their mean activations for each class (K, C).

    Selectivity is (m - r) / (m + r), where m is the mean activation for the preferred class, which has the highest
    mean, and r the mean of the means of all other classes (Orhan, Gupta & Lake 2020, section 5). It is 0 for a unit
    that responds equally to all classes and 1 for one that responds to a single class; 0 is also the value of a unit
    that is silent for all classes, or with m + r = 0. Classes without images, whose means are NaN, are ignored.
    preferred_class is an index into class_means. ValueError for fewer than two classes with images.
    """
    known = np.flatnonzero(~np.isnan(class_means).all(1))
    if len(known) < 2:
        raise ValueError("selectivity compares at least two classes")
    means = class_means[known]
    highest = means.max(0)
    others = (means.sum(0) - highest) / (len(means) - 1)
    total = highest + others
    values = np.divide(highest - others, total, out=np.zeros_like(total), where=total != 0)
    return values, known[means.argmax(0)]


def top_images(rows, units, k):
    """The k highest activations of some units, highest first, and their row numbers: both (min(k, n), len(units)).

    n: the number of rows (N, C) that are not NaN. The order of equal values is kept.
    """
    values = np.array(rows[:, units])
    order = np.argsort(-values, axis=0, kind="stable")[: min(k, np.count_nonzero(~np.isnan(values[:, 0])))]
    return np.take_along_axis(values, order, 0), order


def covariance(rows):
    """The covariance (C, C) of rows (N, C), divided by the number of rows."""
    n = sum(len(block) for _, block in _known_rows(rows))
    mean = sum(block.sum(0) for _, block in _known_rows(rows)) / n
    return sum((block - mean).T @ (block - mean) for _, block in _known_rows(rows)) / n
