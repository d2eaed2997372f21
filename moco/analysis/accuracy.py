"""Accuracies of linear classifiers: of a model on a task, differences between models, and the table of all."""

import hashlib
import itertools
import math
from functools import partial

import numpy as np

from moco import files
from moco.cli import UserError

TOYBOX = ["airplane", "ball", "car", "cat", "cup", "duck", "giraffe", "helicopter", "horse", "mug", "spoon", "truck"]
PUBLISHED = {
    "iid": {"TC-SAY": 0.900, "TC-S": 0.885, "TC-A": 0.868, "TC-Y": 0.870},
    "exemplar": {"TC-SAY": 0.575, "TC-S": 0.549, "TC-A": 0.504, "TC-Y": 0.530},
}  # top-1 accuracy of the published ResNeXt-50 32x4d on Toybox
CONFIDENCE = 0.95
MAX_LINES = 12  # of comparisons in words
FEW_SPLITS = 5  # with fewer, a standard deviation is little known


# --- one model on one task


def summarize(task, scores):
    """The entry of one model and task in results.json: top-1, top-5 for more than 5 classes, per class, baselines.

    For classes of unequal size also the balanced accuracy, the mean over the classes in the test images. splits: a
    digest for each seed; hits: if there is one split only, whether the first seed is right on each test image. task:
    splits.Task. scores: for each seed the scores (n_test, K) of its test images.
    """
    from sklearn import metrics  # here and below, as it takes a second

    labels = [task.labels[test] for _, test in task.splits.values()]
    predicted = [each.argmax(1) for each in scores]
    summary = mean_and_std(map(metrics.accuracy_score, labels, predicted))
    if len(task.classes) > 5:
        top5 = partial(metrics.top_k_accuracy_score, k=5, labels=np.arange(len(task.classes)))
        summary["top5"] = mean_and_std(map(top5, labels, scores))
    if len(np.unique(np.bincount(task.labels))) > 1:
        summary["balanced"] = mean_and_std(map(_balanced_accuracy, labels, predicted))
    counts = confusion_matrix(task, scores)
    recalls = zip(task.classes, counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    summary["per_class"] = {name: right / tested if tested else None for name, right, tested in recalls}
    summary["splits"] = [_digest(task, split) for split in task.splits.values()]
    if len(set(summary["splits"])) == 1:
        summary["hits"] = "".join("01"[hit] for hit in (predicted[0] == labels[0]).astype(int))
    if task.share is not None:
        summary |= {"split": task.split, "train_share": task.share}
    return summary | {
        "majority": majority(task),
        "chance": 1 / len(task.classes),
        "train_images": [len(train) for train, _ in task.splits.values()],
        "test_images": [len(test) for _, test in task.splits.values()],
    }


def confusion_matrix(task, scores):
    """Counts (K, K) of the test images of all seeds: rows are true classes, columns predicted ones.

    task, scores: as in summarize().
    """
    from sklearn import metrics

    labels = np.concatenate([task.labels[test] for _, test in task.splits.values()])
    predicted = np.concatenate([each.argmax(1) for each in scores])
    return metrics.confusion_matrix(labels, predicted, labels=np.arange(len(task.classes)))


def _balanced_accuracy(labels, predicted):
    from sklearn import metrics  # whose balanced_accuracy_score warns of predicted classes that are not tested

    return metrics.recall_score(labels, predicted, labels=np.unique(labels), average="macro")


def mean_and_std(values):
    """{'mean', 'std', 'each'} of values; std is the sample standard deviation (n - 1), None for a single value."""
    values = [float(value) for value in values]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "each": values}


def majority(task):
    """The test accuracy of always predicting the largest class of the training images; mean over the seeds."""
    sides = [(task.labels[train], task.labels[test]) for train, test in task.splits.values()]
    return float(np.mean([np.mean(tested == np.bincount(trained).argmax()) for trained, tested in sides]))


def _digest(task, split):
    """A hash of the file names on both sides of a split."""
    text = repr([[task.names[i] for i in side] for side in split])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def published_accuracy(task, model):
    """The published top-1 accuracy, from 0 to 1, of the model of this name on a task; None if there is none."""
    if sorted(name.lower() for name in task.classes) != TOYBOX:
        return None
    return PUBLISHED.get(task.name, {}).get(model.removesuffix("-resnext"))


