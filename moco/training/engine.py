"""One pass over the data: train or evaluate, on any device, in any precision."""

import time
from contextlib import nullcontext

import torch
from torch.nn import functional

from moco import cli, distributed, models
from moco.training import cpu, metrics


def resolve_dtype(name, device, arch, compiled=False):
    """The dtype that --precision stands for in training; auto is bf16 where that is faster."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and cpu.is_faster_in_bf16(arch, compiled)
    return torch.bfloat16 if faster else torch.float32


def autocast(device, dtype):
    """The context in which a forward pass computes in dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def prepare(model, context, dtype, compiled=False):
    """model ready to train in dtype: on its device, channels last, parallel, compiled if asked for."""
    torch.backends.cudnn.benchmark = True  # all steps but the last have one shape
    model = model.to(memory_format=torch.channels_last)
    if context.device.type == "cpu":
        cpu.disable_malloc_trim()
        if dtype == torch.bfloat16:
            cpu.replace_slow_bf16_modules(model)
    if compiled:
        model.compile()
    return distributed.wrap(model, context)


def classification_objective(model, images, targets):
    """The forward pass of a classifier: (logits, targets)."""
    return model(images), targets


def train_one_epoch(run, model, batches, optimizer, dtype, print_freq, forward=classification_objective):
    """Train the run's present epoch to its end by cross-entropy; returns its record.

    forward(model, images, targets) gives (logits, targets): all our learners differ in it alone. Nothing in a step
    waits for the device; sums stay there until somebody looks at them.
    """
    models.train_mode_keep_frozen_bn(model)
    context, clock = run.context, Throughput()
    with cli.Progress(len(batches), f"epoch {run.epoch}", "steps", None, run.step, context.is_main) as bar:
        for images, targets, _ in clock.watch(batches.epoch(run.epoch, run.step)):
            run.seed_step()
            with autocast(context.device, dtype):
                logits, targets = forward(model, images, targets)
            loss = functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics.count(run.totals, loss.detach(), logits.detach(), targets, run.step)
            clock.images += len(targets) * context.world_size
            bar.update()
            run.step += 1
            if run.step % print_freq == 0:
                record = {"epoch": run.epoch, "step": run.step, **run.averages(), **clock.speed()}
                run.log(record)
                bar.update(0, format_metrics(record))
                bar.line()
            run.after_step()  # perhaps the last one, if a signal says so
        record = {"epoch": run.epoch, **run.averages(), **clock.speed()}
        bar.update(0, format_metrics(record))
    if clock.images and record["waiting"] > 1 / 3:
        run.say("a third of the time went by waiting for data: give more --workers, or --augment-on device with a GPU")
    return record


@torch.inference_mode()
def evaluate(model, batches, context):
    """Mean loss, top-1 % and top-5 % of model on one pass over batches, in float32, over all processes."""
    network = distributed.sync_for_eval(model, context).eval()
    sums = metrics.new(context.device)
    with cli.Progress(len(batches), "evaluation", "steps", None, show=context.is_main) as bar:
        for images, targets, _ in batches.epoch(0):
            logits = network(images)
            metrics.count(sums, functional.cross_entropy(logits, targets), logits, targets)
            bar.update()
    return metrics.averages(sums, context)


def format_metrics(record):
    """A record of training in a user's words."""
    return (
        f"loss {record['loss']:.3f}, top-1 {record['acc1']:.1f} %, top-5 {record['acc5']:.1f} %, "
        f"{record['images_per_second']:.0f} images/s, {record['waiting']:.0%} waiting for data"
    )


class Throughput:
    """How fast images go by, and what share of the time is spent waiting for them."""

    def __init__(self):
        self.images, self.waited, self.start = 0, 0.0, time.monotonic()

    def watch(self, batches):
        """batches, with the time spent waiting for each one counted."""
        batches = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def speed(self):
        """Images a second and the share of waiting, since the start."""
        spent = time.monotonic() - self.start
        return {"images_per_second": self.images / spent, "waiting": self.waited / spent}
