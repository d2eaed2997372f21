"""Pack a folder of images into uncompressed tars, one per video or class, or unpack them again.

    python scripts/pack_frames.py frames_S --save-dir packed_S --verify

Input: a folder of frames with its manifest.json, or any folder with a folder of images per class. Output, in
--save-dir: a tar per video or class; manifest.json; and tars.index, which says where each image is. All scripts read a
packed folder as they read the images, with the same results to the last bit: thousands of files in place of millions,
for clusters that limit their number or are slow to open them. Re-run the command to resume.
"""

import shlex
import shutil
import sys
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, files  # noqa: E402
from moco.cli import UserError  # noqa: E402
from moco.data import augment, manifest, recordings, tars  # noqa: E402
from moco.data.folders import FrameFolder  # noqa: E402


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="folder of images, or packed folder")
    cli.shared_flags(parser, "--save-dir")
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--verify",
        action="store_true",
        help="then read all packed images and compare them; with a packed FOLDER, only decode its images",
    )
    task.add_argument("--unpack", action="store_true", help="write the images of a packed folder as files")
    return parser.parse_args(argv)


def pack(data, folder):
    """Pack the images of the folder data into tars in folder. Tars that exist are complete, and are kept.

    Images that cannot be read are left out. UserError if folder has anything else than tars of these images.
    """
    frames, plan = FrameFolder(data), manifest.read(data)
    if tars.is_packed(data):
        raise UserError(f"{data} is packed already; to unpack it, give --unpack")
    own = dict(groups(frames))
    if tars.has_loose_images(folder):
        raise UserError(f"{folder} has folders or images; choose a new --save-dir")
    if others := sorted(set(tars.list_tars(folder)) - own.keys()):
        raise UserError(f"{folder} has {others[0]}, which is none of the tars of {data}; choose a new --save-dir")
    if plan is not None and (manifest.read(folder) or plan) != plan:
        raise UserError(f"{folder} has the {manifest.NAME} of other frames; choose a new --save-dir")
    copy_plan(data, folder)
    tars.mark_incomplete(folder, shlex.join(["python", "scripts/pack_frames.py", str(data), "--save-dir", str(folder)]))
    with cli.Progress(len(frames), "pack", "images") as progress:
        for name, numbers in own.items():
            if not (folder / name).exists():
                tars.write(folder / name, _read(frames, numbers, progress))
            elif tars.scan(folder / name)[0].keys() <= {frames.relative_path(i) for i in numbers}:
                progress.update(len(numbers))
            else:
                raise UserError(f"{folder / name} has other images; remove it, or choose a new --save-dir")
    (folder / tars.INDEX).unlink()
    dots = sum(Path(frames.relative_path(i)).stem.count(".") > 0 for i in range(len(frames)))
    if dots:
        print(f"note: {dots} names have several dots; WebDataset takes what follows the first one for the file type")


def copy_plan(data, folder):
    """Copy the plan of the folder data, if it has one, and the tables beside it to folder."""
    for name in (manifest.TIMES, recordings.VIDEOS_TABLE, manifest.NAME):
        if (data / manifest.NAME).exists() and (data / name).exists():
            with files.atomic_write(folder / name) as part:
                shutil.copyfile(data / name, part)


def groups(frames):
    """(name of its tar, range of its images) for each video of a manifest or, without one, for each class."""
    images = manifest.load(frames.folder)
    if images is not None:
        return images.tars().items()
    ranges = [range(*edges) for edges in pairwise(accumulate(frames.counts, initial=0))]
    tops = [frames.relative_path(own[0]).rpartition("/")[0].partition("/")[0] for own in ranges]
    return zip(manifest.tar_names([top or frames.folder.resolve().name for top in tops]), ranges, strict=True)


def _read(frames, numbers, progress):
    """Yield (name, time of modification, bytes) of the numbered images."""
    for i in numbers:
        try:
            content, modified = frames.read(i), frames.path(i).stat().st_mtime
        except OSError as error:
            progress.write(f"{frames.name(i)}: {error.strerror}; left out")
            continue
        yield frames.relative_path(i), modified, content
        progress.update()


def check(folder):
    """UserError unless every image of a packed folder can be read and decoded."""
    frames, bad = FrameFolder(folder), []
    with cli.Progress(len(frames), "verify", "images") as progress:
        for i in range(len(frames)):
            try:
                augment.decode(frames.read(i))
            except (augment.BadImage, OSError) as error:
                bad.append(f"{frames.path(i)} ({error})")
            progress.update()
    if bad:
        raise UserError(f"{len(bad)} of {len(frames)} images cannot be decoded, the first is {bad[0]}")
    print(f"{folder} has {len(frames)} images, which can all be decoded")


def verify(data, folder):
    """UserError unless the packed folder has the images of the folder data, in order and byte for byte."""
    originals, copies = FrameFolder(data), FrameFolder(folder)
    different = [copies.path(i) for i in range(len(originals), len(copies))]
    with cli.Progress(len(originals), "verify", "images") as progress:
        for i in range(len(originals)):
            content = _content(originals, i)
            if i >= len(copies) or _content(copies, i) != content:
                different.append(originals.path(i))
            progress.update()
    if different:
        raise UserError(
            f"{len(different)} images differ between {data} and {folder}, the first is {different[0]}; remove its tar "
            "and run the command again"
        )


def _content(frames, i):
    """(name, bytes) of image i; None for the bytes if they cannot be read."""
    try:
        return frames.relative_path(i), frames.read(i)
    except OSError:
        return frames.relative_path(i), None


def unpack(data, folder):
    """Write the images of the packed folder data as files into folder.

    Files that exist must be complete or, after a kill, the beginning of the image; else a UserError is raised.
    """
    if not tars.is_packed(data):
        raise UserError(f"{data} has no tars to unpack")
    frames = FrameFolder(data)
    with cli.Progress(len(frames), "unpack", "images") as progress:
        for i in range(len(frames)):
            name, content = _content(frames, i)
            if not tars.is_safe_name(name):
                raise UserError(f"{frames.path(i)} would be outside of {folder}; remove it from {data}")
            if content is None:
                progress.write(f"{frames.path(i)}: cannot be read; left out")
                continue
            path = folder / name
            present = path.read_bytes() if path.exists() else None
            if present is not None and not content.startswith(present):
                raise UserError(f"{path} exists and is another file; choose a new --save-dir")
            if present != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            progress.update()
    copy_plan(data, folder)


def main(argv=None):
    args = parse_args(argv)
    if args.verify and args.data.is_dir() and tars.is_packed(args.data):
        return check(args.data)
    folder = files.make_output_dir(args.save_dir, [args.data])
    with closing(files.lock(folder)):
        files.remove_temporary_files(folder)
        if args.unpack:
            unpack(args.data, folder)
        else:
            pack(args.data, folder)
        if args.verify:
            verify(args.data, folder)
        equal = f", byte for byte those of {args.data}" if args.verify else ""
        print(f"{folder} has {len(FrameFolder(folder))} images{equal}")


if __name__ == "__main__":
    cli.run(main)
