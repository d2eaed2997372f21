"""Fine-tune on ImageNet: how much of it is learnable from a trunk trained on a child's videos.

    python imagenet_finetuning.py imagenet --model-path TC-SAY.tar --freeze-trunk --save-dir TC-SAY-linear

The paper has two protocols: linear, as above; and 1 %, the whole network on --frac-retained 0.01 of the images first,
then linear from the result. Input: a folder with train/ and val/, and an initial checkpoint. Output, in --save-dir:
ft_IN_START and best_ft_IN_START after every epoch, log.jsonl, training_curve.pdf and .png, and train_list.txt, the
images trained on.
"""

from pathlib import Path

import numpy as np
import torch

from moco import cli, distributed, files
from moco.analysis import features, report, splits
from moco.cli import UserError
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.networks import architectures, layers, opening
from moco.training import engine
from moco.training.run import Run


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", nargs="?", help="folder with train/ and val/, each with one folder of images per class")
    add("--model-path", metavar="FILE", help="checkpoint to initialize the trunk from; default: random weights")
    opening.add_flags(
        parser, "architecture, if not stored in the checkpoint; without --model-path resnext50_32x4d"
    )
    add(
        "--n_out",
        type=cli.number(int, 1),
        help="number of outputs of the checkpoint; read from it, and checked if given",
    )
    add("--freeze-trunk", action="store_true", help="train the head alone, on a frozen trunk")
    add(
        "--frac-retained", type=cli.number(float, 0, 1), default=1.0, help="fraction of each class's images to train on"
    )
    add(
        "--train-list",
        metavar="FILE",
        help="train on the images in this file, such as train_list.txt of another run, whatever --frac-retained",
    )
    add("--evaluate", action="store_true", help="only report the accuracy of the checkpoint at --model-path on val/")
    add("--epochs", type=cli.number(int, 1), default=25, help="number of epochs")
    add(
        "--schedule",
        type=int,
        nargs="*",
        default=[23, 24],
        help="epochs at which the learning rate is multiplied by 0.2",
    )
    cli.shared_flags(parser, "--batch-size")
    Run.add_flags(parser)
    parser.set_defaults(print_freq=5000)
    args = parser.parse_args(argv)
    if not args.data or (args.n_out and not args.model_path):
        raise UserError(
            "give the folder that has train/ and val/ as an argument (published: a constant), and the checkpoint to "
            "start from as --model-path (published: --resume); --resume continues an earlier run of this script"
        )
    if args.evaluate and not args.model_path:
        raise UserError("--evaluate needs --model-path, the checkpoint to evaluate")
    return args


def listed(frames, path):
    """Sorted indices of the images of frames that the file at path names, one CLASS/NAME per line."""
    names = files.read_list(path)
    index = {frames.name(i): i for i in range(len(frames))}
    if unknown := [name for name in names if name not in index]:
        raise UserError(f"--train-list {path} names {unknown[0]}, which is not in {frames.folder}")
    return np.unique([index[name] for name in names])


def start_network(args, n_out):
    """(arch, network) with n_out outputs and a random head, on the trunk that the flags name."""
    start = opening.find(args.model_path, args.model, args.checkpoint_key) if args.model_path else None
    if start and args.n_out not in (None, start.n_out):
        raise UserError(f"the head of {args.model_path} has {start.n_out} outputs, not {args.n_out}")
    arch = start.arch if start else args.model or "resnext50_32x4d"
    network = architectures.build(arch, n_out)
    if start:
        opening.load(network, start.state, args.model_path, drop_head=True)
    architectures.check_image_size(network, args.image_size)
    if args.freeze_trunk:
        architectures.freeze(network)
        architectures.head(network).requires_grad_(True)
    return arch, network


def note_scale(args, network, frames, images):
    """report.note_scale() of what the head sees of a batch of the images (indices), spread over all classes."""
    spread = np.unique(images[np.linspace(0, len(images) - 1, features.BATCH).astype(int)])
    for pictures, *_ in features.batches(network, frames, spread, args.image_size, 0):
        with torch.no_grad():
            (rows,) = layers.layer_means(network, [layers.PENULTIMATE], pictures)
        report.note_scale(args.model_path or "the random network", rows.numpy())


