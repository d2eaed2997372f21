"""Show where in each frame of a clip one feature answers: its last map as colors over the frames, as a film.

    python feature_animation.py frames_S --model-path TC-S.tar --feature-idx 276 --save-dir films

In: a folder of frames in order, or a video, and a model. Out: intphys_feature_animation_IDX.mp4 in --save-dir.
"""

from moco import checkpoint, cli, distributed, models
from moco.analysis import clip
from moco.cli import UserError


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--feature-idx", type=int, default=1, metavar="UNIT", help="the feature, from 0")
    clip.add_flags(parser)
    parser.set_defaults(frames=900, batch_size=900)
    return parser.parse_args(argv)


def feature_map(trunk, feature):
    """What makes of images (N, 3, H, W) the maps (N, H/32, W/32) of one feature of a spatial trunk."""
    return lambda images: trunk(images)[:, feature]


def main(argv=None):
    args = parse_args(argv)
    model = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed).network
    trunk = models.freeze(models.spatial_trunk(model)).to(distributed.select_device(args.device))
    n = models.head(model).in_features
    if not 0 <= args.feature_idx < n:
        raise UserError(f"--feature-idx {args.feature_idx}: the model has {n} features, 0 to {n - 1}")
    network = feature_map(trunk, args.feature_idx)
    clip.animate(args, network, f"feature {args.feature_idx}", f"intphys_feature_animation_{args.feature_idx}.mp4")


if __name__ == "__main__":
    cli.run(main)
