"""Pack a folder of images into uncompressed tars, one per video or class, or unpack them again.

    python scripts/pack_frames.py frames_S --save-dir packed_S --verify
    python scripts/pack_frames.py packed_S --save-dir frames_S --unpack

Input: a folder of frames with its manifest.json, or any folder with a folder of images per class. Output, in
--save-dir: one tar per video or, without a manifest, per class and gigabyte; manifest.json; and tars.index, which says
where each image is. All scripts read a packed folder as they read the images, with the same results to the last bit:
thousands of files in place of millions, for clusters that limit their number or are slow to open them. Re-run the
command to resume.
"""

import os
import shlex
import shutil
import sys
from contextlib import closing
from itertools import accumulate, count, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, files  # noqa: E402
from moco.cli import UserError  # noqa: E402
from moco.data import archive, manifest, packed, recordings  # noqa: E402
from moco.data.frame_folder import FrameFolder  # noqa: E402

PART_BYTES = 10**9  # a tar of a class ends with the image that reaches this size


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="folder of images; with --unpack, a packed folder")
    cli.shared_flags(parser, "--save-dir")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--verify", action="store_true", help="then read all packed images and compare them")
    task.add_argument("--unpack", action="store_true", help="write the images of a packed folder as files")
    return parser.parse_args(argv)


class Progress(cli.Progress):
    """Progress in images, with an estimate of the gigabytes that are left."""

    def __init__(self, total, description):
        super().__init__(total, description, "images")
        self._images = self._bytes = 0

    def add(self, size):
        """Count an image of size bytes."""
        self._images += 1
        self._bytes += size
        left = (self.total - self.n - 1) * self._bytes / self._images
        self.set_postfix_str(f"{left / 1e9:.1f} GB left", refresh=False)
        self.update()


def pack(data, folder):
    """Pack the images of the folder data into tars in folder. Tars that exist are complete, and are kept.

    Images that cannot be read are left out. UserError if folder has anything else than tars of these images.
    """
    frames, images = FrameFolder(data), manifest.load(data)
    if packed.is_packed(data):
        raise UserError(f"{data} is packed already; to unpack it, give --unpack")
    if packed.has_loose_images(folder):
        raise UserError(f"{folder} has folders or images; choose a new --save-dir")
    if images is not None:
        plan = manifest.read(data)
        if (manifest.read(folder) or plan) != plan:
            raise UserError(f"{folder} has the {manifest.NAME} of other frames; choose a new --save-dir")
        copy_plan(data, folder, plan)
    command = shlex.join(["python", "scripts/pack_frames.py", str(data), "--save-dir", str(folder)])
    packed.write_index(folder / packed.NAME, [], [], complete=False, command=command)
    builder = packed.IndexBuilder(images)
    with Progress(len(frames), "pack") as progress:
        for names, numbers, limit in _groups(frames, images):
            for name in names:
                tar = folder / name
                if tar.exists():
                    members = list(archive.scan(tar))
                    progress.update(len(members))
                else:
                    members = archive.write(tar, _read(frames, numbers, limit, progress))
                builder.add(name, members)
                numbers = _after(members, frames, numbers, tar)
                if not numbers:
                    break
    builder.write(folder / packed.NAME)


def copy_plan(data, folder, plan):
    """Write the plan of the folder data and the tables beside it to folder."""
    for name in (manifest.TIMES, recordings.VIDEOS_TABLE):
        if (data / name).exists():
            with files.atomic_write(folder / name) as part:
                shutil.copyfile(data / name, part)
    manifest.write(folder, plan)


def _groups(frames, images):
    """(names of its tars, range of its images, bytes that complete a tar) of each video of a manifest, or class."""
    if images is not None:
        return [([tar], numbers, float("inf")) for tar, numbers in images.tars().items()]
    edges = list(pairwise(accumulate(frames.counts, initial=0)))
    tops = [frames.relative_path(first).rpartition("/")[0].partition("/")[0] for first, _ in edges]
    tops = [top or frames.folder.resolve().name for top in tops]
    return [(_part_names(top), range(*edge), PART_BYTES) for top, edge in zip(tops, edges, strict=True)]


def _part_names(top):
    return (f"{top}-{part:04d}.tar" for part in count())


def _read(frames, numbers, limit, progress):
    """Yield (name, time of modification, bytes) of the numbered images, until they have limit bytes."""
    size = 0
    for i in numbers:
        if size >= limit:
            return
        try:
            with frames.path(i).open("rb") as file:
                content, modified = file.read(), os.fstat(file.fileno()).st_mtime
        except OSError as error:
            progress.write(f"{frames.name(i)}: {error.strerror}; left out")
            continue
        size += len(content)
        yield frames.relative_path(i), modified, content
        progress.add(len(content))


def _after(members, frames, numbers, tar):
    """The range of the numbered images after the members of a tar; UserError unless these are among them."""
    last = members[-1][0] if members else None
    for i in numbers:
        if frames.relative_path(i) == last:
            return range(i + 1, numbers.stop)
    if members:
        raise UserError(f"{tar} has other images; remove it, or choose a new --save-dir")
    return range(0)  # none can be read


def verify(data, folder):
    """UserError unless the packed folder has the images of the folder data, in order and byte for byte."""
    originals, copies = FrameFolder(data), FrameFolder(folder)
    different = [copies.path(i) for i in range(len(originals), len(copies))]
    with Progress(len(originals), "verify") as progress:
        for i in range(len(originals)):
            content = _content(originals, i)
            if i >= len(copies) or _content(copies, i) != content:
                different.append(originals.path(i))
            progress.add(len(content[1] or b""))
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
    frames, plan = FrameFolder(data), manifest.read(data)
    if not packed.is_packed(data):
        raise UserError(f"{data} has no tars to unpack")
    with Progress(len(frames), "unpack") as progress:
        for i in range(len(frames)):
            name, content = _content(frames, i)
            if not archive.is_safe_name(name):
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
            progress.add(len(content))
    if plan is not None:
        copy_plan(data, folder, plan)


def main(argv=None):
    args = parse_args(argv)
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
