"""Differences between models that were tested on the same splits, and their uncertainty."""

import itertools

import numpy as np

CONFIDENCE = 0.95
LINES = 12  # of text at most


def corrected_t(differences, n_train, n_test):
    """(low, high, p) of the mean of differences (k,), one for each of k splits: the corrected resampled t-test.

    Splits share images, so that the variance over splits underestimates that over data sets: the variance of the mean
    is taken as (1/k + n_test/n_train) s^2, with k - 1 degrees of freedom (Nadeau & Bengio 2003). n_train, n_test:
    images on the two sides. It assumes random splits of independent images, and differences that are normal; with a
    small share of the training images it is conservative, as the sets that it trains on hardly overlap. low, high: of
    the CONFIDENCE interval; p: of no difference, two-sided. All are None if all differences are equal, which tells
    nothing of their variance.
    """
    from scipy import stats  # here and below, as it takes half a second

    k = len(differences)
    mean = float(np.mean(differences))
    error = np.sqrt((1 / k + n_test / n_train) * np.var(differences, ddof=1))
    if error < 1e-12:  # all differences are equal
        return None, None, None
    half = error * stats.t.ppf((1 + CONFIDENCE) / 2, k - 1)
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, k - 1))


def mcnemar(a, b):
    """The two-sided p of McNemar's exact test that two models are right equally often.

    a, b: (N,) whether each is right on each of N test images. Only images on which one of them is right count: these
    are binomial with probability 1/2. It assumes independent images, which neighboring frames of a video are not, and
    does not account for the choice of training images.
    """
    from scipy import stats

    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def compare(models):
    """A dict for each task and pair of models whose splits are the same.

    models: {model: {task: entry}}, entries as accuracy.summarize() makes them. Each has task, models (a, b),
    difference (of top-1 accuracy, a - b), test, p, and for several splits low and high.
    """
    comparisons = []
    tasks = dict.fromkeys(task for by_task in models.values() for task in by_task)
    for task in tasks:
        entries = {name: by_task[task] for name, by_task in models.items() if "splits" in by_task.get(task, ())}
        for (a, first), (b, second) in itertools.combinations(entries.items(), 2):
            if first["splits"] == second["splits"]:
                comparisons.append({"task": task, "models": [a, b], **_difference(first, second)})
    return comparisons


def _difference(first, second):
    """The difference of two entries on the same splits.

    On a single split, which may have several seeds, McNemar's test is of the first seed.
    """
    differences = np.subtract(first["each"], second["each"])
    if "hits" in first:
        a, b = (np.array(list(entry["hits"])) == "1" for entry in (first, second))
        test = "McNemar, exact" if len(differences) == 1 else "McNemar, exact, first seed"
        return {"difference": float(differences.mean()), "test": test, "p": mcnemar(a, b)}
    low, high, p = corrected_t(differences, np.mean(first["train_images"]), np.mean(first["test_images"]))
    test = f"corrected resampled t, {len(differences)} splits"
    return {"difference": float(differences.mean()), "low": low, "high": high, "test": test, "p": p}


def text(comparisons):
    """The comparisons as lines of text, in % of top-1 accuracy; none if they are more than LINES."""
    if len(comparisons) > LINES:
        return f"{len(comparisons)} comparisons of models: see comparisons in results.json"
    lines = []
    for each in comparisons:
        a, b = each["models"]
        line = f"{a} - {b}, {each['task']}: {100 * each['difference']:+.1f}"
        if each.get("low") is not None:
            line += f" [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
        if each["p"] is None:
            lines.append(f"{line} in every split, which gives no interval")
        else:
            lines.append(f"{line}, p = {each['p']:.2g} ({each['test']})")
    return "\n".join(lines)
