"""Readouts of features in scikit-learn's form: logistic regression, nearest neighbors, and the scores of either."""

import warnings

import numpy as np

from moco import cli
from moco.analysis import splits

C_VALUES = np.logspace(-5, 3, 9)  # inverse strengths of the L2 penalty
VALIDATION = 0.2  # of the training images of each class
MAX_ITERATIONS = 1000
TEMPERATURE = 0.07  # of nearest neighbors' votes, as in DINO (Caron et al. 2021)
BLOCK = 1024  # test images at a time


def add_flags(parser):
    """Add the flags that choose readouts to parser."""
    parser.add_argument(
        "--readout",
        nargs="+",
        choices=READOUTS,
        default=["published"],
        help="linear classifiers; published: a linear layer trained by Adam, for HOG a linear SVM by SGD; logistic: "
        "scikit-learn's LogisticRegression, its C chosen on a fifth of the training images, as the model NAME-logistic",
    )
    parser.add_argument(
        "--knn",
        type=cli.number(int, 1),
        metavar="K",
        help="also report K-nearest-neighbor accuracies, by DINO's rule: votes weighted by exp(cosine / 0.07)",
    )


def result_name(model, readout):
    """The name of a model with a readout in results."""
    return model if readout == "published" else f"{model}-{readout}"


def logistic(x, y, seed):
    """The LogisticRegression of features x (N, C) and labels y (N,), on all of them.

    Its C is the smallest of C_VALUES with the highest accuracy on VALIDATION of the images of each class, drawn by
    seed, when fitted on the others; 1 if no class has an image to spare.
    """
    from sklearn.exceptions import ConvergenceWarning  # here and below, as it takes a second

    fitted = splits.nested_share(np.arange(len(y)), y, 1 - VALIDATION, seed)
    held_out = np.setdiff1d(np.arange(len(y)), fitted)
    best = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the final fit it is printed
        if len(held_out):
            fits = [_regression(c).fit(x[fitted], y[fitted]) for c in C_VALUES]
            best = C_VALUES[np.argmax([fit.score(x[held_out], y[held_out]) for fit in fits])]
        classifier = _regression(best).fit(x, y)
    if classifier.n_iter_.max() >= MAX_ITERATIONS:
        print(f"note: logistic regression with C = {best:g} did not converge in {MAX_ITERATIONS} iterations")
    return classifier


# Readouts besides the published ones of each script: functions like logistic(), for whose results class_scores() is.
FITS = {"logistic": logistic}
READOUTS = ("published", *FITS)


def _regression(c):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=MAX_ITERATIONS)


def class_scores(classifier, rows, test, n_classes):
    """The scores (n_test, n_classes) of the test images, indices into rows (N, C); -inf for classes not trained on.

    classifier: has decision_function and classes_, as scikit-learn's linear classifiers.
    """
    scores = np.full((len(test), n_classes), -np.inf)
    for start in range(0, len(test), BLOCK):
        part = slice(start, start + BLOCK)
        margins = classifier.decision_function(rows[test[part]])
        scores[part, classifier.classes_] = np.stack([-margins, margins], 1) if margins.ndim == 1 else margins
    return scores


def knn_scores(train, labels, test, k, n_classes):
    """Scores (M, n_classes) of test features (M, C) from the k training features (N, C) of highest cosine similarity.

    Each neighbor adds exp(cosine / TEMPERATURE) to the score of its class.
    """
    train = train / np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    test = test / np.maximum(np.linalg.norm(test, axis=1, keepdims=True), 1e-12)
    k = min(k, len(train))
    scores = np.zeros((len(test), n_classes))
    for start in range(0, len(test), BLOCK):
        cosine = test[start : start + BLOCK] @ train.T
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        rows = np.arange(len(cosine))[:, None]
        votes = np.exp(cosine[rows, nearest].astype(np.float64) / TEMPERATURE)
        np.add.at(scores[start : start + BLOCK], (rows, labels[nearest]), votes)
    return scores
