"""Measure how selective the units of a network are for classes, layer by layer (Orhan, Gupta & Lake 2020, Figure 7a).

    python selectivities.py labeled_S --model-path TC-S.tar --layer 1 2 6 10 14 18 --save-dir selectivity

Input: a folder with one folder of images per class, and a model. Output, for each layer L: selectivity_L.npy, (units,);
selectivity_L.npz, the same with each unit's preferred class and its mean activation for each class; and a figure of
the distribution of selectivity by layer. With --pca also the dimensionality of the features: the variance that their
first principal components explain (Figure A1).
"""

import numpy as np

from moco import cli, distributed, files, plots
from moco.analysis import features, units
from moco.cli import UserError
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers, opening


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with one folder of images per class")
    opening.add_flags(parser)
    add(
        "--layer",
        type=layers.layer,
        nargs="+",
        default=[1],
        metavar="L",
        help="layers, by number from the end, 1 being the last (published: 1, 2, 6, 10, 14, 18), or by the name of a "
        "module, such as layer3.2.relu",
    )
    add(
        "--pca",
        nargs="*",
        metavar="FOLDER",
        help="also the variance explained by principal components, for data and for further folders of images",
    )
    add("--features-dir", metavar="DIR", help="cache of computed features, which are not kept without it")
    cli.shared_flags(parser, "--batch-size", default=580, help="images per batch")
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device")
    cli.shared_flags(parser, "--overwrite")
    return parser.parse_args(argv)


def selectivity(features, labels):
    """Class selectivity (C,) of units, from their activations (N, C) for N images and the classes (N,) of these.

    See units.selectivity for the equation, and for silent units; ValueError for fewer than two classes.
    """
    means = units.ClassMeans(int(labels.max()) + 1)
    means.add(features, labels)
    return units.selectivity(means.means())[0]


class Covariance:
    """Running covariance (C, C) of rows of features (n, C), in float64."""

    def __init__(self):
        self.n = 0

    def add(self, rows):
        """Add rows (n, C)."""
        if not self.n:
            self.origin = rows.mean(0, dtype=np.float64)
            self.sum = self.products = 0
        rows = rows - self.origin  # keeps the products small, and the cancellation in matrix() too
        self.n += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def matrix(self):
        """The covariance of all rows so far, (C, C)."""
        mean = self.sum / self.n
        return self.products / self.n - np.outer(mean, mean)


def variance_explained(covariance):
    """The share of the total variance that the first 1, 2, ... C principal components explain, (C,).

    covariance: (C, C). For features without variance all shares are 1.
    """
    variances = np.linalg.eigvalsh(covariance)[::-1].clip(0)
    return np.cumsum(variances) / variances.sum() if variances.any() else np.ones(len(variances))


def measure(model, layers, data, batch_size, with_covariance, cache=None, what="a network"):
    """One pass over the images of data: units.ClassMeans and, if asked for, Covariance, one per layer.

    cache, what: see units.layer_means.
    """
    class_means = [units.ClassMeans(len(data.frames.classes)) for _ in layers]
    covariances = [Covariance() for _ in layers if with_covariance]
    for means, labels, _ in units.layer_means(model, layers, data, batch_size, cache=cache, what=what):
        for rows, of_layer in zip(means, class_means, strict=True):
            of_layer.add(rows, labels)
        for rows, of_layer in zip(means, covariances, strict=False):
            of_layer.add(rows)
    return class_means, covariances


def save_selectivity(folder, layer, class_means, classes):
    """Write the selectivity of a layer's units to folder, print its mean, and return it, (units,)."""
    means = class_means.means()
    values, preferred_class = units.selectivity(means)
    silent = np.count_nonzero(np.nan_to_num(means).max(0) == 0)
    print(f"layer {layer}: {len(values)} units, mean selectivity {values.mean():.3f}, {silent} silent")
    if np.nanmin(means) < 0:
        print(f"note: layer {layer} has negative mean activations, for which selectivity is not between 0 and 1")
    with files.atomic_write(folder / f"selectivity_{layer}.npy") as part:
        np.save(part, values.astype(np.float32))
    with files.atomic_write(folder / f"selectivity_{layer}.npz") as part:
        np.savez(
            part,
            selectivity=values,
            preferred_class=preferred_class,
            class_means=means,
            classes=classes,
            images=class_means.counts,
        )
    return values


def main(argv=None):
    args = parse_args(argv)
    chosen, batch_size = list(dict.fromkeys(args.layer)), args.batch_size
    folders = [args.data, *(args.pca or ())]
    save_dir = files.make_output_dir(args.save_dir, folders)
    figures = [f"{name}_{'_'.join(map(str, chosen))}" for name in ("selectivity_by_layer", "variance_explained")]
    arrays = [f"selectivity_{layer}.{ending}" for layer in chosen for ending in ("npy", "npz")]
    for name in arrays + [f"{figure}.{ending}" for figure in figures for ending in ("pdf", "png")]:
        files.refuse_overwrite(save_dir / name, args.overwrite)
    device = distributed.select_device(args.device)
    data, *further = [
        features.EvalData(FrameFolder(folder), args.image_size, device, args.workers) for folder in folders
    ]
    classes = data.frames.classes
    if len(classes) < 2:
        raise UserError(f"{args.data} has one class, {classes[0]}; selectivity compares several")
    opened = opening.open_model(args.model_path, args.model, args.n_out, args.seed, key=args.checkpoint_key)
    print(f"model: {opened.description}")
    model = opened.network
    architectures.check_image_size(model, args.image_size)
    cached = args.features_dir and files.make_output_dir(args.features_dir, folders), opened.description

    class_means, covariances = measure(model, chosen, data, batch_size, args.pca is not None, *cached)
    if np.count_nonzero(class_means[0].counts) < 2:
        raise UserError(f"only one class of {args.data} has images that can be read; selectivity compares several")
    files.write_args(save_dir, cli.flags(args), opened.checkpoints)
    by_layer = {
        layer: save_selectivity(save_dir, layer, means, classes)
        for layer, means in zip(chosen, class_means, strict=True)
    }
    plots.selectivity_by_layer(by_layer, save_dir / figures[0])
    if args.pca is None:
        return
    curves = {}
    for each in (data, *further):
        if each is not data:
            covariances = measure(model, chosen, each, batch_size, True, *cached)[1]
        folder = str(each.frames.folder)
        curves[folder] = {}
        for layer, covariance in zip(chosen, covariances, strict=True):
            curve = variance_explained(covariance.matrix())
            print(f"{folder}, layer {layer}: {np.argmax(curve >= 0.9) + 1} components explain 90 % of the variance")
            curves[folder][layer] = curve
    plots.variance_explained(curves, save_dir / figures[1])


if __name__ == "__main__":
    cli.run(main)
