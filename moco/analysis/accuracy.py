"""What a readout's scores say: accuracies, their spread over seeds, confusions, and the table of many results."""

import json
from pathlib import Path

import numpy as np

from moco.cli import UserError

TOYBOX = ["airplane", "ball", "car", "cat", "cup", "duck", "giraffe", "helicopter", "horse", "mug", "spoon", "truck"]
PUBLISHED = {
    "iid": {"TC-SAY": 0.900, "TC-S": 0.885, "TC-A": 0.868, "TC-Y": 0.870},
    "exemplar": {"TC-SAY": 0.575, "TC-S": 0.549, "TC-A": 0.504, "TC-Y": 0.530},
}  # top-1 of the published ResNeXt-50 32x4d on Toybox


def accuracy(scores, labels, k=1):
    """The share of rows of scores (N, K) whose k highest include the label (N,)."""
    if k == 1:
        return float((scores.argmax(1) == labels).mean())
    return float((np.argpartition(-scores, k - 1, axis=1)[:, :k] == labels[:, None]).any(1).mean())


def confusion(task, scores):
    """Counts (K, K) of the test images of all seeds: row, the true class; column, the class that scored highest."""
    counts = np.zeros((len(task.classes), len(task.classes)), int)
    for (_, test), scored in zip(task.splits, scores, strict=True):
        np.add.at(counts, (task.labels[test], scored.argmax(1)), 1)
    return counts


def knn(train, labels, test, k, n_classes):
    """Scores (M, n_classes) of test features (M, C): votes of the k training features (N, C) of highest cosine.

    A vote counts 1 and the cosine, so that of two classes with as many votes the nearer one wins.
    """
    train, test = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (train, test))
    k, scores = min(k, len(train)), np.zeros((len(test), n_classes))
    for start in range(0, len(test), 1024):
        cosine = test[start : start + 1024] @ train.T
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        rows = np.arange(len(cosine))[:, None]
        np.add.at(scores[start : start + 1024], (rows, labels[nearest]), 1 + cosine[rows, nearest] / (k + 1))
    return scores


def spread(values):
    """Mean, sample standard deviation (that with n - 1; None for one value) and each of the values."""
    values = [float(value) for value in values]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "each": values}


def summary(task, scores):
    """What results.json says of one model on one task: top-1, top-5 where there are more classes, by class, baselines.

    scores: for every seed the scores (n_test, K) of its test images.
    """
    pairs = [(scored, task.labels[test]) for scored, (_, test) in zip(scores, task.splits, strict=True)]
    found = spread([accuracy(scored, labels) for scored, labels in pairs])
    if len(task.classes) > 5:
        found["top5"] = spread([accuracy(scored, labels, 5) for scored, labels in pairs])
    counts = confusion(task, scores)
    tested = counts.sum(1)
    found["per_class"] = {
        name: float(counts[i, i] / tested[i]) if tested[i] else None for i, name in enumerate(task.classes)
    }
    return found | {
        "majority": task.majority,
        "chance": 1 / len(task.classes),
        "train_images": [len(train) for train, _ in task.splits],
        "test_images": [len(test) for _, test in task.splits],
    }


def published(task, model):
    """The published top-1 of a model of this name on a task, from 0 to 1; None where there is none."""
    if sorted(name.lower() for name in task.classes) != TOYBOX:
        return None
    return PUBLISHED.get(task.name, {}).get(model.removesuffix("-resnext"))


# --- results of several models


def read_results(paths):
    """The models of the results.json files at paths, {model: {task: summary}}; UserError where two clash."""
    models = {}
    for path in paths:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))["models"]
            if not all(isinstance(entry["mean"], float) for by_task in found.values() for entry in by_task.values()):
                raise ValueError("no accuracies in it")
        except OSError as error:
            raise UserError(f"cannot read the results {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no results of an evaluation ({error!r})") from error
        join(models, found, path)
    return models


def join(models, others, path):
    """Add others to models; UserError, which names path, if both hold the same model on the same task."""
    for name, by_task in others.items():
        if both := set(models.setdefault(name, {})) & set(by_task):
            raise UserError(f"{path} holds another result of {name} ({min(both)}); choose other --names")
        models[name].update(by_task)


def task_names(models):
    """The tasks of all models, in order of appearance."""
    return list(dict.fromkeys(task for by_task in models.values() for task in by_task))


def baselines(models, task):
    """The chance and majority accuracies of a task."""
    entry = next(by_task[task] for by_task in models.values() if task in by_task)
    return {"chance": entry["chance"], "majority": entry["majority"]}


def cells(models):
    """The top-1 accuracies as rows of words: a model a row, a task a column, mean and standard deviation in %."""
    columns = task_names(models)
    rows = [["top-1 %", *columns]]
    for name in ("chance", "majority"):
        rows.append([name, *(f"{100 * baselines(models, task)[name]:.1f}" for task in columns)])
    return rows + [[name, *(_cell(by_task.get(task)) for task in columns)] for name, by_task in models.items()]


def table(models):
    """The cells as lines of text, in columns."""
    rows = cells(models)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)) for row in rows
    )


def _cell(entry):
    """A summary's accuracy in %, with its spread and the published one where there are such; a dash for None."""
    if entry is None:
        return "-"
    text = f"{100 * entry['mean']:.1f}"
    if entry["std"] is not None:
        text += f" ± {100 * entry['std']:.1f}"
    return text + (f" (published {100 * entry['published']:.1f})" if "published" in entry else "")
