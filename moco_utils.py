"""What moco_img.py and moco_temp.py share: flags, learning rate, temporal pairs, and the training."""

from math import cos, pi

import numpy as np
import torch
from torch.nn import functional

from moco import cli
from moco.builder import MoCo
from moco.cli import UserError
from moco.data import augment, loader, recordings
from moco.networks import architectures, checkpoint, opening
from moco.training import engine
from moco.training.engine import topk_accuracy
from moco.training.run import Run

PAIRS = 2  # the stream of random numbers for pairs; the loader has its own
MAX_DRAWS = 10_000  # of a frame, before a folder counts as one without neighbors


def parser(doc):
    """A parser with the flags of both scripts, but for --batch-size's meaning; doc: the script's docstring."""
    parser = cli.parser(doc)
    add = parser.add_argument
    add("data", nargs="+", metavar="FOLDER", help="folder of frames, one folder per class; several are joined")
    architectures.add_flag(parser, "-a", "--arch")
    add("--epochs", type=cli.number(int, 1), default=12, help="number of epochs")
    add(
        "--schedule",
        type=int,
        nargs="*",
        default=[11, 20],
        help="epochs at which the learning rate is multiplied by 0.1; as published, 20 is beyond the last epoch",
    )
    add("--cos", action="store_true", help="cosine learning rate, epoch by epoch, instead of --schedule")
    add("--momentum", type=cli.number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--wd", "--weight-decay", dest="wd", type=cli.number(float, 0), default=0.0, help="weight decay")
    add("--moco-dim", type=cli.number(int, 1), default=128, help="dimension of queries and keys")
    add("--moco-k", type=cli.number(int, 1), default=65536, help="keys in the queue, a multiple of the pairs per step")
    add("--moco-m", type=cli.number(float, 0, 1), default=0.999, help="momentum of the key encoder")
    add("--moco-t", type=cli.number(float, 1e-6), default=0.07, help="softmax temperature")
    add("--mlp", action="store_true", help="two-layer head, as in MoCo v2")
    add("--model-path", metavar="FILE", help="checkpoint to initialize both encoders from, head included if it fits")
    add("--aug-plus", action="store_true", help="augmentation of MoCo v2: weaker hue jitter, and blur")
    add(
        "--bn-splits",
        type=cli.number(int, 1),
        metavar="N",
        help="number of sub-batches with batch-norm statistics of their own, in a single process. With 1, query and "
        "key share their statistics, which gives the positive key away; several processes shuffle the keys instead. "
        "Default: 8, or as many as have at least two images",
    )
    recordings.add_flags(parser)
    Run.add_flags(parser)
    parser.set_defaults(lr=0.03, print_freq=1000)
    return parser


def learning_rate(epoch, lr, epochs, schedule, cosine=False):
    """lr times 0.1 for every epoch of the schedule that has been reached, or a cosine that ends at 0 after epochs."""
    if cosine:
        return lr * (1 + cos(pi * epoch / epochs)) / 2
    return engine.step_learning_rate(epoch, lr, schedule, 0.1)


def resolve_bn_splits(bn_splits, pairs, world_size):
    """The parts of a batch of pairs that batch norm normalizes separately: as given, or a good number if None."""
    possible = max(1, pairs // 2)
    if world_size > 1:
        if bn_splits not in (None, 1):
            raise UserError(f"--bn-splits {bn_splits} is for a single process; {world_size} processes shuffle keys")
        return 1
    if bn_splits is None:
        return min(8, possible)
    if bn_splits > possible:
        raise UserError(f"--bn-splits {bn_splits}: {pairs} pairs per step make at most {possible} parts of two")
    return bn_splits


class TemporalPairs:
    """The pairs of an epoch, of a frame and a neighbor in time, drawn with replacement: half as many as it has frames.

    A sequence whose slices, int64 (n, 2), are drawn when asked for, so that every process draws the pairs of its own
    share. A neighbor is another frame of the same video (of the same class, without a manifest) at most window steps
    away. published draws as the published sampler did: window 1 takes the frame before or the frame itself, of whatever
    video. A pair depends on (seed, epoch, its position in the epoch) alone.
    """

    def __init__(self, frames, batch_size, seed, window, published, epoch):
        self.frames, self.seed, self.epoch = frames, seed, epoch
        self.window, self.published = window, published
        self.pairs = len(frames) // batch_size * (batch_size // 2)
        if published and len(frames) < 2 * window:
            raise UserError(f"--pos-window {window} is too large for the {len(frames)} frames of {frames.folder}")

    def __len__(self):
        return self.pairs

    def __getitem__(self, share):
        positions = range(*share.indices(len(self)))
        return np.array([self.pair(position) for position in positions], np.int64).reshape(-1, 2)

    def pair(self, position):
        """Indices of the two frames at a position of the epoch; UserError if hardly any frame has a neighbor."""
        random, window = loader.generator(self.seed, PAIRS, self.epoch, position), self.window
        if self.published:
            frame = random.integers(window, len(self.frames) - window + 1)
            return frame, frame + random.integers(-window, window)
        for _ in range(MAX_DRAWS):
            frame = int(random.integers(len(self.frames)))
            if neighbors := self.frames.neighbors(frame, window):
                return frame, neighbors[random.integers(len(neighbors))]
        raise UserError(f"the frames of {self.frames.folder} have no neighbors in time; use videos of several frames")


def objective(model, images, _):
    """InfoNCE (He et al., 2020, eq. 1): cross-entropy of the right key among the keys of the queue.

    images: two views, (N, 3, H, W) each. The accuracy in % is that of ranking the right key first, and in the first 5.
    """
    logits, targets = model(*images)
    loss = functional.cross_entropy(logits, targets)
    return loss, {"acc1": topk_accuracy(logits, targets), "acc5": topk_accuracy(logits, targets, k=5)}


def load_start_weights(model, path):
    """Copy the whole query encoder of a MoCo checkpoint, if it has the same head, into both encoders of model.

    Of other checkpoints model has the trunk already. The queue stays random.
    """
    start = checkpoint.read(path).get("state_dict", {})
    prefix = "module.encoder_q."
    start = {name.removeprefix(prefix): value for name, value in start.items() if name.startswith(prefix)}
    own = model.encoder_q.state_dict()
    if {name: value.shape for name, value in start.items()} == {name: value.shape for name, value in own.items()}:
        model.encoder_q.load_state_dict(start)
    model.encoder_k.load_state_dict(model.encoder_q.state_dict())


def train(args, context, name, frames, source, pairs):
    """The training, in one of its processes.

    name: prefix of the checkpoints. source: of the frames of each epoch, see loader.EpochSampler. pairs: per step.
    """
    if args.batch_size > len(frames):
        raise UserError(f"--batch-size {args.batch_size} exceeds the {len(frames)} frames; use a smaller one")
    if pairs < 1:
        raise UserError(f"--batch-size {args.batch_size} makes no pair; use a larger one")
    if args.moco_k % pairs:
        nearest = max(args.moco_k // pairs, 1) * pairs
        raise UserError(f"--moco-k {args.moco_k} is not a multiple of the {pairs} keys per step; {nearest} is")
    bn_splits = resolve_bn_splits(args.bn_splits, pairs, context.world_size)
    args.image_size = opening.start_size(args.image_size, args.model_path, args.arch)
    recipe = augment.RECIPES["moco_v2" if args.aug_plus else "moco_v1"]
    sampler = loader.EpochSampler(source, pairs, args.seed, context, drop_last=True)
    batches = loader.FrameLoader(frames, recipe, args.image_size, sampler, context.device, args.workers, views=2)

    torch.manual_seed(args.seed)
    model = MoCo(
        lambda num_classes: opening.build_from(args.model_path, args.arch, num_classes),
        dim=args.moco_dim,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        mlp=args.mlp,
        bn_splits=bn_splits,
    )
    if args.model_path:
        load_start_weights(model, args.model_path)
    architectures.check_image_size(model.encoder_q, args.image_size)
    dtype = engine.resolve_dtype(args.precision, context.device, args.arch, args.compile)
    model = engine.prepare(model, context, dtype, args.compile, args.deterministic)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=context.supports_fused
    )

    flags = {**vars(args), "bn_splits": bn_splits}
    checkpoint_name = f"{name}_checkpoint_{{epoch:04d}}.pth.tar"
    metadata = {"arch": args.arch, "classes": list(frames.classes), "images": len(frames)}
    run = Run(flags, context, model, optimizer, checkpoint_name, metadata, dtype, layout="moco")
    if frames.selected:
        run.print(frames.selected)
    run.print(
        f"{len(frames)} frames, {len(batches)} steps of {pairs} pairs per epoch; {args.arch} in {dtype} on "
        f"{context.world_size} x {context.device}, {args.image_size} pixels, --bn-splits {bn_splits}"
    )
    if args.moco_k > len(frames):
        run.print(f"note: --moco-k {args.moco_k} exceeds the {len(frames)} frames: a query meets its own old keys")
    for epoch in run.epochs():
        lr = learning_rate(epoch, args.lr, args.epochs, args.schedule, args.cos)
        engine.set_learning_rate(optimizer, lr)
        run.print(f"epoch {epoch}: learning rate {lr:g}")
        run.end_epoch(engine.train_one_epoch(run, model, batches, optimizer, objective) | {"lr": lr})
