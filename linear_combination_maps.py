"""Show where in an image a network sees a class: class activation maps as masks over the images (Figure 6).

    python linear_combination_maps.py toybox --model-path TC-S_labeledS_5_iid.tar --class-idx car --class-only
    python linear_combination_maps.py toybox --model-path dino_s_vitb14.pth --attention --save-dir maps

Input: a folder with one folder of images per class, and a model with a linear head, such as linear_decoding.py writes.
Output, in --save-dir: linear_combination_maps_class_IDX.pdf and .png (with _class, _others or _overlay after these
flags), a random sample of images with true and predicted class. With --attention, for a vision transformer of any
training: linear_combination_maps_attention.pdf and .png, what the class token attends to in the last block.
"""

import numpy as np
import torch

from moco import cli, distributed, files, pictures, plots
from moco.analysis import features, film, maps
from moco.cli import UserError
from moco.data import loader
from moco.data.frame_folder import FrameFolder
from moco.networks import architectures, layers, opening, vit


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with one folder of images per class")
    opening.add_flags(parser)
    add("--class-idx", default="6", metavar="CLASS", help="the class, by its number from 0 or by its name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class-only", action="store_true", help="show images of this class only")
    which.add_argument("--others", action="store_true", help="show images of the other classes only")
    add("--overlay", action="store_true", help="show the maps as colors over the images, not as masks")
    add("--attention", action="store_true", help="show the attention of a vision transformer's class token instead")
    add("--heads", action="store_true", help="with --attention: one column per head, not their mean")
    cli.shared_flags(parser, "--batch-size", default=36, help="number of images, chosen at random")
    cli.shared_flags(parser, "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


def choose(frames, name, which, n, seed):
    """Sorted indices of n random images: of the 'class' folder name, of the 'others', or of 'all'."""
    candidates = np.arange(len(frames))
    if which != "all":
        if name not in frames.classes:
            raise UserError(f"{frames.folder} has no class folder {name}; it has {', '.join(frames.classes)}")
        is_class = frames.labels() == frames.classes.index(name)
        candidates = np.flatnonzero(is_class if which == "class" else ~is_class)
    if not len(candidates):
        raise UserError(f"{frames.folder} has no images of {'this class' if which == 'class' else 'other classes'}")
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:n])


@torch.inference_mode()
def forward_maps(model, data, indices):
    """Run model on some images of data (features.EvalData), in float32.

    Returns, on the CPU, the images (N, 3, H, W), their last maps (N, C, h, w), the predicted classes (N,), and the
    indices (N,) of the images that could be read.
    """
    trunk, head = layers.spatial_trunk(model), architectures.head(model)
    parts = []
    with distributed.no_tf32():
        for images, _, part in data.batches(indices):
            last_maps = trunk(images)
            pooled = last_maps.mean((2, 3))
            features.check_finite(pooled.cpu().numpy(), data.frames, part)
            parts.append((images, last_maps, head(pooled).argmax(1), part))
    if not parts:
        raise UserError(f"none of the chosen images in {data.frames.folder} can be read")
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]


def overlay_heatmaps(heatmaps, images):
    """Heatmaps (N, H, W) in colors over normalized images (N, 3, H, W): N images (H, W, 3) uint8.

    All share one color scale, as in the published films.
    """
    pixels = (255 * maps.denormalize(images)).round().byte().numpy()
    low, high = heatmaps.min(), heatmaps.max()
    brightness = film.brightness(pixels.min((0, 1, 2)), pixels.max((0, 1, 2)), loader.MEAN, loader.STD)
    return [
        film.overlay(image, film.color_indices(heatmap, low, high), brightness)
        for image, heatmap in zip(pixels, heatmaps, strict=True)
    ]


@torch.inference_mode()
def forward_attention(model, data, indices):
    """The images (N, 3, H, W) and the attention (N, heads, H, W) of the class token on them, and indices (N,)."""
    parts = []
    with distributed.no_tf32():
        for images, _, part in data.batches(indices):
            attention = vit.attention_maps(model, images).cpu()
            heads = [maps.upsample(head, images.shape[-1]) for head in attention.unbind(1)]
            parts.append((images.cpu(), torch.stack(heads, 1), part))
    if not parts:
        raise UserError(f"none of the chosen images in {data.frames.folder} can be read")
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]


