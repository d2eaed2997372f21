"""Show where in each frame of a clip a network sees a class: its class activation map over the frames, as a film.

    python feature_animation_class.py room.mp4 --model-path TC-S_labeledS_5_iid.tar --class-idx computer

In: a folder of frames in order, or a video, and a model with a linear head, such as linear_decoding.py writes. Out:
computers_feature_animation_IDX.mp4 in --save-dir.
"""

from moco import checkpoint, cli, distributed, models
from moco.analysis import clip, features


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--class-idx", default="1", metavar="CLASS", help="the class, by its number from 0 or its name")
    clip.add_flags(parser)
    parser.set_defaults(frames=200, batch_size=500)
    return parser.parse_args(argv)


def class_maps(trunk, weights):
    """What makes of images (N, 3, H, W) the maps (N, H/32, W/32) of a class with weights (C,) on a spatial trunk."""
    return lambda images: features.class_activation_map(trunk(images), weights)


def main(argv=None):
    args = parse_args(argv)
    opened = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed, head_required=True)
    model = opened.network
    device = distributed.select_device(args.device)
    trunk = models.freeze(models.spatial_trunk(model)).to(device)
    weights, names = models.head(model).weight.detach().to(device), opened.classes
    number = checkpoint.class_number(args.class_idx, names, len(weights))
    title = names[number] if names else f"class {number}"
    clip.animate(args, class_maps(trunk, weights[number]), title, f"computers_feature_animation_{number}.mp4")


if __name__ == "__main__":
    cli.run(main)