# --- differences between models that were tested on the same splits, and their uncertainty


def corrected_t(differences, n_train, n_test):
    """(low, high, p) of the mean of differences (k,), one for each of k splits: the corrected resampled t-test.

    Splits share images, so that the variance over splits underestimates that over data sets: the variance of the mean
    is taken as (1/k + n_test/n_train) s^2, with k - 1 degrees of freedom (Nadeau & Bengio 2003). n_train, n_test:
    images on the two sides. It assumes random splits of independent images, and differences that are normal; with a
    small share of the training images, whose sets hardly overlap, the interval is too wide. low, high: of the
    CONFIDENCE interval; p: of no difference, two-sided. All are None if all differences are equal, which tells nothing
    of their variance.
    """
    from scipy import stats

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


def holm(p):
    """p values (m,) corrected for m comparisons (Holm 1979)."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)[np.argsort(order)]


def compare(models):
    """A dict for each task and pair of models whose splits are the same.

    models: {model: {task: entry}}, entries as summarize() makes them. Each has task, models (a, b), difference (of
    top-1 accuracy, a - b), test, p, p_holm (corrected for the number of all comparisons), notes (what to mind, in
    words), and for several splits low and high.
    """
    comparisons = []
    for task in task_names(models):
        entries = {name: by_task[task] for name, by_task in models.items() if "splits" in by_task.get(task, ())}
        for (a, first), (b, second) in itertools.combinations(entries.items(), 2):
            if first["splits"] == second["splits"]:
                comparisons.append({"task": task, "models": [a, b], **_difference(first, second)})
    tested = [each for each in comparisons if each["p"] is not None]
    for each, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
        each["p_holm"] = float(p)
    return comparisons


def _difference(first, second):
    """The difference of two entries on the same splits.

    On a single split, which may have several seeds, McNemar's test is of the first seed.
    """
    differences = np.subtract(first["each"], second["each"])
    found, n = {"difference": float(differences.mean())}, len(differences)
    if "hits" in first:
        a, b = (np.array(list(entry["hits"])) == "1" for entry in (first, second))
        return found | {"test": "McNemar, exact" + ", first seed" * (n > 1), "p": mcnemar(a, b), "notes": []}
    low, high, p = corrected_t(differences, np.mean(first["train_images"]), np.mean(first["test_images"]))
    notes = [f"the standard deviation of {n} splits is uncertain: use {FEW_SPLITS} --seeds or more"] * (n < FEW_SPLITS)
    if first.get("train_share", 1) < 1:
        notes.append("with a share of the training images intervals are too wide: training sets hardly overlap")
    return found | {"low": low, "high": high, "test": f"corrected resampled t, {n} splits", "p": p, "notes": notes}


def describe(comparisons):
    """Comparisons as lines of text, in % of top-1 accuracy, and their notes; none if they are more than MAX_LINES."""
    if len(comparisons) > MAX_LINES:
        return f"{len(comparisons)} comparisons of models: see comparisons in results.json"
    lines, tested = [], sum(each["p"] is not None for each in comparisons)
    for each in comparisons:
        a, b = each["models"]
        line = f"{a} - {b}, {each['task']}: {100 * each['difference']:+.1f}"
        if each.get("low") is not None:
            line += f" [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
        if each["p"] is None:
            lines.append(f"{line} in every split, which gives no interval")
        else:
            lines.append(f"{line}, p = {each['p_holm']:.2g} ({each['test']})")
    notes = [f"p values are corrected for {tested} comparisons (Holm)"] * (tested > 1)
    return "\n".join(lines + notes + list(dict.fromkeys(note for each in comparisons for note in each["notes"])))


# --- results of several models: {model: {task: entry}}, entries as summarize() makes them


def read_results(paths):
    """The models of the results.json files at paths; UserError for a file without results, or for a clash."""
    models = {}
    for path in paths:
        results = files.read_json(path)
        try:
            entries = [entry for by_task in results["models"].values() for entry in by_task.values()]
            finite = [math.isfinite(entry[key]) for entry in entries for key in ("mean", "majority", "chance")]
        except (KeyError, TypeError, AttributeError):
            finite = []
        if not finite or not all(finite):
            raise UserError(f"{path} has no accuracies; give a results.json of linear_decoding.py or hog_baseline.py")
        for model, by_task in results["models"].items():
            for task, entry in by_task.items():
                check_no_clash(models, model, task, entry, path)
                models.setdefault(model, {})[task] = entry
    return models


def check_no_clash(models, model, task, entry, source):
    """UserError if an entry cannot join the results in models.

    models may not hold the model's result on the task already, and results on one task have the same classes. entry:
    its 'per_class' and 'chance' are compared. source: the file or flag to name in the message.
    """
    if task in models.get(model, {}):
        raise UserError(f"{source} has another result of {model} ({task}); choose other --names")
    other = next((by_task[task] for by_task in models.values() if task in by_task), entry)
    names, other_names = (set(each.get("per_class", ())) for each in (entry, other))
    if entry["chance"] != other["chance"] or (names and other_names and names != other_names):
        different = ", ".join(sorted(names ^ other_names)[:4])
        raise UserError(f"{source}: results of {task} have different classes ({different}); compare them separately")


def task_names(models):
    """The tasks of all models, in order of appearance."""
    return list(dict.fromkeys(task for by_task in models.values() for task in by_task))


def baselines(models, task):
    """{'chance', 'majority'}: the accuracies of guessing on a task."""
    entry = next(by_task[task] for by_task in models.values() if task in by_task)
    return {"chance": entry["chance"], "majority": entry["majority"]}


def spread(models):
    """What the standard deviations of models are over, such as 'sd over 3 splits'; '' if there are none."""
    several = [each for by_task in models.values() for each in by_task.values() if each["std"] is not None]
    numbers = sorted({len(each["each"]) for each in several})
    of = "seeds" if all("hits" in each for each in several) else "splits"
    return f"sd over {' to '.join(map(str, dict.fromkeys([numbers[0], numbers[-1]])))} {of}" if numbers else ""


def with_knn(models):
    """models with one more row 'NAME (k-NN)' after each model whose entries have nearest-neighbor accuracies."""
    rows = {}
    for model, by_task in models.items():
        rows[model] = by_task
        for task, entry in by_task.items():
            if knn := entry.get("knn"):
                row = rows.setdefault(f"{model} ({knn['k']}-NN)", {})
                kept = ("majority", "chance", "split", "train_share", "train_images")
                row[task] = {key: entry[key] for key in kept if key in entry} | knn
    return rows


def by_training_images(models):
    """{split: {model: [(training images, mean, std), ...]}} of the entries with a share of the training images."""
    curves = {}
    for model, by_task in with_knn(models).items():
        for entry in by_task.values():
            if "train_share" in entry:
                points = curves.setdefault(entry["split"], {}).setdefault(model, [])
                points.append((float(np.mean(entry["train_images"])), entry["mean"], entry["std"]))
    return {split: {model: sorted(points) for model, points in lines.items()} for split, lines in curves.items()}


def cells(models):
    """The top-1 accuracies in % as rows of text: one row per model, one column per task, mean ± standard deviation."""
    columns = task_names(models)
    rows = [["top-1 %", *columns]]
    for name in ("chance", "majority"):
        rows.append([name, *(f"{100 * baselines(models, task)[name]:.1f}" for task in columns)])
    return rows + [
        [name, *(_cell(by_task.get(task)) for task in columns)] for name, by_task in with_knn(models).items()
    ]


def table(models):
    """The cells as lines of text, in aligned columns; below them what ± is, and why majority can lie below chance."""
    rows = cells(models)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    lines = ["  ".join(put(cell, n) for put, cell, n in zip(align, row, widths, strict=True)) for row in rows]
    lines += [f"±: {spread(models)}"] * bool(spread(models))
    below = [task for task in task_names(models) if (levels := baselines(models, task))["majority"] < levels["chance"]]
    if below:
        lines.append(f"majority below chance ({', '.join(below)}): the largest class in training is small in the test")
    return "\n".join(lines)


def _cell(entry):
    """An entry's accuracy in %, with standard deviation, balanced and published value if known; a dash for None."""
    if entry is None:
        return "-"
    text = f"{100 * entry['mean']:.1f}"
    if entry["std"] is not None:
        text += f" ± {100 * entry['std']:.1f}"
    if "balanced" in entry:
        text += f" (balanced {100 * entry['balanced']['mean']:.1f})"
    return text + (f" (published {100 * entry['published']:.1f})" if "published" in entry else "")
