"""Temporal classification: learn features by classifying frames by the episode they are from.

Each class is an episode of a few minutes, as read_saycam.py cuts them. To classify single frames, the network has to
learn features of places, objects and people (Orhan, Gupta & Lake, 2020, section 4.1).

    python temporal_classification.py frames_S --model resnext50_32x4d --save-dir TC-S

Input: a folder of frames, one folder per class. Output, in --save-dir: MODEL_epoch_N.tar after every epoch, last.tar to
resume from, log.jsonl, training_curve.pdf and .png.
"""

import torch

from moco import cli, distributed, files
from moco.cli import UserError
from moco.data import augment, loader, recordings
from moco.data.folders import FrameFolder
from moco.networks import architectures, opening
from moco.training import engine
from moco.training.run import Run

HYPERPARAMETERS = {"released": {"epochs": 16, "batch_size": 256}, "paper": {"epochs": 6, "batch_size": 732}}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", nargs="+", metavar="FOLDER", help="folder of frames, one folder per class; several are joined")
    architectures.add_flag(parser, "--model")
    add(
        "--recipe",
        choices=["released", "paper"],
        default="released",
        help="augmentation, epochs and batch size: of the released ResNeXt models, or of the paper's MobileNetV2",
    )
    add("--no-augmentation", dest="augmentation", action="store_false", help="train on the frames as they are")
    add("--augmentation", dest="augmentation", action="store_false", help=cli.HIDDEN)  # the published spelling
    add("--epochs", type=cli.number(int, 1), help="number of epochs; default: 16, or 6 with --recipe paper")
    add("--n_out", type=cli.number(int, 1), help="number of outputs; default: the number of classes")
    add("--wd", "--weight-decay", dest="wd", type=cli.number(float, 0), default=0.0, help="weight decay")
    add("--model-path", metavar="FILE", help="checkpoint to initialize the trunk from; default: random weights")
    cli.shared_flags(
        parser, "--batch-size", help="total batch size over all processes; default: 256, or 732 with --recipe paper"
    )
    recordings.add_flags(parser)
    Run.add_flags(parser)
    parser.set_defaults(print_freq=10000, batch_size=None)
    args = parser.parse_args(argv)
    args.epochs = args.epochs or HYPERPARAMETERS[args.recipe]["epochs"]
    args.batch_size = args.batch_size or HYPERPARAMETERS[args.recipe]["batch_size"]
    return args


def train(args, context):
    """The training, in one of its processes."""
    files.check_output_dir(args.save_dir, args.data)
    frames = FrameFolder(args.data, recordings.selection(args))
    n_out = len(frames.classes)
    if args.n_out not in (None, n_out):
        raise UserError(f"--n_out {args.n_out} does not fit {frames.folder}: it has {n_out} classes")
    if n_out < 2:
        raise UserError(
            f"{frames.folder} has a single class, {frames.classes[0]}; temporal classification needs several"
        )
    args.image_size = opening.start_size(args.image_size, args.model_path, args.model)
    recipe = augment.RECIPES[args.recipe if args.augmentation else "none"]
    sampler = loader.EpochSampler(len(frames), args.batch_size, args.seed, context)
    batches = loader.FrameLoader(frames, recipe, args.image_size, sampler, context.device, args.workers)

    torch.manual_seed(args.seed)
    model = opening.build_from(args.model_path, args.model, n_out)
    architectures.check_image_size(model, args.image_size)
    dtype = engine.resolve_dtype(args.precision, context.device, args.model, args.compile)
    model = engine.prepare(model, context, dtype, args.compile, args.deterministic)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.wd, fused=context.supports_fused)

    metadata = {"arch": args.model, "n_out": n_out, "classes": list(frames.classes), "images": len(frames)}
    run = Run(vars(args), context, model, optimizer, f"{args.model}_epoch_{{epoch}}.tar", metadata, dtype)
    if frames.selected:
        run.print(frames.selected)
    run.print(
        f"{len(frames)} frames in {n_out} classes; {args.model} in {dtype} on {context.world_size} x {context.device}, "
        f"{args.image_size} pixels"
    )
    if args.batch_size > len(frames):
        run.print(f"note: --batch-size {args.batch_size} exceeds the {len(frames)} frames: an epoch is a single step")
    for _ in run.epochs():
        run.end_epoch(engine.train_one_epoch(run, model, batches, optimizer, engine.classification_objective))


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
