"""Check that training and evaluation are correct and fast on the GPUs of this machine. Run it once on a new one.

    python scripts/check_gpu.py --frames frames_S --save-dir check

Input: optionally a folder of frames, for realistic loading speeds. Output: a table of what holds, what does not and
what could not be checked, and check_gpu.json. The exit status is 1 if something does not hold. It takes some minutes.
"""

import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, distributed, files  # noqa: E402
from moco.data import augment, loader  # noqa: E402
from moco.data.frame_folder import FrameFolder  # noqa: E402
from moco.networks import architectures, checkpoint  # noqa: E402
from scripts.benchmark_train import STEPS, make_steps  # noqa: E402
from scripts.check_gpu_training import ERROR, FIRST, LAST  # noqa: E402
from scripts.timing import measure  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ("temporal_classification", "moco_img", "moco_temp")
CPU_SIZE = dict(arch="mobilenet_v2", image_size=64, batch_size=16, small_batch=8, n=29)  # n: frames
GPU_SIZE = dict(arch="resnext50_32x4d", image_size=224, batch_size=256, small_batch=64, n=4094)
ERROR_SECONDS = 60  # within which an error in one process must end all
NEEDS_GPU = "needs a GPU"
MARKS = {True: "holds", False: "FAILS", None: "not checked"}


@dataclass
class Result:
    """A line of the table. holds: None if it could not be checked here."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class Setup:
    """What to check with: small on a CPU, the size of real training on a GPU."""

    device: torch.device
    frames: Path
    folder: Path
    arch: str
    image_size: int
    batch_size: int
    small_batch: int  # for many steps per epoch
    n: int

    @property
    def is_cuda(self):
        return self.device.type == "cuda"

    @property
    def processes(self):
        """The number of processes to check: one per GPU, two on a CPU."""
        return torch.cuda.device_count() if self.is_cuda else 2

    def flags(self, trainer, name, *more):
        """The flags of a trainer for one epoch in the new folder name, changed by more."""
        flags = [self.frames, "--image-size", self.image_size, "--batch-size", self.batch_size, "--epochs", 1]
        flags += ["--device", self.device.type, "--precision", "bf16", "--workers", 2 if self.is_cuda else 0]
        flags += ["--print-freq", 1000, "--lr", 1e-5, "--save-dir", self.folder / name]
        flags += ["--model", self.arch] if trainer == TRAINERS[0] else ["--arch", self.arch, "--moco-k", 1024]
        return [str(word) for word in [*flags, *more]]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.shared_flags(parser, "--save-dir", "--device", "--overwrite")
    parser.add_argument(
        "--frames", type=Path, metavar="DIR", help="folder of frames to measure loading with; synthetic if not given"
    )
    return parser.parse_args(argv)


def make_frames(folder, n, size, source=None):
    """Create a folder of n frames of four classes: links to those of another folder, or synthetic ones."""
    images = FrameFolder(source) if source else None
    random = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class_{4 * i // n:04d}" / f"img_{i:05d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if images:
            path.symlink_to(images.path(i % len(images)).resolve())
        else:
            noise = random.integers(0, 256, (8, 8, 3), np.uint8)
            cv2.imwrite(str(path), cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC))
    return folder


def run(command, **environment):
    """Run a command in the project's folder."""
    return subprocess.run(**_options(command, environment), capture_output=True)


def _options(command, environment=()):
    variables = {**os.environ, **dict(environment)}
    return dict(args=[str(word) for word in command], text=True, cwd=ROOT, env=variables)


