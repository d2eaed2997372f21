"""An evaluation: its flags, the readouts of scikit-learn, and what it writes to its folder."""

import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moco import cli, files, plots
from moco.analysis import accuracy, splits
from moco.cli import UserError
from moco.data.folders import FrameFolder
from moco.networks import checkpoint

C_VALUES = np.logspace(-5, 3, 9)  # inverse strengths of the L2 penalty
VALIDATION = 0.2  # of the training images of each class
MAX_ITERATIONS = 1000
TEMPERATURE = 0.07  # of nearest neighbors' votes, as in DINO (Caron et al. 2021)
BLOCK = 1024  # test images at a time
MAX_STEM = 200  # bytes of a file name; file systems take 255, and temporary names are longer than final ones


def add_flags(parser):
    """Add the positional folder and the flags that all linear classifiers share to parser."""
    add = parser.add_argument
    add("data", nargs="?", help="folder with one folder of images per class; omit it to plot the results of --compare")
    add(
        "--readout",
        nargs="+",
        choices=READOUTS,
        metavar="READOUT",
        default=["published"],
        help="linear classifiers; published: a linear layer trained by Adam, for HOG a linear SVM by SGD; normalized: "
        "the same on features standardized by the training images, as the model NAME-normalized; logistic: "
        "scikit-learn's LogisticRegression, its C chosen on a fifth of the training images, as NAME-logistic",
    )
    add(
        "--knn",
        type=cli.number(int, 1),
        metavar="K",
        help="also report K-nearest-neighbor accuracies, by DINO's rule: votes weighted by exp(cosine / 0.07)",
    )
    add("--compare", nargs="+", default=[], metavar="JSON", help="results.json files to include in table and figure")
    splits.add_flags(parser)
    cli.shared_flags(parser, "--features-dir", "--save-dir", "--seed", "--workers", "--overwrite")


# --- readouts


def root_mean_square(x):
    """The root mean square of features x, of any shape."""
    return float(np.linalg.norm(x) / np.sqrt(x.size))


def note_scale(name, x):
    """Print a line if features x (N, C) of the model called name have a scale at which Adam is too slow or too fast."""
    if not 0.1 <= (scale := root_mean_square(x)) <= 10:
        print(
            f"note: the root mean square of {name}'s features is {scale:.2g}; the accuracy of the published readout "
            "depends on it, that of linear_decoding.py --readout normalized does not",
            flush=True,
        )


def standardization(x):
    """(mean, factor) of features x (N, C), each (C,): (x - mean) * factor has mean 0 and standard deviation 1.

    The factor of a feature that does not vary is 0.
    """
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    varies = std > np.finfo(x.dtype).eps * np.abs(mean) + np.finfo(x.dtype).tiny
    factor = np.divide(1, std, out=np.zeros_like(std), where=varies)
    return mean.astype(x.dtype), factor.astype(x.dtype)


def fold(weight, bias, mean, factor):
    """The weight (K, C) and bias (K,) that give for features x what those given do for (x - mean) * factor."""
    folded = weight.astype(np.float64) * factor
    return folded.astype(weight.dtype), (bias - folded @ mean).astype(bias.dtype)


def logistic(x, y, seed):
    """The LogisticRegression of features x (N, C) and labels y (N,), on all of them.

    It is fitted on features divided by their root mean square, so that no scale of the features changes the penalty.
    Its C is the smallest of C_VALUES with the highest accuracy on VALIDATION of the images of each class, drawn by
    seed, when fitted on the others; 1 if no class has an image to spare.
    """
    from sklearn.exceptions import ConvergenceWarning  # here and below, as it takes a second
    from sklearn.linear_model import LogisticRegression

    scale = root_mean_square(x) or 1.0
    x = x / np.array(scale, x.dtype)
    fitted = splits.nested_share(np.arange(len(y)), y, 1 - VALIDATION, seed)
    held_out = np.setdiff1d(np.arange(len(y)), fitted)
    best = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the final fit it is printed
        if len(held_out):
            fits = [LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(x[fitted], y[fitted]) for c in C_VALUES]
            best = C_VALUES[np.argmax([fit.score(x[held_out], y[held_out]) for fit in fits])]
        classifier = LogisticRegression(C=best, max_iter=MAX_ITERATIONS).fit(x, y)
    if classifier.n_iter_.max() >= MAX_ITERATIONS:
        print(f"note: logistic regression with C = {best:g} did not converge in {MAX_ITERATIONS} iterations")
    classifier.coef_ = classifier.coef_ / scale
    return classifier


