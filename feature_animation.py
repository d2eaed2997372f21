"""Show where in each frame of a film one feature is active: its last map as colors over the frames.

    python feature_animation.py frames_S --model-path TC-S.tar --feature-idx 276 --save-dir films

Input: a folder of frames in order, and a model. Output: intphys_feature_animation_IDX.mp4 in --save-dir; the published
code animated videos of intuitive physics.
"""

from moco import cli
from moco.analysis import film
from moco.cli import UserError
from moco.networks import architectures, layers, vit


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--feature-idx", type=int, default=1, metavar="UNIT", help="the feature, from 0")
    parser.add_argument(
        "--attention", action="store_true", help="show the attention of a vision transformer's class token instead"
    )
    film.add_flags(parser, frames=900, batch_size=900)
    return parser.parse_args(argv)


def feature_map(trunk, feature):
    """A function from images (N, 3, H, W) to the maps (N, H/32, W/32) of one feature of a spatial trunk."""
    return lambda images: trunk(images)[:, feature]


def main(argv=None):
    args = parse_args(argv)
    frames, opened = film.open_inputs(args)
    network = opened.network
    if args.attention:
        vit.check(network)
        name = title = "attention"
        function, stride = lambda images: vit.attention_maps(network, images).mean(1), network.patch_size
    else:
        n = architectures.head(network).in_features
        if not 0 <= args.feature_idx < n:
            raise UserError(f"--feature-idx {args.feature_idx}: the model has {n} features, 0 to {n - 1}")
        function, stride = feature_map(layers.spatial_trunk(network), args.feature_idx), film.STRIDE
        name, title = args.feature_idx, f"feature {args.feature_idx}"
    film.animate(args, frames, opened, function, f"intphys_feature_animation_{name}.mp4", title, stride)


if __name__ == "__main__":
    cli.run(main)
