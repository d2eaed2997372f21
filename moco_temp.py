"""Learn to see by telling moments of a child's life apart: MoCo, where a frame belongs together with its neighbor.

A query must find the key of a frame next to it in time among those of many others (temporal contrastive learning:
Orhan, Gupta & Lake, 2020, section 4.2, with He et al.'s MoCo, 2020).

    python moco_temp.py frames_S -a resnext50_32x4d --lr 0.015 --mlp --moco-t 0.2 --aug-plus --cos --save-dir temp-S

In: a folder of frames, with the manifest of read_saycam.py or in the order of time within each class. Out, in
--save-dir: moco_temp_checkpoint_NNNN.pth.tar after every epoch, last.tar to continue from, log.jsonl,
training_curve.pdf and .png. --batch-size counts frames, two a pair.
"""

from functools import partial

import moco_utils
from moco import cli, distributed
from moco.data import loader
from moco_utils import EpochPairs, TemporalPairs


def add_flags(parser):
    """Add the flags that say which frames are neighbors to parser."""
    add = parser.add_argument
    add("--pos-window", type=cli.number(int, 1), default=1, metavar="FRAMES", help="how far away a neighbor may be")
    add("--published-sampling", action="store_true", help="draw the frame before or the frame itself, across videos")


def parse_args(argv=None):
    return moco_utils.parse_args(__doc__, argv, add_flags)


def train(args, context):
    """One process of the training."""
    frames = loader.FrameFolder(args.data)
    sampler = TemporalPairs(frames, args.batch_size, args.seed, args.pos_window, args.published_sampling)
    order = partial(EpochPairs, sampler)
    moco_utils.train(args, context, "moco_temp", frames, pairs=sampler.pairs, order=order)


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
