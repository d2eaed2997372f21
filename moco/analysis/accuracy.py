"""Accuracies of linear classifiers: of one model on one task, and the table of many results."""

import json
import math
from pathlib import Path

import numpy as np

from moco.cli import UserError

TOYBOX = ["airplane", "ball", "car", "cat", "cup", "duck", "giraffe", "helicopter", "horse", "mug", "spoon", "truck"]
PUBLISHED = {
    "iid": {"TC-SAY": 0.900, "TC-S": 0.885, "TC-A": 0.868, "TC-Y": 0.870},
    "exemplar": {"TC-SAY": 0.575, "TC-S": 0.549, "TC-A": 0.504, "TC-Y": 0.530},
}  # top-1 accuracy of the published ResNeXt-50 32x4d on Toybox


def topk_accuracy(scores, labels, k=1):
    """The fraction of rows of scores (N, K) whose k highest entries include the label (N,)."""
    if k == 1:
        return float((scores.argmax(1) == labels).mean())
    return float((np.argpartition(-scores, k - 1, axis=1)[:, :k] == labels[:, None]).any(1).mean())


def balanced_accuracy(scores, labels):
    """The mean over classes of the fraction of their rows of scores (N, K) whose highest entry is the label (N,)."""
    hits = scores.argmax(1) == labels
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def confusion_matrix(task, scores):
    """Counts (K, K) of the test images of all seeds: rows are true classes, columns predicted classes.

    task: splits.Task. scores: for each seed the scores (n_test, K) of its test images.
    """
    counts = np.zeros((len(task.classes), len(task.classes)), int)
    for (_, test), seed_scores in zip(task.splits, scores, strict=True):
        np.add.at(counts, (task.labels[test], seed_scores.argmax(1)), 1)
    return counts


def mean_and_std(values):
    """{'mean', 'std', 'each'} of values; std is the sample standard deviation (n - 1), None for a single value."""
    values = [float(value) for value in values]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "each": values}


def summarize(task, scores):
    """The entry of one model and task in results.json: top-1, top-5 for more than 5 classes, per class, baselines.

    For classes of unequal size also the balanced accuracy, the mean over the classes in the test images. splits: a
    digest for each seed; hits: if there is one split only, whether the first seed is right on each test image. task:
    splits.Task. scores: for each seed the scores (n_test, K) of its test images.
    """
    labels = [task.labels[test] for _, test in task.splits]
    pairs = list(zip(scores, labels, strict=True))
    summary = mean_and_std([topk_accuracy(*pair) for pair in pairs])
    if len(task.classes) > 5:
        summary["top5"] = mean_and_std([topk_accuracy(*pair, k=5) for pair in pairs])
    if len(np.unique(np.bincount(task.labels))) > 1:
        summary["balanced"] = mean_and_std([balanced_accuracy(*pair) for pair in pairs])
    counts = confusion_matrix(task, scores)
    tested = counts.sum(1)
    summary["per_class"] = {
        name: float(counts[i, i] / tested[i]) if tested[i] else None for i, name in enumerate(task.classes)
    }
    summary["splits"] = task.digests()
    if len(set(summary["splits"])) == 1:
        summary["hits"] = "".join("01"[hit] for hit in (scores[0].argmax(1) == labels[0]).astype(int))
    if task.share is not None:
        summary |= {"split": task.split, "train_share": task.share}
    return summary | {
        "majority": task.majority,
        "chance": 1 / len(task.classes),
        "train_images": [len(train) for train, _ in task.splits],
        "test_images": [len(test) for _, test in task.splits],
    }


def published_accuracy(task, model):
    """The published top-1 accuracy, from 0 to 1, of the model of this name on a task; None if there is none."""
    if sorted(name.lower() for name in task.classes) != TOYBOX:
        return None
    return PUBLISHED.get(task.name, {}).get(model.removesuffix("-resnext"))


# --- results of several models: {model: {task: entry}}, entries as summarize() makes them


def read_results(paths):
    """The models of the results.json files at paths; UserError for a file without results, or for a clash."""
    models = {}
    for path in paths:
        try:
            results = json.loads(Path(path).read_bytes())["models"]
            entries = [entry for by_task in results.values() for entry in by_task.values()]
            if not entries:
                raise ValueError("no accuracies in it")
            if not all(math.isfinite(entry[key]) for entry in entries for key in ("mean", "majority", "chance")):
                raise ValueError("an accuracy in it is not finite")
        except OSError as error:
            raise UserError(f"cannot read the results {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a results.json of linear_decoding.py or hog_baseline.py ({error!r})"
            ) from error
        for model, by_task in results.items():
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
    """The cells as lines of text, in aligned columns."""
    rows = cells(models)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)) for row in rows
    )


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
