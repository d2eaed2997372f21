"""One training run in its folder: its position, checkpoints, log and curve, and what a stop signal does."""

import json
import re
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from moco import cli, distributed, files, plots
from moco.cli import UserError, number
from moco.networks import checkpoint
from moco.training import resume
from moco.training.engine import MetricSums

EXIT_RESUBMIT = 75  # exit status after a stop signal: the run has saved and is to be started again with --resume
CHECK_LOSS_EVERY = 100  # steps; each check waits for the device
DRAW_CURVE_EVERY = 60  # seconds; drawing it takes half of one, as long as some epochs do


@dataclass(frozen=True)
class RunOptions:
    """The flags that a Run depends on, by name, and all flags of the script.

    flags: all of them as plain values, recorded in args.json and in every checkpoint.
    """

    save_dir: Path
    epochs: int
    seed: int
    print_freq: int
    resume: str | None
    override: bool
    overwrite: bool
    start_epoch: int
    save_minutes: float
    flags: dict

    @classmethod
    def from_args(cls, args, **resolved):
        """The options in the arguments of a script that has the flags of Run.add_flags and the shared ones.

        resolved: the values of flags that were not given.
        """
        own = {
            field.name: getattr(args, field.name) for field in fields(cls) if field.name not in ("save_dir", "flags")
        }
        return cls(save_dir=Path(args.save_dir), flags=cli.flags(args) | resolved, **own)


@dataclass(frozen=True)
class CheckpointFormat:
    """The name and the keys of the checkpoint that each epoch leaves; by default those of temporal classification.

    prefix, digits, suffix: of the name, with the epoch zero-padded to so many digits between them; digits None leaves
    the epoch out, so that each epoch replaces the file of the one before. network_key, optimizer_key: where the state
    dicts are. first_epoch: what `epoch` stores after epoch 0: MoCo's files count the finished epochs.
    """

    prefix: str
    suffix: str = ".tar"
    digits: int | None = 1
    network_key: str = "model_state_dict"
    optimizer_key: str = "optimizer_state_dict"
    first_epoch: int = 0

    def name(self, epoch):
        """The file name of an epoch's checkpoint."""
        number = "" if self.digits is None else f"{epoch:0{self.digits}d}"
        return f"{self.prefix}{number}{self.suffix}"

    def matches(self, name):
        """Whether a file name is that of a checkpoint of this format, best_* included."""
        number = "" if self.digits is None else r"\d+"
        return re.fullmatch(f"(best_)?{re.escape(self.prefix)}{number}{re.escape(self.suffix)}", name) is not None