def nearest_neighbors(x, y, seed, k):
    """The classifier by the k features of x (N, C) of highest cosine similarity, with labels y (N,).

    Each neighbor adds exp(cosine / TEMPERATURE) to the score of its class. Nothing is drawn by seed.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances):
        return np.exp((1 - distances.astype(np.float64)) / TEMPERATURE)

    return KNeighborsClassifier(min(k, len(x)), weights=votes, metric="cosine").fit(x, y)


FITS = {"logistic": logistic}  # readouts besides the published one of each script
READOUTS = ("published", "normalized", *FITS)


def chosen_fits(readouts, k, **own):
    """{name: function (x, y, seed) -> classifier} of those of readouts that are in FITS or own and, if k, of 'knn'."""
    fits = FITS | own
    chosen = {name: fits[name] for name in readouts if name in fits}
    return chosen | ({"knn": partial(nearest_neighbors, k=k)} if k else {})


def class_scores(classifier, rows, test, n_classes):
    """The scores (n_test, n_classes) of the test images, indices into rows (N, C); the lowest for classes not trained.

    classifier: of scikit-learn, with decision_function or predict_proba.
    """
    score = getattr(classifier, "decision_function", None) or classifier.predict_proba
    scores = np.full((len(test), n_classes), np.finfo(float).min)
    for start in range(0, len(test), BLOCK):
        part = slice(start, start + BLOCK)
        found = score(rows[test[part]])
        scores[part, classifier.classes_] = np.stack([-found, found], 1) if found.ndim == 1 else found
    return scores


# --- results


class Evaluation:
    """Tasks on labeled images, and the results of models on them, written to a folder.

    Predictions and decoded models are written as they are added; finish() writes everything else, numbers before
    figures.

    folder: where to. frames: the FrameFolder of the labeled images, and those of --test-data; None with --compare only.
    tasks: the splits.Tasks on them. models: {model: {task: entry}}, see accuracy.summarize.
    """

    def __init__(self, flags):
        """flags: {name: value} of a script, with those of add_flags. UserError if they do not fit the data."""
        data, test_data = flags["data"], flags["test_data"]
        if not data and not flags["compare"]:
            raise UserError("give a folder that has one folder of images per class, or only --compare")
        if data and test_data and Path(test_data).resolve() == Path(data).resolve():
            raise UserError(f"--test-data {test_data} is the folder to train on; give another one")
        self.flags = flags
        flags["readout"] = list(dict.fromkeys(flags["readout"]))
        self.folder = files.make_output_dir(flags["save_dir"], [data] if data else [])
        files.refuse_overwrite(self.folder / "results.json", flags["overwrite"])
        self.models = accuracy.read_results(flags["compare"])
        self.frames, self.tasks = None, []
        if data:
            self.frames = FrameFolder([data, test_data] if test_data else data, one_size=False)
            self.tasks = splits.make_tasks(self.frames, flags)
        self._confusions = []  # (file name, counts, classes, title)

    def check_names(self, models):
        """UserError if a result of these models (names) clashes with one of --compare, or has too long a name."""
        for model in [result_name(model, readout) for model in models for readout in self.flags["readout"]]:
            for task in self.tasks:
                if len(os.fsencode(f"{model}_labeledS_5_{task.slug}")) > MAX_STEM:
                    raise UserError(f"the name {model} is too long for file names; give a shorter one with --names")
                entry = {"per_class": task.classes, "chance": 1 / len(task.classes)}
                accuracy.check_no_clash(self.models, model, task.name, entry, "--compare")

    def add(self, model, task, scores):
        """Add the results of a model on a task.

        scores: {readout: for each seed the scores (n_test, K) of its test images}; those of 'knn' go with the first
        readout. UserError for scores that are not finite.
        """
        if task.left_out:
            print(f"{len(task.left_out)} images cannot be read and are left out, such as {task.left_out[0]}")
        for readout in self.flags["readout"]:
            name, of_readout = result_name(model, readout), scores[readout]
            if not all(np.isfinite(seed_scores).all() for seed_scores in of_readout):
                raise UserError(f"the scores of {name} on {task.name} are not finite; lower --lr, or check the model")
            entry = accuracy.summarize(task, of_readout)
            if (published := accuracy.published_accuracy(task, name)) is not None:
                entry["published"] = published
            if task.left_out:
                entry["left_out"] = list(task.left_out)
            if "knn" in scores and readout == self.flags["readout"][0]:
                knn = accuracy.summarize(task, scores["knn"])
                entry["knn"] = {"k": self.flags["knn"], **{key: knn[key] for key in ("mean", "std", "each")}}
            self.models.setdefault(name, {})[task.name] = entry
            self._write_predictions(f"predictions_{name}_{task.slug}.csv", task, of_readout)
            counts = accuracy.confusion_matrix(task, of_readout)
            self._confusions.append((f"confusion_{name}_{task.slug}", counts, task.classes, f"{name}, {task.name}"))

    def _write_predictions(self, name, task, scores):
        origins = [self.frames.source(i) for i in task.images]
        is_known = any(origins)  # by a manifest
        rows = [["seed", "file", "target", "prediction", *["source"] * is_known]]
        for (seed, (_, test)), seed_scores in zip(task.splits.items(), scores, strict=True):
            for i, predicted in zip(test, seed_scores.argmax(1), strict=True):
                row = [seed, task.names[i], task.classes[task.labels[i]], task.classes[predicted]]
                rows.append(row + [str(origins[i] or "")] * is_known)
        files.write_table(self.folder / name, rows)

    def save_classifier(self, model, task, metadata, state, optimizer, accuracies, scores):
        """Write the network and linear classifier of the first seed, under the published name and keys.

        metadata: what the file says of the network: arch, image_size. state: of the trunk and the new head. accuracies:
        training top-1 (%) by epoch. scores: (n_test, K) of the test images.
        """
        test = next(iter(task.splits.values()))[1]
        predicted, labels = scores.argmax(1), task.labels[test]
        content = {
            "acc1_list": accuracies,
            "val_acc1_list": [100 * float((predicted == labels).mean())],
            "model_state_dict": {f"module.{name}": value.cpu() for name, value in state.items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "preds": torch.from_numpy(predicted),
            "target": torch.from_numpy(labels),
            "images": [task.names[i] for i in test],
            "n_out": len(task.classes),
            "classes": task.classes,
            **metadata,
        }
        checkpoint.write(self.folder / f"{model}_labeledS_5_{task.slug}.tar", content)

    def finish(self):
        """Write splits and results.json, print the table, and draw the figures."""
        for task in self.tasks:
            for seed, (train, test) in task.splits.items():
                sides = {"train": [task.names[i] for i in train], "test": [task.names[i] for i in test]}
                files.write_json(files.make_output_dir(self.folder / "splits") / f"{task.slug}_{seed}.json", sides)
        results = {"flags": self.flags, "std": "sample standard deviation over the seeds"}
        if self.tasks:
            first = self.tasks[0]
            results |= {
                "classes": first.classes,
                "counts": dict(zip(first.classes, np.bincount(first.labels).tolist(), strict=True)),
                "seeds": list(first.splits),
                "chance": 1 / len(first.classes),
                "majority": accuracy.majority(first),
            }
        results["comparisons"] = accuracy.compare(self.models)
        files.write_json(self.folder / "results.json", results | {"models": self.models})
        print(accuracy.table(self.models))
        if results["comparisons"]:
            print(f"differences of top-1 %, 95 % intervals:\n{accuracy.describe(results['comparisons'])}")
        for name, counts, classes, title in self._confusions:
            plots.confusion_matrix(counts, classes, self.folder / name, title)
        plots.accuracy_bars(accuracy.with_knn(self.models), self.folder / "accuracies", accuracy.spread(self.models))
        if curves := accuracy.by_training_images(self.models):
            plots.accuracy_by_training_images(curves, self.folder / "training_images")
        print(f"results and figures: {self.folder}")


def result_name(model, readout):
    """The name in the results of a readout of a model."""
    return model if readout == "published" else f"{model}-{readout}"
