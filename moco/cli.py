"""Command-line flags that scripts share, what is recorded of them, errors as one line, and progress."""

import argparse
import difflib
import errno
import io
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import traceback
from contextlib import suppress
from importlib import metadata
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

HIDDEN = argparse.SUPPRESS  # help of a flag that exists for old command lines only
CGROUP = Path("/sys/fs/cgroup")  # of a container
EXIT_NO_READER = 128 + 13  # of a program that SIGPIPE ends


class UserError(Exception):
    """A mistake the user can correct: the message names the file or flag and says what to do."""


def run(main):
    """Run a script's main and exit: status 0, 2 after an error that the user can correct, 130 after Ctrl-C."""
    guard_output()
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Exception) as error:
        status, text = failure(error)
        if status == 1:
            raise
        print(text, end="", file=sys.stderr)
        sys.exit(status)


class _Output(io.TextIOWrapper):
    """Standard output or error. If its reader goes away, as head does, the process stops as after SIGTERM.

    A trainer saves first. A process without a handler of SIGTERM exits with the status of other programs.
    """

    def write(self, text):
        return self._unless_closed(super().write, text)

    def flush(self):
        return self._unless_closed(super().flush)

    def _unless_closed(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
                raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            sys.exit(EXIT_NO_READER)
        signal.raise_signal(signal.SIGTERM)
        return 0


def guard_output():
    """Let neither names that a terminal cannot show nor a reader that goes away end this process with a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (it stays open)
        elif type(stream) is io.TextIOWrapper:
            options = dict(encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, _Output(stream.buffer, **options))


def failure(error):
    """The exit status of a process that an exception ends, and what it prints.

    That is one line on an error that the user can correct, which too little memory is as well, or else the traceback.
    """
    if isinstance(error, SystemExit):
        return int(error.code or 0), ""
    if isinstance(error, KeyboardInterrupt):
        kept = str(error) or "what is finished is kept, re-run to go on (a trainer with --resume)"
        return 130, f"\n{program()}: interrupted; {kept}\n"
    message = str(error)
    if what_to_do := advice(error):
        what = ". ".join(message.split("\n")[0].split(". ")[:2]).rstrip(". ")
        message = f"{what or 'out of memory'}; {what_to_do}"
    elif not isinstance(error, UserError):
        return 1, "".join(traceback.format_exception(error))
    return 2, f"{program()}: error: {message}\n"


ADVICE = {  # words in an error's type or text: what to do; the first that are there count
    "exited unexpectedly": "its reason is above, or it was killed (out of memory?): use fewer --workers",
    "shared memory": "/dev/shm is too small: use fewer --workers or enlarge it (docker run --shm-size=8g)",
    "DataLoader worker": "a worker process was killed (out of memory?): use fewer --workers",
    "out of memory": "lower --batch-size or --image-size, or use --precision bf16",
    "allocate memory": "lower --batch-size, --image-size or --workers",  # "cannot", "can't"
    "MemoryError": "lower --batch-size, --image-size or --workers",
    "Resource temporarily unavailable": "the limit of processes is reached: use fewer --workers",
    "No space left on device": "free some space and retry; if /dev/shm is full, use fewer --workers or enlarge it",
    "Disk quota exceeded": "free some space and retry",
    "File too large": "raise the limit of a file's size (ulimit -f), or choose another folder",
    "Read-only file system": "choose another folder",
    "Permission denied": "choose another folder or change its permissions",
    "Operation not permitted": "choose another folder or change its permissions",
    "File name too long": "choose a shorter name",
    "Expected more than 1 value per channel": "give a --batch-size of at least two images for each process",
    "no kernel image is available": "install torch for an older CUDA, which supports this GPU, or give --device cpu",
}


def advice(error):
    """What to do about an error of the system or of torch that the user can correct; None for other errors."""
    if not isinstance(error, MemoryError | OSError | RuntimeError | ValueError):
        return None
    text = f"{type(error).__name__}: {error}"
    return next((advice for words, advice in ADVICE.items() if words in text), None)


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
    git = ["git", "-c", "safe.directory=*", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]  # whoever owns it
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


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
    def parse_args(self, args=None, namespace=None):
        """As argparse, which gives a flag with several values all words up to the next flag, but for a last folder."""
        words = sys.argv[1:] if args is None else list(args)
        folders = self._folders_after_values(words)
        rest = [word for i, word in enumerate(words) if i not in folders]
        return super().parse_args([*(words[i] for i in folders), *rest], namespace)

    def _folders_after_values(self, words):
        """The numbers of the words that are the positional argument, though they follow the values of a flag.

        None if the positional argument stands elsewhere, or with a flag that excludes it. Otherwise the folders at the
        end of a flag's values, all of them for a positional that takes several, but not the only value of a flag that
        needs one. If there are none, the last value stands for a folder that is missing, unless it is a number.
        """
        positional = next((action for action in self._actions if not action.option_strings), None)
        groups = [group._group_actions for group in self._mutually_exclusive_groups]
        excluding = {flag for group in groups if positional in group for each in group for flag in each.option_strings}
        if positional is None or excluding & set(words):
            return []
        room, lists = 0, []  # the values that a flag takes yet; nargs and values of the flags that may take several
        for i, word in enumerate(words):
            if word.startswith("-") and not word[1:2].isdigit():
                nargs = getattr(self._option_string_actions.get(word), "nargs", 0)
                room = {None: 1, "?": 1, "*": len(words), "+": len(words)}.get(nargs, nargs)
                lists.append((nargs, []))
            elif room:
                room -= 1
                lists[-1][1].append(i)
            else:
                return []
        lists = [(nargs, values[nargs == "+" :]) for nargs, values in lists if nargs in ("?", "*", "+")]
        for _, values in reversed(lists):
            if folders := list(takewhile(lambda i: Path(words[i]).is_dir(), reversed(values))):
                return folders[::-1] if positional.nargs in ("*", "+") else folders[:1]
        last = [i for nargs, values in lists if nargs != "?" for i in values][-1:]
        return last if positional.nargs in (None, "+") and last and not words[last[0]].isdecimal() else []

    def error(self, message):
        """Exit with one line that names the flag nearest to an unknown one; the usage would hide it."""
        unknown = re.findall(r"(?<!\S)--?\w[\w-]*", message) if message.startswith("unrecognized") else []
        shown = [flag for action in self._actions if action.help != HIDDEN for flag in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0], shown, 1, 0.75) if unknown else []
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        self.exit(2, f"{self.prog}: error: {message}; {hint}see --help\n")


def parser(doc):
    """An argument parser for a script with the docstring doc."""
    return _Parser(description=doc, formatter_class=_Help, allow_abbrev=False)


def cores():
    """The number of CPU cores available to this process: SLURM's allocation, else the limit of system and container."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        return int(slurm)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroup versions 2 and 1
        with suppress(OSError, ValueError):  # there is no such file; the quota is "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            count = min(count, -(-quota // period)) if quota > 0 else count
    return count


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
    "--features-dir": dict(metavar="DIR", help="cache of computed features; default: features in --save-dir"),
    "--image-size": dict(
        type=number(int, 32),
        metavar="PIXELS",
        help="side of the images; default: what the network was trained at, 224 if unknown",
    ),
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
    "--print-freq": dict(
        flags=["-p", "--print-freq"], default=100, type=number(int, 1), metavar="N", help="log every N steps"
    ),
    "--overwrite": dict(action="store_true", help="replace existing results in --save-dir"),
}


