"""Where in an image a network sees a class: class activation maps, laid over the images as masks (Figure 6).

    python linear_combination_maps.py toybox --model-path TC-S_labeledS_5_iid.tar --class-idx car --class-only

In: a folder with a folder of images per class, and a model with a linear head, such as linear_decoding.py writes. Out,
in --save-dir: linear_combination_maps_class_IDX.pdf and .png, a random sample of images with true and named class.
"""

import numpy as np
import torch

from moco import checkpoint, cli, distributed, files, models, plots
from moco.analysis import features, film
from moco.cli import UserError
from moco.data import augment, loader


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with a folder of images per class")
    checkpoint.add_flags(parser)
    add("--class-idx", default="6", metavar="CLASS", help="the class, by its number from 0 or by its name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class-only", action="store_true", help="show images of this class only")
    which.add_argument("--others", action="store_true", help="show images of the other classes only")
    add("--overlay", action="store_true", help="show the maps as heat over the images, not as masks")
    cli.shared_flags(parser, "--batch-size", default=36, help="images shown at most, chosen at random")
    cli.shared_flags(parser, "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


def choose(frames, name, which, n, seed):
    """Sorted indices of n random images: of the class folder name, of the 'others', or of 'all'."""
    candidates = np.arange(len(frames))
    if which != "all":
        if name not in frames.classes:
            raise UserError(f"{frames.folder} has no class folder for class {name}; it has {', '.join(frames.classes)}")
        is_class = frames.labels() == frames.classes.index(name)
        candidates = np.flatnonzero(is_class if which == "class" else ~is_class)
    if not len(candidates):
        raise UserError(f"{frames.folder} holds no images of the wanted classes")
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:n])


@torch.inference_mode()
def look(model, batches):
    """Images (N, 3, H, W), their last maps (N, C, h, w), the class the model names (N,), and their indices (N,)."""
    trunk, head, seen = models.spatial_trunk(model), models.head(model), []
    for images, _, indices in batches.epoch(0):
        maps = trunk(images)
        features.check_finite(maps.mean((2, 3)).cpu().numpy(), [batches.frames.path(i) for i in indices])
        seen.append((images, maps, head(maps.mean((2, 3))).argmax(1), indices))
    if not seen:
        raise UserError(f"none of the chosen images in {batches.frames.folder} can be read")
    return [torch.cat(column).cpu() for column in zip(*seen, strict=True)]


def heated(maps, images):
    """Maps (N, H, W) as heat over images (N, 3, H, W): N pictures, with one scale for all as in the published films."""
    pictures, (low, high) = (255 * features.denormalize(images)).round().byte().numpy(), (maps.min(), maps.max())
    shades = film.brightness(pictures.min((0, 1, 2)), pictures.max((0, 1, 2)), loader.MEAN, loader.STD)
    return [film.overlay(picture, film.heat(m, low, high), shades) for picture, m in zip(pictures, maps, strict=True)]


def main(argv=None):
    args = parse_args(argv)
    frames, device = loader.FrameFolder(args.data), distributed.select_device(args.device)
    opened = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed, head_required=True)
    model = opened.network
    weight = models.head(model).weight.detach().cpu()
    names = opened.classes or (frames.classes if len(frames.classes) == len(weight) else None)
    number = checkpoint.class_number(args.class_idx, names, len(weight))
    if names is None and (args.class_only or args.others):
        known = f"{len(weight)} outputs of the model are not the {len(frames.classes)} class folders of {args.data}"
        raise UserError(f"the {known}; leave out --class-only and --others")
    which = "class" if args.class_only else "others" if args.others else "all"
    parts = ["linear_combination_maps_class", str(number)] + ([] if which == "all" else [which])
    path = files.make_output_dir(args.save_dir) / "_".join(parts + ["overlay"] * args.overlay)
    files.refuse_overwrite(path.with_suffix(".pdf"), args.overwrite)

    chosen = choose(frames, names[number] if names else None, which, args.batch_size, args.seed)
    recipe = augment.Recipe("none", args.image_size)
    batches = loader.in_order(frames, recipe, device, args.workers, chosen)
    images, maps, named, indices = look(models.freeze(model).to(device), batches)
    maps = features.upsample(features.class_activation_map(maps, weight[number]), images.shape[-1])
    if args.overlay:
        pictures = heated(maps.numpy(), images)
    else:
        pictures = features.denormalize(features.attention_mask(maps)[:, None] * images).numpy()
    labels = frames.labels()
    captions = [
        (frames.classes[labels[i]], names[guess] if names else str(guess))
        for i, guess in zip(indices.tolist(), named.tolist(), strict=True)
    ]
    plots.image_grid(pictures, captions, path, f"what speaks for {names[number] if names else f'class {number}'}")
    print(f"{len(pictures)} images: {path.with_suffix('.pdf')} and .png")


if __name__ == "__main__":
    cli.run(main)
