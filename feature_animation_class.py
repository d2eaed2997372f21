"""Show where in each frame of a film a network sees a class: its class activation map as colors over the frames.

    python feature_animation_class.py frames_S --model-path TC-S_labeledS_5_iid.tar --class-idx computer

Input: a folder of frames in order, and a model with a linear head, such as linear_decoding.py writes.
Output: computers_feature_animation_IDX.mp4 in --save-dir; the published code animated videos of computers.
"""

from moco import cli, distributed, files
from moco.analysis import film
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers, opening


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--class-idx", default="1", metavar="CLASS", help="the class, by its number from 0 or its name")
    film.add_flags(parser, frames=200, batch_size=500)
    return parser.parse_args(argv)


def class_map(trunk, weights):
    """A function from images (N, 3, H, W) to the maps (N, H/32, W/32) of a class with head weights (C,)."""
    return lambda images: film.class_activation_map(trunk(images), weights)


def main(argv=None):
    args = parse_args(argv)
    film.check_range(args.range)
    frames = FrameFolder(args.data)
    opened = opening.open_model(args.model_path, args.model, args.n_out, args.seed, True, args.checkpoint_key)
    print(f"model: {opened.description}")
    device = distributed.select_device(args.device)
    network, classes = architectures.freeze(opened.network).to(device), opened.classes
    architectures.check_image_size(network, args.image_size)
    trunk, weights = layers.spatial_trunk(network), architectures.head(network).weight
    number = opening.class_number(args.class_idx, classes, len(weights))
    name = args.name or f"computers_feature_animation_{number}.mp4"
    path = files.refuse_overwrite(files.make_output_dir(args.save_dir, [args.data]) / name, args.overwrite)

    images, maps, indices = film.images_and_maps(
        class_map(trunk, weights[number]),
        frames,
        frames.in_time()[: args.frames],
        args.image_size,
        device,
        args.batch_size,
        args.workers,
    )
    files.write_args(path.parent, cli.flags(args), opened.checkpoints)
    titles = film.titles(frames, indices, classes[number] if classes else f"class {number}")
    film.write(path, images, film.upsample(maps, images.shape[1:3]), titles, args.fps, args.range, args.side_by_side)


if __name__ == "__main__":
    cli.run(main)
