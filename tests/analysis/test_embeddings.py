"""Groups, dissimilarities, their correlations and t-SNE: by hand, as SciPy and scikit-learn; rows of NaN left out."""

from itertools import combinations

import numpy as np
import pytest
from scipy.spatial import distance
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from moco.analysis import embeddings
from moco.cli import UserError


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(1, 1, (30, 60)).astype(np.float32)


def matrix_of(values):
    """The symmetric matrix with these values above its diagonal, row by row, and zeros in it."""
    n = round((1 + (1 + 8 * len(values)) ** 0.5) / 2)
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = values
    return matrix + matrix.T


# --- groups


TABLE = [
    ["file", "class", "age_months", "width"],
    ["a", "toy", 6.9, "5"],
    ["b", "toy", 12.1, "5"],
    ["c", "ball", 6.0, "x"],
    ["d", "toy", None, "30"],
    ["e", "toy", "6.5", ""],
]


@pytest.mark.parametrize("columns, groups, labels", [
    (["class"], [("ball",), ("toy",)], [1, 1, 0, 1, 1]),
    (["class", "age_months"], [("ball", "6"), ("toy", ""), ("toy", "6"), ("toy", "12")], [2, 3, 0, 1, 2]),
    (["age_months:12-,6-12"], [("12-",), ("6-12",)], [1, 0, 1, 2, 1]),
    (["width"], [("",), ("5",), ("30",), ("x",)], [1, 1, 3, 2, 0]),
    (["width:-10", "class"], [("-10", "toy")], [0, 0, 1, 1, 1]),
])  # fmt: skip
def test_groups_are_cells_whole_months_or_ranges_in_natural_order(columns, groups, labels):
    found = embeddings.group_images(TABLE, columns)
    assert found[0] == groups and found[1].tolist() == labels


@pytest.mark.parametrize("column, message", [
    ("colour", "images.csv has the columns file, class, age_months, width"),
    ("colour:1-2", "images.csv has the columns"),
    ("age_months:12-6", "12-6 is not a range"),
    ("age_months:young", "young is not a range"),
])  # fmt: skip
def test_groups_by_what_there_is_not_are_refused(column, message):
    with pytest.raises(UserError, match=f"--group-by {column}: {message}"):
        embeddings.group_images(TABLE, ["class", column])


# --- dissimilarity


@pytest.mark.parametrize("metric", embeddings.METRICS)
def test_dissimilarities_are_those_of_scipy_and_nan_for_rows_of_nan(rows, metric):
    rows[20] = rows[3]
    found = embeddings.dissimilarity(rows, metric)
    expected = distance.squareform(distance.pdist(rows.astype(np.float64), metric))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert not found.diagonal().any() and found[3, 20] < 1e-6
    rows[0] = np.nan
    again = embeddings.dissimilarity(rows, metric)
    assert np.isnan(again[0]).all() and np.isnan(again[:, 0]).all()
    np.testing.assert_allclose(again[1:, 1:], found[1:, 1:], atol=1e-6)


@pytest.mark.parametrize("metric, row, is_nan", [
    ("correlation", np.full(60, 7), True),
    ("correlation", np.full(60, 0.1), True),  # whose mean has a rounding error
    ("correlation", np.zeros(60), True),
    ("correlation", 0.1 + 1e-9 * np.arange(60), True),  # less than float32 resolves
    ("correlation", 0.1 + 1e-5 * np.arange(60), False),
    ("cosine", np.full(60, 7), False),
    ("cosine", np.zeros(60), True),
    ("euclidean", np.zeros(60), False),
])  # fmt: skip
def test_the_correlation_of_a_row_that_does_not_vary_is_nan(rows, metric, row, is_nan):
    rows[[2, 5]] = row
    found = embeddings.dissimilarity(rows, metric)
    assert np.isnan(found[[2, 5]]).all() == np.isnan(found[:, 2]).all() == is_nan
    assert np.isfinite(np.delete(np.delete(found, [2, 5], 0), [2, 5], 1)).all()
    rows[:] = row
    assert np.isnan(embeddings.dissimilarity(rows, metric)).all() == is_nan


@pytest.mark.parametrize("content, message", [
    (np.zeros((3, 4)), "it is 3 x 4; the matrices here are 4 x 4"),
    (np.zeros(4), "it is 4; the matrices here"),
    (np.arange(16).reshape(4, 4), "it is not symmetric"),
    (np.full((4, 4), "a"), "it is no .npy file of a matrix of numbers"),
    (np.full((4, 4), None), "it is no .npy file"),
    (b"no array", "it is no .npy file"),
    (None, "it is no .npy file"),
])  # fmt: skip
def test_a_matrix_of_other_items_is_refused(tmp_path, content, message):
    path = tmp_path / "own.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=f"--rdm-with .*own.npy: {message}"):
        embeddings.read_matrix(path, 4)
    np.save(path, matrix_of([1, 2, 3, np.nan, 5, 6]))
    assert np.isnan(embeddings.read_matrix(path, 4)[1, 2])


