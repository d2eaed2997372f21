"""Decode the class of labelled images linearly from a frozen network: what it has learned shows in how well that goes.

    python linear_decoding.py toybox --model-name random imagenet TC-SAY --split iid exemplar --seeds 5 --save-dir out

In: a folder with a folder of images per class, and models: published names or checkpoints. Out, in --save-dir: the
printed table as results.json and accuracies.pdf; for each model and split the confusion matrix, the predictions by file
name and the decoded model NAME_labeledS_5_SPLIT.tar; every split, as --split-file reads it. Also PNGs of all figures.
"""

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moco import checkpoint, cli, distributed, models
from moco.analysis import features
from moco.analysis.report import Report
from moco.cli import UserError
from moco.data import augment, loader

PUBLISHED = {
    "random": ("random", None),
    "imagenet": ("imagenet", None),
    **{name: (f"{name}.tar", "resnext50_32x4d") for name in ("TC-S", "TC-A", "TC-Y", "TC-SAY")},
    "moco_img_0011": ("../self_supervised_models/moco_img_0011.pth.tar", "mobilenet_v2"),
    "moco_temp_0011": ("../self_supervised_models/moco_temp_0011.pth.tar", "mobilenet_v2"),
}  # name -> file from the working folder, architecture


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    Report.add_flags(parser)
    add = parser.add_argument
    add(
        "--model-name",
        nargs="+",
        default=[],
        choices=PUBLISHED,
        metavar="NAME",
        help=f"published models, read from the working folder: {', '.join(PUBLISHED)}",
    )
    add("--model-path", nargs="+", default=[], metavar="PATH", help="checkpoints, or 'random', or 'imagenet'")
    add("--names", nargs="+", metavar="NAME", help="names for the models in all results; default: those of the files")
    add(
        "--model",
        type=models.arch_name,
        metavar="ARCH",
        help="architecture where no file says it; default: mobilenet_v2",
    )
    add("--num-outs", type=int, metavar="N", help="outputs of the pretrained head; read from its file, checked here")
    add(
        "--bn-mode",
        choices=["eval", "adapt", "train"],
        help="batch norm of the trunk. eval: frozen as it is; adapt: first given the statistics of images that train "
        "with any seed; train: drifting as in the published code (slow). Default: eval, and adapt for random weights",
    )
    add("--epochs", type=cli.number(int, 1), default=100, help="epochs of the readout")
    cli.shared_flags(parser, "--batch-size", "--lr", "--image-size", "--device", "--print-freq")
    return parser.parse_args(argv)


def readout(layer, epochs, lr, print_freq):
    """Train a linear layer as published: Adam on the cross-entropy of features that do not learn.

    epochs: iterable of epochs, each an iterable of features (n, C) and labels (n,). Returns the optimizer and the
    training accuracy (%) of every epoch.
    """
    optimizer, accuracies = torch.optim.Adam(layer.parameters(), lr), []
    for epoch, batches in enumerate(epochs):
        correct, images = 0, 0
        for step, (x, y) in enumerate(batches, 1):
            logits = layer(x)
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
    """Epochs of batches in random order of features x (N, C) that were computed once, and their labels y (N,)."""
    for _ in range(epochs):
        order = torch.randperm(len(x)).to(x.device)
        yield ((x[batch], y[batch]) for batch in order.split(batch_size))


def drifting_epochs(trunk, images, labels, epochs):
    """Epochs as in the published code: images through a trunk whose batch-norm statistics go on drifting to them.

    images: loader.FrameLoader. labels: those of all images that it could give.
    """
    for epoch in range(epochs):
        trunk.train()
        yield ((trunk(pictures), labels[indices]) for pictures, _, indices in images.epoch(epoch))


def wanted_models(args):
    """(name, frozen trunk, architecture, name of the head, bn_mode) of every model that the flags name."""
    wanted = [(name, *PUBLISHED[name]) for name in args.model_name]
    wanted += [(Path(path).name.removesuffix(".tar").removesuffix(".pth"), path, None) for path in args.model_path]
    names = args.names or [name for name, _, _ in wanted]
    if len(names) != len(wanted) or len(set(names)) != len(names) or any("/" in name for name in names):
        named = ", ".join(names)
        raise UserError(f"{len(wanted)} models, named {named}; give each a name of its own, without /, with --names")
    for name, (_, source, arch) in zip(names, wanted, strict=True):
        model = checkpoint.open_model(source, args.model or arch, args.num_outs, args.seed)
        head = models.head_name(model.network)
        mode = args.bn_mode or ("adapt" if source == "random" else "eval")
        yield name, models.freeze(models.remove_head(model.network)), model.arch, head, mode


def main(argv=None):
    args = parse_args(argv)
    report = Report(args)
    device, opened = distributed.select_device(args.device), list(wanted_models(args))
    if args.data and not opened:
        raise UserError("name at least one model with --model-name or --model-path")
    report.expect([name for name, *_ in opened])
    options = dict(frames=report.frames, size=args.image_size, workers=args.workers, device=device, cache=report.cache)
    for (name, trunk, arch, head, mode), task in itertools.product(opened, report.tasks):
        trunk = copy.deepcopy(trunk).to(device)
        if mode == "adapt":
            learned = np.unique(np.concatenate([train for train, _ in task.splits]))
            features.adapt(trunk, images=task.images[learned], seed=args.seed, **options)
        rows = features.extract_features(trunk, images=task.images, **options)
        task = task.without(np.isnan(rows[:, 0]))
        labels = torch.zeros(len(report.frames), dtype=torch.long, device=device)
        labels[task.images] = torch.from_numpy(task.labels).to(device)
        scores = []
        for seed, (train, test) in zip(task.seeds, task.splits, strict=True):
            torch.manual_seed(seed)
            layer, network = nn.Linear(rows.shape[1], len(task.classes)).to(device), copy.deepcopy(trunk)
            if mode == "train":
                sampler = loader.EpochSampler(task.images[train], args.batch_size, seed)
                recipe = augment.Recipe("none", args.image_size)
                batches = loader.FrameLoader(report.frames, recipe, sampler, device, args.workers)
                epochs = drifting_epochs(network, batches, labels, args.epochs)
            else:
                x = torch.from_numpy(rows[train]).to(device)
                epochs = cached_epochs(x, labels[task.images[train]], args.batch_size, args.epochs)
            optimizer, accuracies = readout(layer, epochs, args.lr, args.print_freq)
            tested = (
                features.extract_features(network, images=task.images[test], **options)
                if mode == "train"
                else rows[test]
            )
            with torch.no_grad():
                scores.append(layer(torch.tensor(tested).to(device)).cpu().numpy())
            if seed == args.seed:
                state = network.state_dict() | {f"{head}.{key}": value for key, value in layer.state_dict().items()}
                report.add_model(name, task, arch, state, optimizer, accuracies, scores[0])
        report.add(name, task, rows, scores)
    report.finish()


if __name__ == "__main__":
    cli.run(main)
