"""One training run in its folder: its position, what it saves and resumes, its log, and what a stop signal does."""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from moco import cli, distributed, files, plots
from moco.cli import UserError, number
from moco.networks import checkpoint, opening
from moco.training import engine

EXIT_RESUBMIT = 75  # exit status after a stop signal: the run has saved and is to be started again with --resume
CHECK_LOSS_EVERY = 100  # steps; each check waits for the device
DRAW_CURVE_EVERY = 60  # seconds; drawing it takes half of one, as long as some epochs do
# Flags that do not change what is learned. The data are compared by their classes and number of images.
IGNORED_ON_RESUME = {
    *("data", "save_dir", "resume", "override", "overwrite", "model_path", "start_epoch", "epochs", "save_minutes"),
    *("print_freq", "workers", "device", "world_size", "rank", "dist_url", "dist_backend", "gpu"),
    *("multiprocessing_distributed", "processes_per_node", "compile", "deterministic"),
}
# The published checkpoints: keys of network and optimizer, and what "epoch" is after epoch 0.
LAYOUTS = {"tc": ("model_state_dict", "optimizer_state_dict", 0), "moco": ("state_dict", "optimizer", 1)}


class Run:
    """The course of a training run, and its files in save_dir; only rank 0 prints and writes.

    Construction resumes the run that --resume asks for, or starts a new one; until then nothing in save_dir is changed,
    and UserError says why it cannot be.

    flags: all flags of the script by name, recorded in args.json and in every checkpoint; among them those of
    add_flags, and epochs. name: of an epoch's checkpoint, as a format string of epoch; without a field, each epoch
    replaces the file of the one before. metadata: {"arch", "classes", "images", ...}: stored in every checkpoint, and
    must not differ on resume. dtype: of the forward pass. layout: of LAYOUTS.
    epoch, step: the position, the next step to take. records: one dict per finished epoch. metrics: MetricSums of the
    current epoch; after a resume rank 0 has those of all processes.
    """

    @staticmethod
    def add_flags(parser):
        """Add the flags that all trainers share to parser, but for --epochs and --batch-size."""
        cli.shared_flags(parser, "--lr", "--image-size", "--workers", "--save-dir", "--seed", "--device", "--overwrite")
        engine.add_flags(parser)
        distributed.add_flags(parser)
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

    def __init__(self, flags, context, model, optimizer, name, metadata, dtype=torch.float32, layout="tc"):
        self.flags, self.context, self.dtype = flags, context, dtype
        self.model, self.optimizer = model, optimizer
        self.folder, self.name, self.metadata = Path(flags["save_dir"]), name, metadata
        self._network_key, self._optimizer_key, self._first_epoch = LAYOUTS[layout]
        self.epoch = flags["start_epoch"]
        self.step = 0
        self.records = []
        self.metrics = engine.MetricSums(context.device)
        self._stops = StopSignals()
        # Over gloo, even on GPUs: agreeing on a save never waits for the device.
        self._host_group = dist.new_group(backend="gloo") if context.world_size > 1 else None
        self._open_folder(self._resume() if flags["resume"] else None)
        self._saved_at = self._drawn_at = time.monotonic()

    def print(self, text):
        """Print text on rank 0."""
        if self.context.is_main:
            print(text, flush=True)

    # --- position

    def epochs(self):
        """The epochs that remain."""
        if self.epoch >= self.flags["epochs"]:
            self.print(f"nothing to do: {self.folder} has all {self.flags['epochs']} epochs; raise --epochs for more")
        return range(self.epoch, self.flags["epochs"])

    def seed_step(self):
        """Seed torch for the next step, so that a resumed run draws the random numbers of an uninterrupted one."""
        position = [self.flags["seed"], self.epoch, self.step, self.context.rank]
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

    def until_stopped(self, batches):
        """Yield batches; a stop signal that arrives while one is waited for saves and ends the process at once.

        Not among several processes: others may be within the step that waits for the batch.
        """
        batches = iter(batches)
        waiting = self._stops if self.context.world_size == 1 else nullcontext()
        while True:
            try:
                with waiting:
                    batch = next(batches, None)
            except Stopped:
                with suppress(SystemExit):
                    self.save_if_due()
                for worker in multiprocessing.active_children():  # it may hang in a read, and torch would wait for it
                    worker.kill()
                sys.stdout.flush()
                os._exit(EXIT_RESUBMIT)
            if batch is None:
                return
            yield batch

    def save_if_due(self):
        """Save every save_minutes; after a stop signal save and end the process with EXIT_RESUBMIT."""
        if self.step % CHECK_LOSS_EVERY == 0:
            self.check_loss()
        is_due = time.monotonic() - self._saved_at > 60 * self.flags["save_minutes"]
        stop, is_due = self._max_over_processes(max(self._stops.received, default=0), is_due)
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
        name = self.name.format(epoch=self.epoch)
        if self.context.is_main:
            self._check_weights()
            for file in [name, f"best_{name}"] if is_best else [name]:
                checkpoint.write(self.folder / file, self.content(self.epoch))
            is_last = self.epoch + 1 == self.flags["epochs"]
            if is_last or time.monotonic() - self._drawn_at > DRAW_CURVE_EVERY:
                self._draw_curve()
        self.epoch += 1
        self.step = 0
        self.metrics.reset()
        self.save()
        if self.epoch == self.flags["epochs"]:
            self.print(f"finished: {self.folder / name} is the network, for --model-path; curve and log are beside it")

    def _draw_curve(self):
        """Draw the curve, with what guessing among the classes, or among the keys of MoCo, would give."""
        title = f"{Path(cli.program()).stem}: {self.metadata['arch']}"
        choices = self.metadata.get("n_out") or self.flags.get("moco_k", -1) + 1
        chance = {"loss": math.log(choices), "acc1": 100 / choices, "acc5": min(500 / choices, 100)} if choices else {}
        plots.training_curve(self.records, self.folder / "training_curve", title, chance)
        self._drawn_at = time.monotonic()

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
            self._network_key: {f"module.{name}": value for name, value in network.items()},
            self._optimizer_key: self.optimizer.state_dict(),
            "epoch": epoch + self._first_epoch,
            "args": self.flags,
            **self.metadata,
        }

    def save(self):
        """Write last.tar with all that a bitwise resume needs."""
        self._saved_at = time.monotonic()
        totals = self.metrics.all_reduce(self.context)
        if not self.context.is_main:
            return
        self._check_weights()
        position = {"epoch": self.epoch, "step": self.step, "records": self.records, "totals": totals}
        checkpoint.write(self.folder / "last.tar", {**self.content(self.epoch), **position})

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
        files.write_args(self.folder, self.flags)
        if resumed_from is None:
            files.write_text(self.folder / "log.jsonl", "")
        else:
            trim_log(self.folder / "log.jsonl", self.epoch, self.step)

    def _check_replaceable(self):
        """The checkpoints of another run in save_dir, which --overwrite replaces; UserError without it.

        With --resume the checkpoint of a first epoch that was interrupted before its last.tar was written may go too.
        """
        paths = [path for path in sorted(self.folder.glob("*")) if path.is_file() and self._is_checkpoint(path.name)]
        for path in paths if not self.flags["overwrite"] else ():
            is_first = self.flags["resume"] == "last" and checkpoint.read(path).get("epoch") == self._first_epoch
            if not is_first:
                raise UserError(f"{path} exists; give --resume to continue, --overwrite, or another --save-dir")
        return paths

    def _is_checkpoint(self, file):
        """Whether a file name is that of a checkpoint of this run's, whatever its epoch."""
        numbers = [0, *map(int, re.findall(r"\d+", file))]
        names = [self.name.format(epoch=number) for number in numbers]
        return file == "last.tar" or file.removeprefix("best_") in names

    # --- resuming

    def _resume(self):
        """Continue from where --resume says; returns the folder of the run that is continued, None if there is none.

        Network and optimizer must fit exactly. UserError if the data differ, or flags do without --override. With it,
        an epoch that was interrupted is trained from its start: the rest of another order would not be its rest.
        """
        is_last = self.flags["resume"] == "last"
        path = self.folder / "last.tar" if is_last else Path(self.flags["resume"])
        if is_last and not path.exists():
            self.print(f"{self.folder} holds no run yet: starting a new one")
            return None
        content = checkpoint.read(path)
        if missing := {self._network_key, self._optimizer_key} - set(content):
            raise checkpoint.CheckpointError(f"{path} cannot be continued by this script: it has no {min(missing)}")
        has_flags = "args" in content
        is_changed = has_flags and self._check_changes(path, content)
        chosen = [dict(group, params=None) for group in self.optimizer.param_groups]
        self._load_states(path, content)
        if self.flags["override"] or not has_flags:
            for group, given in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update({key: given[key] for key in ("lr", "weight_decay", "momentum") if key in group})
        if "step" not in content:
            self.epoch = max(self.flags["start_epoch"], content.get("epoch", -1) + 1 - self._first_epoch)
            self.records = checkpoint.past_records(content)
            self.print(f"{path} stores no position within an epoch, and no past losses: starting at epoch {self.epoch}")
        else:
            self.epoch, self.records = content["epoch"], content["records"]
            if not is_changed:
                self.step, totals = content["step"], content["totals"]  # over all processes; the others start from 0
                self.metrics.load(totals if self.context.is_main else dict.fromkeys(totals, 0))
        lr = self.optimizer.param_groups[0]["lr"]
        self.print(f"continuing {path} at epoch {self.epoch}, step {self.step}, learning rate {lr:g}")
        return path.parent

    def _check_changes(self, path, content):
        """Whether flags differ from the original run's in a way that changes what is learned.

        UserError if they do without --override, or if the data differ.
        """
        data = _differences(content, self.metadata)
        ignored = IGNORED_ON_RESUME - ({"epochs"} if self.flags.get("cos") else set())  # its schedule ends with them
        changed = _differences(content["args"], self.flags, ignored)
        if data or (changed and not self.flags["override"]):
            hint = "" if data else "; --override continues with the new value"
            raise UserError(f"--resume: {path} is of another run: {'; '.join(data + changed)}{hint}")
        return bool(changed)

    def _load_states(self, path, content):
        """Load network and optimizer."""
        state = {name.removeprefix("module."): value for name, value in content[self._network_key].items()}
        opening.load(distributed.unwrap(self.model), state, path)
        try:
            self.optimizer.load_state_dict(content[self._optimizer_key])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"the optimizer in {path} does not fit this model: {error}") from error
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    # A fused step on a GPU needs the memory format of the parameter; published files are contiguous.
                    values[key] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


