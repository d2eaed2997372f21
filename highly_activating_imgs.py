"""Show the images that units of a network answer to most strongly (Orhan, Gupta & Lake 2020, figures 7b and A5).

    python highly_activating_imgs.py labeled_S --model-path TC-S.tar --neuron_idx 276 12 7 --save-dir top

In: a folder with a folder of images per class, and a model. Out, in --save-dir: highly_activating_imgs_neuron_IDX.pdf
and .png, a row a unit, with its selectivity and its preferred_class class; and the same as .json, with file names.
"""

import numpy as np
import torch

from moco import checkpoint, cli, distributed, files, models, plots
from moco.analysis import units
from moco.cli import UserError
from moco.data import augment, loader


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with a folder of images per class")
    checkpoint.add_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--neuron_idx", type=int, nargs="+", default=[276], metavar="UNIT", help="units, from 0")
    which.add_argument("--most-selective", type=cli.number(int, 1), metavar="N", help="the N most selective units")
    add("--layer", type=cli.number(int, 1), default=1, metavar="L", help="their layer, counted from the end")
    add("--top", type=cli.number(int, 1), default=10, metavar="N", help="images a unit")
    add("--all", action="store_true", help="look at all images, and not at a random sample of --batch-size")
    cli.shared_flags(parser, "--batch-size", default=1024, help="size of the random sample the images are chosen from")
    cli.shared_flags(parser, "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


def sample(total, size, seed):
    """Rising indices of size random ones of total images, of all of them where they are fewer."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:size])


def check(model, layer, neurons, most_selective):
    """UserError, before any image is read, where a layer of model has not the wanted units."""
    with torch.no_grad():
        n = models.LayerMeans(model.eval(), [layer])(torch.zeros(1, 3, 64, 64))[0].shape[1]
    if most_selective and most_selective > n:
        raise UserError(f"--most-selective {most_selective}: the layer has {n} units")
    if not most_selective and (faulty := [unit for unit in neurons if not 0 <= unit < n]):
        raise UserError(f"--neuron_idx {faulty[0]}: the layer has {n} units, 0 to {n - 1}")


def look(model, layer, frames, chosen, top, **flags):
    """One pass over the chosen images (all if None): class means, images by class, and units.TopK of all units."""
    means, best = units.ClassMeans(len(frames.classes)), units.TopK(top)
    for (rows,), labels, indices in units.layer_means(model, [layer], frames, sample=chosen, **flags):
        means.add(rows, labels)
        best.add(rows, indices)
    return means.means(), means.counts, best


def main(argv=None):
    args = parse_args(argv)
    name = "_".join(map(str, args.neuron_idx)) if len(args.neuron_idx) <= 16 else f"{len(args.neuron_idx)}_units"
    name = f"most_selective_{args.most_selective}" if args.most_selective else f"neuron_{name}"
    path = files.make_output_dir(args.save_dir) / f"highly_activating_imgs_{name}"
    files.refuse_overwrite(path.with_suffix(".pdf"), args.overwrite)
    frames = loader.FrameFolder(args.data)
    chosen = None if args.all else sample(len(frames), args.batch_size, args.seed)
    model = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed).network
    check(model, args.layer, args.neuron_idx, args.most_selective)
    flags = dict(size=args.image_size, batch_size=args.batch_size, workers=args.workers)
    flags["device"] = distributed.select_device(args.device)
    means, counts, best = look(model, args.layer, frames, chosen, args.top, **flags)
    labelled = np.count_nonzero(counts) > 1
    if args.most_selective and not labelled:
        raise UserError(f"{args.data} gave images of one class only; --most-selective compares several")
    selectivity, preferred_class = units.selectivity(means) if labelled else (np.zeros(means.shape[1]), None)
    wanted = args.neuron_idx
    if args.most_selective:
        wanted = np.argsort(-selectivity, kind="stable")[: args.most_selective].tolist()
    found, rows = [], []
    for unit in wanted:
        paths = [frames.path(index) for index in best.indices[:, unit]]
        entry, margin = {"unit": unit}, f"unit {unit}"
        if labelled:
            entry |= {"selectivity": float(selectivity[unit]), "preferred_class": frames.classes[preferred_class[unit]]}
            margin += f"\nselectivity {entry['selectivity']:.2f}\n{entry['preferred_class']}"
        entry["files"] = [frames.name(index) for index in best.indices[:, unit]]
        entry["activations"] = best.values[:, unit].tolist()
        found.append(entry)
        rows.append(
            (
                margin,
                [augment.resize_center_crop(augment.decode(image.read_bytes()), args.image_size) for image in paths],
            )
        )
    plots.image_rows(rows, path)
    files.write_json(path.with_suffix(".json"), found)
    print(f"{len(best.values)} best of {counts.sum()} images for {len(found)} units: {path.with_suffix('.pdf')}")
    if len(best.values) < args.top:
        print(f"there were fewer images than the {args.top} of --top")


if __name__ == "__main__":
    cli.run(main)
