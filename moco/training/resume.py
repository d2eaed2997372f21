"""Continuing a training run: which file, what may differ from the original run, and what is restored."""

import json
from pathlib import Path

import torch

from moco import distributed, files
from moco.cli import UserError
from moco.networks import checkpoint, opening

# Flags that do not change what is learned. The data are compared by their classes and number of images.
IGNORED_ON_RESUME = {
    *("data", "save_dir", "resume", "override", "overwrite", "model_path", "start_epoch", "epochs", "save_minutes"),
    *("print_freq", "workers", "device", "world_size", "rank", "dist_url", "dist_backend", "gpu"),
    *("multiprocessing_distributed", "processes_per_node", "compile", "deterministic"),
}
# Flags that say which images an epoch has, in which order: with others, the rest of an epoch would not be its rest.
FIXED_WITHIN_EPOCH = {
    *("batch_size", "seed", "frac_retained", "train_list", "pos_window", "published_sampling"),
    *("children", "ages", "select", "exclude", "list", "hours"),
}


def restore(run):
    """Bring run to where options.resume says; returns the folder of the run it continues, None if there is none.

    Network and optimizer must fit exactly. UserError if the data differ, or flags do without --override.
    """
    path, content = _read(run)
    if content is None:
        run.print(f"{run.folder} holds no run yet: starting a new one")
        return None
    keys = {run.format.network_key, run.format.optimizer_key}
    if missing := keys - set(content):
        raise checkpoint.CheckpointError(f"{path} cannot be continued by this script: it has no {min(missing)}")
    has_flags = "args" in content
    if has_flags:
        _check_same_run(run, path, content)
    chosen = [dict(group, params=None) for group in run.optimizer.param_groups]
    _load_states(run, path, content)
    if run.options.override or not has_flags:
        _set_hyperparameters(run.optimizer, chosen)
    if "step" in content:
        run.epoch, run.step, run.records = content["epoch"], content["step"], content["records"]
        totals = _totals(content["totals"])  # over all processes; the others start from 0
        run.metrics.load(totals if run.context.is_main else dict.fromkeys(totals, 0))
    else:
        run.epoch = max(run.options.start_epoch, content.get("epoch", -1) + 1 - run.format.first_epoch)
        run.records = checkpoint.past_records(content)
        run.print(f"{path} stores no position within an epoch, and no past losses: starting at epoch {run.epoch}")
    lr = run.optimizer.param_groups[0]["lr"]
    run.print(f"continuing {path} at epoch {run.epoch}, step {run.step}, learning rate {lr:g}")
    return Path(path).parent


def _read(run):
    """(path, content) of the file to continue from; of save_dir the newest that is whole, or None where it has none."""
    if run.options.resume != "last":
        return run.options.resume, checkpoint.read(run.options.resume)
    last, old = run.folder / "last.tar", run.folder / "last.old.tar"
    if not last.exists() and not old.exists():
        return last, None
    try:
        return last, checkpoint.read(last)
    except checkpoint.CheckpointError as error:
        if not old.exists():
            raise
        run.print(f"warning: {error}; continuing from {old}")
        return old, checkpoint.read(old)


def _check_same_run(run, path, content):
    """UserError if flags or data differ from the original run's in a way that changes what is learned."""
    flags = run.options.flags
    data = _differences({key: content.get(key) for key in run.metadata}, run.metadata)
    changed = _differences(content["args"], flags, IGNORED_ON_RESUME)
    if flags.get("cos"):
        changed |= _differences({"epochs": content["args"].get("epochs")}, {"epochs": flags["epochs"]})
    fixed = {key: line for key, line in changed.items() if key in FIXED_WITHIN_EPOCH and content.get("step")}
    if data or fixed or (changed and not run.options.override):
        hint = ""
        if fixed:
            hint = "; only --overwrite or another --save-dir can change that within an epoch"
        elif not data:
            hint = "; --override continues with the new value"
        if "epochs" in changed:
            hint += ", which raises the learning rate of --cos again"
        differences = "; ".join([*data.values(), *changed.values()])
        raise UserError(f"--resume: {path} is of another run: {differences}{hint}")


def _differences(before, now, ignored=()):
    """{key: text} for every key whose value differs; a flag that is new since then counts only if it is given."""
    return {
        key: f"{key} was {_shorten(before.get(key))} and is {_shorten(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if key not in ignored and before.get(key) != now.get(key) and (key in before or now[key])
    }


def _shorten(value):
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}, ...)"
    return str(value)


def _load_states(run, path, content):
    """Load network and optimizer."""
    state = {name.removeprefix("module."): value for name, value in content[run.format.network_key].items()}
    opening.load(distributed.unwrap(run.model), state, path)
    try:
        run.optimizer.load_state_dict(content[run.format.optimizer_key])
    except ValueError as error:
        raise checkpoint.CheckpointError(f"the optimizer in {path} does not fit this model: {error}") from error
    for parameter, values in run.optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                # A fused step on a GPU needs the memory format of the parameter; published files are contiguous.
                values[key] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def _set_hyperparameters(optimizer, groups):
    """Give optimizer the hyperparameters of groups, which loading its state has replaced."""
    for group, chosen in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: chosen[key] for key in ("lr", "weight_decay", "momentum") if key in group})


def _totals(totals):
    """Sums of metrics as saved; runs of version 1.0 saved a tensor (loss, top-1 hits, top-5 hits, images, ...)."""
    if isinstance(totals, dict):
        return totals
    loss, top1, top5, images, _ = totals.tolist()
    return {"loss": loss, "acc1": 100 * top1, "acc5": 100 * top5, "images": int(images)}


def trim_log(log, epoch, step):
    """Drop the lines of log.jsonl that the run resumed at (epoch, step) will write again, and damaged ones."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.exists() else []
    files.write_text(log, "".join(line for line in lines if line.endswith("\n") and _is_past(line, epoch, step)))


def _is_past(line, epoch, step):
    try:
        record = json.loads(line)
        return (record["epoch"], record.get("step", float("inf"))) <= (epoch, step)
    except (ValueError, TypeError, KeyError):  # cut or damaged when a disk was full
        return False
