"""Compare the speed of this project with plain implementations, run alternately; print medians and ratios.

    python scripts/benchmark.py all --videos videos --frames tests/golden/images --save-dir benchmark
    python scripts/benchmark.py reader --videos videos --runs 5 --save-dir benchmark
    python scripts/benchmark.py decode --frames tests/golden/images --runs 1 --save-dir benchmark
    python scripts/benchmark.py train --runs 5 --save-dir benchmark

Run it on an idle machine. Input: videos or frames, depending on the part. Output: one printed table per part with one
row per implementation, and benchmark_PART.json in --save-dir.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, files  # noqa: E402
from scripts import benchmark_files, benchmark_inside, benchmark_readers, benchmark_readouts, benchmark_train  # noqa: E402
from scripts.timing import measure_in_turn  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FILES = 100_000  # images that the part files writes


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"], metavar="PART", help=f"{', '.join(PARTS)}, or all")
    cli.shared_flags(parser, "--save-dir", "--workers")
    parser.add_argument("--runs", type=cli.number(int, 1), default=5, help="runs of each implementation")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="for reader: a folder of long landscape videos")
    add = parser.add_argument
    add(
        "--frames",
        type=Path,
        metavar="DIR",
        help="for other parts but train: a folder with a folder of 224x224 frames per class",
    )
    return parser.parse_args(argv)


def run(commands):
    """Run command lines one after another."""
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def reader(args):
    """read_saycam.py beside one process of OpenCV, as published, ffmpeg and torchcodec, if they are installed.

    Then the sampled frames of the first video alone at several rates, decoded in this process without any image.
    """
    if args.videos is None or not args.videos.is_dir():
        raise cli.UserError("--videos must name a folder of videos to read")
    videos = sorted(str(path.resolve()) for path in args.videos.iterdir() if not path.name.startswith("."))
    ours = ["read_saycam.py", str(args.videos.resolve()), "--workers", str(args.workers), "--save-dir"]
    loop = "import sys; from scripts.benchmark_readers import plain_loop; plain_loop(sys.argv[2:], sys.argv[1])"
    picture = "fps=5,scale=-1:256:flags=bicubic,crop=224:224:(iw-224)/2:0,hflip,vflip"
    ffmpeg = ["ffmpeg", "-v", "error", "-i"]
    contestants = {
        "read_saycam.py": lambda out: run([[sys.executable, *ours, str(out)]]),
        "plain OpenCV loop": lambda out: run([[sys.executable, "-c", loop, str(out), *videos]]),
        "ffmpeg command line": lambda out: run(
            [*ffmpeg, video, "-vf", picture, "-q:v", "2", str(out / f"{number}_%07d.jpeg")]
            for number, video in enumerate(videos)
        ),
    }
    if not shutil.which("ffmpeg"):
        del contestants["ffmpeg command line"]
    rows = measure_in_turn(contestants, args.runs)
    for fps in (0.2, 1, 5, 30):
        decoders = {
            f"ours, {fps} frames per second": lambda _, fps=fps: benchmark_readers.ours(videos[0], fps),
            f"torchcodec, {fps}": lambda _, fps=fps: benchmark_readers.torchcodec(videos[0], fps),
            f"OpenCV, {fps}": lambda _, fps=fps: benchmark_readers.opencv(videos[0], fps),
        }
        if not benchmark_readers.has_torchcodec():
            del decoders[f"torchcodec, {fps}"]
        rows += measure_in_turn(decoders, args.runs)
    return rows


def loading(args):
    """Augmented images by torchvision, lightly and this project's loader."""
    from scripts import benchmark_loader  # loads torchvision, which the other parts do not need

    return benchmark_loader.loading(args)


def link_frames(frames, n, folder):
    """A folder below folder with n links to the frames of another, repeated as needed, in two classes."""
    if frames is None:
        raise cli.UserError("--frames must name a folder of 224x224 frames")
    images = sorted(path.resolve() for path in frames.rglob("*.jpeg"))
    for i in range(n):
        link = folder / str(n) / f"class_{2 * i // n}" / f"img_{i:05d}.jpeg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(images[i % len(images)])
    return folder / str(n)


def peak_memory(call, *values):
    """The peak memory (MB) of a new process that calls 'module.function' of scripts with values; Linux only."""
    work = f"{call}(*{[str(value) for value in values]})"
    # The resource module would count the memory of this process too, because the new one is forked from it.
    code = f"from scripts import {call.split('.')[0]}; {work}; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) // 1024


