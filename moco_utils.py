"""What the two contrastive learners share: flags, learning rate, pairs of frames close in time, and the training."""

from math import cos, pi

import numpy as np
import torch

from moco import cli, distributed, models, plots
from moco.builder import MoCo
from moco.cli import UserError
from moco.data import augment, loader
from moco.training import engine
from moco.training.run import Run

LAYOUT = ("state_dict", "optimizer", 1)  # of the published files, whose `epoch` counts the epochs that are done
PAIRS = 2  # the stream of random numbers that pairs are drawn from, beside those of the loader
TRIES = 10_000  # draws of a frame before a folder counts as one without neighbors


def parse_args(doc, argv=None, *more):
    """The flags of both learners; more: functions that add flags to the parser."""
    parser = cli.parser(doc)
    add = parser.add_argument
    add("data", help="folder of frames, one folder a class")
    add(
        "-a",
        "--arch",
        type=models.arch_name,
        default="resnet50",
        metavar="ARCH",
        help=f"published: {', '.join(models.PUBLISHED)}; or any other torchvision classifier",
    )
    add("--epochs", type=cli.number(int, 1), default=12, help="passes over the frames")
    add("--schedule", type=int, nargs="*", default=[11, 20], help="epochs from which on the learning rate is x 0.1")
    add("--cos", action="store_true", help="let the learning rate fall like a cosine instead, epoch by epoch")
    add("--momentum", type=cli.number(float, 0, 1), default=0.9, help="momentum of the optimizer, SGD")
    add("--wd", "--weight-decay", dest="wd", type=cli.number(float, 0), default=0.0, help="weight decay")
    add("--moco-dim", type=cli.number(int, 1), default=128, help="length of queries and keys")
    add("--moco-k", type=cli.number(int, 1), default=65536, help="keys in the queue: a multiple of those of a step")
    add("--moco-m", type=cli.number(float, 0, 1), default=0.999, help="momentum of the key encoder")
    add("--moco-t", type=cli.number(float, 1e-6), default=0.07, help="temperature of the logits")
    add("--mlp", action="store_true", help="two layers in the head, as in MoCo v2")
    add("--aug-plus", action="store_true", help="augment as in MoCo v2: weaker hues, and blur")
    add(
        "--bn-splits",
        type=cli.number(int, 1),
        metavar="N",
        help="in a single process: parts of a batch that batch norm normalizes each on its own. Over the whole batch, "
        "query and key would share statistics that give the key away; several processes avoid that by shuffling keys. "
        "1: the whole batch; default: 8, or as many as get two images each",
    )
    cli.shared_flags(parser, "--batch-size", "--lr", "--image-size", "--augment-on", "--print-freq", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--precision", "--overwrite")
    Run.add_flags(parser)
    distributed.add_flags(parser)
    for each in more:
        each(parser)
    parser.set_defaults(lr=0.03, print_freq=1000)
    args = parser.parse_args(argv)
    if args.gpu is None and args.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        args.multiprocessing_distributed = True  # the copies that DataParallel makes would not keep queue and keys
    return args


def learning_rate(epoch, lr, epochs, schedule, cosine=False):
    """lr times 0.1 for every epoch of the schedule that has come, or a cosine that would be 0 after all epochs."""
    if cosine:
        return lr * (1 + cos(pi * epoch / epochs)) / 2
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)


