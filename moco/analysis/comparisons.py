"""Differences between models that were tested on the same splits, and their uncertainty."""

import itertools

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LINES = 12  # of text at most


def corrected_t(differences, n_train, n_test):
    """(low, high, p) of the mean of differences (k,), one for each of k splits: the corrected resampled t-test.

    Splits share images, so that the variance over splits underestimates that over data sets: the variance of the mean
    is taken as (1/k + n_test/n_train) s^2, with k - 1 degrees of freedom (Nadeau & Bengio 2003). n_train, n_test:
    images on the two sides. It assumes random splits of independent images, and differences that are normal; with a
    small share of the training images it is conservative, as the sets that it trains on hardly overlap. low, high: of
    the CONFIDENCE interval; p: of no difference, two-sided.
    """
    k, mean = len(differences), float(np.mean(differences))
    error = np.sqrt((1 / k + n_test / n_train) * np.var(differences, ddof=1))
    if error < 1e-12:  # all differences are equal
        return mean, mean, float(abs(mean) < 1e-12)
    half = error * stats.t.ppf((1 + CONFIDENCE) / 2, k - 1)
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, k - 1))


def mcnemar(a, b):
    """The two-sided p of McNemar's exact test that two models are right equally often.

    a, b: (N,) whether each is right on each of N test images. Only images on which one of them is right count: these
    are binomial with probability 1/2. It assumes independent images, which neighboring frames of a video are not, and
    says nothing of other training images.
    """
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def compare(models):
    """A dict for each task and pair of models whose splits are the same.

    models: {model: {task: entry}}, entries as accuracy.summarize() makes them. Each has task, models (a, b),
    difference (of top-1 accuracy, a - b), test, p, and for several splits low and high.
    """
    found = []
    tasks = dict.fromkeys(task for by_task in models.values() for task in by_task)
    for task in tasks:
        entries = {name: by_task[task] for name, by_task in models.items() if "splits" in by_task.get(task, ())}
        for (a, first), (b, second) in itertools.combinations(entries.items(), 2):
            if first["splits"] == second["splits"]:
                found.append({"task": task, "models": [a, b], **_difference(first, second)})
    return found


def _difference(first, second):
    """The difference of two entries on the same splits."""
    if "hits" in first:
        a, b = (np.array(list(entry["hits"])) == "1" for entry in (first, second))
        return {"difference": float(a.mean() - b.mean()), "test": "McNemar, exact", "p": mcnemar(a, b)}
    differences = np.subtract(first["each"], second["each"])
    low, high, p = corrected_t(differences, np.mean(first["train_images"]), np.mean(first["test_images"]))
    test = f"corrected resampled t, {len(differences)} splits"
    return {"difference": float(differences.mean()), "low": low, "high": high, "test": test, "p": p}


def text(found):
    """The comparisons as lines of text, in % of top-1 accuracy; none if they are more than LINES."""
    if len(found) > LINES:
        return f"{len(found)} comparisons of models: see comparisons in results.json"
    lines = []
    for each in found:
        interval = f" [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]" if "low" in each else ""
        a, b = each["models"]
        lines.append(f"{a} - {b}, {each['task']}: {100 * each['difference']:+.1f}{interval}, p = {each['p']:.2g}")
    return "\n".join(lines)