def show_attention(args, opened, frames):
    """Draw what the class token attends to in random images: a row per image, with the mean of the heads or each."""
    path = files.make_output_dir(args.save_dir, [args.data]) / "linear_combination_maps_attention"
    path = path.with_name(path.name + "_heads" * args.heads)
    for ending in (".pdf", ".png"):
        files.refuse_overwrite(path.with_suffix(ending), args.overwrite)
    data = features.EvalData(frames, args.image_size, distributed.select_device(args.device), args.workers)
    chosen = choose(frames, None, "all", args.batch_size, args.seed)
    images, attention, indices = forward_attention(architectures.freeze(opened.network).to(data.device), data, chosen)
    heads = attention.unbind(1) if args.heads else [attention.mean(1)]
    columns = [(255 * maps.denormalize(images)).round().byte().numpy()]
    columns += [overlay_heatmaps(head.numpy(), images) for head in heads]
    names = plots.drawable([frames.classes[frames.label(i)] for i in indices], plots.CAPTION_LENGTH)
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    pictures.image_rows([([name], row) for name, row in zip(names, zip(*columns, strict=True), strict=True)], path)
    print(f"{len(images)} images, {attention.shape[1]} heads: {path.with_suffix('.pdf')} and .png")


def main(argv=None):
    args = parse_args(argv)
    frames = FrameFolder(args.data)
    if args.attention:
        opened = opening.open_model(args.model_path, args.model, args.n_out, args.seed, key=args.checkpoint_key)
        print(f"model: {opened.description}")
        architectures.check_image_size(opened.network, args.image_size)
        return show_attention(args, opened, frames)
    opened = opening.open_model(args.model_path, args.model, args.n_out, args.seed, True, args.checkpoint_key)
    print(f"model: {opened.description}")
    model = opened.network
    architectures.check_image_size(model, args.image_size)
    weights = architectures.head(model).weight.detach().cpu()
    classes = opened.classes or (frames.classes if len(frames.classes) == len(weights) else None)
    number = opening.class_number(args.class_idx, classes, len(weights))
    if classes is None and (args.class_only or args.others):
        raise UserError(
            f"the {len(weights)} outputs of the model are not the {len(frames.classes)} class folders of {args.data}; "
            "omit --class-only and --others"
        )
    which = "class" if args.class_only else "others" if args.others else "all"
    parts = ["linear_combination_maps_class", str(number)] + ([] if which == "all" else [which])
    path = files.make_output_dir(args.save_dir, [args.data]) / "_".join(parts + ["overlay"] * args.overlay)
    for ending in (".pdf", ".png"):
        files.refuse_overwrite(path.with_suffix(ending), args.overwrite)

    data = features.EvalData(frames, args.image_size, distributed.select_device(args.device), args.workers)
    chosen = choose(frames, classes[number] if classes else None, which, args.batch_size, args.seed)
    images, last_maps, predicted, indices = forward_maps(architectures.freeze(model).to(data.device), data, chosen)
    heatmaps = maps.upsample(maps.class_activation_map(last_maps, weights[number]), images.shape[-1])
    if args.overlay:
        shown = overlay_heatmaps(heatmaps.numpy(), images)
    else:
        shown = maps.denormalize(maps.attention_mask(heatmaps)[:, None] * images).numpy()
    names = classes or [f"class {k}" for k in range(len(weights))]
    every_name = list(dict.fromkeys([*names, *frames.classes]))
    labels = dict(zip(every_name, plots.drawable(every_name, plots.CAPTION_LENGTH), strict=True))
    captions = [
        (labels[frames.classes[frames.label(i)]], labels[names[k]])
        for i, k in zip(indices.tolist(), predicted.tolist(), strict=True)
    ]
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    pictures.image_grid(shown, captions, path, f"class activation maps: {labels[names[number]]}")
    print(f"{len(shown)} images: {path.with_suffix('.pdf')} and .png")


if __name__ == "__main__":
    cli.run(main)
