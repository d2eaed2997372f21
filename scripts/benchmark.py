"""Measure how fast this project is beside plain ways of doing the same, run in turn, and print medians and ratios.

    python scripts/benchmark.py reader --videos videos --runs 5 --save-dir benchmark

A part is a function of the arguments that gives the rows of one table; each row is one contestant. The machine should
have nothing else to do. In: what the part works on. Out: the table, and benchmark_PART.json in --save-dir.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, files  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=list(PARTS), help="what to measure")
    cli.shared_flags(parser, "--save-dir", "--workers")
    parser.add_argument("--runs", type=cli.number(int, 1), default=5, help="runs of each contestant, in turn")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="reader: a folder of landscape videos, long ones")
    return parser.parse_args(argv)


def in_turn(contestants, runs):
    """Rows of medians over runs of each contestant, a row each: the first is what the others are compared with.

    contestants: {name: function of a fresh folder, giving command lines to run in it}.
    """
    measured = {name: [] for name in contestants}
    for _ in range(runs):
        for name, commands in contestants.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(measure(commands(Path(folder))))
    rows, first = [], next(iter(measured.values()))
    for name, times in measured.items():
        row = {"name": name, "runs": times}
        for key in ("seconds", "cpu_seconds"):
            row[key] = statistics.median(run[key] for run in times)
            row[f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in zip(times, first, strict=True))
        rows.append(row)
    return rows


def measure(commands):
    """Wall and CPU seconds of commands run one after another, with all their processes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def reader(args):
    """read_saycam.py beside one process of OpenCV, as published, and the ffmpeg command line where it is installed."""
    if args.videos is None or not args.videos.is_dir():
        raise cli.UserError("--videos must name a folder of videos to read")
    videos = sorted(str(path.resolve()) for path in args.videos.iterdir() if not path.name.startswith("."))
    ours = ["read_saycam.py", str(args.videos.resolve()), "--workers", str(args.workers), "--save-dir"]
    loop = "import sys; from scripts.benchmark import plain_loop; plain_loop(sys.argv[2:], sys.argv[1])"
    picture = "fps=5,scale=-1:256:flags=bicubic,crop=224:224:(iw-224)/2:0,hflip,vflip"
    ffmpeg = ["ffmpeg", "-v", "error", "-i"]
    contestants = {
        "read_saycam.py": lambda out: [[sys.executable, *ours, str(out)]],
        "plain OpenCV loop": lambda out: [[sys.executable, "-c", loop, str(out), *videos]],
        "ffmpeg command line": lambda out: [
            [*ffmpeg, video, "-vf", picture, "-q:v", "2", str(out / f"{number}_%07d.jpeg")]
            for number, video in enumerate(videos)
        ],
    }
    if not shutil.which("ffmpeg"):
        del contestants["ffmpeg command line"]
    return in_turn(contestants, args.runs)


def plain_loop(videos, folder, step=6):
    """Read every frame of one video after another in one process; write each step-th as an image, as published."""
    import cv2

    count = 0
    for name in videos:
        video, number = cv2.VideoCapture(name), 0
        while True:
            there, frame = video.read()
            if not there:
                break
            if number % step == 0:
                frame = cv2.resize(frame, (frame.shape[1] * 256 // frame.shape[0], 256), interpolation=cv2.INTER_CUBIC)
                left = (frame.shape[1] - 224) // 2
                cv2.imwrite(f"{folder}/img_{count:07d}.jpeg", frame[:224, left : left + 224][::-1, ::-1])
                count += 1
            number += 1


PARTS = {"reader": reader}


def table(rows):
    """Rows as lines of text."""
    lines = [f"{'':24}{'wall s':>10}{'CPU s':>10}{'wall ratio':>12}{'CPU ratio':>12}"]
    for row in rows:
        numbers = f"{row['seconds']:10.2f}{row['cpu_seconds']:10.2f}"
        lines.append(f"{row['name']:24}{numbers}{row['seconds_ratio']:12.2f}{row['cpu_seconds_ratio']:12.2f}")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    rows = PARTS[args.part](args)
    print(table(rows))
    path = files.output_folder(args.save_dir) / f"benchmark_{args.part}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    cli.run(main)
