"""Extract frames from head-camera videos, in episodes: the classes of temporal classification.

    python read_saycam.py videos --save-dir frames --fps 5 --seg-len 288

In: folders of videos, read one after another in the order of their names. Out: class_0000/img_0000.jpeg and so on in
--save-dir, which torchvision's ImageFolder reads, and manifest.json, which says where every image came from. Frames are
scaled, cropped around the center and rotated by 180 degrees, as the head camera hangs upside down. Re-run the command
to resume.
"""

import os
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from moco import cli, files, pool
from moco.data import manifest
from moco.videos import extract, listing, video
from moco.videos.video import crop, frame_step, sampled_frames

# The flags on which the images depend: a run is resumed only with the same ones.
SETTINGS = ("fps", "seg-len", "class-by", "size", "quality", "shift")
SETTINGS += ("no-rotate", "published-step", "drop-last", "recursive")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("data", nargs="+", metavar="FOLDER", help="folder of videos; several are read in turn")
    cli.shared_flags(parser, "--save-dir", "--workers")
    number, positive = cli.number, cli.number(fraction, 1e-4, 1e7)
    parser.add_argument("--fps", type=positive, default=5.0, help="frames a second to take, such as 5 or 1/2")
    parser.add_argument("--seg-len", type=positive, default=288.0, help="length of an episode in seconds")
    parser.add_argument(
        "--class-by",
        choices=["time", "video", "name"],
        default="time",
        help="a class for each episode, each video, or each first part of a file name (up to its first underscore)",
    )
    parser.add_argument("--size", type=number(int, 8, 4096), default=224, help="side of the square images in pixels")
    parser.add_argument("--quality", type=number(int, 1, 100), default=95, help="JPEG quality")
    parser.add_argument(
        "--shift", type=number(int, 0), default=16, help="pixels of a 224-pixel image that the crop moves up"
    )
    parser.add_argument("--no-rotate", action="store_true", help="do not turn frames by 180 degrees")
    parser.add_argument(
        "--published-step", action="store_true", help="take every int(native) // fps + 1-th frame, as published"
    )
    parser.add_argument("--drop-last", action="store_true", help="leave out the last episode where it is short")
    parser.add_argument("--recursive", action="store_true", help="read videos in sub-folders too")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if any video or frame was left out")
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    todo.add_argument("--plan", action="store_true", help="write the plan, manifest.json, and stop")
    todo.add_argument("--shard", type=shard, metavar="I/N", help="read part I of N only, I from 0 to N - 1")
    return parser.parse_args(argv)


def fraction(text):
    """A number from text like 5, 0.2 or 1/3."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def shard(text):
    """(part, of how many) from I/N."""
    part, parts = (int(word) for word in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(text)
    return part, parts


def jpeg(picture, settings):
    """A video frame as the bytes of its JPEG image."""
    image = crop(picture, settings["size"], settings["shift"], not settings["no-rotate"])
    return cv2.imencode(".jpeg", image, [cv2.IMWRITE_JPEG_QUALITY, settings["quality"]])[1].tobytes()


def plan_video(settings, path):
    """The entry of a video file in the plan, a dict; or the reason why it cannot be read."""
    try:
        info = video.probe(path)
    except video.UnreadableVideo as error:
        return str(error)
    fps, published = settings["fps"], settings["published-step"]
    return {
        "width": info.width,
        "height": info.height,
        "rate": info.rate,
        "frames": info.frames,
        "step": frame_step(info.rate, fps, published) if info.is_constant_rate() else None,
        "slots": len(sampled_frames(info, fps, published)),
    }


def extract_frames(folder, plan, task, report):
    """Write the images of one video into its slots; returns (runs of slots without an image, the reason or None)."""
    path, entry = task
    settings, first = plan["settings"], entry["first_slot"]
    written, reported, reason = np.zeros(entry["slots"], bool), 0, None
    try:
        info = video.probe(path)
        indices = sampled_frames(info, settings["fps"], settings["published-step"])[: entry["slots"]]
        if (os.path.getsize(path), info.frames, len(indices)) != (entry["bytes"], entry["frames"], entry["slots"]):
            raise video.UnreadableVideo("it has changed since the plan was made")
        for position, picture in video.frames(path, indices, info):
            extract.write_image(folder / manifest.slot_path(plan, entry, first + position), jpeg(picture, settings))
            written[position] = True
            if position % 32 == 31:
                report(int(indices[position]) - reported)
                reported = int(indices[position])
    except video.UnreadableVideo as error:
        reason = str(error)
    if not written.all() and not reason:
        reason = f"{np.count_nonzero(~written)} of {len(written)} frames are damaged"
    missing = (np.flatnonzero(np.diff(written, prepend=True, append=True)) + first).reshape(-1, 2).tolist()
    extract.clear(folder, plan, entry, missing)
    report(entry["frames"] - reported)
    return missing, reason


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(0)  # the workers read videos in parallel: threads within one would compete with them
    os.environ.setdefault(
        "MALLOC_MMAP_THRESHOLD_", str(2**22)
    )  # so that the memory of a long video's index is returned to the system
    settings = {flag: getattr(args, flag.replace("-", "_")) for flag in SETTINGS}
    roots, folder = [os.path.abspath(each) for each in args.data], Path(args.save_dir)
    videos = listing.list_videos(roots, args.recursive, folder)
    plan = extract.matching_plan(folder, settings, videos)
    with pool.WorkerPool(args.workers) as workers:
        if plan is None:
            plan = extract.make_plan(roots, settings, videos, partial(plan_video, settings), workers)
        if not args.dry_run:
            files.make_output_dir(folder)
            plan = extract.matching_plan(folder, settings, videos) or extract.begin(folder, plan)
        if not args.dry_run and not args.plan:
            plan = extract.read_videos(folder, plan, roots, extract_frames, workers, args.shard or (0, 1))
    print(extract.summary(plan))
    if args.dry_run:
        print(f"expected size: {plan['slots'] * image_size(plan) / 1e9:.3g} GB")
    left_out = manifest.left_out(plan)
    for name, reason in left_out:
        print(f"left out: {listing.printable(name)}: {reason}")
    return 1 if args.strict and left_out else None


def image_size(plan, samples=8):
    """The mean size of an image in bytes, from the first frames of a few videos."""
    settings, sizes = plan["settings"], []
    for entry in plan["videos"][:: len(plan["videos"]) // samples + 1]:
        path = os.path.join(plan["folders"][entry["folder"]], entry["name"])
        with suppress(video.UnreadableVideo):  # it may be gone by now
            _, picture = next(video.frames(path, np.arange(1), video.probe(path)), (0, None))
            sizes += [] if picture is None else [len(jpeg(picture, settings))]
    return sum(sizes) / max(1, len(sizes))


if __name__ == "__main__":
    cli.run(main)
