"""MoCo on images: contrastive learning in which two augmentations of one frame are a positive pair.

The other frames in the queue are the negatives (static contrastive learning: Orhan, Gupta & Lake, 2020, section 4.2,
with the MoCo of He et al., 2020).

    python moco_img.py frames_S -a resnext50_32x4d --lr 0.015 --mlp --moco-t 0.2 --aug-plus --cos --save-dir moco_img-S

Input: a folder of frames. Output, in --save-dir: moco_img_checkpoint_NNNN.pth.tar after every epoch, last.tar to resume
from, log.jsonl, training_curve.pdf and .png. Accuracy is that of classifying the positive key against all keys of
the queue: high while the queue still contains its initial random keys, then low, then rising.
"""

import moco_utils
from moco import cli, distributed, files
from moco.data import recordings
from moco.data.folders import FrameFolder


def parse_args(argv=None):
    parser = moco_utils.parser(__doc__)
    cli.shared_flags(parser, "--batch-size")
    return parser.parse_args(argv)


def train(args, context):
    """The training, in one of its processes."""
    files.check_output_dir(args.save_dir, args.data)
    frames = FrameFolder(args.data, recordings.selection(args))
    moco_utils.train(args, context, "moco_img", frames, source=len(frames), pairs=args.batch_size)


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
