"""Measure how selective the units of a network are for classes, layer by layer (Orhan, Gupta & Lake 2020, figure 7a).

    python selectivities.py labeled_S --model-path TC-S.tar --layer 1 2 6 10 14 18 --save-dir selectivity

In: a folder with a folder of images per class, and a model. Out, for every layer L: selectivity_L.npy, (units,);
selectivity_L.npz, the same with each unit's preferred class and its mean activation for each class; and a figure of
the distribution of selectivity by layer. With --pca also how many principal components the features fill (figure A1).
"""

import numpy as np

from moco import checkpoint, cli, distributed, files, plots
from moco.analysis import units
from moco.cli import UserError
from moco.data import loader


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with a folder of images per class")
    checkpoint.add_flags(parser)
    add(
        "--layer",
        type=cli.number(int, 1),
        nargs="+",
        default=[1],
        metavar="L",
        help="layers, counted from the end; 1 is the last; published: 1, 2, 6, 10, 14, 18",
    )
    add(
        "--pca",
        nargs="*",
        metavar="FOLDER",
        help="also the variance that principal components explain, of data and of any further folders of images",
    )
    cli.shared_flags(parser, "--batch-size", default=580, help="images a forward pass")
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device")
    cli.shared_flags(parser, "--overwrite")
    return parser.parse_args(argv)


def selectivity(features, labels):
    """Class selectivity (C,) of units, from their activations (N, C) on N images and the classes (N,) of these.

    See units.selectivity for the equation, and for units that are silent; ValueError for fewer than two classes.
    """
    means = units.ClassMeans(int(labels.max()) + 1)
    means.add(features, labels)
    return units.selectivity(means.means())[0]


class Covariance:
    """Running covariance (C, C) of rows of features (n, C), in float64."""

    def __init__(self):
        self.n = 0

    def add(self, rows):
        """Take in rows (n, C)."""
        if not self.n:
            self.origin, self.sum, self.products = rows.mean(0, dtype=np.float64), 0, 0
        rows = rows - self.origin  # keeps the products small, and what cancels in matrix() too
        self.n += len(rows)
        self.sum, self.products = self.sum + rows.sum(0), self.products + rows.T @ rows

    def matrix(self):
        """The covariance of all rows so far, (C, C)."""
        mean = self.sum / self.n
        return self.products / self.n - np.outer(mean, mean)


def variance_explained(covariance):
    """The share of all variance that the first 1, 2, ... C principal components explain: (C,), rising to 1.

    covariance: (C, C). Of features that never vary all is explained by the first.
    """
    variances = np.linalg.eigvalsh(covariance)[::-1].clip(0)
    return np.cumsum(variances) / variances.sum() if variances.any() else np.ones(len(variances))


def measure(model, layers, frames, with_covariance, flags):
    """One pass over frames: units.ClassMeans and, where wanted, Covariance, each one a layer."""
    class_means = [units.ClassMeans(len(frames.classes)) for _ in layers]
    covariances = [Covariance() for _ in layers if with_covariance]
    for means, labels, _ in units.layer_means(model, layers, frames, **flags):
        for rows, of_layer in zip(means, class_means, strict=True):
            of_layer.add(rows, labels)
        for rows, of_layer in zip(means, covariances, strict=False):
            of_layer.add(rows)
    return class_means, covariances


def main(argv=None):
    args = parse_args(argv)
    folder, layers = files.make_output_dir(args.save_dir), list(dict.fromkeys(args.layer))
    figures = [f"{what}_{'_'.join(map(str, layers))}" for what in ("selectivity_by_layer", "variance_explained")]
    for name in [f"selectivity_{layer}.npy" for layer in layers] + [f"{figure}.pdf" for figure in figures]:
        files.refuse_overwrite(folder / name, args.overwrite)
    frames, further = loader.FrameFolder(args.data), [loader.FrameFolder(each) for each in args.pca or ()]
    if len(frames.classes) < 2:
        raise UserError(f"{args.data} holds a single class, {frames.classes[0]}; selectivity compares several")
    model = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed).network
    flags = dict(size=args.image_size, batch_size=args.batch_size, workers=args.workers)
    flags["device"] = distributed.select_device(args.device)
    class_means, covariances = measure(model, layers, frames, args.pca is not None, flags)
    found = {}
    for layer, of_layer in zip(layers, class_means, strict=True):
        if np.count_nonzero(of_layer.counts) < 2:
            raise UserError(f"only one class of {args.data} has images that can be read; selectivity compares several")
        means = of_layer.means()
        found[layer], preferred_class = units.selectivity(means)
        silent = np.count_nonzero(np.nan_to_num(means).max(0) == 0)
        print(
            f"layer {layer}: {len(preferred_class)} units, mean selectivity {found[layer].mean():.3f}, {silent} silent"
        )
        with files.atomic_write(folder / f"selectivity_{layer}.npy") as part:
            np.save(part, found[layer].astype(np.float32))
        with files.atomic_write(folder / f"selectivity_{layer}.npz") as part:
            facts = dict(classes=frames.classes, images=of_layer.counts)
            np.savez(part, selectivity=found[layer], preferred_class=preferred_class, class_means=means, **facts)
    plots.selectivity_by_layer(found, folder / figures[0])
    if args.pca is not None:
        parts = [(frames, covariances)] + [(each, measure(model, layers, each, True, flags)[1]) for each in further]
        curves = {}
        for each, of_folder in parts:
            for layer, covariance in zip(layers, of_folder, strict=True):
                curve = variance_explained(covariance.matrix())
                enough = np.argmax(curve >= 0.9) + 1
                print(f"{each.folder}, layer {layer}: {enough} components explain 90 % of the variance")
                curves.setdefault(str(each.folder), {})[layer] = curve
        plots.variance_explained(curves, folder / figures[1])


if __name__ == "__main__":
    cli.run(main)
