"""Show where in each frame of a clip one feature is active: its last map as colors over the frames, as a film.

    python feature_animation.py frames_S --model-path TC-S.tar --feature-idx 276 --save-dir films

In: a folder of frames in order, or a video, and a model. Out: intphys_feature_animation_IDX.mp4 in --save-dir; the
published code animated videos of intuitive physics.
"""

from moco import checkpoint, cli, distributed, models, provenance
from moco.analysis import clip
from moco.cli import UserError


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--feature-idx", type=int, default=1, metavar="UNIT", help="the feature, from 0")
    clip.add_flags(parser, frames=900, batch_size=900)
    return parser.parse_args(argv)


def feature_map(trunk, feature):
    """A function from images (N, 3, H, W) to the maps (N, H/32, W/32) of one feature of a spatial trunk."""
    return lambda images: trunk(images)[:, feature]


def main(argv=None):
    args = parse_args(argv)
    limits = clip.color_range(args.range)
    opened = checkpoint.open_model(args.model_path, args.model, args.n_out, args.seed)
    print(f"model: {opened.description}")
    device = distributed.select_device(args.device)
    trunk = models.freeze(models.spatial_trunk(opened.network)).to(device)
    models.check_image_size(trunk, args.image_size)
    n = models.head(opened.network).in_features
    if not 0 <= args.feature_idx < n:
        raise UserError(f"--feature-idx {args.feature_idx}: the model has {n} features, 0 to {n - 1}")
    name = args.name or f"intphys_feature_animation_{args.feature_idx}.mp4"
    path = clip.film_path(args.save_dir, name, args.data, args.overwrite)

    crop = clip.Crop(args.image_size, args.shift, not args.no_rotate)
    images = clip.Clip(args.data, crop, args.frames, args.fps, args.workers)
    maps = clip.ClipMaps(images, feature_map(trunk, args.feature_idx), args.batch_size, device)
    provenance.write(path.parent, provenance.flags(args), opened.checkpoints)
    clip.write_film(path, images, maps, f"feature {args.feature_idx}", args.fps, limits, args.side_by_side)


if __name__ == "__main__":
    cli.run(main)