def observe(runs, processes=0):
    """Run check_gpu_training on runs, under torchrun for several processes; returns its observations and errors."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    done = run([sys.executable, *torchrun, "-m", "scripts.check_gpu_training", json.dumps(runs)])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def last_record(folder):
    """The record of the last epoch in the log of a run."""
    return json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


# --- the checks: generators of Results


def check_versions(setup):
    """Versions of torch and driver, and kernels for the GPUs."""
    cudnn = torch.backends.cudnn.version()
    yield Result("torch", True, f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    yield Result("--device auto", True, str(distributed.select_device("auto")))
    if not setup.is_cuda:
        yield Result("kernels for the GPU", None, NEEDS_GPU)
        return
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        driver = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).stdout.split("\n")[0]
    built = re.findall(r"sm_(\d+)(\d)\b", " ".join(torch.cuda.get_arch_list()))
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        has_kernels = any(int(a) == major and int(b) <= minor for a, b in built)
        detail = f"{torch.cuda.get_device_name(number)}, sm_{major}{minor}, driver {driver}"
        yield Result(f"kernels for GPU {number}", has_kernels, detail)


def check_color(setup):
    """Color jitter and blur on the device: against the same on the CPU, and against those of the workers."""
    frames = FrameFolder(setup.frames)
    std = 255 * torch.tensor(loader.STD)[:, None, None]

    def first_batch(recipe, on, device):
        sampler = loader.EpochSampler(len(frames), 16, 0)
        batches = loader.FrameLoader(frames, augment.Recipe(recipe, setup.image_size, on), sampler, device)
        return std * next(iter(batches.epoch(0)))[0].cpu()

    cpu = torch.device("cpu")
    for recipe in ("released", "paper", "moco_v1", "moco_v2"):
        images = first_batch(recipe, "device", setup.device)
        if setup.device != cpu:
            difference = float((images - first_batch(recipe, "device", cpu)).abs().max())
            yield Result(
                f"color of {recipe}, GPU and CPU", difference <= 1, f"at most {difference:.2f} gray levels apart"
            )
        difference = float((images - first_batch(recipe, "worker", cpu)).abs().mean())
        yield Result(
            f"color of {recipe}, device and worker", difference <= 1, f"{difference:.2f} gray levels on average"
        )


def check_features(setup):
    """Features in float32 on the device against those on the CPU."""
    if setup.device.type == "cpu":
        yield Result("features, GPU and CPU", None, NEEDS_GPU)
        return
    torch.manual_seed(0)
    images = torch.randn(16, 3, setup.image_size, setup.image_size)
    for arch in ("mobilenet_v2", "resnext50_32x4d"):
        trunk = architectures.freeze(architectures.remove_head(architectures.build(arch)))
        with torch.inference_mode(), distributed.no_tf32():
            expected = trunk(images)
            difference = (trunk.to(setup.device)(images.to(setup.device)).cpu() - expected).abs().max()
        relative = float(difference / expected.abs().max())
        yield Result(f"features of {arch}, GPU and CPU", relative < 1e-4, f"relative difference {relative:.1e}")


def check_steps(setup):
    """Host syncs, precision, memory format and augmentation time in the steps of all trainers."""
    names, runs = [], []
    for trainer, on in itertools.product(TRAINERS, ("worker", "device")):
        names.append(f"{trainer}, augmentation on {on}")
        flags = setup.flags(trainer, f"steps_{trainer}_{on}", "--batch-size", setup.small_batch, "--augment-on", on)
        runs.append([trainer, flags, {"syncs": setup.is_cuda}])
    observations, errors = observe(runs)
    if len(observations) < len(runs):
        yield Result("steps of all trainers", False, errors[-300:])
        return
    for name, seen in zip(names, observations, strict=True):
        if "error" in seen:
            yield Result(f"no host sync: {name}", False, seen["error"])
            continue
        if setup.is_cuda:
            yield Result(f"no host sync: {name}", seen["steps"] >= LAST, f"steps {FIRST} to {LAST} of {seen['steps']}")
        else:
            yield Result(f"no host sync: {name}", None, NEEDS_GPU)
        yield from precision_and_layout(name, [seen])
        if seen["color_ms"]:
            yield Result(f"time: {name}", True, f"{statistics.median(seen['color_ms']):.2f} ms per batch of one view")


def precision_and_layout(name, observations):
    """Whether linear layers computed in bf16, and all convolutions got images in channels-last order."""
    dtypes = {dtype for seen in observations for dtype in seen["dtypes"]}
    layouts = {layout for seen in observations for layout in seen["channels_last"]}
    yield Result(f"bf16 logits: {name}", dtypes == {"bfloat16"}, ", ".join(dtypes))
    yield Result(f"channels last: {name}", layouts == {True}, "inputs of all convolutions")


def check_speed(setup):
    """Images per second with images on the device and from the folder, peak memory, and the gain of --compile."""
    if setup.is_cuda:
        steps = make_steps(setup.arch, setup.batch_size, "ours", "")
        steps()  # warm-up
        seconds = measure(lambda _: steps(), None)["seconds"]
        yield Result("speed, images on the device", True, f"{STEPS * setup.batch_size / seconds:.0f} images/s")
    speeds = {}
    for workers, *more in [(4,), (cli.cores(),), (cli.cores(), "--compile")] if setup.is_cuda else [(0,)]:
        name = " ".join([f"{workers} workers", *more])
        flags = setup.flags(TRAINERS[0], name, "--workers", workers, "--epochs", 3, *more)
        observations, errors = observe([[TRAINERS[0], flags, {}]])
        if not observations or "error" in observations[0]:
            yield Result(f"speed, {name}", False, observations[0]["error"] if observations else errors[-300:])
            continue
        (seen,) = observations
        record = last_record(setup.folder / name)
        speeds[name] = record["images_per_second"]
        memory = f", peak memory {seen['peak_gib']:.1f} GiB" if seen["peak_gib"] else ""
        detail = f"{speeds[name]:.0f} images/s, {record['waiting']:.0%} waiting for data{memory}"
        if more:
            detail += f", {seen['graphs']} compilations"
        yield Result(f"speed, {name}", not more or seen["graphs"] <= 2, detail)
    if not setup.is_cuda:
        yield Result("speed, images on the device, and --compile", None, NEEDS_GPU)


def check_resume(setup):
    """A stop signal saves, the resumed run equals an uninterrupted one, and its checkpoint opens without a GPU."""
    script = [sys.executable, "temporal_classification.py"]
    more = ["--deterministic", "--epochs", 2, "--print-freq", 1, "--batch-size", setup.small_batch]
    full, cut = ([*script, *setup.flags(TRAINERS[0], name, *more)] for name in ("full", "cut"))
    done = run(full)
    if done.returncode:
        yield Result("training with --deterministic", False, done.stderr[-300:])
        return
    process = subprocess.Popen(**_options(cut), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = setup.folder / "cut" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)
    errors = process.communicate()[1]
    yield Result("SIGUSR2 saves and ends a run", process.returncode == 75, errors[-300:] or "status 75")
    run([*cut, "--resume"])
    before, after = (checkpoint.read(setup.folder / name / "last.tar") for name in ("full", "cut"))
    keys = ("model_state_dict", "optimizer_state_dict")
    equal = all(_is_equal(before[key], after[key]) for key in keys) and before["epoch"] == after["epoch"]
    yield Result("resume with --deterministic is bitwise equal", equal, "network and optimizer")
    code = (
        "import torch; assert not torch.cuda.is_available(); torch.load(__import__('sys').argv[1], weights_only=True)"
    )
    done = run([sys.executable, "-c", code, setup.folder / "full" / "last.tar"], CUDA_VISIBLE_DEVICES="")
    yield Result(
        "a checkpoint opens without a GPU", done.returncode == 0, done.stderr[-300:] or "torch.load as published"
    )


def _is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_processes(setup):
    """Several processes have equal weights, see every image once, and end together after an error."""
    if setup.processes < 2:
        yield Result("several processes", None, "needs several GPUs")
        return
    n = setup.processes
    batch_size = setup.small_batch * n
    more = ["--batch-size", batch_size]
    left_out = {"temporal_classification": setup.n % n, "moco_img": setup.n % batch_size}  # of the last batch
    for trainer in left_out if setup.is_cuda else ["moco_img"]:
        observations, errors = observe([[trainer, setup.flags(trainer, f"processes_{trainer}", *more), {}]], n)
        name = f"{trainer}, {n} processes"
        if len(observations) < n or any("error" in seen for seen in observations):
            yield Result(f"training: {name}", False, errors[-300:])
            return
        yield Result(f"equal weights: {name}", len({seen["weights"] for seen in observations}) == 1, "of all processes")
        yield from precision_and_layout(name, observations)
        images = last_record(setup.folder / f"processes_{trainer}")["images"]
        yield Result(f"every image once: {name}", images == setup.n - left_out[trainer], f"{images} images")
    flags = setup.flags(TRAINERS[0], "error", *more)
    start = time.monotonic()
    observations, errors = observe([[TRAINERS[0], flags, {"failing_rank": n - 1}]], n)
    seconds = time.monotonic() - start
    holds = not observations and ERROR in errors and seconds < ERROR_SECONDS
    yield Result("an error in one process ends all, with its message", holds, f"{seconds:.0f} s, start included")
    if setup.is_cuda:
        observations, errors = observe([["collectives", [setup.device.type], {}]], n)
        for name in ("all_reduce_ms", "all_gather_ms"):
            detail = f"{observations[0][name]:.1f} ms for 128 MiB" if observations else errors[-300:]
            yield Result(name.removesuffix("_ms"), bool(observations), detail)


CHECKS = (check_versions, check_color, check_features, check_steps, check_speed, check_resume, check_processes)


def table(results):
    """The results as text, in three columns."""
    width = max(len(result.name) for result in results)
    return "\n".join(f"{result.name:{width}}  {MARKS[result.holds]:11}  {result.detail}" for result in results)


def main(argv=None):
    args = parse_args(argv)
    path = files.refuse_overwrite(files.make_output_dir(args.save_dir) / "check_gpu.json", args.overwrite)
    device = distributed.select_device(args.device)
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    results = []
    with tempfile.TemporaryDirectory() as folder:
        frames = make_frames(Path(folder) / "frames", size["n"], size["image_size"], args.frames)
        setup = Setup(device, frames, Path(folder), **size)
        for check in CHECKS:
            print(f"{check.__doc__.splitlines()[0]} ...", flush=True)
            try:
                results += check(setup)
            except Exception as error:  # one fault must not hide the others
                results.append(Result(check.__name__, False, f"{type(error).__name__}: {error}"))
    print(table(results))
    files.write_json(path, [asdict(result) for result in results])
    return int(any(result.holds is False for result in results))


if __name__ == "__main__":
    cli.run(main)
