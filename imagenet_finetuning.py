"""How much of ImageNet a trunk that a child's videos taught makes learnable: fine-tune it, whole or its head alone.

    python imagenet_finetuning.py imagenet --model-path TC-SAY.tar --freeze-trunk --save-dir TC-SAY-linear

The paper has two protocols: linear, as above; and 1 %, the whole network on --frac-retained 0.01 of the images first,
then linear from what came out. In: a folder with train/ and val/, and a start checkpoint. Out, in --save-dir, after
every epoch: ft_IN_START and best_ft_IN_START, log.jsonl, training_curve.pdf and .png; and train_list.txt, the images
trained on.
"""

from pathlib import Path

import numpy as np
import torch

from moco import checkpoint, cli, distributed, files, models, plots
from moco.cli import UserError
from moco.data import augment, loader
from moco.training import engine
from moco.training.run import Run


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", help="folder with train/ and val/, each with a folder of images a class")
    add("--model-path", metavar="FILE", help="start from the trunk in this checkpoint; without one from random weights")
    add("--model", type=models.arch_name, metavar="ARCH", help="architecture where no file says it: resnext50_32x4d")
    add("--n_out", type=cli.number(int, 1), help="outputs of the start checkpoint; read from it, checked if given")
    add("--freeze-trunk", action="store_true", help="train the head alone, on a trunk that does not change at all")
    add("--frac-retained", type=cli.number(float, 0, 1), default=1.0, help="share of each class's images to train on")
    add("--train-list", metavar="FILE", help="train on the images this file names, such as train_list.txt")
    add("--evaluate", action="store_true", help="only say how well the checkpoint at --model-path does on val/")
    add("--epochs", type=cli.number(int, 1), default=25, help="passes over the images")
    add("--schedule", type=int, nargs="*", default=[23, 24], help="epochs from which on the learning rate is x 0.2")
    cli.shared_flags(parser, "--batch-size", "--lr", "--image-size", "--print-freq", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--precision", "--overwrite")
    Run.add_flags(parser)
    distributed.add_flags(parser)
    parser.set_defaults(print_freq=5000)
    args = parser.parse_args(argv)
    if args.evaluate and not args.model_path:
        raise UserError("--evaluate needs --model-path, the checkpoint to evaluate")
    return args


def learning_rate(epoch, lr, schedule):
    """lr, divided by five at every epoch of the schedule that has come."""
    return lr * 0.2 ** sum(epoch >= milestone for milestone in schedule)


def retained(labels, share, seed):
    """Sorted indices of a random share of the images of every class (labels, (N,)), at least one of each."""
    draws = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        kept.append(draws.permutation(images)[: max(1, round(share * len(images)))])
    return np.sort(np.concatenate(kept))


def listed(frames, path):
    """Sorted indices of the images of frames that the file at path names, one a line, as CLASS/NAME."""
    try:
        names = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read --train-list {path}: {error.strerror}") from error
    index = {frames.name(i): i for i in range(len(frames))}
    wanted = [name for name in names if name]
    if unknown := [name for name in wanted if name not in index]:
        raise UserError(f"--train-list {path} names {unknown[0]}, which {frames.folder} does not hold")
    return np.unique([index[name] for name in wanted])


def evaluate(args, context, batches):
    """Print top-1 and top-5 of the checkpoint at --model-path."""
    model, found = checkpoint.load(args.model_path, args.model, args.n_out)
    classes = len(batches.frames.classes)
    if found.n_out != classes:
        raise UserError(f"{args.model_path} has {found.n_out} outputs and {batches.frames.folder} {classes} classes")
    result = engine.evaluate(distributed.wrap(models.freeze(model), context), batches, context)
    if context.is_main:
        accuracies = f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %"
        print(f"{args.model_path}: {accuracies}, {result['images']} images")


def train(args, context):
    """One process of the fine-tuning, or of the evaluation."""
    val = loader.FrameFolder(Path(args.data) / "val")
    crops = augment.Recipe("center", args.image_size)
    in_order = loader.EpochSampler(len(val), args.batch_size, context=context, train=False)
    tests = loader.FrameLoader(val, crops, in_order, context.device, args.workers)
    if args.evaluate:
        return evaluate(args, context, tests)

    frames = loader.FrameFolder(Path(args.data) / "train")
    if frames.classes != val.classes:
        raise UserError(f"train/ and val/ of {args.data} hold different classes")
    images = retained(frames.labels(), args.frac_retained, args.seed)
    if args.train_list:
        images = listed(frames, args.train_list)
    crops = augment.Recipe("imagenet", args.image_size)
    sampler = loader.EpochSampler(images, args.batch_size, args.seed, context)
    batches = loader.FrameLoader(frames, crops, sampler, context.device, args.workers)

    torch.manual_seed(args.seed)
    start = checkpoint.weights(args.model_path, args.model) if args.model_path else None
    if start and args.n_out not in (None, start.n_out):
        raise UserError(f"--n_out {args.n_out} does not fit {args.model_path}: its head has {start.n_out} outputs")
    arch = start.arch if start else args.model or "resnext50_32x4d"
    model = models.build(arch, len(frames.classes))
    if start:
        checkpoint.fill(model, start, drop_head=True)
    if args.freeze_trunk:
        models.freeze(model)
        models.head(model).requires_grad_(True)
    dtype = engine.resolve_dtype(args.precision, context.device, arch)
    model = engine.prepare(model, context, dtype)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(learning, args.lr, fused=context.supports_fused)
    name = f"ft_IN_{Path(args.model_path or arch + '.tar').name}"
    facts = {"arch": arch, "n_out": len(frames.classes), "classes": frames.classes, "images": len(images)}
    run = Run(args, context, model, optimizer, name, facts)
    if context.is_main:
        names = [frames.name(i) for i in images]
        files.write_text(run.folder / "train_list.txt", "\n".join(names) + "\n")
    for epoch in run.epochs():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args.lr, args.schedule)
        record = engine.train_one_epoch(run, model, batches, optimizer, dtype, args.print_freq)
        found = engine.evaluate(model, tests, context)
        run.say(f"epoch {epoch}: val top-1 {found['acc1']:.2f} %, top-5 {found['acc5']:.2f} %, lr {group['lr']:g}")
        is_best = all(found["acc1"] > past.get("val_acc1", -1) for past in run.records)
        run.end_epoch(record | {"val_acc1": found["acc1"], "val_acc5": found["acc5"]}, is_best)
        if context.is_main:
            plots.training_curve(run.records, run.folder / "training_curve")


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
