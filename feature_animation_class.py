"""Show where in each frame of a film a network sees a class: its class activation map as colors over the frames.

    python feature_animation_class.py frames_S --model-path TC-S_labeledS_5_iid.tar --class-idx computer

Input: a folder of frames in order, and a model with a linear head, such as linear_decoding.py writes.
Output: computers_feature_animation_IDX.mp4 in --save-dir; the published code animated videos of computers.
"""

from moco import cli
from moco.analysis import film
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
    frames, opened = film.open_inputs(args, head_required=True)
    trunk, weights = layers.spatial_trunk(opened.network), architectures.head(opened.network).weight
    number = opening.class_number(args.class_idx, opened.classes, len(weights))
    title = opened.classes[number] if opened.classes else f"class {number}"
    name = f"computers_feature_animation_{number}.mp4"
    film.animate(args, frames, opened, class_map(trunk, weights[number]), name, title)


if __name__ == "__main__":
    cli.run(main)
