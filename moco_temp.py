"""MoCo over time: contrastive learning in which two frames next to each other in time are a positive pair.

The other frames in the queue are the negatives (temporal contrastive learning: Orhan, Gupta & Lake, 2020, section 4.2,
with the MoCo of He et al., 2020).

    python moco_temp.py frames_S -a resnext50_32x4d --lr 0.015 --mlp --moco-t 0.2 --aug-plus --cos --save-dir temp-S

Input: a folder of frames, with the manifest of read_saycam.py or in order of time within each class. Output, in
--save-dir: moco_temp_checkpoint_NNNN.pth.tar after every epoch, last.tar to resume from, log.jsonl, training_curve.pdf
and .png. --batch-size counts frames, two per pair.
"""

from functools import partial

import moco_utils
from moco import cli, distributed, files
from moco.data import recordings
from moco.data.folders import FrameFolder
from moco_utils import TemporalPairs


def parse_args(argv=None):
    parser = moco_utils.parser(__doc__)
    add = parser.add_argument
    add(
        "--pos-window",
        type=cli.number(int, 1),
        default=1,
        metavar="FRAMES",
        help="maximum distance between the two frames of a pair",
    )
    add(
        "--published-sampling",
        action="store_true",
        help="as the published code: pair a frame with the one before it or with itself, also across videos",
    )
    cli.shared_flags(parser, "--batch-size", help="total number of frames in a batch, two per pair, over all processes")
    return parser.parse_args(argv)


def train(args, context):
    """The training, in one of its processes."""
    files.check_output_dir(args.save_dir, args.data)
    frames = FrameFolder(args.data, recordings.selection(args))
    pairs = partial(TemporalPairs, frames, args.batch_size, args.seed, args.pos_window, args.published_sampling)
    moco_utils.train(args, context, "moco_temp", frames, source=pairs, pairs=args.batch_size // 2)


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
