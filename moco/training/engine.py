"""One pass over the data: train on an objective or evaluate a classifier, with metrics over all images seen."""

import time
from contextlib import nullcontext

import torch
from torch.nn import functional

from moco import cli, distributed
from moco.cli import UserError
from moco.distributed import ProcessContext
from moco.networks import architectures
from moco.training import cpu

SHOW_EVERY = 60  # seconds, however large --print-freq is


def add_flags(parser):
    """Add the flags of how a step is computed to parser."""
    cli.shared_flags(parser, "--precision", "--print-freq")
    add = parser.add_argument
    add("--compile", action="store_true", help="compile the network: minutes at the start, then faster steps")
    add("--deterministic", action="store_true", help="bitwise reproducible on a GPU as well, at the cost of speed")


def resolve_dtype(precision, device, arch, compiled=False):
    """The torch dtype of --precision auto, fp32 or bf16; auto is bf16 where that is faster to train in."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = device.type == "cpu" and cpu.is_faster_in_bf16(arch, compiled)
    return torch.bfloat16 if is_faster else torch.float32


def prepare(model, context, dtype, compiled=False, deterministic=False):
    """model ready to train in dtype: on its device, channels last, compiled if asked for, in DDP among processes."""
    torch.backends.cudnn.benchmark = not deterministic  # all steps but the last have one shape
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
    if context.device.type != "mps":  # where channels-last convolutions are very slow (pytorch#193349)
        model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if hasattr(module, "inplace"):  # autograd clones what an activation overwrites
            module.inplace = False
    if context.device.type == "cpu":
        cpu.disable_malloc_trim()
        if dtype == torch.bfloat16:
            cpu.replace_slow_bf16_modules(model)
    if compiled:
        check_compiler(context.device)
        model.compile(dynamic=False)  # a smaller last batch would turn all later steps to dynamic shapes, other bits
    return distributed.wrap(model, context)


def check_compiler(device):
    """UserError if torch cannot compile a small function here, as without a C++ compiler or Python's headers."""
    weights = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: x.sin().sum())(weights).backward()
    except Exception as error:  # of torch, of Triton, of a compiler
        lines = str(error).split("\n")
        reason = next((line for line in lines if "error: " in line), lines[0])
        raise UserError(
            f"--compile: torch cannot compile here ({reason.strip()}); install a C++ compiler and Python's headers (on "
            "Debian: apt-get install g++ python3-dev), or leave --compile out"
        ) from error


def autocast(device, dtype):
    """The context in which a forward pass computes in dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def classification_objective(model, images, targets):
    """Cross-entropy of a classifier on images (N, 3, H, W) and targets (N,), with top-1 and top-5 accuracy in %."""
    logits = model(images)
    loss = functional.cross_entropy(logits.float(), targets)
    return loss, {"acc1": topk_accuracy(logits, targets), "acc5": topk_accuracy(logits, targets, k=5)}


def train_one_epoch(run, model, batches, optimizer, objective):
    """Train from the position of run to the end of its epoch; returns the epoch's record for run.end_epoch.

    objective: function of (model, images, targets) that returns the loss and {name: mean over the images} of whatever
    it measures, as 0-d tensors. images is a tuple of views where batches have several. Losses and metrics are averaged
    over the images of all processes under their names. No step waits for the device.
    """
    architectures.train_mode_keep_frozen_bn(model)
    context, throughput, shown_at = run.context, Throughput(), time.monotonic()
    with cli.Progress(len(batches), f"epoch {run.epoch}", "steps", None, run.step, context.is_main) as bar:
        for images, targets, _ in throughput.time_waiting(run.until_stopped(batches.epoch(run.epoch, run.step))):
            run.seed_step()
            with autocast(context.device, run.dtype):
                loss, metrics = objective(model, images, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.end_step(loss, metrics, len(targets))
            throughput.images += len(targets) * context.world_size
            bar.update()
            if run.step % run.flags["print_freq"] == 0:
                record = {"epoch": run.epoch, "step": run.step, **run.averages(), **throughput.summary()}
                run.log(record)
                bar.set_postfix_str(format_metrics(record))
                shown_at = time.monotonic()
            elif context.is_main and time.monotonic() - shown_at > SHOW_EVERY and run.metrics.images:
                averages = run.metrics.averages(ProcessContext())  # of this process: the others do not wait for it
                bar.set_postfix_str(format_metrics({**averages, **throughput.summary()}))
                shown_at = time.monotonic()
            run.save_if_due()  # ends the process after a stop signal
        record = {"epoch": run.epoch, **run.averages(), **throughput.summary()}
        bar.set_postfix_str(format_metrics(record), refresh=False)
    if throughput.images and record["waiting"] > 1 / 3:
        run.print("over a third of the time was spent waiting for data; try more --workers")
    return record


@torch.inference_mode()
def evaluate(model, batches, context):
    """Mean loss, top-1 and top-5 accuracy (%) of a classifier over the batches of all processes, in float32."""
    network = distributed.sync_for_eval(model, context).eval()
    sums = MetricSums(context.device, ("loss", "acc1", "acc5"))
    with cli.Progress(len(batches), "evaluation", "steps", None, show=context.is_main) as bar, distributed.no_tf32():
        for images, targets, _ in batches.epoch(0):
            loss, metrics = classification_objective(network, images, targets)
            sums.update(loss, metrics, len(targets))
            bar.update()
    return sums.averages(context)


LABELS = {"acc1": "top-1 {:.1f} %", "acc5": "top-5 {:.1f} %", "images_per_second": "{:.0f} images/s"}
LABELS |= {"waiting": "{:.0%} waiting for data", "loss": "loss {:.3f}"}


def format_metrics(record):
    """A record of training as text for the progress bar and the log."""
    shown = {name: value for name, value in record.items() if name not in ("epoch", "step", "images")}
    return ", ".join(LABELS.get(name, f"{name} {{:.4g}}").format(value) for name, value in shown.items())


def set_learning_rate(optimizer, lr):
    """Set the learning rate of all parameters of optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_learning_rate(epoch, lr, milestones, factor):
    """lr multiplied by factor once for each of the milestones (epochs) that have been reached."""
    return lr * factor ** sum(epoch >= milestone for milestone in milestones)


