"""Embeddings of many images: which images, what is known of each, how dissimilar their embeddings are."""

import os
from pathlib import Path

import numpy as np

from moco import files
from moco.analysis import features, splits
from moco.cli import UserError
from moco.data import folders, manifest, recordings

SOURCE = ("recording", "video", "frame", "second", "child", "date", "age_months")
METRICS = ("correlation", "cosine", "euclidean")
RDM_IMAGES = 20_000
COMPONENTS = 50  # principal components that t-SNE starts from

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


# --- similarity; rows of NaN are left out


def check_rdm_size(n):
    """UserError if a dissimilarity matrix of n images is too large."""
    if n > RDM_IMAGES:
        raise UserError(
            f"--rdm: the matrix of {n} images would have {4 * n * n / 1e9:.1f} GB; "
            f"at most {RDM_IMAGES} images are compared, choose fewer with --every"
        )


def dissimilarity(embeddings, metric):
    """The representational dissimilarity matrix (N, N) of embeddings (N, C), float32; NaN for rows of NaN.

    metric: 1 - Pearson's correlation, 1 - cosine, or the Euclidean distance.
    """
    from sklearn.metrics import pairwise_distances  # here and below, as it takes a second

    known = ~np.isnan(embeddings[:, 0])
    rows = embeddings[known].astype(np.float64)
    if metric == "correlation":  # is the cosine of centered rows
        rows, metric = rows - rows.mean(1, keepdims=True), "cosine"
    matrix = np.full((len(known), len(known)), np.nan, np.float32)
    matrix[np.ix_(known, known)] = pairwise_distances(rows, metric=metric)
    return matrix


def tsne(embeddings, seed):
    """Coordinates (N, 2) by scikit-learn's t-SNE on the first principal components of embeddings (N, C), in float32.

    NaN for rows of NaN. UserError for fewer than four images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    known = ~np.isnan(embeddings[:, 0])
    rows = np.asarray(embeddings[known], np.float32)
    if len(rows) < 4:
        raise UserError(f"--tsne needs at least four images; {len(rows)} can be read")
    rows = PCA(min(COMPONENTS, *rows.shape), random_state=seed).fit_transform(rows)
    points = np.full((len(known), 2), np.nan, np.float32)
    points[known] = TSNE(perplexity=min(30, (len(rows) - 1) / 3), random_state=seed).fit_transform(rows)
    return points
