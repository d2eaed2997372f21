"""Embeddings of many images: which images, their groups, how dissimilar embeddings are, and how alike two networks."""

import os
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path

import numpy as np

from moco import files
from moco.analysis import features, splits
from moco.cli import UserError
from moco.data import folders, manifest, recordings

SOURCE = ("recording", "video", "frame", "second", "child", "date", "age_months")
METRICS = {"correlation": "1 - correlation", "cosine": "1 - cosine", "euclidean": "Euclidean distance"}
RDM_ITEMS = 20_000  # images or groups in a dissimilarity matrix, which then has 1.6 GB
COMPONENTS = 50  # principal components that t-SNE starts from
PERPLEXITY = 30  # of t-SNE, or a third of the other rows
VARIES = 1e-6  # smallest deviation of what varies, as a share of its size; float32 rounds at 1e-7
RESAMPLES = 1000  # of a bootstrap
RESAMPLED_ITEMS = 2000  # more take minutes, and have narrow intervals

# --- images


class ImageList:
    """The images in the column 'file' of a CSV table, relative to the table, in the form of a FrameFolder.

    Their classes are in the column 'class' or, without it, the names of their folders. rows: further columns of each
    image, {column: cell}. UserError for a table that cannot be read, and for files that do not exist.
    """

    def __init__(self, path):
        self.folder = Path(path).parent
        self.rows = [row for _, row in files.read_table(path, "file")]
        self._names = [row.pop("file") for row in self.rows]
        for i, name in enumerate(self._names):
            if not self.path(i).is_file():  # its encoding may be that of the table, not UTF-8
                self._names[i] = os.fsdecode(name.encode("cp1252", "replace"))
        if missing := [name for i, name in enumerate(self._names) if not self.path(i).is_file()]:
            raise UserError(f"{path}: there is no file {missing[0]} (and {len(missing) - 1} more) in {self.folder}")
        classes = [row.pop("class", "") or self.path(i).resolve().parent.name for i, row in enumerate(self.rows)]
        self.classes = list(dict.fromkeys(classes))
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = np.array([number[name] for name in classes])

    def __len__(self):
        return len(self._names)

    def name(self, i):
        """The file of image i as the table has it, printable."""
        return files.printable(self._names[i])

    def path(self, i):
        """The path of image i."""
        return self.folder / self._names[i]

    def read(self, i):
        """The bytes of the file of image i; OSError if it cannot be read, UserError if the disk fails for long."""
        return folders.read_part(self.path(i))

    def source(self, i):
        """None: no manifest says where an image is from."""

    def label(self, i):
        """The label of image i: an index into classes."""
        return self._labels[i]

    def labels(self):
        """The labels of all images, (N,)."""
        return self._labels


def every_nth(frames, n):
    """Sorted indices of every n-th image in time of each recording or, without a manifest, of each class."""
    if n == 1:
        return np.arange(len(frames))
    if frames.source(0) is None:
        return splits.every_nth(frames.name, frames.labels(), n)
    plan = manifest.load(frames.folder)
    return np.concatenate([np.array(plan.video_images(number)[::n], int) for number in range(len(plan.videos))])


