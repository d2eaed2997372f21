"""Cut head-camera videos into frames, and the frames into episodes: the classes of temporal classification.

    python read_saycam.py videos --save-dir frames --fps 5 --seg-len 288

In: folders of videos, read one after another in the order of their names. Out: class_0000/img_0000.jpeg and so on in
--save-dir, which torchvision's ImageFolder reads, and manifest.json, which says where every image came from. Frames are
scaled, cropped around the centre and turned by 180 degrees, as the head camera hangs upside down. A run that was
interrupted goes on when started again.
"""

import os
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from moco import cli, files, folders, manifest, parallel, video

OWN_FILES = (manifest.NAME,)  # in a save folder that is a video folder too


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("data", nargs="+", metavar="FOLDER", help="folder of videos; several are read in turn")
    cli.shared_flags(parser, "--save-dir", "--workers")
    number = cli.number
    parser.add_argument("--fps", type=rate, default=5.0, help="frames a second to take; a fraction like 1/2 will do")
    parser.add_argument("--seg-len", type=number(float, 0.001), default=288.0, help="length of an episode in seconds")
    parser.add_argument(
        "--class-by",
        choices=["time", "video", "name"],
        default="time",
        help="a class for each episode, each video, or each first part of a file name (up to its first underscore)",
    )
    parser.add_argument("--size", type=number(int, 8), default=224, help="side of the square images in pixels")
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


def rate(text):
    """Frames a second from a number or a fraction."""
    value = float(Fraction(text))
    if not value > 0:
        raise ValueError(text)
    return value


