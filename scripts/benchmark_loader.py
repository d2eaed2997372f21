"""Augmented images by torchvision on PIL and on tensors, by lightly and by this project's loader."""

import importlib.util
import random
from functools import partial

import numpy as np
import torch
from PIL import ImageFilter
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from moco.cli import UserError
from moco.data import augment, loader
from moco.data.frame_folder import FrameFolder
from scripts.timing import measure_in_turn

IMAGES = 1000
BATCH = 50


class PilBlur:
    """The Gaussian blur of the published recipe."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


ON_PIL = transforms.Compose([
    transforms.RandomResizedCrop(224, (0.2, 1)),
    transforms.RandomApply([transforms.ColorJitter(0.9, 0.9, 0.9, 0.5)], 0.9),
    transforms.RandomGrayscale(0.2),
    transforms.RandomApply([PilBlur()], 0.5),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize(loader.MEAN, loader.STD),
])  # fmt: skip
ON_TENSORS = v2.Compose([
    v2.ToImage(),
    v2.RandomResizedCrop(224, (0.2, 1)),
    v2.RandomApply([v2.ColorJitter(0.9, 0.9, 0.9, 0.5)], 0.9),
    v2.RandomGrayscale(0.2),
    v2.RandomApply([v2.GaussianBlur(23, (0.1, 2))], 0.5),
    v2.RandomHorizontalFlip(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(loader.MEAN, loader.STD),
])  # fmt: skip


def loading(args):
    """IMAGES augmented 224x224 images; with lightly, if it is installed, also MoCo v2's two views of half as many.

    First on one core, then with --workers. The work of the device is not included.
    """
    if args.frames is None:
        raise UserError("--frames must name a folder of frames to read, 224x224 as read_saycam.py writes them")
    torch.set_num_threads(1)
    frames = FrameFolder(args.frames)
    indices = np.arange(IMAGES) % len(frames)

    def theirs(transform, workers, n=IMAGES):
        images = datasets.ImageFolder(args.frames, transform)
        read(DataLoader(images, BATCH, sampler=indices[:n].tolist(), num_workers=workers))

    def ours(recipe, on, workers, views=1):
        images = loader.BatchDataset(frames, augment.Recipe(recipe, 224, on), 0, True, views)
        firsts = range(0, IMAGES // views, BATCH)
        parts = [(0, range(first, first + BATCH), indices[first : first + BATCH]) for first in firsts]
        read(DataLoader(images, None, sampler=parts, collate_fn=list, num_workers=workers))

    one_view = {
        "torchvision": partial(theirs, ON_PIL),
        "torchvision v2": partial(theirs, ON_TENSORS),
        "ours on worker": partial(ours, "released", "worker"),
        "ours on device": partial(ours, "released", "device"),
    }
    two_views = {
        "two views on worker": partial(ours, "moco_v2", "worker", views=2),
        "two views on device": partial(ours, "moco_v2", "device", views=2),
    }
    if importlib.util.find_spec("lightly"):
        from lightly.transforms.moco_transform import MoCoV2Transform

        lightly = partial(theirs, MoCoV2Transform(input_size=224), n=IMAGES // 2)
        two_views = {"two views by lightly": lightly} | two_views
    rows = []
    for workers in sorted({0, args.workers}):
        for contestants in (one_view, two_views):
            work = {
                f"{name}, {workers or 'no'} workers": lambda _, call=call, n=workers: call(workers=n)
                for name, call in contestants.items()
            }
            rows += measure_in_turn(work, args.runs)
    return rows


def read(batches):
    """Take all batches."""
    for _ in batches:
        pass
