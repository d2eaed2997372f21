"""Show where in an image a network sees a class: class activation maps as masks over the images (Figure 6).

    python linear_combination_maps.py toybox --model-path TC-S_labeledS_5_iid.tar --class-idx car --class-only
    python linear_combination_maps.py toybox --model-path dino_s_vitb14.pth --attention --save-dir maps

Input: a folder with one folder of images per class, and a model with a linear head, such as linear_decoding.py writes.
Output, in --save-dir: linear_combination_maps_class_IDX.pdf and .png (with _class, _others or _overlay after these
flags), a random sample of images with true and predicted class. With --attention, for a vision transformer of any
training: linear_combination_maps_attention.pdf and .png, what the class token attends to in the last block.
"""

from difflib import get_close_matches
from functools import partial

import numpy as np

from moco import cli, files, pictures, plots
from moco.analysis import film
from moco.cli import UserError
from moco.data import loader
from moco.networks import architectures, layers, opening, vit

LEGENDS = {
    "masks": "Gray: the location is no evidence for the class. ",
    "overlay": "From blue to red: from the least to the most evidence for the class. ",
    "classes": "Below an image: its class, and the predicted one, with an arrow if it is another",
    "folders": "Below an image: its folder",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with one folder of images per class")
    opening.add_model_flags(parser)
    add("--class-idx", default="6", metavar="CLASS", help="the class, by its number from 0 or by its name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class-only", action="store_true", help="show images of this class only")
    which.add_argument("--others", action="store_true", help="show images of the other classes only")
    add("--overlay", action="store_true", help="show the maps as colors over the images, not as masks")
    add("--attention", action="store_true", help="show the attention of a vision transformer's class token instead")
    add("--heads", action="store_true", help="with --attention: one column per head, not their mean")
    cli.shared_flags(parser, "--batch-size", default=36, help="number of images, chosen at random")
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


def choose(frames, name, which, n, seed):
    """Sorted indices of n random images: of the 'class' folder name, of the 'others', or of 'all'."""
    candidates = np.arange(len(frames))
    if which != "all":
        if name not in frames.classes:
            similar = ", ".join(get_close_matches(name, frames.classes, 3, 0))
            raise UserError(f"{frames.folder} has no class folder {name}; did you mean {similar}?")
        is_class = frames.labels() == frames.classes.index(name)
        candidates = np.flatnonzero(is_class if which == "class" else ~is_class)
    if not len(candidates):
        raise UserError(f"{frames.folder} has no images of {'this class' if which == 'class' else 'other classes'}")
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:n])


def masked(images, heatmaps):
    """Images (N, H, W, 3) uint8 where heatmaps (N, H, W) are high, and of the mean color elsewhere: floats, 0 to 1.

    Orhan, Gupta & Lake (2020), Figure 6: the mask multiplies the normalized image.
    """
    return film.attention_mask(heatmaps)[..., None] * (images / np.float32(255) - loader.MEAN) + loader.MEAN


def compute(args, frames, opened, function, name, chosen):
    """Compute maps of some images: (path of the figure without its ending, images, maps, true classes for captions).

    function: normalized images to maps, see film.images_and_maps. name: of the figure. chosen: indices of the images.
    """
    path = files.make_output_dir(args.save_dir, [args.data]) / f"linear_combination_maps_{name}"
    for ending in (".pdf", ".png"):
        files.refuse_overwrite(path.with_suffix(ending), args.overwrite)
    device = next(opened.network.parameters()).device
    images, maps, indices = film.images_and_maps(
        function, frames, chosen, args.image_size, device, workers=args.workers, square=True
    )
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    true = plots.drawable([frames.classes[frames.label(i)] for i in indices], plots.CAPTION_LENGTH)
    return path, images, maps, true


def draw_attention(args, frames, opened):
    """A row per image: what the class token attends to, the mean over the heads, or with --heads a column for each."""
    network = opened.network
    vit.check(network)
    chosen = choose(frames, None, "all", args.batch_size, args.seed)
    name = "attention_heads" if args.heads else "attention"
    path, images, maps, true = compute(args, frames, opened, partial(vit.attention_maps, network), name, chosen)
    maps = maps.unbind(1) if args.heads else [maps.mean(1)]
    heatmaps = [film.upsample(head, images.shape[1:3], network.patch_size) for head in maps]
    columns = [images, *(film.overlay(images, head) for head in heatmaps)]
    rows = [([name], row, ()) for name, *row in zip(true, *columns, strict=True)]
    pictures.image_rows(rows, path, f"{opened.title}: attention of the class token, from blue to red")
    return f"{len(images)} images: {path}.pdf and .png"


def draw_class_maps(args, frames, opened):
    """A grid of images with their class activation maps, and the predicted classes where these can be right."""
    trunk, head = layers.spatial_trunk(opened.network), architectures.head(opened.network)
    n_out, which = head.out_features, "class" if args.class_only else "others" if args.others else "all"
    classes = opened.classes or (frames.classes if len(frames.classes) == n_out else None)
    number = opening.class_number(args.class_idx, classes, n_out)
    if classes is None and which != "all":
        raise UserError(
            f"the {n_out} outputs of the model are not the {len(frames.classes)} class folders of {args.data}; "
            "omit --class-only and --others"
        )
    is_comparable = not set(frames.classes).isdisjoint(classes or ())
    if not is_comparable:
        print(
            f"note: no output of the model is a class folder of {args.data}, as if its classes were episodes; "
            "train a classifier of these folders with linear_decoding.py, and give its .tar"
        )
    name = "_".join(["class", str(number)] + [which] * (which != "all") + ["overlay"] * args.overlay)
    chosen = choose(frames, classes[number] if classes else None, which, args.batch_size, args.seed)
    path, images, maps, true = compute(args, frames, opened, trunk, name, chosen)
    names = plots.drawable(classes or [f"class {k}" for k in range(n_out)], plots.CAPTION_LENGTH)
    predicted = [names[k] if is_comparable else None for k in head.cpu()(maps.mean((2, 3))).argmax(1)]
    heatmaps = film.upsample(film.class_activation_map(maps, head.weight[number]), images.shape[1:3])
    shown = film.overlay(images, heatmaps) if args.overlay else masked(images, heatmaps)
    legend = LEGENDS["overlay" if args.overlay else "masks"] + LEGENDS["classes" if is_comparable else "folders"]
    title = f"{opened.title}, class activation maps: {names[number]}"
    pictures.image_grid(shown, list(zip(true, predicted, strict=True)), path, title, legend)
    return f"{len(images)} images: {path}.pdf and .png"


def main(argv=None):
    args = parse_args(argv)
    frames, opened = film.open_inputs(args, head_required=not args.attention)
    draw = draw_attention if args.attention else draw_class_maps
    print(draw(args, frames, opened))


if __name__ == "__main__":
    cli.run(main)
