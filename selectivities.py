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
from moco.networks import layers, opening


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with one folder of images per class")
    opening.add_model_flags(parser)
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
    cli.shared_flags(parser, "--batch-size", default=580, help="without effect: images are processed 64 at a time")
    cli.shared_flags(parser, "--features-dir", "--image-size", "--workers", "--save-dir", "--seed", "--device")
    cli.shared_flags(parser, "--overwrite")
    return parser.parse_args(argv)


def variance_explained(covariance):
    """The share of the total variance that the first 1, 2, ... C principal components explain, (C,).

    covariance: (C, C). For features without variance all shares are 1.
    """
    variances = np.linalg.eigvalsh(covariance)[::-1].clip(0)
    return np.cumsum(variances) / variances.sum() if variances.any() else np.ones(len(variances))


def save_selectivity(folder, layer, means, counts, classes):
    """Write the selectivity of a layer's units to folder, print its mean, and return it, (units,).

    means, counts: see units.class_means.
    """
    values, preferred_class = units.selectivity(means)
    silent = np.count_nonzero(np.nan_to_num(means).max(0) == 0)
    print(f"layer {layer}: {len(values)} units, mean selectivity {values.mean():.3f}, {silent} silent")
    if np.nanmin(means) < 0:
        print(f"note: layer {layer} has negative mean activations, for which selectivity is not between 0 and 1")
    with files.atomic_write(folder / f"selectivity_{layer}.npy") as part:
        np.save(part, values.astype(np.float32))
    arrays = dict(selectivity=values, preferred_class=preferred_class, class_means=means, classes=classes)
    with files.atomic_write(folder / f"selectivity_{layer}.npz") as part:
        np.savez(part, images=counts, **arrays)
    return values


def main(argv=None):
    args = parse_args(argv)
    chosen = list(dict.fromkeys(args.layer))
    folders = [args.data, *(args.pca or ())]
    save_dir = files.make_output_dir(args.save_dir, folders)
    figures = [f"{name}_{'_'.join(map(str, chosen))}" for name in ("selectivity_by_layer", "variance_explained")]
    arrays = [f"selectivity_{layer}.{ending}" for layer in chosen for ending in ("npy", "npz")]
    for name in arrays + [f"{figure}.{ending}" for figure in figures for ending in ("pdf", "png")]:
        files.refuse_overwrite(save_dir / name, args.overwrite)
    device = distributed.select_device(args.device)
    data, *further = map(FrameFolder, folders)
    if len(data.classes) < 2:
        raise UserError(f"{args.data} has one class, {data.classes[0]}; selectivity compares several")
    opened = opening.open_for(args)
    names = [layers.layer_name(opened.network, layer) for layer in chosen]
    cache = files.make_output_dir(args.features_dir or save_dir / "features", folders)

    def activations(frames):
        """Spatial means of the images in frames, (N, C) for each layer."""
        network, images, size = opened.network.to(device), np.arange(len(frames)), args.image_size
        return features.extract_features(network, frames, images, cache, size, args.workers, opened.description, names)

    rows = activations(data)
    means = [units.class_means(of_layer, data.labels(), len(data.classes)) for of_layer in rows]
    if np.count_nonzero(means[0][1]) < 2:
        raise UserError(f"only one class of {args.data} has images that can be read; selectivity compares several")
    files.write_args(save_dir, cli.flags(args), opened.checkpoints)
    by_layer = {
        layer: save_selectivity(save_dir, layer, *of_layer, data.classes)
        for layer, of_layer in zip(chosen, means, strict=True)
    }
    plots.selectivity_by_layer(by_layer, save_dir / figures[0], f"{opened.title}: selectivity for classes")
    if args.pca is None:
        return
    curves = {}
    ends = [frames.folder.resolve().name for frames in (data, *further)]
    for frames, end in zip((data, *further), ends, strict=True):
        of_folder = curves[end if ends.count(end) == 1 else str(frames.folder)] = {}
        for layer, of_layer in zip(chosen, rows if frames is data else activations(frames), strict=True):
            curve = variance_explained(units.covariance(of_layer))
            n = np.argmax(curve >= 0.9) + 1
            print(f"{frames.folder}, layer {layer}: {n} components explain 90 % of the variance")
            of_folder[layer] = curve
    plots.variance_explained(curves, save_dir / figures[1], f"{opened.title}: variance of its units")


if __name__ == "__main__":
    cli.run(main)
