"""What an evaluation writes to its folder: accuracies, predictions, splits, decoded models and figures."""

import csv
import os
from pathlib import Path

import numpy as np
import torch

from moco import cli, files, plots
from moco.analysis import accuracy, comparisons, readouts, splits
from moco.cli import UserError
from moco.data.frame_folder import FrameFolder
from moco.networks import checkpoint

MAX_STEM = 200  # bytes of a file name; file systems take 255, and temporary names are longer than final ones


def add_flags(parser):
    """Add the positional folder and the flags that all linear classifiers share to parser."""
    add = parser.add_argument
    add("data", nargs="?", help="folder with one folder of images per class; omit it to plot the results of --compare")
    readouts.add_flags(parser)
    add("--compare", nargs="+", default=[], metavar="JSON", help="results.json files to include in table and figure")
    add("--features-dir", metavar="DIR", help="cache of computed features; default: features in --save-dir")
    splits.add_flags(parser)
    cli.shared_flags(parser, "--save-dir", "--seed", "--workers", "--overwrite")


def open_frames(data, test_data):
    """The FrameFolder of a folder of labeled images and, if given, one of test images."""
    if test_data and Path(test_data).resolve() == Path(data).resolve():
        raise UserError(f"--test-data {test_data} is the folder to train on; give another one")
    return FrameFolder([data, test_data] if test_data else data, one_size=False)


class Report:
    """The results of an evaluation, written to its folder.

    Predictions and decoded models are written as they are added; finish() writes everything else, numbers before
    figures.

    folder: where to. models: {model: {task: entry}}, see accuracy.summarize.
    """

    def __init__(self, save_dir, data=None, overwrite=False, compare=()):
        """data: folder of the labeled images, if any. compare: results.json files whose models come first.

        UserError if the folder cannot be used, or nothing is to be reported.
        """
        if not data and not compare:
            raise UserError("give a folder that has one folder of images per class, or only --compare")
        self.folder = files.make_output_dir(save_dir, [data] if data else [])
        files.refuse_overwrite(self.folder / "results.json", overwrite)
        self.models = accuracy.read_results(compare)
        self._confusions = []  # (file name, counts, task, model)

    def check_no_clash(self, models, tasks):
        """UserError if a result of these models on these tasks clashes with one of --compare, or has too long a name.

        models: names. tasks: splits.Tasks.
        """
        for model in models:
            for task in tasks:
                if len(os.fsencode(f"{model}_labeledS_5_{task.slug}")) > MAX_STEM:
                    raise UserError(f"the name {model} is too long for file names; give a shorter one with --names")
                entry = {"per_class": task.classes, "chance": 1 / len(task.classes)}
                accuracy.check_no_clash(self.models, model, task.name, entry, "--compare")

    def add(self, model, task, scores, knn=None):
        """Add the results of a model on a task.

        scores: for each seed the scores (n_test, K) of its test images. knn: (k, such scores of the k nearest
        neighbors). UserError for scores that are NaN.
        """
        if any(np.isnan(seed_scores).any() for seed_scores in scores):
            raise UserError(f"the scores of {model} on {task.name} are not finite; lower --lr, or check the model")
        entry = accuracy.summarize(task, scores)
        if (published := accuracy.published_accuracy(task, model)) is not None:
            entry["published"] = published
        if task.left_out:
            entry["left_out"] = task.left_out
            print(f"{len(task.left_out)} images cannot be read and are left out, such as {task.left_out[0]}")
        if knn:
            k, votes = knn
            entry["knn"] = {"k": k, **{key: accuracy.summarize(task, votes)[key] for key in ("mean", "std", "each")}}
        self.models.setdefault(model, {})[task.name] = entry
        self._write_predictions(f"predictions_{model}_{task.slug}.csv", task, scores)
        counts = accuracy.confusion_matrix(task, scores)
        self._confusions.append((f"confusion_{model}_{task.slug}", counts, task.classes, f"{model}, {task.name}"))

    def add_readouts(self, model, task, scores, knn=None):
        """add() the results of each readout of a model, {readout: scores}; knn goes with the first."""
        for readout, of_readout in scores.items():
            self.add(readouts.result_name(model, readout), task, of_readout, knn)
            knn = None

    def _write_predictions(self, name, task, scores):
        text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names may not be UTF-8
        with files.atomic_write(self.folder / name) as part, open(part, "w", **text) as file:
            writer = csv.writer(file)
            writer.writerow(["seed", "file", "target", "prediction", *(["source"] if task.sources else [])])
            for seed, (_, test), seed_scores in zip(task.seeds, task.splits, scores, strict=True):
                for i, predicted in zip(test, seed_scores.argmax(1), strict=True):
                    row = [seed, task.names[i], task.classes[task.labels[i]], task.classes[predicted]]
                    writer.writerow([*row, task.sources[i]] if task.sources else row)

    def save_classifier(self, model, task, arch, state, optimizer, accuracies, scores):
        """Write the network and linear classifier of the first seed, under the published name and keys.

        state: of the trunk and the new head. accuracies: training top-1 (%) by epoch. scores: (n_test, K) of the test
        images.
        """
        test = task.splits[0][1]
        content = {
            "acc1_list": accuracies,
            "val_acc1_list": [100 * accuracy.topk_accuracy(scores, task.labels[test])],
            "model_state_dict": {f"module.{name}": value.cpu() for name, value in state.items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "preds": torch.from_numpy(scores.argmax(1)),
            "target": torch.from_numpy(task.labels[test]),
            "images": [task.names[i] for i in test],
            "arch": arch,
            "n_out": len(task.classes),
            "classes": task.classes,
        }
        checkpoint.write(self.folder / f"{model}_labeledS_5_{task.slug}.tar", content)

    def finish(self, flags, tasks=()):
        """Write splits and results.json, print the table, and draw the figures.

        flags: {name: value} of the script. tasks: the splits.Tasks as they were before images were left out.
        """
        for task in tasks:
            for seed, (train, test) in zip(task.seeds, task.splits, strict=True):
                sides = {"train": [task.names[i] for i in train], "test": [task.names[i] for i in test]}
                files.write_json(files.make_output_dir(self.folder / "splits") / f"{task.slug}_{seed}.json", sides)
        results = {"flags": flags, "std": "sample standard deviation over the seeds"}
        if tasks:
            first = tasks[0]
            results |= {
                "classes": first.classes,
                "counts": dict(zip(first.classes, np.bincount(first.labels).tolist(), strict=True)),
                "seeds": first.seeds,
                "chance": 1 / len(first.classes),
                "majority": first.majority,
            }
        results["comparisons"] = comparisons.compare(self.models)
        files.write_json(self.folder / "results.json", results | {"models": self.models})
        print(accuracy.table(self.models))
        if results["comparisons"]:
            print(f"differences of top-1 %, 95 % intervals:\n{comparisons.text(results['comparisons'])}")
        for name, counts, classes, title in self._confusions:
            plots.confusion_matrix(counts, classes, self.folder / name, title)
        plots.accuracy_bars(accuracy.with_knn(self.models), self.folder / "accuracies")
        if curves := accuracy.by_training_images(self.models):
            plots.accuracy_by_training_images(curves, self.folder / "training_images")
        print(f"results and figures: {self.folder}")
