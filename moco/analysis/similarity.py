"""Similarity of embeddings: dissimilarity matrices and t-SNE. Rows of NaN are left out."""

import numpy as np

from moco.cli import UserError

RDM_IMAGES = 20_000
METRICS = ("correlation", "cosine", "euclidean")
COMPONENTS = 50  # principal components that t-SNE starts from
MEMORY = 256  # MiB that scikit-learn uses for a block of distances


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
    import sklearn  # here and below, as it takes a second
    from sklearn.metrics import pairwise_distances_chunked

    known = ~np.isnan(embeddings[:, 0])
    rows = embeddings[known].astype(np.float64)
    if metric == "correlation":
        rows -= rows.mean(1, keepdims=True)
    matrix = np.empty((len(rows), len(rows)), np.float32)
    start = 0
    with sklearn.config_context(working_memory=MEMORY):
        for block in pairwise_distances_chunked(rows, metric="euclidean" if metric == "euclidean" else "cosine"):
            end = start + len(block)
            matrix[start:end] = block
            matrix[:start, start:end] = block[:, :start].T  # symmetric to the last digit
            matrix[start:end, start:end] = (block[:, start:end] + block[:, start:end].T) / 2
            start = end
    np.fill_diagonal(matrix, 0)
    if known.all():
        return matrix
    full = np.full((len(known), len(known)), np.nan, np.float32)
    full[np.ix_(known, known)] = matrix
    return full


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
