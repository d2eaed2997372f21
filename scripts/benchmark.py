"""Compare the speed of this project with a plain way of doing the same, on an idle machine.

    python scripts/benchmark.py reader videos
    python scripts/benchmark.py loader --workers 0
    python scripts/benchmark.py train --arch mobilenet_v2 --batch-size 64 --images 256
    python scripts/benchmark.py train --trainer moco_img --device cuda --images 20000 --compile

All implementations take turns, each run in a process of its own. Output: a line for each run, then medians of images
per second and of the ratio to the first; for training also the share of time spent waiting for data, and peak memory.
"""

import importlib
import itertools
import json
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ImageFilter
from torch.nn import functional
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from moco import cli, distributed  # noqa: E402
from moco.builder import MoCo  # noqa: E402
from moco.data import augment, loader  # noqa: E402
from moco.data.folders import FrameFolder  # noqa: E402
from moco.networks import architectures  # noqa: E402

FPS = 5  # read_saycam.py's default
ARCH_FLAGS = {"temporal_classification": "--model", "moco_img": "--arch"}
read_epoch = loader.FrameLoader.epoch


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("part", choices=PARTS, help="what to measure")
    add("data", nargs="?", type=Path, metavar="FOLDER", help="for reader: long landscape videos; else: frames")
    add("--images", type=cli.number(int, 1), default=1000, help="frames to make up for loader and train, if none given")
    add("--trainer", choices=ARCH_FLAGS, default="temporal_classification", help="for train: the script")
    add("--arch", type=architectures.arch_name, default="resnext50_32x4d", help="for train: the architecture")
    add("--compile", action="store_true", help="for train: also with --compile")
    add("--workers", type=cli.number(int, 0), nargs="+", metavar="N", help="default: all cores; --device cuda: also 4")
    add("--runs", type=cli.number(int, 1), default=5, help="runs of each implementation")
    cli.shared_flags(parser, "--batch-size", "--device")
    args = parser.parse_args(argv)
    args.workers = args.workers or sorted({cli.cores(), 4 if args.device == "cuda" else cli.cores()})
    if args.part == "reader" and not args.data:
        parser.error("reader needs a folder of videos")
    return args


# --- reader


def reader(args):
    """read_saycam.py with the start of Python, and the same work in one process without."""
    ours = {f"ours, {n} workers": partial(read_saycam, args.data, n) for n in args.workers}
    return {"OpenCV, one process": partial(plain_reader, args.data)} | ours


def plain_reader(videos):
    """Decode all frames of all videos, and scale, crop, rotate and write those sampled; returns their number."""
    count = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(videos.iterdir()):
            video = cv2.VideoCapture(str(path))
            step = max(1, round(video.get(cv2.CAP_PROP_FPS) / FPS))
            for number in itertools.count():
                is_read, frame = video.read()
                if not is_read:
                    break
                if number % step == 0:
                    width = frame.shape[1] * 256 // frame.shape[0]
                    left = (width - 224) // 2
                    frame = cv2.resize(frame, (width, 256), interpolation=cv2.INTER_CUBIC)[:224, left : left + 224]
                    cv2.imwrite(f"{folder}/img_{next(count):07d}.jpeg", frame[::-1, ::-1])
    return next(count)


def read_saycam(videos, workers):
    """Run read_saycam.py; returns the number of images."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [videos, "--workers", str(workers), "--save-dir", folder]
        subprocess.run([sys.executable, ROOT / "read_saycam.py", *flags], check=True, stdout=subprocess.DEVNULL)
        return sum(1 for _ in Path(folder).glob("*/*.jpeg"))


# --- loader


def loading(args):
    """Batches of the recipe "released" as normalized float32, in main memory."""
    return {
        f"{name}, {workers} workers": partial(load, args.data, args.batch_size, workers)
        for workers in args.workers
        for name, load in {"torchvision on PIL": torchvision_loader, "ours": frame_loader}.items()
    }


def pil_blur(image):
    """The Gaussian blur of the published recipe."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def torchvision_loader(folder, batch_size, workers):
    """Load a folder as published; returns the number of images."""
    torch.set_num_threads(1)
    steps = [transforms.RandomResizedCrop(224, (0.2, 1))]
    steps += [transforms.RandomApply([transforms.ColorJitter(0.9, 0.9, 0.9, 0.5)], 0.9)]
    steps += [transforms.RandomGrayscale(0.2), transforms.RandomApply([pil_blur], 0.5)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(loader.MEAN, loader.STD)]
    images = datasets.ImageFolder(folder, transforms.Compose(steps))
    batches = torch.utils.data.DataLoader(images, batch_size, shuffle=True, num_workers=workers)
    return sum(len(targets) for _, targets in batches)


def frame_loader(folder, batch_size, workers):
    """The same with FrameLoader."""
    torch.set_num_threads(1)
    frames = FrameFolder(folder)
    sampler = loader.EpochSampler(len(frames), batch_size)
    batches = loader.FrameLoader(frames, augment.RECIPES["released"], 224, sampler, "cpu", workers)
    return sum(len(targets) for _, targets, _ in batches.epoch(0))