def resolve_bn_splits(wanted, pairs, world):
    """Parts in which batch norm takes the pairs of a step: as wanted, or if that is None as many as are good."""
    possible = max(1, pairs // 2)
    if world > 1:
        if wanted not in (None, 1):
            raise UserError(f"--bn-splits {wanted} is for a single process: leave it out, {world} shuffle keys")
        return 1
    if wanted is None:
        return min(8, possible)
    if wanted > possible:
        raise UserError(f"--bn-splits {wanted}: the {pairs} pairs of a step make at most {possible} parts of two")
    return wanted


class TemporalPairs:
    """Pairs of a frame and a neighbor in time, drawn with replacement: half as many as a batch has frames.

    A neighbor is another frame of the same video, at most window steps away: of the same class, where no manifest
    knows the videos. published draws as the released sampler did: window 1 takes the frame before or the frame itself,
    whatever video it is from. A pair depends on (seed, epoch, its position in the epoch) alone.
    """

    def __init__(self, frames, batch_size, seed, window=1, published=False):
        self.frames, self.seed, self.window, self.published = frames, seed, window, published
        self.batches, self.pairs = len(frames) // batch_size, batch_size // 2
        if published and len(frames) < 2 * window:
            raise UserError(f"--pos-window {window} reaches beyond the {len(frames)} frames of {frames.folder}")

    def __len__(self):
        """The number of batches of an epoch."""
        return self.batches

    def pair(self, epoch, position):
        """Indices of the two frames at a position of an epoch; UserError if hardly a frame has a neighbor."""
        draws, window = loader.generator(self.seed, PAIRS, epoch, position), self.window
        if self.published:
            frame = draws.integers(window, len(self.frames) - window + 1)
            return frame, frame + draws.integers(-window, window)
        for _ in range(TRIES):
            frame = int(draws.integers(len(self.frames)))
            if near := self.frames.neighbors(frame, window):
                return frame, near[draws.integers(len(near))]
        raise UserError(f"the frames of {self.frames.folder} have no neighbors in time; give videos of several frames")


class EpochPairs:
    """An epoch of a sampler's pairs in place of a list of them: every process draws those of its own share, no others.

    Has the length of that list, and gives its slices, int64 (n, 2).
    """

    def __init__(self, sampler, epoch):
        self.sampler, self.epoch = sampler, epoch

    def __len__(self):
        return len(self.sampler) * self.sampler.pairs

    def __getitem__(self, share):
        positions = range(*share.indices(len(self)))
        return np.array([self.sampler.pair(self.epoch, position) for position in positions], np.int64).reshape(-1, 2)


def contrast(model, images, _):
    """MoCo's forward pass of two views of images, as engine.train_one_epoch wants it: (logits, targets)."""
    return model(*images)


def train(args, context, name, frames, pairs, order=None):
    """One process of the training: pairs of views a step; name: how the files of the epochs begin.

    order: as loader.FrameLoader takes it; without one, all frames at random, two views of each.
    """
    if pairs < 1:
        raise UserError(f"--batch-size {args.batch_size} makes no pair; give a larger one")
    if args.moco_k % pairs:
        fitting = max(args.moco_k // pairs, 1) * pairs
        raise UserError(f"--moco-k {args.moco_k} is no multiple of the {pairs} keys of a step; {fitting} would be")
    args.bn_splits = resolve_bn_splits(args.bn_splits, pairs, context.world_size)
    recipe = augment.Recipe("moco_v2" if args.aug_plus else "moco_v1", args.image_size, args.augment_on)
    sampler = loader.EpochSampler(order or len(frames), pairs, args.seed, context, drop_last=True)
    batches = loader.FrameLoader(frames, recipe, sampler, context.device, args.workers, views=2)
    torch.manual_seed(args.seed)
    model = MoCo(
        lambda num_classes: models.build(args.arch, num_classes),
        args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp, args.bn_splits,
    )  # fmt: skip
    dtype = engine.resolve_dtype(args.precision, context.device, args.arch)
    model = engine.prepare(model, context, dtype)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=context.supports_fused
    )
    facts = {"arch": args.arch, "classes": list(frames.classes), "images": len(frames)}
    run = Run(args, context, model, optimizer, f"{name}_checkpoint_{{:04d}}.pth.tar", facts, LAYOUT)
    run.say(
        f"{len(frames)} frames, {len(batches)} steps of {pairs} pairs an epoch; {args.arch} in {dtype} on "
        f"{context.world_size} x {context.device}, --bn-splits {args.bn_splits}"
    )
    if args.moco_k > len(frames):
        run.say(f"note: the {len(frames)} frames do not fill --moco-k {args.moco_k}: keys of a frame oppose its query")
    for epoch in run.epochs():
        lr = learning_rate(epoch, args.lr, args.epochs, args.schedule, args.cos)
        for group in optimizer.param_groups:
            group["lr"] = lr
        run.say(f"epoch {epoch}: learning rate {lr:g}")
        run.end_epoch(
            {**engine.train_one_epoch(run, model, batches, optimizer, dtype, args.print_freq, contrast), "lr": lr}
        )
        if context.is_main:
            plots.training_curve(run.records, run.folder / "training_curve")
