"""One training run in its folder: flags, log, checkpoints, resume, stop signals."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from moco import checkpoint, distributed, files, provenance
from moco.cli import UserError, number
from moco.training import metrics

EXIT_RESUBMIT = 75  # exit status of a run that was told to stop and saved: 'start me again with --resume'
LAYOUT = ("model_state_dict", "optimizer_state_dict", 0)  # keys of network and optimizer; number of the first epoch
CHECK_LOSS_EVERY = 100  # steps between two looks at the loss; each look waits for the device
IGNORED_ON_RESUME = {  # flags that do not change what is learned; data is compared by its classes and number of images
    *("data", "save_dir", "resume", "override", "overwrite", "model_path", "start_epoch", "epochs", "save_minutes"),
    *("print_freq", "workers", "device", "world_size", "rank", "dist_url", "dist_backend", "gpu"),
    *("multiprocessing_distributed", "processes_per_node"),
}


class Run:
    """What a training run keeps: its position, the epochs so far, and all its files. Only rank 0 prints and writes.

    epoch, step: where to go on. records: one dict for every finished epoch. totals: moco.totals of this epoch's steps,
    of this process's since the start, and on rank 0 those of all before it.

    pattern: name of an epoch's checkpoint, such as "resnet50_epoch_{}.tar". facts: what a reader of a checkpoint must
    know (arch, n_out, classes) and what must be the same to continue (images). layout: as LAYOUT.
    """

    @staticmethod
    def add_flags(parser):
        """Add the flags by which a run is saved and continued to parser."""
        add = parser.add_argument
        add(
            "--resume",
            nargs="?",
            const="last",
            metavar="PATH",
            help="continue a run: from PATH, or without one from what --save-dir holds, or else start new",
        )
        add("--override", action="store_true", help="let --resume take flags that differ from the first start's")
        add("--start-epoch", type=number(int, 0), default=0, help="first epoch, for a file that does not say its own")
        add("--save-minutes", type=number(float, 0), default=30, help="minutes between two saves in mid-epoch")

    def __init__(self, args, context, model, optimizer, pattern, facts, layout=LAYOUT):
        self.args, self.context, self.model, self.optimizer = args, context, model, optimizer
        self.folder, self.pattern, self.facts = Path(args.save_dir), pattern, facts
        self.network_key, self.optimizer_key, self.first = layout
        self.epoch, self.step, self.records = args.start_epoch, 0, []
        self.totals = metrics.new(context.device)
        self.stopped_by = 0
        for stop in distributed.STOP_SIGNALS:
            signal.signal(stop, self._note_signal)
        self.host_group = dist.new_group(backend="gloo") if context.world_size > 1 else None  # never waits for a GPU
        if not (args.resume and self._resume(args.resume)):
            self._start_new()
        self.saved = time.monotonic()

    def _note_signal(self, number, frame):
        self.stopped_by = number

    def say(self, text):
        """Print text, once among all processes."""
        if self.context.is_main:
            print(text, flush=True)

    # --- the course of a run

    def epochs(self):
        """The numbers of the epochs still to do."""
        if self.epoch >= self.args.epochs:
            self.say(f"nothing to do: {self.folder} has all {self.args.epochs} epochs; --epochs may grow")
        return range(self.epoch, self.args.epochs)

    def seed_step(self):
        """Seed torch for the next step, so that a resumed run draws what the undisturbed one would have drawn."""
        position = [self.args.seed, self.epoch, self.step, self.context.rank]
        torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0]))

    def averages(self):
        """Mean loss, top-1 % and top-5 % over the images of this epoch so far, of all processes."""
        self.check_loss()
        return metrics.averages(self.totals, self.context)

    def check_loss(self):
        """UserError if a loss of this epoch was not finite."""
        if bad := int(self.totals[4]):
            self._stop_not_finite(f"the loss is not finite from step {bad}")

    def _stop_not_finite(self, what):
        raise UserError(
            f"{what} of epoch {self.epoch}: try a lower --lr or --precision fp32, or look at the images there; "
            f"the last good checkpoint in {self.folder} is kept"
        )

    def after_step(self):
        """Save by the clock; on a stop signal save and end the process with EXIT_RESUBMIT."""
        if self.step % CHECK_LOSS_EVERY == 0:
            self.check_loss()
        stop, due = self._max_over_processes(
            self.stopped_by, time.monotonic() - self.saved > 60 * self.args.save_minutes
        )
        if stop or due:
            self.save()
        if stop:
            name = signal.Signals(stop).name
            self.say(f"stopped by {name} after step {self.step} of epoch {self.epoch}: saved, continue with --resume")
            if self.context.world_size > 1:
                dist.barrier(self.host_group)  # nobody leaves, and thereby ends the others, before rank 0 has saved
            sys.exit(EXIT_RESUBMIT)

    def _max_over_processes(self, *wishes):
        """The largest that any process has of each of the numbers, so that all do the same after the same step."""
        if self.context.world_size == 1:
            return wishes
        flags = torch.tensor([int(wish) for wish in wishes])
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.host_group)
        return flags.tolist()

    def end_epoch(self, record, is_best=False):
        """Write the finished epoch's record to the log and its network to a file, and go to the next.

        is_best: the network goes to a second file, best_*, too.
        """
        self.records.append(record)
        self.log(record)
        if self.context.is_main:
            self._check_weights()
            name = self.pattern.format(self.epoch)
            for file in [name, f"best_{name}"] if is_best else [name]:
                checkpoint.write(self.folder / file, self.published(self.epoch))
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        self.save()

    # --- files

    def log(self, record):
        """Append a record to log.jsonl."""
        if self.context.is_main:
            files.append(self.folder / "log.jsonl", json.dumps(record) + "\n")

    def published(self, epoch):
        """The checkpoint of an epoch: the published keys, and what its reader would want to know."""
        network = distributed.unwrap(self.model).state_dict()
        val_acc1 = [record["val_acc1"] for record in self.records if "val_acc1" in record]
        return {
            "acc1_list": [record["acc1"] for record in self.records],
            **({"val_acc1_list": val_acc1} if val_acc1 else {}),
            self.network_key: {f"module.{name}": value for name, value in network.items()},
            self.optimizer_key: self.optimizer.state_dict(),
            "epoch": epoch + self.first,
            "args": self._flags(),
            **self.facts,
        }

    def save(self):
        """Write last.tar with all that a bitwise resume needs; the one before stays as last.old.tar."""
        self.saved, seen = time.monotonic(), distributed.all_reduce_sum(self.totals, self.context)
        if not self.context.is_main:
            return
        self._check_weights()
        last = self.folder / "last.tar"
        checkpoint.keep_previous(last)
        position = {"epoch": self.epoch, "step": self.step, "records": self.records, "totals": seen.cpu()}
        checkpoint.write(last, {**self.published(self.epoch), **position})

    def _check_weights(self):
        """UserError if a loss or weight is not finite: such a state must not replace a good one."""
        self.check_loss()
        norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in self.model.parameters()]))
        if not norms.isfinite().all():
            self._stop_not_finite(f"the weights are not finite after step {self.step}")

    def _flags(self):
        return provenance.flags(self.args)

    def _start_new(self):
        """Make room for a new run, and write its flags."""
        if not self.context.is_main:
            return
        self._make_room()
        self._write_flags()
        files.write_text(self.folder / "log.jsonl", "")

    def _make_room(self):
        """Refuse a folder that holds another run, or with --overwrite remove its checkpoints, lest they be resumed."""
        files.remove_temporary_files(files.make_output_dir(self.folder))
        each = re.sub(r"\{.*?\}", "*", self.pattern)
        found = [path for pattern in ("last*.tar", each, f"best_{each}") for path in sorted(self.folder.glob(pattern))]
        if self.args.resume == "last":  # what a first epoch wrote before it was cut short, without last.tar, may go
            found = [path for path in found if checkpoint.read(path).get("epoch") != self.first]
        if found and not self.args.overwrite:
            raise UserError(f"{found[0]} exists; give --resume to continue, --overwrite, or another --save-dir")
        for path in found:
            path.unlink()

    def _write_flags(self):
        provenance.write(self.folder, self.args)

    # --- resume

    def _resume(self, path):
        """Go on from the file at path, or from the newest good one in the folder; False if there is none."""
        content = self._newest() if path == "last" else checkpoint.read(path)
        if content is None:
            self.say(f"{self.folder} holds no run yet: starting new")
            return False
        if missing := {self.network_key, self.optimizer_key} - set(content):
            raise checkpoint.CheckpointError(f"{path} cannot be continued: it holds no {', no '.join(sorted(missing))}")
        chosen = [dict(group, params=None) for group in self.optimizer.param_groups]
        if "step" in content:
            self._refuse_differences(content)
        self._load(path, content)
        if self.context.is_main and path != "last" and Path(path).resolve().parent != self.folder.resolve():
            self._make_room()  # it is of another folder
        if "step" in content:
            self.epoch, self.step, self.records = content["epoch"], content["step"], content["records"]
            if self.context.is_main:  # they are of all processes
                self.totals.copy_(content["totals"])
        else:
            self.epoch = max(self.args.start_epoch, content.get("epoch", -1) + 1 - self.first)
            self.records = checkpoint.past_records(content)
            self.say(f"{path} holds no position: its past losses are unknown, epoch {self.epoch} begins anew")
        for group, wanted in zip(self.optimizer.param_groups, chosen, strict=True):
            if self.args.override:
                group.update({key: wanted[key] for key in ("lr", "weight_decay", "momentum") if key in group})
        self.say(f"continuing at epoch {self.epoch}, step {self.step}, learning rate {group['lr']:g}")
        if self.context.is_main:
            files.remove_temporary_files(files.make_output_dir(self.folder))
            self._write_flags()
            self._cut_log()
        return True

    def _newest(self):
        """What last.tar holds, or the one before it if that is damaged; None where there is neither."""
        last, old = self.folder / "last.tar", self.folder / "last.old.tar"
        if not last.exists() and not old.exists():
            return None
        try:
            return checkpoint.read(last)
        except checkpoint.CheckpointError as error:
            if not old.exists():
                raise
            self.say(f"warning: {error}; taking {old}")
            return checkpoint.read(old)

    def _load(self, path, content):
        """Load network and optimizer, which must fit exactly."""
        state = {name.removeprefix("module."): value for name, value in content[self.network_key].items()}
        network = distributed.unwrap(self.model)
        checkpoint.fill(network, checkpoint.Weights(Path(path), state, self.facts["arch"], self.facts.get("n_out")))
        try:
            self.optimizer.load_state_dict(content[self.optimizer_key])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"the optimizer in {path} does not fit this model: {error}") from error

    def _refuse_differences(self, content):
        """UserError if flags or data differ from the first start's in a way that changes what is learned."""
        facts = _differences({key: content.get(key) for key in self.facts}, self.facts)
        flags = _differences(content["args"], self._flags())
        if facts or (flags and not self.args.override):
            hint = "" if facts else "; give --override to take the new"
            raise UserError(f"--resume: not the run in {self.folder}: {'; '.join(facts + flags)}{hint}")

    def _cut_log(self):
        """Drop the lines of log.jsonl that the resumed run will write again, and the one a kill cut short."""
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        kept = [line for line in lines if line.endswith("\n") and self._is_past(json.loads(line))]
        files.write_text(log, "".join(kept))

    def _is_past(self, record):
        return (record["epoch"], record.get("step", float("inf"))) <= (self.epoch, self.step)


def _differences(before, now):
    """One line for every entry that differs in a way that matters."""
    return [
        f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if key not in IGNORED_ON_RESUME and before.get(key) != now.get(key)
    ]


def _short(value):
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}, ...)"
    return str(value)