# --- train


def training(args):
    """The second epoch of a trainer, on one batch that stays on the device and on a folder; and a textbook loop."""
    implementations = {"plain float32, one batch": partial(plain_training, args)}
    for flag in ("", " --compile") if args.compile else ("",):
        implementations[f"one batch{flag}"] = partial(run_trainer, args, 0, flag, same_batch)
        for workers in args.workers:
            implementations[f"folder, {workers} workers{flag}"] = partial(run_trainer, args, workers, flag, read_epoch)
    return implementations


def plain_training(args):
    """Steps of a textbook loop in float32, after three of warm-up."""
    device, is_moco = distributed.select_device(args.device), args.trainer == "moco_img"
    model = MoCo(lambda num_classes: architectures.build(args.arch, num_classes)) if is_moco else None
    model = model or architectures.build(args.arch, 1000)
    optimizer = torch.optim.Adam(model.to(device).parameters(), 1e-5)
    views = torch.randn(1 + is_moco, args.batch_size, 3, 224, 224, device=device)
    targets = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    steps = max(1, args.images // args.batch_size)
    for step in range(-3, steps):
        if step == 0:
            start = time.perf_counter()
        output = model(*views)
        loss = functional.cross_entropy(*(output if is_moco else (output, targets)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
    return {"images/s": steps * args.batch_size / (time.perf_counter() - start)}


def same_batch(batches, epoch, start=0):
    """An epoch of a FrameLoader in which the first batch of the first one is repeated."""
    if epoch == 0:
        batches.first = next(read_epoch(batches, 0))
    return itertools.repeat(batches.first, len(batches))


def run_trainer(args, workers, flag, epoch):
    """Train for two epochs, with the function epoch in place of FrameLoader.epoch; the numbers of the second one."""
    loader.FrameLoader.epoch = epoch
    with tempfile.TemporaryDirectory() as folder:
        flags = [args.data, ARCH_FLAGS[args.trainer], args.arch, "--batch-size", args.batch_size, "--epochs", 2]
        flags += ["--device", args.device, "--processes-per-node", 1, "--workers", workers, "--save-dir", folder]
        flags += ["--lr", 1e-5, *flag.split()]  # so that the loss of made-up frames remains finite
        importlib.import_module(args.trainer).main([str(word) for word in flags])
        record = json.loads(Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"images/s": record["images_per_second"], "waiting": record["waiting"]}


# --- measuring

PARTS = {"reader": reader, "loader": loading, "train": training}


def measure(work):
    """Images per second of work(), which returns the number of images; or its own numbers, and the peak memory."""
    start = time.perf_counter()
    result = work()
    if not isinstance(result, dict):
        return {"images/s": result / (time.perf_counter() - start)}
    used = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result | {"GiB": used / 2**30}


def measure_in_turn(implementations, runs):
    """{name: the numbers of each run} of implementations {name: function}."""
    results = {name: [] for name in implementations}
    start_method = (multiprocessing.get_start_method(), True)  # of loader workers, which else would be spawned, too
    new_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    for _ in range(runs):
        for name, work in implementations.items():
            with new_process(multiprocessing.set_start_method, start_method) as process:
                results[name].append(process.submit(measure, work).result())
            show(name, results[name][-1])
    return results


def medians(results):
    """{name: medians over the runs}, with the ratio to the first one in the same turn, as load varies between turns."""
    first = next(iter(results.values()))
    for runs in results.values():
        for run, reference in zip(runs, first, strict=True):
            run["ratio"] = run["images/s"] / reference["images/s"]
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }


def show(name, numbers):
    """Print a line of numbers {key: value}."""
    print(f"{name:32}", *(f"{key} {value:<8.4g}" for key, value in numbers.items()), flush=True)


def write_frames(folder, n):
    """Write n made-up 224x224 JPEGs of the usual size, 18 kB, in four classes."""
    noise = np.random.default_rng(0).integers(0, 256, (min(n, 500), 20, 20, 3), np.uint8)
    pictures = [cv2.resize(each, (224, 224), interpolation=cv2.INTER_CUBIC) for each in noise]
    contents = [cv2.imencode(".jpeg", picture)[1].tobytes() for picture in pictures]
    for i in range(n):
        path = folder / f"class_{4 * i // n:04d}" / f"img_{i:05d}.jpeg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents[i % len(contents)])
    return folder


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            args.data = write_frames(Path(folder), args.images)
        rows = medians(measure_in_turn(PARTS[args.part](args), args.runs))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cli.cores()} CPU cores"
    print(f"{args.part} on {device}, torch {torch.__version__}, medians of {args.runs} runs")
    for name, numbers in rows.items():
        show(name, numbers)


if __name__ == "__main__":
    cli.run(main)
