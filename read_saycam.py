"""Extract frames from head-camera videos, in episodes: the classes of temporal classification.

    python read_saycam.py videos --save-dir frames --fps 5 --seg-len 288

In: folders of videos, read one after another in the order of their names. Out: class_0000/img_0000.jpeg and so on in
--save-dir, which torchvision's ImageFolder reads, and manifest.json, which records where every image comes from.
Frames are scaled, cropped around the center and rotated by 180 degrees, as the head camera hangs upside down. Re-run
the command to resume.
"""

import os
from fractions import Fraction
from pathlib import Path

from moco import cli, files, pool
from moco.data import manifest
from moco.videos import extract, listing

# Flags that change the images: a run is resumed only with the same values.
SETTINGS = ("fps", "seg-len", "class-by", "size", "quality", "shift")
SETTINGS += ("no-rotate", "published-step", "drop-last", "recursive")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "data", nargs="+", metavar="FOLDER", help="folder of videos; several are read one after another"
    )
    cli.shared_flags(parser, "--save-dir", "--workers")
    number, positive = cli.number, cli.number(fraction, 1e-4, 1e7)
    parser.add_argument("--fps", type=positive, default=5.0, help="sampled frames per second, such as 5 or 1/2")
    parser.add_argument("--seg-len", type=positive, default=288.0, help="length of an episode in seconds")
    parser.add_argument(
        "--class-by",
        choices=["time", "video", "name"],
        default="time",
        help="one class per episode, per video, or per first part of a file name (up to its first underscore)",
    )
    parser.add_argument("--size", type=number(int, 8, 4096), default=224, help="side of the square images in pixels")
    parser.add_argument("--quality", type=number(int, 1, 100), default=95, help="JPEG quality")
    parser.add_argument(
        "--shift", type=number(int, 0), default=16, help="pixels of a 224-pixel image that the crop moves up"
    )
    parser.add_argument("--no-rotate", action="store_true", help="do not rotate frames by 180 degrees")
    parser.add_argument(
        "--published-step", action="store_true", help="sample every (int(native) // fps + 1)-th frame, as published"
    )
    parser.add_argument(
        "--drop-last", action="store_true", help="leave out the last episode if it is shorter than --seg-len"
    )
    parser.add_argument("--recursive", action="store_true", help="read videos in sub-folders too")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if any video or frame was left out")
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    todo.add_argument("--plan", action="store_true", help="write the plan, manifest.json, and stop")
    todo.add_argument("--shard", type=shard, metavar="I/N", help="read only part I of N, with I from 0 to N - 1")
    return parser.parse_args(argv)


def fraction(text):
    """A number from text like 5, 0.2 or 1/3."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def shard(text):
    """(part, number of parts) from I/N."""
    part, parts = (int(word) for word in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(text)
    return part, parts


def main(argv=None):
    args = parse_args(argv)
    # So that the memory of a long video's index is returned to the system.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**22))
    settings = {flag: getattr(args, flag.replace("-", "_")) for flag in SETTINGS}
    roots, folder = [os.path.abspath(each) for each in args.data], Path(args.save_dir)
    videos = listing.list_videos(roots, args.recursive, folder)
    plan, selections = extract.matching_plan(folder, settings, videos), {}
    with pool.WorkerPool(args.workers) as workers:
        if plan is None:
            plan, selections = extract.make_plan(roots, settings, videos, workers)
        if not args.dry_run:
            files.make_output_dir(folder)
            plan = extract.matching_plan(folder, settings, videos) or extract.write_plan(folder, plan)
        if not args.dry_run and not args.plan:
            plan = extract.read_videos(folder, plan, roots, selections, workers, args.shard or (0, 1))
    extract.print_summary(plan, with_size=args.dry_run)
    return 1 if args.strict and manifest.left_out(plan) else None


if __name__ == "__main__":
    cli.run(main)
