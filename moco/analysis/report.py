"""The frame around a readout: the images and splits its flags ask for, and everything it leaves in its folder."""

import csv

import numpy as np
import torch

from moco import checkpoint, cli, files, plots
from moco.analysis import accuracy, splits
from moco.cli import UserError
from moco.data import loader


class Report:
    """An evaluation in its folder. frames: loader.FrameFolder of the labelled images. tasks: the splits.Tasks on them.

    cache: folder where computed features are kept. models: {model: {task: accuracy.summary}}, --beside's first.
    """

    def __init__(self, args):
        self.folder = files.make_output_dir(args.save_dir)
        files.refuse_overwrite(self.folder / "results.json", args.overwrite)
        self.cache = files.make_output_dir(args.features_dir or self.folder / "features")
        self.knn, self.models, self.frames, self.tasks = args.knn, accuracy.read_results(args.beside), None, []
        self.results = {"flags": vars(args), "std": "sample standard deviation over the seeds"}
        if not args.data:
            if not args.beside:
                raise UserError("give a folder that holds a folder of images per class (or only --beside)")
            return
        self.frames = loader.FrameFolder(args.data)
        self.tasks = splits.tasks(self.frames, args.data, args)
        first = self.tasks[0]
        self.results |= {
            "classes": first.classes,
            "counts": dict(zip(first.classes, np.bincount(first.labels).tolist(), strict=True)),
            "seeds": first.seeds,
            "chance": 1 / len(first.classes),
            "majority": first.majority,
        }

    @staticmethod
    def add_flags(parser):
        """Add the positional folder and the flags that all readouts share to parser."""
        add = parser.add_argument
        add("data", nargs="?", help="folder with a folder of images per class; none: draw the results of --beside")
        add("--knn", type=cli.number(int, 1), metavar="K", help="also name the class by the K nearest training images")
        add("--beside", nargs="+", default=[], metavar="JSON", help="results.json files to show beside these results")
        add("--features-dir", metavar="DIR", help="where computed features are kept; default: features in --save-dir")
        splits.add_flags(parser)
        cli.shared_flags(parser, "--save-dir", "--seed", "--workers", "--overwrite")

    def expect(self, models):
        """UserError if --beside has results of one of these models on a task of this evaluation."""
        for model in models:
            if both := self.models.get(model, {}).keys() & {task.name for task in self.tasks}:
                raise UserError(f"--beside holds another result of {model} ({min(both)}); choose other --names")

    def add(self, model, task, rows, scores):
        """Keep the results of a model on a task: for every seed the scores (n_test, K) of its test images.

        rows: (N, C) features of the task's images, for --knn.
        """
        entry = accuracy.summary(task, scores)
        if (known := accuracy.published(task, model)) is not None:
            entry["published"] = known
        if task.left_out:
            entry["left_out"] = task.left_out
            print(f"{len(task.left_out)} images cannot be read and are left out, such as {task.left_out[0]}")
        if self.knn:
            votes = [
                accuracy.knn(rows[train], task.labels[train], rows[test], self.knn, len(task.classes))
                for train, test in task.splits
            ]
            found = accuracy.summary(task, votes)
            entry["knn"] = {"k": self.knn} | {key: found[key] for key in ("mean", "std", "each")}
        self.models.setdefault(model, {})[task.name] = entry
        self._write_predictions(f"predictions_{model}_{task.slug}.csv", task, scores)
        figure = self.folder / f"confusion_{model}_{task.slug}"
        plots.confusion_matrix(accuracy.confusion(task, scores), task.classes, figure, f"{model}, {task.name}")

    def _write_predictions(self, name, task, scores):
        with files.atomic_write(self.folder / name) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["seed", "file", "target", "prediction"])
            for seed, (_, test), scored in zip(task.seeds, task.splits, scores, strict=True):
                for i, best in zip(test, scored.argmax(1), strict=True):
                    writer.writerow([seed, task.names[i], task.classes[task.labels[i]], task.classes[best]])

    def add_model(self, model, task, arch, state, optimizer, accuracies, scores):
        """Write the model decoded with the first seed, under the published name and keys.

        state: trunk and new head. accuracies: training top-1 (%) by epoch. scores: (n_test, K) of its test images.
        """
        test = task.splits[0][1]
        content = {
            "acc1_list": accuracies,
            "val_acc1_list": [100 * accuracy.accuracy(scores, task.labels[test])],
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

    def finish(self):
        """Write splits, results.json and the figure of all accuracies; print the table."""
        for task in self.tasks:
            for seed, (train, test) in zip(task.seeds, task.splits, strict=True):
                sides = {"train": [task.names[i] for i in train], "test": [task.names[i] for i in test]}
                files.write_json(files.make_output_dir(self.folder / "splits") / f"{task.slug}_{seed}.json", sides)
        plots.accuracy_bars(self.models, self.folder / "accuracies")
        files.write_json(self.folder / "results.json", self.results | {"models": self.models})
        print(accuracy.table(self.models))
        print(f"results and figures: {self.folder}")
