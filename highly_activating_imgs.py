"""Show the images that activate units of a network most strongly (Orhan, Gupta & Lake 2020, Figures 7b and A5).

    python highly_activating_imgs.py labeled_S --model-path TC-S.tar --neuron_idx 276 12 7 --save-dir top

Input: a folder with one folder of images per class, and a model. Output, in --save-dir:
highly_activating_imgs_neuron_IDX.pdf and .png, with one row per unit, its selectivity and its preferred class; and the
same as .json, with file names.
"""

import numpy as np
import torch

from moco import cli, distributed, files, pictures, plots
from moco.analysis import features, units
from moco.cli import UserError
from moco.data import augment
from moco.data.folders import FrameFolder
from moco.networks import layers, opening


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with one folder of images per class")
    opening.add_model_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--neuron_idx", type=int, nargs="+", default=[276], metavar="UNIT", help="units, from 0")
    which.add_argument("--most-selective", type=cli.number(int, 1), metavar="N", help="the N most selective units")
    add(
        "--layer",
        type=layers.layer,
        default=1,
        metavar="L",
        help="layer of the units, by number from the end or by the name of a module, such as layer3.2.relu",
    )
    add("--top", type=cli.number(int, 1), default=10, metavar="N", help="images per unit")
    add("--all", action="store_true", help="use all images, not a random sample of --batch-size")
    cli.shared_flags(
        parser,
        "--batch-size",
        default=1024,
        help="size of the random sample the images are chosen from, without --all",
    )
    cli.shared_flags(parser, "--features-dir", "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


def sample(total, size, seed):
    """Sorted indices of a random sample of size out of total images; of all images if there are fewer."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:size])


def check_units(network, layer, image_size, neurons, most_selective):
    """UserError if a layer of network does not have the units of --neuron_idx, or enough for --most-selective."""
    with torch.no_grad():
        n = layers.layer_means(network.eval(), [layer], torch.zeros(1, 3, image_size, image_size))[0].shape[1]
    if most_selective and most_selective > n:
        raise UserError(f"--most-selective {most_selective}: the layer has {n} units")
    if not most_selective and (faulty := [unit for unit in neurons if not 0 <= unit < n]):
        raise UserError(f"--neuron_idx {faulty[0]}: the layer has {n} units, 0 to {n - 1}")


def describe_units(neurons, values, indices, frames, selectivity, preferred_class):
    """An entry of the JSON file for each unit: its number, selectivity and preferred class, and its top images.

    values, indices: activations and indices of the top images, (k, len(neurons)). selectivity, preferred_class: (C,) of
    all units, or None for images of one class.
    """
    entries = []
    for unit, of_unit, images in zip(neurons, values.T, indices.T, strict=True):
        entry = {"unit": unit}
        if selectivity is not None:
            entry["selectivity"] = float(selectivity[unit])
            entry["preferred_class"] = frames.classes[preferred_class[unit]]
        entry["files"] = [frames.name(index) for index in images]
        if frames.source(0):
            entry["sources"] = [str(frames.source(index)) for index in images]
        entry["activations"] = of_unit.tolist()
        entries.append(entry)
    return entries


def image_row(entry, contents, size):
    """The row of a unit's entry in the figure: (lines of text, [images (size, size, 3) uint8], [their activations]).

    contents: the files of its top images.
    """
    lines = [f"unit {entry['unit']}"]
    if "selectivity" in entry:
        (preferred_class,) = plots.drawable([entry["preferred_class"]], plots.CAPTION_LENGTH)
        lines += [f"selectivity {entry['selectivity']:.2f}", f"prefers {preferred_class}"]
    images = [augment.resize_center_crop(augment.decode(content), size) for content in contents]
    return lines, images, [f"{activation:.3g}" for activation in entry["activations"]]


def main(argv=None):
    args = parse_args(argv)
    numbers = "_".join(map(str, args.neuron_idx)) if len(args.neuron_idx) <= 16 else f"{len(args.neuron_idx)}_units"
    name = f"most_selective_{args.most_selective}" if args.most_selective else f"neuron_{numbers}"
    frames, device = FrameFolder(args.data), distributed.select_device(args.device)
    opened = opening.open_for(args)
    model = opened.network
    layer = layers.layer_name(model, args.layer)
    check_units(model, layer, args.image_size, args.neuron_idx, args.most_selective)
    path = files.make_output_dir(args.save_dir, [args.data]) / f"highly_activating_imgs_{name}"
    for ending in (".json", ".pdf", ".png"):
        files.refuse_overwrite(path.with_suffix(ending), args.overwrite)

    images = np.arange(len(frames)) if args.all else sample(len(frames), args.batch_size, args.seed)
    cache = files.make_output_dir(args.features_dir or path.parent / "features", [args.data])
    (rows,) = features.extract_features(
        model.to(device), frames, images, cache, args.image_size, args.workers, opened.description, [layer]
    )
    means, counts = units.class_means(rows, frames.labels()[images], len(frames.classes))
    neurons, selectivity, preferred_class = args.neuron_idx, None, None
    if np.count_nonzero(counts) > 1:
        selectivity, preferred_class = units.selectivity(means)
    if args.most_selective:
        if selectivity is None:
            raise UserError(f"the images used of {args.data} have one class; --most-selective compares several")
        neurons = np.argsort(-selectivity, kind="stable")[: args.most_selective].tolist()
    values, best = units.top_images(rows, neurons, args.top)
    entries = describe_units(neurons, values, images[best], frames, selectivity, preferred_class)
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    files.write_json(path.with_suffix(".json"), entries)
    shown = [
        image_row(entry, map(frames.read, of_unit), args.image_size)
        for entry, of_unit in zip(entries, images[best].T, strict=True)
    ]
    pictures.image_rows(shown, path, f"{opened.title}, {layers.title(args.layer)}: highest activations")
    print(f"top {len(best)} of {counts.sum()} images for {len(entries)} units: {path.with_suffix('.pdf')}")
    if len(best) < args.top:
        print(f"fewer images than --top {args.top} could be read")


if __name__ == "__main__":
    cli.run(main)