def shard(text):
    """(part, of how many) from I/N."""
    part, parts = (int(word) for word in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(text)
    return part, parts


def frame_step(native, fps, published=False):
    """Every how many frames one is taken to get fps of native frames a second, both by the published rule or nearest."""
    return int(int(native) // fps) + 1 if published else max(1, round(native / fps))


def sampled_frames(held, fps, published=False):
    """Indices of the frames to take from a video, (n,) int64 rising.

    A steady video gives every frame_step-th frame. One of variable rate gives the first frame in each 1/fps seconds.
    """
    if held.is_steady():
        return np.arange(0, held.frames, frame_step(held.rate, fps, published))
    ticks = np.floor((held.times - held.times[0]) * (held.tick * fps) + 1e-6)
    return np.flatnonzero(np.diff(ticks, prepend=-1))


def crop(picture, size=224, shift=16, rotate=True):
    """A video frame, (height, width, 3) uint8, as an image of (size, size, 3).

    The minor edge is scaled to size * 256 / 224 pixels (bicubic), the centre cut out, moved up by shift pixels of a
    224-pixel image as far as the picture goes (the camera prints the time at the bottom), and turned by 180 degrees
    (the head camera hangs upside down).
    """
    height, width = picture.shape[:2]
    edge, minor = round(size * 256 / 224), min(height, width)
    width, height = width * edge // minor, height * edge // minor
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    left = (width - size) // 2
    top = min(max((height - size) // 2 - round(shift * size / 224), 0), height - size)
    picture = picture[top : top + size, left : left + size]
    return picture[::-1, ::-1] if rotate else picture


def inspect(settings, path, report):
    """What the plan says of a video file: a dict, or a string that says why it cannot be read."""
    try:
        held = video.contents(path)
    except video.UnreadableVideo as error:
        return str(error)
    taken = sampled_frames(held, settings["fps"], settings["published-step"])
    step = frame_step(held.rate, settings["fps"], settings["published-step"]) if held.is_steady() else None
    return {
        "width": held.width,
        "height": held.height,
        "rate": held.rate,
        "frames": held.frames,
        "step": step,
        "slots": len(taken),
    }


def fill(folder, plan, task, report):
    """Write the images of one video into its slots; (runs of slots that stay empty, the reason or None)."""
    path, entry = task
    first, end, settings = entry["first_slot"], entry["first_slot"] + entry["slots"], plan["settings"]
    full = np.zeros(entry["slots"], bool)
    reason, reported = None, 0
    try:
        held = video.contents(path)
        taken = sampled_frames(held, settings["fps"], settings["published-step"])[: entry["slots"]]
        if os.stat(path).st_size != entry["bytes"] or held.frames != entry["frames"] or len(taken) != entry["slots"]:
            raise video.UnreadableVideo("it has changed since the plan was made")
        for place, picture in video.frames(path, taken, held):
            image = crop(picture, settings["size"], settings["shift"], not settings["no-rotate"])
            _, jpeg = cv2.imencode(".jpeg", image, [cv2.IMWRITE_JPEG_QUALITY, settings["quality"]])
            write_image(folder / manifest.slot_path(plan, entry, first + place), jpeg)
            full[place] = True
            if place % 32 == 31:
                report(int(taken[place] - reported))
                reported = taken[place]
    except video.UnreadableVideo as error:
        reason = str(error)
    except OSError as error:
        reason = f"it cannot be reached: {error.strerror}"
    if not full.all() and not reason:
        reason = f"{np.count_nonzero(~full)} of {end - first} frames are damaged"
    report(int(entry["frames"] - reported))
    edges = np.flatnonzero(np.diff(full, prepend=True, append=True)) + first
    os.sync()  # noted as done only when its images would outlive a power cut
    return edges.reshape(-1, 2).tolist(), reason


def write_image(path, jpeg):
    """Write one image; UserError where the disk is full or may not be written to."""
    try:
        try:
            handle = open(path, "wb", buffering=0)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            handle = open(path, "wb", buffering=0)
        with handle:
            handle.write(jpeg)
    except OSError as error:
        raise cli.UserError(f"cannot write {path}: {error.strerror}; mend that and start again to go on") from error


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(0)
    plan = manifest.read(args.save_dir) or make_plan(args)
    if args.plan or args.dry_run:
        if args.plan:
            manifest.write(files.output_folder(args.save_dir), plan)
        return None
    manifest.write(files.output_folder(args.save_dir), plan)
    save_dir = Path(args.save_dir)
    done = manifest.filled(save_dir)
    part, parts = args.shard or (0, 1)
    todo = [n for n in range(len(plan["videos"])) if n % parts == part and n not in done]
    todo.sort(key=lambda n: -plan["videos"][n]["frames"])  # the longest first, so that all end together
    tasks = [(path_of(plan, plan["videos"][n]), plan["videos"][n]) for n in todo]
    head = {key: plan[key] for key in ("settings", "per_class", "class_digits", "image_digits")}
    with cli.Progress(sum(entry["frames"] for _, entry in tasks), "read", "frames") as progress:
        for number, amount, result in parallel.run(partial(fill, save_dir, head), tasks, args.workers):
            progress.update(amount)
            if result is not None:
                manifest.note(save_dir, todo[number], *result)
    done = manifest.filled(save_dir)
    if len(done) == len(plan["videos"]):
        manifest.complete(save_dir, plan, done)
    return None


def path_of(plan, entry):
    return os.path.join(plan["folders"][entry["folder"]], entry["name"])


def make_plan(args):
    """The plan for the videos there are."""
    settings = {
        name: getattr(args, name.replace("-", "_"))
        for name in ("fps", "seg-len", "class-by", "size", "quality", "shift")
        + ("no-rotate", "published-step", "drop-last", "recursive")
    }
    roots = [os.path.abspath(folder) for folder in args.data]
    found, refused = folders.video_files(roots, args.recursive, [args.save_dir])
    left_out = [{"folder": number, "name": name, "reason": reason} for number, name, reason in refused]
    paths = [os.path.join(roots[number], name) for number, name, _ in found]
    results = {}
    for number, _, result in parallel.run(partial(inspect, settings), paths, args.workers):
        results[number] = result
    videos = []
    for number, (folder, name, size) in enumerate(found):
        if isinstance(results[number], dict):
            videos.append({"folder": folder, "name": name, "bytes": size, **results[number]})
        else:
            left_out.append({"folder": folder, "name": name, "reason": results[number]})
    if not videos:
        raise cli.UserError(f"no video could be read in {', '.join(args.data)}: {Counter(map(str, left_out))}")
    return manifest.make(settings, roots, videos, left_out)


if __name__ == "__main__":
    cli.run(main)
