"""The part files of benchmark.py: images as files, as our tars, and the same tars through WebDataset."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from moco.data import archive, manifest, packed
from moco.data.frame_folder import FrameFolder
from scripts.timing import measure_in_turn

ROOT = Path(__file__).resolve().parents[1]
PER_VIDEO = 1440  # images: a tar has some 25 MB
BUFFER = 1000  # samples in WebDataset's shuffle buffer
DELAYED = 3000  # images that are read with the delay
MILLIONS = (1, 2, 4, 8)  # images of the folders whose memory is measured
KINDS = ("files", "tars", "WebDataset") if importlib.util.find_spec("webdataset") else ("files", "tars")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def make_plan(images):
    """The plan of a frame folder with this number of images, in classes of 288 seconds."""
    settings = {"class-by": "time", "fps": 5.0, "seg-len": 288.0, "drop-last": False}
    slots = [min(PER_VIDEO, images - first) for first in range(0, images, PER_VIDEO)]
    videos = [{"name": f"{number:06d}.mp4", "folder": 0, "slots": n} for number, n in enumerate(slots)]
    return {**manifest.make(settings, ["videos"], videos, []), "complete": True}


def write(kind, contents, n, folder):
    """Write n images, contents again and again, into folder, flushed to disk."""
    images = manifest.Manifest(make_plan(n), folder)
    builder = packed.IndexBuilder(images)
    for tar, numbers in images.tars().items():
        members = ((images.path(i), 0, contents[i % len(contents)]) for i in numbers)
        if kind == "files":
            for name, _, content in members:
                path = os.path.join(folder, name)
                try:
                    file = open(path, "wb")  # noqa: SIM115 (the folder may be missing)
                except FileNotFoundError:
                    os.makedirs(os.path.dirname(path))
                    file = open(path, "wb")  # noqa: SIM115
                with file:
                    file.write(content)
        elif kind == "tars":
            builder.add(tar, archive.write(folder / tar, members))
        else:
            import webdataset

            with webdataset.TarWriter(str(folder / tar), encoder=False) as writer:
                for name, _, content in members:
                    writer.write({"__key__": name.removesuffix(".jpeg"), "jpeg": content})
    if kind == "tars":
        builder.write(folder / packed.NAME)
    manifest.write(folder, make_plan(n))
    os.sync()


def read(kind, folder, n, order):
    """Wall and CPU seconds to read n images of folder, in a "random" order or "in order"; to "open" it, n is 0."""
    if kind == "WebDataset":
        import webdataset

    start = time.perf_counter(), time.process_time()
    if kind == "WebDataset":
        tars = [str(folder / tar) for tar in packed.list_tars(folder)]
        images = webdataset.WebDataset(tars, shardshuffle=len(tars) if order == "random" else False, seed=0)
        images = iter(images.shuffle(BUFFER, initial=BUFFER) if order == "random" else images)
        for _ in range(n):
            next(images)
    else:
        frames = FrameFolder(folder)
        indices = np.random.default_rng(0).permutation(len(frames))[:n] if order == "random" else np.arange(n)
        for i in indices.tolist():
            frames.read(i)
    return {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


def memory(folder):
    """MB that a FrameFolder takes in its process, and in a worker process that looks up 100,000 images of it."""

    def private(kind):
        return sum(map(int, re.findall(kind + r":\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text()))) / 1024

    before = private("Anonymous")
    frames = FrameFolder(folder)
    opened = private("Anonymous") - before
    pipe = os.pipe()
    if os.fork() == 0:
        before = private("Private_Dirty")
        for i in np.random.default_rng(0).integers(len(frames), size=100_000).tolist():
            frames.path(i)
        os.write(pipe[1], str(private("Private_Dirty") - before).encode())
        os._exit(0)
    os.wait()
    return {"main": round(opened, 1), "worker": round(float(os.read(pipe[0], 100)), 1)}


def elsewhere(call, slow_folder=None, library=None):
    """The result of a call of a function of this module in a new process, with its imports not counted.

    library: made of slow_files.c, delays access to files below slow_folder.
    """
    environment = {**os.environ, "SLOW_FOLDER": str(slow_folder), "LD_PRELOAD": str(library)}
    code = f"from pathlib import Path, PosixPath; from scripts.benchmark_files import *; print(json.dumps({call}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment if library else None, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compile_delay(folder):
    """Compile slow_files.c into folder; returns the library."""
    library = folder / "slow_files.so"
    source = ROOT / "scripts" / "slow_files.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def drop_caches():
    """Make the system forget what it has read from disks."""
    os.sync()
    DROP_CACHES.write_text("3")


def measure_reading(folders, images, runs, library):
    """Rows of reading by each kind: opened, warm and cold, and with a delay of 1 ms for opening files."""
    tasks = [("open", 0, False, None), ("random", images, False, None), ("in order", images, False, None)]
    if os.access(DROP_CACHES, os.W_OK):
        tasks += [("random", images, True, None), ("in order", images, True, None)]
    if library:
        few = min(images, DELAYED)
        tasks += [("open", 0, False, library), ("random", few, False, library), ("in order", few, False, library)]
    rows = []
    for order, n, cold, slow in tasks:

        def work(_, kind, order=order, n=n, cold=cold, slow=slow):
            if cold:
                drop_caches()
            return elsewhere(f"read({kind!r}, {folders[kind]!r}, {n}, {order!r})", folders[kind], slow)

        title = f"{order}{', cold' if cold else ''}{', 1 ms' if slow else ''}"
        rows += measure_in_turn({f"{title}, {kind}": partial(work, kind=kind) for kind in folders}, runs)
    return rows


def measure_memory(folder, millions):
    """{kind: {millions: MB}} of opened folders that have a manifest and an index, but no images."""
    result = {}
    for kind in ("files", "tars"):
        for n in millions:
            data = folder / f"{kind} {n}"
            data.mkdir()
            plan = make_plan(n * 10**6)
            manifest.write(data, plan)
            if kind == "tars":
                tars = list(manifest.Manifest(plan).tars())
                entries = np.arange(plan["slots"], dtype=np.uint64) % PER_VIDEO << packed.LENGTH_BITS | 40
                packed.write_index(data / packed.NAME, entries, tars)
                for tar in tars:
                    (data / tar).touch()
            result.setdefault(kind, {})[n] = elsewhere(f"memory({data!r})")
    return result


def files_and_tars(contents, images, runs):
    """Rows of writing and reading images as files, as our tars and through WebDataset; memory is printed."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = measure_in_turn({f"write, {kind}": partial(write, kind, contents, images) for kind in KINDS}, runs)
        folders = {"files": folder / "files", "tars": folder / "tars"}
        for kind, data in folders.items():
            data.mkdir()
            write(kind, contents, images, data)
            paths = [path.lstat() for path in data.rglob("*")]
            print(f"{kind}: {len(paths)} files and folders, {sum(path.st_blocks for path in paths) * 512 / 1e6:.0f} MB")
        if "WebDataset" in KINDS:
            folders["WebDataset"] = folders["tars"]
        library = compile_delay(folder) if shutil.which("cc") else None
        rows += measure_reading(folders, images, runs, library)
        rows[0]["memory_mb"] = measure_memory(folder, MILLIONS)
    for kind, each in rows[0]["memory_mb"].items():
        print(f"memory, {kind}: " + "; ".join(f"{n} million images {used}" for n, used in each.items()))
    return rows