def shared_flags(parser, *names, **changes):
    """Add the flags called names, as SHARED_FLAGS defines them, to parser; changes replace their default or help."""
    for name in names:
        options = SHARED_FLAGS[name] | changes
        parser.add_argument(*options.pop("flags", [name]), **options)


class Progress(tqdm):
    """A progress bar on a terminal; in a batch log a line at a fixed interval and at the end.

    total: number of units, None if unknown. description: text before the bar. unit: name of the units. seconds:
    interval between lines in a log; None prints lines only on refresh(). start: number of units that are done already.
    show: False prints nothing.
    """

    LINE = "{desc}: {n_fmt}/{total_fmt}{unit} in {elapsed}, {rate_noinv_fmt}{postfix}"
    NARROW = "{desc}: {n_fmt}/{total_fmt} {remaining}{postfix}"  # for less than 120 columns: numbers, not a bar

    def __init__(self, total, description, unit, seconds=60, start=0, show=True):
        self.is_log = not sys.stderr.isatty()
        options = dict(desc=description, unit=f" {unit}", initial=start, disable=not show, dynamic_ncols=True)
        if self.is_log:  # display() prints: tqdm itself would rewrite a line
            options |= dict(file=io.StringIO(), bar_format=self.LINE, smoothing=0, miniters=1)
            options |= dict(mininterval=float("inf") if seconds is None else seconds)
        super().__init__(total=total, unit_scale=total is None or total >= 10_000, **options)

    @property
    def format_dict(self):
        """What tqdm formats."""
        options = super().format_dict
        if options["postfix"] and not self.is_log and (options["ncols"] or 80) < 120:
            options["bar_format"] = self.NARROW
        return options

    def display(self, msg=None, pos=None):
        """Show the present state."""
        if not self.is_log:
            super().display(msg, pos)
        elif self.n > self.initial:
            print(self, flush=True)