def shard(images, i, n):
    """Part i of n of images (N,): whole batches, so that their features are those of one run to the bit."""
    n_batches = -(-len(images) // features.BATCH)
    start, end = (features.BATCH * (n_batches * part // n) for part in (i, i + 1))
    return images[start:end]


def table(frames, images):
    """Yield the rows of images.csv for some images (indices) of frames, as lists: first the names of its columns."""
    rows = getattr(frames, "rows", None)
    yield ["file", "class", *(rows[0] if rows else SOURCE if frames.source(0) else ())]
    for i in images:
        row = [frames.name(i), frames.classes[frames.label(i)]]
        if rows:
            row += rows[i].values()
        elif source := frames.source(i):
            known = source.recording
            row += [recordings.chapter(source.name)[0], source.name, source.frame, round(source.second, 3)]
            row += [known.child, known.date, known.age_months]
        yield row


# --- groups of images


def group_images(table, columns):
    """The groups of images by some columns of their table: (groups, labels).

    table: as table() gives it. columns: names of columns, where age_months counts in whole months; or COLUMN:BINS with
    ranges of numbers such as age_months:6-12,12-18. groups: the cells of each, in natural order. labels: (N,) the
    number of each image's group; for images in no range, the number of groups. UserError for an unknown column.
    """
    table = iter(table)
    names = next(table)
    cells, ranks = zip(*(_group_column(text, names) for text in columns), strict=True)
    keys = [tuple(cell(row) for cell in cells) for row in table]
    known = {key for key in keys if None not in key}
    groups = sorted(known, key=lambda key: [rank(value) for rank, value in zip(ranks, key, strict=True)])
    number = {key: label for label, key in enumerate(groups)}
    return groups, np.array([number.get(key, len(groups)) for key in keys])


def _group_column(text, names):
    """Functions from a row to its cell in a column of groups, None for no group, and from that to its rank in order.

    text: of --group-by. names: of the columns of a row.
    """
    name, bins = (text, "") if text in names else text.rpartition(":")[::2]
    if name not in names:
        raise UserError(f"--group-by {text}: images.csv has the columns {', '.join(names)}")
    try:
        i, bins = names.index(name), {each: recordings.age_range(each) for each in bins.split(",") if each}
    except ArgumentTypeError as error:
        raise UserError(f"--group-by {text}: {error}") from error

    def cell(row):
        number = np.nan
        with suppress(ValueError, TypeError):
            number = float(row[i])
        if bins:
            return next((each for each, (low, high) in bins.items() if low <= number < high), None)
        if name == "age_months":
            return f"{number // 1:.0f}".removeprefix("nan")
        return "" if row[i] is None else str(row[i])

    return cell, list(bins).index if bins else recordings.natural_key


# --- similarity; rows of NaN are left out


def dissimilarity(embeddings, metric):
    """The representational dissimilarity matrix (N, N) of embeddings (N, C), float32.

    metric: 1 - Pearson's correlation, 1 - cosine, or the Euclidean distance. NaN for rows of NaN and, where it is not
    defined, for rows that are 0 everywhere (cosine) or do not vary (correlation).
    """
    from sklearn.metrics import pairwise_distances  # here and below, as it takes a second

    rows = np.array(embeddings, np.float64)
    known, sizes = ~np.isnan(rows[:, 0]), np.linalg.norm(rows, axis=1)
    if metric == "correlation":  # is the cosine of centered rows
        rows, metric = rows - rows.mean(1, keepdims=True), "cosine"
    if metric == "cosine":
        known &= np.linalg.norm(rows, axis=1) > VARIES * sizes
    matrix = np.full((len(known), len(known)), np.nan, np.float32)
    if known.any():
        matrix[np.ix_(known, known)] = pairwise_distances(rows[known], metric=metric)
    return matrix


def read_matrix(path, n):
    """The dissimilarity matrix (n, n) in the .npy file at path; UserError if it is none, or of another size."""
    try:
        matrix = np.load(path, allow_pickle=False)
        matrix = matrix.astype(np.float64)
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise UserError(f"--rdm-with {path}: it is no .npy file of a matrix of numbers") from error
    if matrix.shape != (n, n):
        size = " x ".join(map(str, matrix.shape))
        raise UserError(f"--rdm-with {path}: it is {size}; the matrices here are {n} x {n}, in the order of the table")
    if not np.allclose(matrix, matrix.T, equal_nan=True):
        raise UserError(f"--rdm-with {path}: it is not symmetric, so it has no dissimilarities of pairs")
    return matrix


def compare(first, second, seed):
    """(rho, low, high, pairs): Spearman's correlation of two dissimilarity matrices (N, N), its 95 % interval, pairs.

    It is over the entries above the diagonal that are numbers in both. The interval has the percentiles over RESAMPLES
    samples of the items with replacement, in each of which an item's pairs with its own copies are left out (Nili et
    al. 2014, A toolbox for representational similarity analysis). So it says how much rho would vary with other items
    of the same kind, provided that these are a random sample of them; not with other networks, children or raters. NaN
    for more than RESAMPLED_ITEMS items, and where nothing varies.
    """
    rows, columns = np.nonzero(np.triu(~np.isnan(first + second), 1))
    values = [np.unique(matrix[rows, columns], return_inverse=True)[1] for matrix in (first, second)]
    rho, items = _spearman(*values, np.ones(len(rows))), np.unique([rows, columns])
    if not 2 < len(items) <= RESAMPLED_ITEMS:
        return rho, np.nan, np.nan, len(rows)
    draws, copies, found = np.random.default_rng(seed), np.zeros(len(first)), []
    for _ in range(RESAMPLES):
        copies[items] = draws.multinomial(len(items), np.full(len(items), 1 / len(items)))
        found.append(_spearman(*values, copies[rows] * copies[columns]))
    low, high = np.nanpercentile(found, (2.5, 97.5)) if np.isfinite(found).any() else (np.nan, np.nan)
    return rho, low, high, len(rows)


def _spearman(first, second, weights):
    """Spearman's correlation of values, numbered in their order, (P,) each; weights: how often each of them counts."""
    ranks = []
    for values in (first, second):
        sizes = np.bincount(values, weights)  # of ties, which share their mean rank
        ranks.append((np.cumsum(sizes) - sizes / 2)[values])
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        a, b = (each - weights @ each / weights.sum() for each in ranks)
        return weights @ (a * b) / np.sqrt((weights @ a**2) * (weights @ b**2))


def tsne(embeddings, seed):
    """(points, perplexity) of scikit-learn's t-SNE on the first principal components of embeddings (N, C), in float32.

    points: (N, 2), NaN for rows of NaN. UserError for fewer than four rows, and if all are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    known = ~np.isnan(embeddings[:, 0])
    rows = np.asarray(embeddings[known], np.float32)
    if len(rows) < 4:
        raise UserError(f"t-SNE needs at least four embeddings, not {len(rows)}")
    size = np.abs(rows).max()
    if not np.ptp(rows, axis=0).max() > VARIES * size:  # scikit-learn would divide by zero, and crash
        raise UserError("t-SNE needs embeddings that differ; these are all the same")
    if not 1e-12 < size < 1e12:  # their squares would leave the range of float32
        rows = rows / size
    rows = PCA(min(COMPONENTS, *rows.shape), random_state=seed).fit_transform(rows)
    points = np.full((len(known), 2), np.nan, np.float32)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    points[known] = TSNE(perplexity=perplexity, random_state=seed).fit_transform(rows)
    return points, perplexity
