"""Dissimilarity and t-SNE of embeddings: equal to SciPy and to scikit-learn called by hand, rows of NaN left out."""

import numpy as np
import pytest
from scipy.spatial import distance
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from moco.analysis import embeddings
from moco.cli import UserError


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(1, 1, (30, 60)).astype(np.float32)


@pytest.mark.parametrize("metric", embeddings.METRICS)
def test_dissimilarities_are_those_of_scipy(rows, metric):
    rows[20] = rows[3]
    found = embeddings.dissimilarity(rows, metric)
    expected = distance.squareform(distance.pdist(rows.astype(np.float64), metric))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert not found.diagonal().any() and found[3, 20] < 1e-6


def test_unreadable_images_have_nan(rows):
    expected = embeddings.dissimilarity(rows[1:], "cosine")
    rows[0] = np.nan
    found = embeddings.dissimilarity(rows, "cosine")
    assert np.isnan(found[0]).all() and np.isnan(found[:, 0]).all()
    np.testing.assert_array_equal(found[1:, 1:], expected)


def test_a_large_matrix_is_refused_with_its_size():
    embeddings.check_rdm_size(20_000)
    with pytest.raises(UserError, match="the matrix of 100000 images would have 40.0 GB; at most 20000"):
        embeddings.check_rdm_size(100_000)


def test_tsne_is_scikit_learns_on_principal_components(rows):
    expected = TSNE(perplexity=29 / 3, random_state=3).fit_transform(PCA(30, random_state=3).fit_transform(rows))
    np.testing.assert_array_equal(embeddings.tsne(rows, 3), expected)
    rows[4:] = np.nan
    assert np.isnan(embeddings.tsne(rows, 3)).any(1).tolist() == [False] * 4 + [True] * 26
    with pytest.raises(UserError, match="--tsne needs at least four images; 3 can be read"):
        embeddings.tsne(rows[1:], 3)