# --- correlations of matrices


def test_the_correlation_is_that_of_ranks_by_hand():
    rho, _, _, pairs = embeddings.compare(matrix_of([1, 2, 3]), matrix_of([10, 30, 20]), 0)
    assert rho == pytest.approx(0.5) and pairs == 3  # 1 - 6 (0 + 1 + 1) / (3 (9 - 1))
    rho, low, high, pairs = embeddings.compare(matrix_of([1, 2, np.nan, 3, 4, 5]), matrix_of([3, 2, 9, 7, 8, 9]), 0)
    assert rho == pytest.approx(0.9) and pairs == 5 and low <= rho <= high  # 1 - 6 (1 + 1 + 0) / (5 (25 - 1))
    constant = embeddings.compare(matrix_of([1, 2, 3]), np.zeros((3, 3)), 0)
    assert np.isnan(constant[:3]).all() and constant[3] == 3
    assert embeddings.compare(np.full((3, 3), np.nan), np.zeros((3, 3)), 0)[3] == 0


def test_the_interval_is_that_of_resampled_items_without_their_own_copies(monkeypatch):
    monkeypatch.setattr(embeddings, "RESAMPLES", 40)
    random = np.random.default_rng(5)
    first, second = (matrix_of(random.integers(0, 6, 45)) for _ in range(2))  # with many ties
    first[4] = first[:, 4] = np.nan  # an image that cannot be read
    rho, low, high, pairs = embeddings.compare(first, second, 3)
    known = [pair for pair in combinations(range(10), 2) if 4 not in pair]
    values = [[matrix[pair] for pair in known] for matrix in (first, second)]
    assert rho == pytest.approx(spearmanr(*values)[0]) and pairs == 36
    draws, items, found = np.random.default_rng(3), np.delete(np.arange(10), 4), []
    for _ in range(40):
        sample = np.repeat(items, draws.multinomial(9, np.full(9, 1 / 9)))
        chosen = [(i, k) for i, k in combinations(sample, 2) if i != k]
        found.append(spearmanr(*([matrix[pair] for pair in chosen] for matrix in (first, second)))[0])
    np.testing.assert_allclose((low, high), np.nanpercentile(found, (2.5, 97.5)), atol=1e-9)
    assert low < rho < high


def test_many_items_have_no_interval(monkeypatch):
    monkeypatch.setattr(embeddings, "RESAMPLED_ITEMS", 3)
    rho, low, high, pairs = embeddings.compare(matrix_of(range(6)), matrix_of(range(6)), 0)
    assert rho == pytest.approx(1) and np.isnan((low, high)).all() and pairs == 6


@pytest.mark.thorough
def test_correlations_are_those_of_rsatoolbox(rows):
    rsatoolbox = pytest.importorskip("rsatoolbox", reason="rsatoolbox is not installed")
    matrices = [embeddings.dissimilarity(part, "correlation") for part in (rows[:, :20], rows[:, 10:])]
    theirs = [rsatoolbox.rdm.RDMs(matrix[None].astype(float)) for matrix in matrices]
    expected = rsatoolbox.rdm.compare(*theirs, method="spearman").item()
    assert embeddings.compare(*matrices, 0)[0] == pytest.approx(expected, abs=1e-9)


# --- t-SNE


def test_tsne_is_scikit_learns_on_principal_components(rows):
    expected = TSNE(perplexity=29 / 3, random_state=3).fit_transform(PCA(30, random_state=3).fit_transform(rows))
    points, perplexity = embeddings.tsne(rows, 3)
    np.testing.assert_array_equal(points, expected)
    assert perplexity == 29 / 3
    rows[4:] = np.nan
    assert np.isnan(embeddings.tsne(rows, 3)[0]).any(1).tolist() == [False] * 4 + [True] * 26
    with pytest.raises(UserError, match="t-SNE needs at least four embeddings, not 3"):
        embeddings.tsne(rows[1:], 3)


@pytest.mark.parametrize("value", [0, 7, 0.1, 1e-30])
def test_tsne_of_rows_that_are_all_the_same_is_refused(rows, value):
    """Scikit-learn's has a segmentation fault."""
    rows[:] = value
    rows[3] *= 1 + 1e-7
    rows[8] = np.nan
    with pytest.raises(UserError, match="t-SNE needs embeddings that differ"):
        embeddings.tsne(rows, 0)


@pytest.mark.parametrize("scale", [2**-80, 2**80])
def test_tsne_of_an_extreme_scale_is_that_of_another(rows, scale):
    expected, _ = embeddings.tsne(rows / np.abs(rows).max(), 0)
    np.testing.assert_array_equal(embeddings.tsne(rows * np.float32(scale), 0)[0], expected)
