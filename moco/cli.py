"""Command-line flags that scripts share, what is recorded of them, errors as one line, and progress."""

import argparse
import errno
import importlib.util
import io
import os
import platform
import subprocess
import sys
import textwrap
import time
from importlib import metadata

from tqdm import tqdm

HIDDEN = argparse.SUPPRESS  # help of a flag that exists for old command lines only


class UserError(Exception):
    """A mistake the user can correct: the message names the file or flag and says what to do."""


def run(main):
    """Run a script's main and exit: status 0, 2 after an error that the user can correct, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{program()}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
    print(f"{program()}: error: {message}", file=sys.stderr)
    sys.exit(2)


def user_message(error):
    """One line on an error that the user can correct, which too little memory is as well. None for other errors."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if not isinstance(error, MemoryError | OSError | RuntimeError):
        return None
    if "shared memory" in text:
        advice = "/dev/shm is too small: use fewer --workers or enlarge it (docker run --shm-size=8g)"
    elif "DataLoader worker" in text:
        advice = "a worker process was killed (out of memory?): use fewer --workers"
    elif type(error).__name__ == "OutOfMemoryError" or "out of memory" in text:  # torch's; it is not imported here
        advice = "lower --batch-size or --image-size, or use --precision bf16"
    elif isinstance(error, MemoryError) or "can't allocate memory" in text:
        advice = "lower --batch-size, --image-size or --workers"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        advice = "free disk space; if it is /dev/shm that is full, use fewer --workers or enlarge it"
    else:
        return None
    what = ". ".join(text.split("\n")[0].split(". ")[:2]).rstrip(". ")
    return f"{what or 'out of memory'}; {advice}"


def program():
    """The file name of the running script."""
    return os.path.basename(sys.argv[0])


def flags(args):
    """The flags in args, an argparse.Namespace, as a dict, without those about earlier results."""
    return {flag: value for flag, value in vars(args).items() if flag not in ("override", "overwrite")}


def versions():
    """The versions of Python and of the packages that a result may depend on."""
    packages = ("torch", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def commit():
    """The git commit of this code; None without git or outside a repository."""
    git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def lazy_import(name):
    """The module called name, loaded when one of its attributes is first used: --help need not wait for torchvision."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parent, _, child = name.rpartition(".")
        if parent:  # 'from parent import child' would load a module that is no attribute yet
            setattr(sys.modules[parent], child, module)
    return sys.modules[name]


class _Help(argparse.HelpFormatter):
    """Help with every default that exists, its text wrapped to the terminal but for indented command lines."""

    def add_usage(self, usage, actions, groups, prefix=None):
        self._prog += " [options]"  # each of them follows below
        super().add_usage(usage, [action for action in actions if not action.option_strings], [], prefix)

    def _get_help_string(self, action):
        default = action.default
        if action.nargs == 0 or default in (None, "", [], argparse.SUPPRESS):
            return action.help
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{action.help} (default: {shown.replace('%', '%%')})"

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text, width, indent):
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else "\n".join(self._split_lines(paragraph, width))
            for paragraph in paragraphs
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Exit with one line; the usage of a script with thirty flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parser(doc):
    """An argument parser for a script with the docstring doc."""
    return _Parser(description=doc, formatter_class=_Help, allow_abbrev=False)


def cores():
    """The number of CPU cores available to this process: SLURM's allocation, else the system's limit."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        return int(slurm)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(kind, low, high=None):
    """An argparse type: a finite int or float of at least low and, if high is given, at most high."""

    def convert(text):
        value = kind(text)
        if not low <= value < float("inf") or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__
    return convert


def shard(text):
    """(part, number of parts) from I/N (an argparse type)."""
    part, parts = (int(word) for word in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(text)
    return part, parts


SHARED_FLAGS = {
    "--save-dir": dict(default=".", metavar="DIR", help="output folder; created if missing"),
    "--seed": dict(default=0, type=number(int, 0, 2**32 - 1), metavar="N", help="random seed"),
    "--device": dict(
        default="auto",
        choices=["auto", "cpu", "cuda", "mps"],
        help="where the network runs; auto: on a GPU if there is one, else on the CPU",
    ),
    "--precision": dict(
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="precision of training; auto: bf16 where it is faster than fp32",
    ),
    "--workers": dict(
        flags=["-j", "--workers"],
        type=number(int, 0),
        default=cores(),
        metavar="N",
        help="worker processes (one per available CPU core); 0: work in the main process",
    ),
    "--image-size": dict(default=224, type=number(int, 32), metavar="PIXELS", help="input resolution of the network"),
    "--batch-size": dict(
        flags=["-b", "--batch-size"],
        default=256,
        type=number(int, 1),
        metavar="N",
        help="total batch size over all processes",
    ),
    "--lr": dict(
        flags=["--lr", "--learning-rate"], default=5e-4, type=number(float, 0), metavar="LR", help="learning rate"
    ),
    "--augment-on": dict(
        default="worker",
        choices=["worker", "device"],
        help="where color jitter and blur are applied: in the worker processes, or on the device, which helps where "
        "a GPU waits for data",
    ),
    "--print-freq": dict(
        flags=["-p", "--print-freq"],
        default=100,
        type=number(int, 1),
        metavar="N",
        help="log every N steps",
    ),
    "--overwrite": dict(action="store_true", help="replace existing results in --save-dir"),
}


def shared_flags(parser, *names, **changes):
    """Add the flags called names, as SHARED_FLAGS defines them, to parser; changes replace their default or help."""
    for name in names:
        options = SHARED_FLAGS[name] | changes
        parser.add_argument(*options.pop("flags", [name]), **options)


class Progress:
    """A progress bar on a terminal; in a batch log a line at a fixed interval and at the end.

    total: number of units, None if unknown. description: text before the bar. unit: name of the units. seconds:
    interval between lines in a log; None prints lines only on line(). start: number of units that are done already.
    show: False prints nothing.
    """

    def __init__(self, total, description, unit, seconds=60, start=0, show=True):
        self.layout = dict(unit=f" {unit}", unit_scale=total is None or total >= 10_000, initial=start)
        self.bar = tqdm(
            total=total, desc=description, dynamic_ncols=True, disable=None if show else True, **self.layout
        )
        self.is_log = show and self.bar.disable
        self.total = total
        self.description = description
        self.seconds = seconds
        self.done = start
        self.postfix = ""
        self.started = time.monotonic()
        self.printed = self.started

    def update(self, n=1, postfix=None):
        """Count n more units as done; postfix replaces the text after the numbers."""
        self.done += n
        if postfix is not None:
            self.postfix = postfix
            self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(n)
        if self.seconds is not None and time.monotonic() - self.printed >= self.seconds:
            self.line()

    def line(self):
        """In a log, print the current state."""
        self.printed = time.monotonic()
        if self.is_log:
            elapsed = self.printed - self.started
            form = "{desc}: {n_fmt}/{total_fmt}{unit} in {elapsed}, {rate_noinv_fmt}{postfix}"
            options = dict(prefix=self.description, postfix=self.postfix or None, bar_format=form, **self.layout)
            print(tqdm.format_meter(self.done, self.total, elapsed, **options), flush=True)

    def say(self, text):
        """Print text above the bar."""
        if self.is_log:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self):
        """Close the bar; in a log, print the final state."""
        self.line()
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
