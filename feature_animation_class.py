"""Show where in each frame of a clip a network sees a class: its class activation map over the frames, as a film.

    python feature_animation_class.py room.mp4 --model-path TC-S_labeledS_5_iid.tar --class-idx computer

Input: a folder of frames in order, or a video, and a model with a linear head, such as linear_decoding.py writes.
Output: computers_feature_animation_IDX.mp4 in --save-dir; the published code animated videos of computers.
"""

from moco import cli, distributed, files, plots
from moco.analysis import clip, maps
from moco.networks import architectures, layers, opening


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--class-idx", default="1", metavar="CLASS", help="the class, by its number from 0 or its name")
    clip.add_flags(parser, frames=200, batch_size=500)
    return parser.parse_args(argv)


def class_maps(trunk, weights):
    """A function from images (N, 3, H, W) to the maps (N, H/32, W/32) of a class with head weights (C,)."""
    return lambda images: maps.class_activation_map(trunk(images), weights)


def main(argv=None):
    args = parse_args(argv)
    limits = clip.color_range(args.range)
    opened = opening.open_model(args.model_path, args.model, args.n_out, args.seed, True, args.checkpoint_key)
    print(f"model: {opened.description}")
    device = distributed.select_device(args.device)
    trunk = architectures.freeze(layers.spatial_trunk(opened.network)).to(device)
    architectures.check_image_size(trunk, args.image_size)
    weights, classes = architectures.head(opened.network).weight.detach().to(device), opened.classes
    number = opening.class_number(args.class_idx, classes, len(weights))
    name = args.name or f"computers_feature_animation_{number}.mp4"
    path = clip.film_path(args.save_dir, name, args.data, args.overwrite)

    crop = clip.Crop(args.image_size, args.shift, not args.no_rotate)
    images = clip.Clip(args.data, crop, args.frames, args.fps, args.workers)
    clip_maps = clip.ClipMaps(images, class_maps(trunk, weights[number]), args.batch_size, device)
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    title = classes[number] if classes and plots.find_font(classes[number]) else f"class {number}"
    clip.write_film(path, images, clip_maps, title, args.fps, limits, args.side_by_side)


if __name__ == "__main__":
    cli.run(main)
