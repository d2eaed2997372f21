"""Extract frames from head-camera videos, in episodes: the classes of temporal classification.

    python read_saycam.py videos --save-dir frames --fps 5 --seg-len 288
    python read_saycam.py --save-dir frames --locate class_0003/img_0412.jpeg S_20130417_0600_01.mp4@82.4

Input: folders of videos, read one after another, each in natural order of their names. Output: class_0000/img_0000.jpeg
and so on in --save-dir, which torchvision's ImageFolder reads; manifest.json, which records where every image comes
from; and videos.csv, a row per video; with --pack, images are in a tar per video. Frames are scaled, cropped around the
center and rotated by 180 degrees, as the head camera hangs upside down. Re-run the command to resume.
"""

import os
from fractions import Fraction
from pathlib import Path

from moco import cli, files
from moco.cli import UserError
from moco.data import manifest, recordings
from moco.videos import extract, planning, pool

# Flags that change the images: a run is resumed only with the same values.
SETTINGS = ("fps", "seg-len", "class-by", "size", "quality", "shift", "published-step", "drop-last", "recursive")
IF_GIVEN = ("whole", "recordings", "moments", "children", "select", "exclude", "list", "hours", "pack")  # since later
SWITCHES = {
    "--whole": "keep the whole frame, with a minor edge of --size pixels, not a square",
    "--published-step": "sample every (int(native) // fps + 1)-th frame, as published",
    "--drop-last": "leave out the last episode if it is shorter than --seg-len",
    "--recursive": "read videos in sub-folders too",
    "--pack": "write an uncompressed tar per video in place of a file per image",
    "--strict": "exit with status 1 if any video or frame was left out",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "data", nargs="*", metavar="FOLDER", help="folder of videos; several are read one after another"
    )
    cli.shared_flags(parser, "--save-dir", "--workers", "--seed")
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
    parser.add_argument(
        "--rotate",
        type=int,
        choices=recordings.ROTATIONS,
        default=180,
        help="degrees clockwise by which frames are rotated; a column rotate of --recordings has priority",
    )
    parser.add_argument("--no-rotate", dest="rotate", action="store_const", const=0, help="the same as --rotate 0")
    for flag, text in SWITCHES.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument(
        "--recordings",
        metavar="CSV",
        help="table of what is known of the videos: file, and any of child, date, age_months, age_days, part, rotate, "
        "and further columns; without it, SAYCam's file names are understood",
    )
    parser.add_argument(
        "--moments",
        metavar="CSV",
        help="extract the frames nearest to the moments in a table of file, seconds and, optionally, class, which "
        "become the class folders; instead of sampling at --fps",
    )
    recordings.add_flags(parser)
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    todo.add_argument("--plan", action="store_true", help="write the plan, manifest.json, and stop")
    todo.add_argument("--shard", type=cli.shard, metavar="I/N", help="read only part I of N, with I from 0 to N - 1")
    todo.add_argument(
        "--locate",
        nargs="+",
        metavar="IMAGE",
        help="print from which video, frame and second the images of --save-dir are; or, for VIDEO@SECONDS, which "
        "image is nearest to it",
    )
    todo.add_argument("--table", action="store_true", help="write frames.csv into --save-dir, a row per image")
    args = parser.parse_args(argv)
    if not (args.data or args.locate or args.table):
        parser.error("give a folder of videos")
    return args


def fraction(text):
    """A number from text like 5, 0.2 or 1/3."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def settings_of(args):
    """The flags that change the images, by name, as plain values."""
    settings = {flag: getattr(args, flag.replace("-", "_")) for flag in SETTINGS}
    settings["no-rotate"] = args.rotate == 0
    given = {flag: getattr(args, flag) for flag in IF_GIVEN}
    given["rotate"] = args.rotate if args.rotate in (90, 270) else None
    given["ages"] = args.ages and recordings.format_ages(args.ages)
    given["seed"] = args.seed if args.hours else None
    return settings | {flag: value for flag, value in given.items() if value not in (None, False)}


def look_up(args):
    """Answer --locate and --table from the manifest of --save-dir."""
    images = manifest.load(args.save_dir)
    if images is None:
        raise UserError(f"{args.save_dir} has no {manifest.NAME}; give the folder of an earlier run as --save-dir")
    if args.table:
        print(f"{len(images)} images: {recordings.write_frames_table(images)}")
        return
    for name in args.locate:
        video, at, second = name.rpartition("@")
        try:
            i = recordings.find_moment(images, video, float(second)) if at else recordings.find_image(images, name)
        except ValueError as error:
            raise UserError(f"--locate {name}: {second} is not a number of seconds") from error
        print(f"{images.path(i)}: {images.source(i)}")


def main(argv=None):
    args = parse_args(argv)
    if args.locate or args.table:
        return look_up(args)
    # So that the memory of a long video's index is returned to the system.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**22))
    settings = settings_of(args)
    roots, folder = [os.path.abspath(each) for each in args.data], Path(args.save_dir)
    table = recordings.read_table(args.recordings) if args.recordings else {}
    moments = planning.read_moments(args.moments) if args.moments else None
    selection = recordings.selection(args)
    if not args.dry_run:
        files.check_output_dir(folder)
    videos, left_out = planning.list_videos(roots, args.recursive, folder)
    videos = planning.choose(videos, table, selection, moments)
    listed = videos + left_out
    plan = extract.matching_plan(folder, settings, listed)
    with pool.WorkerPool(args.workers) as workers:
        if plan is None:
            plan = planning.make_plan(settings, roots, videos, left_out, workers, selection)
        if not args.dry_run:
            files.make_output_dir(folder)
            plan = extract.matching_plan(folder, settings, listed) or extract.write_plan(folder, plan)
        if not args.dry_run and not args.plan:
            plan = extract.read_videos(folder, plan, roots, workers, args.shard or (0, 1))
    state = ", planned; re-run without --plan, or with --shard, to extract them" if args.plan else ""
    if args.shard and not plan["complete"]:
        state = ", not all extracted yet; run the other shards"
    extract.print_summary(plan, state, with_size=args.dry_run)
    return 1 if args.strict and manifest.left_out(plan) else None


if __name__ == "__main__":
    cli.run(main)