class Throughput:
    """Images per second, and the fraction of the time spent waiting for data."""

    def __init__(self):
        self.images = 0
        self.waited = 0.0
        self.start = time.monotonic()

    def time_waiting(self, batches):
        """Yield batches, timing how long each one is waited for."""
        batches = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def summary(self):
        """{"images_per_second": ..., "waiting": fraction of the time} since the start."""
        elapsed = time.monotonic() - self.start
        return {"images_per_second": self.images / elapsed, "waiting": self.waited / elapsed}


def topk_accuracy(logits, targets, k=1):
    """The share in % of the rows of logits (N, K) whose k largest include the target (N,), as a 0-d tensor.

    With fewer than k classes it is 100.
    """
    top = logits.topk(min(k, logits.shape[1])).indices
    return 100 * (top == targets[:, None]).any(1).float().mean()


class MetricSums:
    """Sums over the images of an epoch, from which averages over all images of all processes follow.

    names: metrics that are known beforehand. Every process must have the same ones when sums are reduced, so that a
    process which may get no images needs them.
    """

    def __init__(self, device, names=()):
        self.device, self.names = device, names
        # float64 sums of a float32 mean times its images are exact, whatever their order; MPS has float32 only.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self):
        """Begin a new epoch."""
        self.sums = {name: torch.zeros((), dtype=self.dtype, device=self.device) for name in self.names}
        self.images = 0
        self.nonfinite_step = torch.zeros((), dtype=torch.int64, device=self.device)  # the first one, from 1; 0: none

    def update(self, loss, metrics, images, step=0):
        """Add a step: its mean loss and mean metrics {name: 0-d tensor}, over a number of images."""
        for name, mean in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0) + mean.detach().to(self.dtype) * images
        self.images += images
        is_first = (self.nonfinite_step == 0) & ~loss.detach().isfinite()
        self.nonfinite_step = torch.where(is_first, step + 1, self.nonfinite_step)

    def all_reduce(self, context):
        """The sums over all processes: {name: float, "images": int}. Waits for the device."""
        sums = [*self.sums.values(), torch.tensor(self.images, dtype=self.dtype, device=self.device)]
        *totals, images = distributed.all_reduce_sum(torch.stack(sums), context).tolist()
        return {**dict(zip(self.sums, totals, strict=True)), "images": int(images)}

    def averages(self, context):
        """Mean loss and metrics over exactly the images that all processes saw, and the number of these images.

        Raises UserError where there were none.
        """
        totals = self.all_reduce(context)
        images = totals.pop("images")
        if not images:
            raise UserError("none of the images can be read; see the lines above for the reasons")
        return {**{name: total / images for name, total in totals.items()}, "images": images}

    def load(self, totals):
        """Continue from the sums of all_reduce."""
        self.reset()
        self.images = totals["images"]
        self.sums = {
            name: torch.tensor(total, dtype=self.dtype, device=self.device)
            for name, total in totals.items()
            if name != "images"
        }
