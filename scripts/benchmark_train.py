"""Training steps as scripts/benchmark.py measures them: ours beside plain float32, the images already there.

    python -m scripts.benchmark_train mobilenet_v2 64 ours

Learner, images in a batch, and ours or plain; prints the seconds that STEPS steps took. Each is a process of its own,
as ours changes how its process keeps memory.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional

from moco import builder, distributed, models
from moco.training import engine
from scripts.timing import in_turn, measure

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
LEARNERS = [("mobilenet_v2", 64, ""), ("resnext50_32x4d", 16, "compiled"), ("moco mobilenet_v2", 64, "")]


def training(args):
    """Steps at 224 pixels: MobileNetV2 and MoCo with it as they are, ResNeXt-50 with --compile."""
    rows = []
    for learner, batch, compiled in LEARNERS:
        work = {
            f"{learner} {name}": lambda _, words=(learner, batch, *way): _in_a_process(words)
            for name, way in {"ours": ("ours", compiled), "plain float32": ("plain", "")}.items()
        }
        rows += in_turn(work, args.runs)
    return rows


def _in_a_process(words):
    """What one of these processes says it took."""
    command = [sys.executable, "-m", "scripts.benchmark_train", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def steps(learner, batch, way, compiled):
    """A function that takes STEPS training steps."""
    context = distributed.ProcessContext(device=distributed.select_device("auto"))
    arch, ours = learner.split()[-1], way == "ours"
    views = 2 if learner.startswith("moco") else 1
    if views == 2:
        model = builder.MoCo(lambda num_classes: models.build(arch, num_classes), K=4096, bn_splits=8 if ours else 1)
    else:
        model = models.build(arch, 1000)
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


def main(learner, batch, way, compiled=""):
    work = steps(learner, int(batch), way, compiled)
    for _ in range(2):  # compiles, lets the libraries choose their ways, and the system find the memory
        work()
    print(json.dumps(measure(lambda _: work(), None)))


if __name__ == "__main__":
    main(*sys.argv[1:])
