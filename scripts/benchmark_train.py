"""The part train of benchmark.py: training steps on images in memory, ours and in plain float32.

    python -m scripts.benchmark_train mobilenet_v2 64 ours

Arguments: method, batch size, and 'ours' or 'plain'. It prints the seconds of STEPS steps. Each measurement is a
process, because ours changes the memory management of its process.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional

from moco import builder, distributed
from moco.networks import architectures
from moco.training import engine
from scripts.timing import measure, measure_in_turn

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
METHODS = [("mobilenet_v2", 64, ""), ("resnext50_32x4d", 16, "compiled"), ("moco mobilenet_v2", 64, "")]


def training(args):
    """Steps at 224 pixels: MobileNetV2 and MoCo with MobileNetV2 without, ResNeXt-50 with --compile."""
    rows = []
    for method, batch, compiled in METHODS:
        work = {
            f"{method} {name}": lambda _, words=(method, batch, *mode): _measure_in_process(words)
            for name, mode in {"ours": ("ours", compiled), "plain float32": ("plain", "")}.items()
        }
        rows += measure_in_turn(work, args.runs)
    return rows


def _measure_in_process(words):
    """The measurement of one such process."""
    command = [sys.executable, "-m", "scripts.benchmark_train", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def make_steps(method, batch, mode, compiled):
    """A function that takes STEPS training steps."""
    context = distributed.ProcessContext(device=distributed.select_device("auto"))
    arch = method.split()[-1]
    ours = mode == "ours"
    views = 2 if method.startswith("moco") else 1
    if views == 2:
        model = builder.MoCo(
            lambda num_classes: architectures.build(arch, num_classes), K=4096, bn_splits=8 if ours else 1
        )
    else:
        model = architectures.build(arch, 1000)
    images = [torch.randn(batch, 3, 224, 224, device=context.device) for _ in range(views)]
    targets = torch.zeros(batch, dtype=torch.long, device=context.device)
    dtype = engine.resolve_dtype("auto", context.device, arch, bool(compiled)) if ours else torch.float32
    if ours:
        model = engine.prepare(model, context, dtype, bool(compiled))
        images = [view.to(memory_format=torch.channels_last) for view in images]
    else:
        model = model.to(context.device)
    optimizer = torch.optim.Adam(model.train().parameters(), 5e-4, fused=ours or None)

    def work():
        for _ in range(STEPS):
            with engine.autocast(context.device, dtype):
                logits = model(*images)
            loss = functional.cross_entropy((logits[0] if views == 2 else logits).float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device

    return work


def main(method, batch, mode, compiled=""):
    work = make_steps(method, int(batch), mode, compiled)
    for _ in range(2):  # warm-up: compilation, choice of algorithms, memory
        work()
    print(json.dumps(measure(lambda _: work(), None)))


if __name__ == "__main__":
    main(*sys.argv[1:])
