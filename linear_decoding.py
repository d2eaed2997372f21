"""Measure how linearly decodable the classes of labeled images are from the features of a frozen network.

    python linear_decoding.py toybox --model-name random imagenet TC-SAY --split iid exemplar --seeds 5 --save-dir out

Input: a folder with one folder of images per class, and models: published names or checkpoints. Output, in --save-dir:
the printed table as results.json and accuracies.pdf; for each model and split the confusion matrix, the predictions by
file name and the decoded model of the first seed, NAME_labeledS_5_SPLIT.tar (the published name, whatever the data);
every split, as --split-file reads it. Figures are PDF and PNG.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moco import cli, distributed, files
from moco.analysis import features, report
from moco.cli import UserError
from moco.data import augment, loader
from moco.networks import architectures, opening, released


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    report.add_flags(parser)
    add = parser.add_argument
    add(
        "--model-name",
        nargs="+",
        default=[],
        type=released.name,
        metavar="NAME",
        help="published models, read from --models-dir: random, imagenet, TC-SAY, TC-S-mobilenet, dino_say_vitb14, ... "
        "(moco/networks/released.py lists all)",
    )
    add("--models-dir", default=".", metavar="DIR", help="folder of the files of --model-name")
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )
    add("--model-path", nargs="+", default=[], metavar="PATH", help="checkpoints, 'random' or 'imagenet'")
    add("--names", nargs="+", metavar="NAME", help="names of the models in all results; default: their file names")
    add(
        "--model",
        type=architectures.arch_name,
        metavar="ARCH",
        help="architecture of 'random' and 'imagenet', or of a checkpoint without one; default: mobilenet_v2",
    )
    add(
        "--num-outs", type=int, metavar="N", help="outputs of the pretrained head; read from the file, checked if given"
    )
    add(
        "--bn-mode",
        choices=["eval", "adapt", "train"],
        help="batch norm of the trunk. eval: frozen; adapt: statistics of the training images of each seed; train: "
        "updated while the classifier trains, as in the published code (slow). Default: eval, and adapt for random "
        "weights",
    )
    add("--epochs", type=cli.number(int, 1), default=100, help="number of epochs of the linear classifier")
    cli.shared_flags(parser, "--batch-size", help="images per training step")
    cli.shared_flags(parser, "--lr", "--image-size", "--device", "--print-freq")
    args = parser.parse_args(argv)
    if args.bn_mode == "train" and args.readout != ["published"]:
        raise UserError(
            "--bn-mode train changes the features while the published classifier trains; --readout logistic "
            "needs fixed ones: give --bn-mode eval or adapt"
        )
    return args


def fit(classifier, epochs, lr, print_freq):
    """Train a linear layer as published: Adam on the cross-entropy of features from a trunk that is not trained.

    epochs: iterable of epochs, each an iterable of features (n, C) and labels (n,). Returns the optimizer and the
    training accuracy (%) of every epoch.
    """
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    accuracies = []
    for epoch, batches in enumerate(epochs):
        correct, images = 0, 0
        for step, (x, y) in enumerate(batches, 1):
            logits = classifier(x)
            loss = functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct = correct + (logits.detach().argmax(1) == y).sum()
            images += len(y)
            if step % print_freq == 0:
                print(f"epoch {epoch} step {step}: loss {loss:.4f}, top-1 {100 * correct / images:.1f} %", flush=True)
        accuracies.append(100 * float(correct) / images)
    return optimizer, accuracies


def cached_epochs(x, y, batch_size, epochs):
    """Epochs of batches in random order of precomputed features x (N, C) and their labels y (N,)."""
    for _ in range(epochs):
        order = torch.randperm(len(x)).to(x.device)
        yield ((x[batch], y[batch]) for batch in order.split(batch_size))


def drifting_epochs(trunk, batches, labels, epochs):
    """Epochs of features from a trunk in training mode, whose batch-norm statistics drift as in the published code.

    batches: loader.FrameLoader. labels: (N,) of all images of its folder.
    """
    for epoch in range(epochs):
        trunk.train()
        yield ((trunk(images), labels[indices]) for images, _, indices in batches.epoch(epoch))


@dataclass(frozen=True)
class FrozenNetwork:
    """A frozen network without its head: trunk maps images (N, 3, H, W) to features (N, C).

    name: in the results. head_name: of the head in the network's state dict. bn_mode: a value of --bn-mode.
    description: of the model, in words.
    """

    name: str
    trunk: nn.Module
    arch: str
    head_name: str
    bn_mode: str
    description: str


def open_networks(args):
    """The FrozenNetworks that the flags name, and {path: SHA-256} of their checkpoints; prints what each of them is."""
    sources = [released.locate(name, args.models_dir) for name in args.model_name]
    sources += args.model_path
    names = args.names or args.model_name + [released.stem(path) for path in args.model_path]
    if not sources:
        raise UserError("name at least one model with --model-name or --model-path")
    if len(names) != len(sources) or len(set(names)) != len(names) or any(not name or "/" in name for name in names):
        given = ", ".join(names)
        raise UserError(f"{len(sources)} models, named {given}; give each a different name, without /, with --names")
    networks, checkpoints = [], {}
    for name, source in zip(names, sources, strict=True):
        model = opening.open_model(source, args.model, args.num_outs, args.seed, key=args.checkpoint_key)
        print(f"{name}: {model.description}")
        architectures.check_image_size(model.network, args.image_size)
        head_name = architectures.head_name(model.network)
        trunk = architectures.freeze(architectures.remove_head(model.network))
        bn_mode = args.bn_mode or ("adapt" if source == "random" else "eval")
        networks.append(FrozenNetwork(name, trunk, model.arch, head_name, bn_mode, model.description))
        checkpoints |= model.checkpoints
    return networks, checkpoints


def decode(args, frozen, task, device, cache, evaluation):
    """Fit and test linear classifiers on a task with each seed; adds them to a report.Evaluation."""
    trunk, frames = frozen.trunk.to(device), evaluation.frames
    fits, scores = report.chosen_fits(args.readout, args.knn), defaultdict(list)
    for i, seed in enumerate(task.splits):
        if frozen.bn_mode == "adapt":
            train_images = task.images[task.splits[seed][0]]
            features.adapt_batch_norm(
                trunk, frames, train_images, seed, args.image_size, args.workers, cache, frozen.description
            )
        if i == 0 or frozen.bn_mode == "adapt":
            adapted = f", batch norm adapted to {len(train_images)} of them" if frozen.bn_mode == "adapt" else ""
            (rows,) = features.extract_features(
                trunk, frames, task.images, cache, args.image_size, args.workers, f"{frozen.description}{adapted}"
            )
        if i == 0:
            task = task.drop(np.isnan(rows[:, 0]))
        train, test = task.splits[seed]
        if "published" in args.readout:
            classifier, network, fitted, test_rows = fit_published(args, frozen, task, seed, rows, frames, cache)
            with torch.no_grad():
                scores["published"].append(classifier(torch.tensor(test_rows).to(device)).cpu().numpy())
            if i == 0:
                head = {f"{frozen.head_name}.{key}": value for key, value in classifier.state_dict().items()}
                state = network.state_dict() | head
                evaluation.save_classifier(frozen.name, task, frozen.arch, state, *fitted, scores["published"][0])
        for name, fit_readout in fits.items():
            classifier = fit_readout(rows[train], task.labels[train], seed)
            scores[name].append(report.class_scores(classifier, rows, test, len(task.classes)))
    evaluation.add(frozen.name, task, scores)


def fit_published(args, frozen, task, seed, rows, frames, cache):
    """Train a linear layer on a seed's split: the layer, its network, the results of fit(), and the test features.

    rows: features of the task's images in frames, (N, C), from the trunk as it is.
    """
    train, test = task.splits[seed]
    device = next(frozen.trunk.parameters()).device
    torch.manual_seed(seed)
    classifier = nn.Linear(rows.shape[1], len(task.classes)).to(device)
    if frozen.bn_mode == "train":
        network = copy.deepcopy(frozen.trunk)
        fitted = fit_drifting(args, classifier, network, task, seed, frames)
        what = f"{frozen.description}, batch norm drifted while a classifier trained"
        (rows,) = features.extract_features(
            network, frames, task.images[test], cache, args.image_size, args.workers, what
        )
        return classifier, network, fitted, rows
    x, y = (torch.from_numpy(values[train]).to(device) for values in (rows, task.labels))
    fitted = fit(classifier, cached_epochs(x, y, args.batch_size, args.epochs), args.lr, args.print_freq)
    return classifier, frozen.trunk, fitted, rows[test]


def fit_drifting(args, classifier, network, task, seed, frames):
    """fit() on the training images of a task, of which network, in training mode, computes features in every epoch."""
    device, size = next(network.parameters()).device, args.image_size
    sampler = loader.EpochSampler(task.images[task.splits[seed][0]], args.batch_size, seed)
    batches = loader.FrameLoader(frames, augment.RECIPES["none"], size, sampler, device, args.workers)
    labels = torch.zeros(len(frames), dtype=torch.long, device=device)
    labels[task.images] = torch.from_numpy(task.labels).to(device)
    with distributed.no_tf32():
        return fit(classifier, drifting_epochs(network, batches, labels, args.epochs), args.lr, args.print_freq)


def main(argv=None):
    args = parse_args(argv)
    evaluation, checkpoints = report.Evaluation(vars(args)), {}
    if args.data:
        networks, checkpoints = open_networks(args)
        evaluation.check_names([frozen.name for frozen in networks])
        device = distributed.select_device(args.device)
        cache = files.make_output_dir(args.features_dir or evaluation.folder / "features")
        for frozen in networks:
            for task in evaluation.tasks:
                decode(args, frozen, task, device, cache, evaluation)
    files.write_args(evaluation.folder, cli.flags(args), checkpoints)
    evaluation.finish()


if __name__ == "__main__":
    cli.run(main)
