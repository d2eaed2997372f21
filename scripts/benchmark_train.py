"""Training steps as scripts/benchmark.py measures them: ours beside plain float32, the images already there."""

BATCH = 16


def training(args, in_turn):
    """Three steps of 16 images at 224 pixels: MobileNetV2 as it is, ResNeXt-50 with --compile."""
    import torch

    from moco import distributed, engine, models

    place = distributed.Place(device=distributed.device("auto"))
    rows = []
    for arch, compiled in (("mobilenet_v2", False), ("resnext50_32x4d", True)):
        network = models.build(arch, 1000).to(place.device)
        plain = _steps(network, torch.randn(BATCH, 3, 224, 224, device=place.device), torch.float32)
        network = engine.prepare(models.build(arch, 1000), place, compiled)
        images = torch.randn(BATCH, 3, 224, 224, device=place.device).to(memory_format=torch.channels_last)
        dtype = engine.precision("auto", place.device, arch, compiled)
        ours = _steps(network, images, dtype, fused=True)
        for steps in (plain, ours):
            steps(None)  # compiles, and lets the libraries choose their ways
        names = f"{arch} ours", f"{arch} plain float32"
        rows += in_turn({names[0]: ours, names[1]: plain}, args.runs)
    return rows


def _steps(model, images, dtype, **options):
    """A function that takes three training steps."""
    import torch
    from torch.nn import functional

    from moco import engine

    optimizer = torch.optim.Adam(model.train().parameters(), 5e-4, **options)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def steps(folder):
        for _ in range(3):
            with engine.autocast(images.device, dtype):
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device

    return steps
