"""Learn to see by telling episodes of a child's life apart: temporal classification of head-camera frames.

Every class is an episode of some minutes, as read_saycam.py cuts them; a network that tells from one frame which
episode it comes from learns features of places, objects and people (Orhan, Gupta & Lake, 2020, section 4.1).

    python temporal_classification.py frames_S --model resnext50_32x4d --save-dir TC-S

In: a folder of frames, one folder a class. Out, in --save-dir: MODEL_epoch_N.tar after every epoch, last.tar to
continue from, log.jsonl, training_curve.pdf and .png.
"""

import torch

from moco import checkpoint, cli, distributed, models, plots
from moco.data import augment, loader
from moco.training import engine
from moco.training.run import Run

HYPERPARAMETERS = {"released": {"epochs": 16, "batch_size": 256}, "paper": {"epochs": 6, "batch_size": 732}}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder of frames, one folder a class")
    add(
        "--model",
        type=models.arch_name,
        default="resnet50",
        metavar="ARCH",
        help=f"published: {', '.join(models.PUBLISHED)}; or any other torchvision classifier",
    )
    add(
        "--recipe",
        choices=["released", "paper"],
        default="released",
        help="augmentation, epochs and batch size: of the released ResNeXt models, or of the paper's MobileNetV2",
    )
    add("--no-augmentation", dest="augmentation", action="store_false", help="show the frames as they are")
    add("--augmentation", dest="augmentation", action="store_false", help=cli.HIDDEN)  # the published spelling
    add("--epochs", type=cli.number(int, 1), help="default: 16, or 6 with --recipe paper")
    add("--n_out", type=cli.number(int, 1), help="outputs of the network; default: the classes in data")
    add("--wd", "--weight-decay", dest="wd", type=cli.number(float, 0), default=0.0, help="weight decay")
    add("--model-path", metavar="FILE", help="start from the weights in this checkpoint")
    add("--compile", action="store_true", help="compile the network first: minutes at the start, then faster steps")
    cli.shared_flags(parser, "--batch-size", "--lr", "--image-size", "--augment-on", "--print-freq", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--precision", "--overwrite")
    Run.add_flags(parser)
    distributed.add_flags(parser)
    parser.set_defaults(print_freq=10000, batch_size=None)
    args = parser.parse_args(argv)
    args.epochs = args.epochs or HYPERPARAMETERS[args.recipe]["epochs"]
    args.batch_size = args.batch_size or HYPERPARAMETERS[args.recipe]["batch_size"]
    return args


def network(arch, n_out, start_weights=None):
    """An architecture with n_out outputs, from random weights or those of a checkpoint, whose head is left out."""
    model = models.build(arch, n_out)
    if start_weights:
        checkpoint.fill(model, checkpoint.weights(start_weights, arch), drop_head=True)
    return model


def train(args, context):
    """One process of the training."""
    frames = loader.FrameFolder(args.data)
    n_out = args.n_out or len(frames.classes)
    if n_out != len(frames.classes):
        raise cli.UserError(f"--n_out {n_out} does not fit {args.data}: it has {len(frames.classes)} classes")
    recipe = augment.Recipe(args.recipe if args.augmentation else "none", args.image_size, args.augment_on)
    sampler = loader.EpochSampler(len(frames), args.batch_size, args.seed, context)
    batches = loader.FrameLoader(frames, recipe, sampler, context.device, args.workers)
    torch.manual_seed(args.seed)
    dtype = engine.resolve_dtype(args.precision, context.device, args.model, args.compile)
    model = engine.prepare(network(args.model, n_out, args.model_path), context, dtype, args.compile)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.wd, fused=context.supports_fused)
    facts = {"arch": args.model, "n_out": n_out, "classes": list(frames.classes), "images": len(frames)}
    run = Run(args, context, model, optimizer, f"{args.model}_epoch_{{}}.tar", facts)
    run.say(
        f"{len(frames)} frames in {n_out} classes; {args.model} in {dtype} on {context.world_size} x {context.device}"
    )
    for _ in run.epochs():
        run.end_epoch(engine.train_one_epoch(run, model, batches, optimizer, dtype, args.print_freq))
        if context.is_main:
            plots.training_curve(run.records, run.folder / "training_curve")


def main(argv=None):
    args = parse_args(argv)
    return distributed.launch(train, args)


if __name__ == "__main__":
    cli.run(main)