class Stopped(BaseException):
    """A stop signal that arrived while a batch was waited for."""


class StopSignals:
    """The stop signals that this process has received; as a context, one that comes in it or before raises Stopped."""

    def __init__(self):
        self.received = []
        self._is_raised = False
        for stop in distributed.STOP_SIGNALS:
            signal.signal(stop, self._receive)

    def _receive(self, number, frame):
        self.received.append(number)
        if self._is_raised:
            self._is_raised = False  # a second one must not disturb what follows the first
            raise Stopped

    def __enter__(self):
        self._is_raised = True
        if self.received:
            self._is_raised = False
            raise Stopped

    def __exit__(self, *error):
        self._is_raised = False


def _differences(before, now, ignored=()):
    """A text for each key of now whose value differs; one that is new since then counts only if it has a value."""
    return [
        f"{key} was {_shorten(before.get(key))} and is {_shorten(now[key])}"
        for key in sorted(now)
        if key not in ignored and before.get(key) != now[key] and (key in before or now[key])
    ]


def _shorten(value):
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}, ...)"
    return str(value)


def trim_log(log, epoch, step):
    """Drop the lines of log.jsonl that the run resumed at (epoch, step) will write again, and damaged ones."""
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):  # cut or damaged when a disk was full
            record = json.loads(line)
            if (record["epoch"], record.get("step", float("inf"))) <= (epoch, step):
                kept.append(line + "\n")
    files.write_text(log, "".join(kept))
