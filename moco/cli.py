"""The flags every script has, a mistake as one line, and progress on a terminal or in a log."""

import argparse
import os
import sys
import time

from tqdm import tqdm

HIDDEN = argparse.SUPPRESS  # the help of a flag that is kept for old command lines only


class UserError(Exception):
    """Something the user can mend: the message names the file or flag and says what to do."""


def run(main):
    """Run a script's main and end the process: status 0, 2 after a mistake of the user's, 130 after Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        print(f"{program()}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"\n{program()}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def program():
    """The name of the running script."""
    return os.path.basename(sys.argv[0])


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows every default that says something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def parser(doc):
    """An argument parser for a script whose docstring is doc."""
    return argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)


def cores():
    """The number of cores this process may use: what SLURM gave it, else what the system lets it run on."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        return int(slurm)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(kind, low, high=None):
    """An argparse type: an int or float of at least low and, where high is given, at most high."""

    def convert(text):
        value = kind(text)
        if not value >= low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__
    return convert


SHARED_FLAGS = {
    "--save-dir": dict(default=".", metavar="DIR", help="folder for everything this run writes; made if missing"),
    "--seed": dict(default=0, type=int, help="seed of everything random in this run"),
    "--device": dict(default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes the fastest there is"),
    "--precision": dict(
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="arithmetic of training; auto takes bf16 only where it is faster",
    ),
    "--workers": dict(
        flags=["-j", "--workers"],
        type=number(int, 0),
        default=cores(),
        help="worker processes that read data; the default is the cores this process may use; 0 reads in the main one",
    ),
    "--image-size": dict(
        default=224, type=number(int, 32), metavar="PIXELS", help="side of the square images the network sees"
    ),
    "--batch-size": dict(
        flags=["-b", "--batch-size"], default=256, type=number(int, 1), help="images a step, over all processes"
    ),
    "--lr": dict(flags=["--lr", "--learning-rate"], default=5e-4, type=number(float, 0), help="learning rate"),
    "--augment-on": dict(
        default="worker",
        choices=["worker", "device"],
        help="where colors are jittered and blurred; device frees the workers, where a GPU waits for them",
    ),
    "--print-freq": dict(
        flags=["-p", "--print-freq"], default=100, type=number(int, 1), help="steps between two lines of a batch log"
    ),
    "--overwrite": dict(action="store_true", help="replace results that are already in --save-dir"),
}


def shared_flags(parser, *names, **changes):
    """Add the named flags of SHARED_FLAGS to parser, with changes to what they say there: default, help."""
    for name in names:
        options = SHARED_FLAGS[name] | changes
        parser.add_argument(*options.pop("flags", [name]), **options)


class Progress:
    """A bar on a terminal; in a batch log a plain line every so many seconds and at the end.

    total: how many units there are (None: unknown), of which start are done already. unit: the word for one. note:
    text shown behind the numbers. seconds: None for no lines but those that line() asks for. show: False prints
    nothing at all.
    """

    def __init__(self, total, what, unit, seconds=60, start=0, show=True):
        self.layout = dict(unit=f" {unit}", unit_scale=total is None or total >= 10_000, initial=start)
        self.bar = tqdm(total=total, desc=what, dynamic_ncols=True, disable=None if show else True, **self.layout)
        self.log = show and self.bar.disable
        self.total, self.what, self.seconds = total, what, seconds
        self.done, self.note, self.began = start, "", time.monotonic()
        self.printed = self.began

    def update(self, n=1, note=None):
        """Count n more units as done; note replaces the text behind the numbers."""
        self.done += n
        if note is not None:
            self.note = note
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)
        if self.seconds is not None and time.monotonic() - self.printed >= self.seconds:
            self.line()

    def line(self):
        """Print the present state, in a log."""
        self.printed = time.monotonic()
        if self.log:
            spent, note = self.printed - self.began, self.note or None
            form = "{desc}: {n_fmt}/{total_fmt}{unit} in {elapsed}, {rate_fmt}{postfix}"
            options = dict(prefix=self.what, postfix=note, bar_format=form, **self.layout)
            print(tqdm.format_meter(self.done, self.total, spent, **options), flush=True)

    def say(self, text):
        """Print a line without breaking the bar."""
        if self.log:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self):
        """End the bar; in a log print the last state."""
        self.line()
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