def evaluate(args, context, batches):
    """Print top-1 and top-5 accuracy of the checkpoint at --model-path."""
    opened = opening.open_model(
        args.model_path, args.model, args.n_out, 0, True, key=args.checkpoint_key, image_size=args.image_size
    )
    n_out, classes = architectures.head(opened.network).out_features, batches.frames.classes
    if n_out != len(classes):
        raise UserError(
            f"{args.model_path} has {n_out} outputs, but {batches.frames.folder} has {len(classes)} classes"
        )
    if opened.classes not in (None, classes):
        different = next(pair for pair in zip(opened.classes, classes, strict=True) if pair[0] != pair[1])
        raise UserError(f"{args.model_path} was trained on other classes: {different[0]} where {different[1]} is now")
    network = distributed.wrap(architectures.freeze(opened.network), context)
    result = engine.evaluate(network, batches, context)
    if context.is_main:
        accuracies = f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %"
        print(f"{opened.description}: {accuracies}, {result['images']} images")


def train(args, context):
    """The fine-tuning, or the evaluation, in one of its processes."""
    val = FrameFolder(Path(args.data) / "val")
    args.image_size = opening.start_size(args.image_size, args.model_path, args.model, args.checkpoint_key)
    in_order = loader.EpochSampler(len(val), args.batch_size, context=context, train=False)
    center = augment.RECIPES["center"]
    val_batches = loader.FrameLoader(val, center, args.image_size, in_order, context.device, args.workers)
    if args.evaluate:
        return evaluate(args, context, val_batches)

    files.check_output_dir(args.save_dir, [args.data])
    frames = FrameFolder(Path(args.data) / "train")
    if frames.classes != val.classes:
        raise UserError(f"train/ and val/ of {args.data} have different classes")
    if args.train_list:
        images = listed(frames, args.train_list)
    else:
        images = splits.nested_share(np.arange(len(frames)), frames.labels(), args.frac_retained, args.seed)
    sampler = loader.EpochSampler(images, args.batch_size, args.seed, context)
    crops = augment.RECIPES["imagenet"]
    batches = loader.FrameLoader(frames, crops, args.image_size, sampler, context.device, args.workers)

    torch.manual_seed(args.seed)
    arch, network = start_network(args, len(frames.classes))
    if args.freeze_trunk and context.is_main:
        note_scale(args, network, frames, images)
    dtype = engine.resolve_dtype(args.precision, context.device, arch, args.compile)
    model = engine.prepare(network, context, dtype, args.compile, args.deterministic)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, args.lr, fused=context.supports_fused)

    name = f"ft_IN_{Path(args.model_path or arch + '.tar').name}".replace("{", "{{").replace("}", "}}")
    metadata = {"arch": arch, "n_out": len(frames.classes), "classes": frames.classes, "images": len(images)}
    run = Run(vars(args), context, model, optimizer, name, metadata, dtype)
    run.print(f"{len(images)} images of {args.image_size} pixels; {arch} in {dtype}")
    if context.is_main:
        files.write_text(run.folder / "train_list.txt", "".join(f"{frames.name(i)}\n" for i in images))
    for epoch in run.epochs():
        lr = engine.step_learning_rate(epoch, args.lr, args.schedule, 0.2)
        engine.set_learning_rate(optimizer, lr)
        record = engine.train_one_epoch(run, model, batches, optimizer, engine.classification_objective)
        result = engine.evaluate(model, val_batches, context)
        run.print(f"epoch {epoch}: val top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %, lr {lr:g}")
        is_best = all(result["acc1"] > past.get("val_acc1", -1) for past in run.records)
        run.end_epoch(record | {"val_acc1": result["acc1"], "val_acc5": result["acc5"]}, is_best)


def main(argv=None):
    return distributed.launch(train, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