def with_memory(rows, frames, call, small, large):
    """Rows with the peak memory of 'module.function' of scripts added to the first."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {n: link_frames(frames, n, Path(folder)) for n in (small, large)}
        rows[0]["peak_mb"] = {n: peak_memory(call, data, folder) for n, data in folders.items()}
    print("; ".join(f"memory for {n} frames: {peak} MB" for n, peak in rows[0]["peak_mb"].items()))
    return rows


def films(args):
    """A film of 300 frames, including reading, excluding the network: the map is a mean over 32x32 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        data = link_frames(args.frames, 300, Path(folder))
        work = {
            "ours": lambda out: benchmark_inside.our_film(data, out),
            "ArtistAnimation": lambda out: benchmark_inside.published_film(data, out),
        }
        return with_memory(measure_in_turn(work, args.runs), args.frames, "benchmark_inside.our_film", 100, 10_000)


def inner_features(args):
    """Units of six layers of MobileNetV2 for 96 images: in one forward pass, and in one per layer as published."""
    with tempfile.TemporaryDirectory() as folder:
        data = link_frames(args.frames, 96, Path(folder))
        work = {
            "six layers in one pass": lambda _: benchmark_inside.our_units(data),
            "one pass per layer": lambda _: benchmark_inside.a_pass_for_each(data),
        }
        return with_memory(measure_in_turn(work, args.runs), args.frames, "benchmark_inside.our_units", 96, 960)


def decoding(args):
    """Linear decoding of 2000 frames with MobileNetV2: from cached features, and with the trunk in every epoch.

    100 epochs of the latter are extrapolated from runs of 1 and 3 epochs; they would take an hour.
    """
    with tempfile.TemporaryDirectory() as folder:
        decode, data = benchmark_readouts.decode, link_frames(args.frames, 2000, Path(folder))
        work = {
            "cached features": lambda out: decode(data, out, 100, "eval", args.workers),
            "trunk, 1 epoch": lambda out: decode(data, out, 1, "train", args.workers),
            "trunk, 3 epochs": lambda out: decode(data, out, 3, "train", args.workers),
        }
        return benchmark_readouts.extrapolate(measure_in_turn(work, args.runs), 100)


def hogs(args):
    """HOG of 600 frames in one process and in --workers; peak memory of HOG and a fit of 2000, and of a plain loop."""
    calls = ("nothing", "our_hog", "plain_hog")
    with tempfile.TemporaryDirectory() as folder:
        data, more = (link_frames(args.frames, n, Path(folder)) for n in (600, 2000))
        features = benchmark_readouts.our_features
        work = {f"{n} workers": lambda out, n=n: features(data, out, n) for n in (1, args.workers)}
        rows = measure_in_turn(work, args.runs)
        rows[0]["peak_mb"] = {call: peak_memory(f"benchmark_readouts.{call}", more, folder) for call in calls}
    print("; ".join(f"memory of {call}: {peak} MB" for call, peak in rows[0]["peak_mb"].items()))
    return rows


def many_files(args):
    """FILES images as files, as tars and through WebDataset: written, opened and read, with and without delays."""
    from moco.data.frame_folder import FrameFolder

    if args.frames is None:
        raise cli.UserError("--frames must name a folder of frames to write and read")
    frames = FrameFolder(args.frames)
    return benchmark_files.files_and_tars([frames.read(i) for i in range(len(frames))], FILES, args.runs)


PARTS = {
    "reader": reader,
    "loader": loading,
    "film": films,
    "features": inner_features,
    "decode": decoding,
    "hog": hogs,
    "files": many_files,
    "train": benchmark_train.training,
}


def table(rows):
    """The rows as a text table."""
    lines = [f"{'':32}{'wall s':>10}{'CPU s':>10}{'wall ratio':>12}{'CPU ratio':>12}"]
    for row in rows:
        numbers = f"{row['seconds']:10.2f}{row['cpu_seconds']:10.2f}"
        lines.append(f"{row['name']:32}{numbers}{row['seconds_ratio']:12.2f}{row['cpu_seconds_ratio']:12.2f}")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    folder = files.make_output_dir(args.save_dir)
    for part in PARTS if args.part == "all" else [args.part]:
        rows = PARTS[part](args)
        print(f"{part}\n{table(rows)}", flush=True)
        files.write_json(folder / f"benchmark_{part}.json", rows)


if __name__ == "__main__":
    cli.run(main)