class Run:
    """The course of a training run, and its files in save_dir; only rank 0 prints and writes.

    Construction resumes the run that options.resume asks for, or starts a new one; until then nothing in save_dir is
    changed, and UserError says why it cannot be.

    epoch, step: the position, the next step to take. records: one dict per finished epoch. metrics: MetricSums of the
    current epoch; after a resume rank 0 has those of all processes.
    metadata: {"arch", "classes", "images", ...}: stored in every checkpoint, and must not differ on resume.
    dtype: of the forward pass.
    """

    @staticmethod
    def add_flags(parser):
        """Add the flags by which a run is saved and resumed to parser."""
        add = parser.add_argument
        add(
            "--resume",
            nargs="?",
            const="last",
            metavar="PATH",
            help="continue a run: from the file PATH, or without PATH from --save-dir, starting new if it holds no run",
        )
        add(
            "--override",
            action="store_true",
            help="let --resume continue with flags that differ from those of the original run",
        )
        add(
            "--start-epoch", type=number(int, 0), default=0, help="first epoch, for a checkpoint that does not store it"
        )
        add("--save-minutes", type=number(float, 0), default=30.0, help="minutes between saves within an epoch")

    def __init__(self, options, context, model, optimizer, checkpoint_format, metadata, dtype=torch.float32):
        self.options, self.context, self.dtype = options, context, dtype
        self.model, self.optimizer = model, optimizer
        self.folder, self.format, self.metadata = options.save_dir, checkpoint_format, metadata
        self.epoch = options.start_epoch
        self.step = 0
        self.records = []
        self.metrics = MetricSums(context.device)
        self._stop_signals = []  # received so far
        for stop in distributed.STOP_SIGNALS:
            signal.signal(stop, lambda number, frame, received=self._stop_signals: received.append(number))
        # Over gloo, even on GPUs: agreeing on a save never waits for the device.
        self._host_group = dist.new_group(backend="gloo") if context.world_size > 1 else None
        self._open_folder(resume.restore(self) if options.resume else None)
        self._saved_at = self._drawn_at = time.monotonic()

    def print(self, text):
        """Print text on rank 0."""
        if self.context.is_main:
            print(text, flush=True)

    # --- position

    def epochs(self):
        """The epochs that remain."""
        if self.epoch >= self.options.epochs:
            self.print(f"nothing to do: {self.folder} has all {self.options.epochs} epochs; raise --epochs for more")
        return range(self.epoch, self.options.epochs)

    def seed_step(self):
        """Seed torch for the next step, so that a resumed run draws the random numbers of an uninterrupted one."""
        position = [self.options.seed, self.epoch, self.step, self.context.rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]))

    def end_step(self, loss, metrics, images):
        """Count a step: its mean loss and metrics {name: 0-d tensor} over this process's number of images."""
        self.metrics.update(loss, metrics, images, self.step)
        self.step += 1

    def averages(self):
        """Mean loss and metrics over the images of this epoch so far, of all processes; waits for the device."""
        self.check_loss()
        return self.metrics.averages(self.context)

    def check_loss(self):
        """UserError if a loss of this epoch was not finite; waits for the device."""
        if step := int(self.metrics.nonfinite_step):
            self._stop_not_finite(f"the loss is not finite from step {step}")

    def _stop_not_finite(self, what):
        raise UserError(
            f"{what} of epoch {self.epoch}: try a lower --lr or --precision fp32, or look at the images; "
            f"the last good checkpoint in {self.folder} is kept"
        )

    def save_if_due(self):
        """Save every save_minutes; after a stop signal save and end the process with EXIT_RESUBMIT."""
        if self.step % CHECK_LOSS_EVERY == 0:
            self.check_loss()
        is_due = time.monotonic() - self._saved_at > 60 * self.options.save_minutes
        stop, is_due = self._max_over_processes(max(self._stop_signals, default=0), is_due)
        if stop or is_due:
            self.save()
        if stop:
            name = signal.Signals(stop).name
            self.print(f"stopped by {name} after step {self.step} of epoch {self.epoch}: saved; continue with --resume")
            if self.context.world_size > 1:
                dist.barrier(self._host_group)  # the first process to leave ends the others: rank 0 saves before
            sys.exit(EXIT_RESUBMIT)

    def _max_over_processes(self, *values):
        """The largest of each of the numbers over all processes, so that all act alike after the same step."""
        if self.context.world_size == 1:
            return values
        tensor = torch.tensor([int(value) for value in values])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._host_group)
        return tensor.tolist()

    def end_epoch(self, record, is_best=False):
        """Log the finished epoch's record, write its checkpoint, draw the curve if it is time, move to the next epoch.

        is_best: also write the checkpoint as best_*.
        """
        self.records.append(record)
        self.log(record)
        if self.context.is_main:
            self._check_weights()
            name = self.format.name(self.epoch)
            for file in [name, f"best_{name}"] if is_best else [name]:
                checkpoint.write(self.folder / file, self.content(self.epoch))
            is_last = self.epoch + 1 == self.options.epochs
            if is_last or time.monotonic() - self._drawn_at > DRAW_CURVE_EVERY:
                plots.training_curve(self.records, self.folder / "training_curve")
                self._drawn_at = time.monotonic()
        self.epoch += 1
        self.step = 0
        self.metrics.reset()
        self.save()

    # --- files

    def log(self, record):
        """Append a record to log.jsonl."""
        if self.context.is_main:
            files.append(self.folder / "log.jsonl", json.dumps(record) + "\n")

    def content(self, epoch):
        """The checkpoint of an epoch: the published keys, the metadata and the flags."""
        network = distributed.unwrap(self.model).state_dict()
        lists = {
            f"{name}_list": [record[name] for record in self.records if name in record] for name in ("acc1", "val_acc1")
        }
        return {
            **{name: values for name, values in lists.items() if values or name == "acc1_list"},
            self.format.network_key: {f"module.{name}": value for name, value in network.items()},
            self.format.optimizer_key: self.optimizer.state_dict(),
            "epoch": epoch + self.format.first_epoch,
            "args": self.options.flags,
            **self.metadata,
        }

    def save(self):
        """Write last.tar with all that a bitwise resume needs; the previous one stays as last.old.tar."""
        self._saved_at = time.monotonic()
        totals = self.metrics.all_reduce(self.context)
        if not self.context.is_main:
            return
        self._check_weights()
        last = self.folder / "last.tar"
        checkpoint.keep_previous(last)
        position = {"epoch": self.epoch, "step": self.step, "records": self.records, "totals": totals}
        checkpoint.write(last, {**self.content(self.epoch), **position})

    def _check_weights(self):
        """UserError if a loss or weight is not finite: such a state must not replace a good one."""
        self.check_loss()
        norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in self.model.parameters()]))
        if not norms.isfinite().all():
            self._stop_not_finite(f"the weights are not finite after step {self.step}")

    def _open_folder(self, resumed_from):
        """Make save_dir this run's, or raise UserError and leave it as it is.

        resumed_from: the folder of the run that is continued, None for a new one.
        """
        if not self.context.is_main:
            return
        continues = resumed_from is not None and resumed_from.resolve() == self.folder.resolve()
        if not continues:
            self._check_replaceable()
        files.make_output_dir(self.folder)
        self._lock = files.lock(self.folder)  # for the life of this object
        if not continues:
            for path in self._check_replaceable():  # again: the run that had the lock may have written since
                path.unlink()
        files.remove_temporary_files(self.folder)
        files.write_args(self.folder, self.options.flags)
        if resumed_from is None:
            files.write_text(self.folder / "log.jsonl", "")
        else:
            resume.trim_log(self.folder / "log.jsonl", self.epoch, self.step)

    def _check_replaceable(self):
        """The checkpoints of another run in save_dir, which --overwrite replaces; UserError without it.

        With --resume the checkpoint of a first epoch that was interrupted before its last.tar was written may go too.
        """
        if not self.folder.is_dir():
            return []
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        names = [name for name in names if name in ("last.tar", "last.old.tar") or self.format.matches(name)]
        paths = [self.folder / name for name in names]
        if self.options.overwrite:
            return paths
        for path in paths:
            is_first = self.options.resume == "last" and checkpoint.read(path).get("epoch") == self.format.first_epoch
            if not is_first:
                raise UserError(f"{path} exists; give --resume to continue, --overwrite, or another --save-dir")
        return paths
