"""Measure how linearly decodable the classes of labeled images are from the features of a frozen network.

    python linear_decoding.py toybox --model-name random imagenet TC-SAY --split iid exemplar --seeds 5 --save-dir out

Input: a folder with one folder of images per class, and models: published names or checkpoints. Output, in --save-dir:
the printed table as results.json and accuracies.pdf; for each model and split the confusion matrix, the predictions by
file name and the decoded model of the first seed, NAME_labeledS_5_SPLIT.tar (the published name, whatever the data);
every split, as --split-file reads it. Figures are PDF and PNG.
"""

import copy
from collections import defaultdict

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
    add("--model-path", nargs="+", default=[], metavar="PATH", help="checkpoints, 'random' or 'imagenet'")
    add("--names", nargs="+", metavar="NAME", help="names of the models in all results; default: their file names")
    opening.add_flags(
        parser, "architecture of 'random' and 'imagenet', or of a checkpoint without one; default: mobilenet_v2"
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
    add(
        "--epochs",
        type=cli.number(int, 1),
        default=100,
        help="number of epochs of the linear layer; with --train-share as many as make the same number of steps",
    )
    cli.shared_flags(parser, "--batch-size", help="images per training step")
    cli.shared_flags(parser, "--lr", "--image-size", "--device", "--print-freq")
    args = parser.parse_args(argv)
    if args.bn_mode == "train" and set(args.readout) != {"published"}:
        raise UserError(
            "--bn-mode train changes the features while the published classifier trains; --readout logistic and "
            "normalized need fixed ones: give --bn-mode eval or adapt"
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


def open_models(args):
    """{name: opening.OpenedModel} of the models that the flags name; prints what each of them is."""
    sources = [released.locate(name, args.models_dir) for name in args.model_name]
    sources += args.model_path
    names = args.names or args.model_name + [released.stem(path) for path in args.model_path]
    if not sources:
        raise UserError("name at least one model with --model-name or --model-path")
    if len(names) != len(sources):
        raise UserError(
            f"--names {' '.join(names)}: {len(names)} names for {len(sources)} models "
            f"({' '.join(map(str, sources))}); give one for each, those of --model-name first"
        )
    if len(set(names)) != len(names) or any(not name or "/" in name for name in names):
        raise UserError(f"models named {', '.join(names)}: give each a different name, without /, with --names")
    models = {}
    for name, source in zip(names, sources, strict=True):
        models[name] = opening.open_model(
            source, args.model, args.num_outs, args.seed, key=args.checkpoint_key, image_size=args.image_size
        )
        print(f"{name}: {models[name].description}")
    args.networks = {name: opened.description for name, opened in models.items()}
    return models


def new_layer(n_features, task, seed, device):
    """The linear layer that a seed starts from, with an output for each class of a task."""
    torch.manual_seed(seed)
    return nn.Linear(n_features, len(task.classes)).to(device)


def number_of_epochs(args, task, seed):
    """--epochs, or for a share of the training images as many as make the same number of steps, rounded up."""
    train = task.splits[seed][0]
    steps, without_share = (-(-len(each) // args.batch_size) for each in (train, task.without_share.get(seed, train)))
    return -(-args.epochs * without_share // steps)


def fit_cached(args, rows, task, seed, normalize, device):
    """Train a linear layer on a seed's split, on rows, the features (N, C) of all images of a task.

    normalize: train on features standardized by the training images; the layer returned is for features as they are.
    Returns the layer and what fit() returns.
    """
    train = task.splits[seed][0]
    x, layer = rows[train], new_layer(rows.shape[1], task, seed, device)
    if normalize:
        mean, factor = report.standardization(x)
        x = (x - mean) * factor
    x, y = (torch.from_numpy(values).to(device) for values in (x, task.labels[train]))
    epochs = cached_epochs(x, y, args.batch_size, number_of_epochs(args, task, seed))
    fitted = fit(layer, epochs, args.lr, args.print_freq)
    if normalize:
        folded = report.fold(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy(), mean, factor)
        layer.load_state_dict(dict(zip(("weight", "bias"), map(torch.from_numpy, folded), strict=True)))
    return layer, *fitted


def fit_drifting(args, network, size, n_features, task, seed, frames):
    """Train a linear layer as fit_cached(), on features that network, in training mode, computes in every epoch."""
    device = next(network.parameters()).device
    sampler = loader.EpochSampler(task.images[task.splits[seed][0]], args.batch_size, seed)
    batches = loader.FrameLoader(frames, augment.RECIPES["none"], size, sampler, device, args.workers)
    labels = torch.zeros(len(frames), dtype=torch.long, device=device)
    labels[task.images] = torch.from_numpy(task.labels).to(device)
    layer = new_layer(n_features, task, seed, device)
    epochs = drifting_epochs(network, batches, labels, number_of_epochs(args, task, seed))
    with distributed.no_tf32():
        return layer, *fit(layer, epochs, args.lr, args.print_freq)


def decode(args, name, opened, task, cache, evaluation):
    """Fit and test linear classifiers on a task with each seed; adds them to a report.Evaluation.

    name, opened: of the model, an opening.OpenedModel. cache: folder in which features are kept.
    """
    frames, device = evaluation.frames, distributed.select_device(args.device)
    trunk = architectures.freeze(architectures.remove_head(copy.deepcopy(opened.network))).to(device)
    bn_mode = args.bn_mode or ("eval" if opened.path or opened.has_head else "adapt")  # adapt for random weights
    fits, scores = report.chosen_fits(args.readout, args.knn), defaultdict(list)

    def extract(network, images, of=""):
        what = opened.description + of
        return features.extract_features(network, frames, images, cache, opened.image_size, args.workers, what)[0]

    for i, seed in enumerate(task.splits):
        adapted = ""
        if bn_mode == "adapt":
            images = task.images[task.splits[seed][0]]
            features.adapt_batch_norm(
                trunk, frames, images, seed, opened.image_size, args.workers, cache, opened.description
            )
            adapted = f", batch norm adapted to {len(images)} of them"
        if i == 0 or adapted:
            rows = extract(trunk, task.images, adapted)
        if i == 0:
            is_first = task is evaluation.tasks[0]
            task = task.drop(np.isnan(rows[:, 0]))
            if is_first and "published" in args.readout and bn_mode != "train":
                report.note_scale(name, rows[task.splits[seed][0]])
        train, test = task.splits[seed]
        for readout in [each for each in args.readout if each not in fits]:
            network, test_rows = trunk, rows[test]
            if bn_mode == "train":
                network = copy.deepcopy(trunk)
                layer, *fitted = fit_drifting(args, network, opened.image_size, rows.shape[1], task, seed, frames)
                test_rows = extract(network, task.images[test], ", batch norm drifted while a classifier trained")
            else:
                layer, *fitted = fit_cached(args, rows, task, seed, readout == "normalized", device)
            with torch.no_grad():
                scores[readout].append(layer(torch.tensor(test_rows).to(device)).cpu().numpy())
            if i == 0:
                state = network.state_dict() | layer.state_dict(prefix=f"{architectures.head_name(opened.network)}.")
                result = report.result_name(name, readout)
                metadata = {"arch": opened.arch, "image_size": opened.image_size}
                evaluation.save_classifier(result, task, metadata, state, *fitted, scores[readout][0])
        for readout, fit_readout in fits.items():
            classifier = fit_readout(rows[train], task.labels[train], seed)
            scores[readout].append(report.class_scores(classifier, rows, test, len(task.classes)))
    evaluation.add(name, task, scores)


def main(argv=None):
    args = parse_args(argv)
    evaluation, checkpoints = report.Evaluation(vars(args)), {}
    if args.data:
        models = open_models(args)
        evaluation.check_names(models)
        cache = files.make_output_dir(args.features_dir or evaluation.folder / "features")
        for name, opened in models.items():
            checkpoints |= opened.checkpoints
            for task in evaluation.tasks:
                decode(args, name, opened, task, cache, evaluation)
    files.write_args(evaluation.folder, cli.flags(args), checkpoints)
    evaluation.finish()


if __name__ == "__main__":
    cli.run(main)
