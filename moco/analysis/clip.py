"""A clip, the frames of a folder or a video in order, the maps of a network for them, and the film of both."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from moco import cli, distributed, files
from moco.analysis import features, film
from moco.cli import UserError
from moco.data import augment, loader
from moco.data.frame_folder import FrameFolder
from moco.networks import opening
from moco.videos import images, video
from moco.videos.probe import probe

STRIDE = 32  # pixels of the image per location of a last map
MEAN, STD = np.array(loader.MEAN), np.array(loader.STD)
MAX_NAME = 200  # bytes of a file name; file systems take 255, and temporary names are longer than final ones


def add_flags(parser, frames, batch_size):
    """Add the flags that all films share, with the default length and batch size of a script, to parser."""
    add = parser.add_argument
    add("data", help="folder of images, used in order, or a video file, sampled at --fps")
    opening.add_flags(parser)
    add("--frames", type=cli.number(int, 1), default=frames, metavar="N", help="maximum length of the film")
    add("--fps", type=cli.number(float, 0.01, 1000), default=5.0, help="frames per second")
    add(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="activations at the two ends of the color scale; default: the range over the clip",
    )
    add("--side-by-side", action="store_true", help="also show the images without colors, on the left")
    add("--name", type=film.file_name, metavar="FILE", help="name of the film in --save-dir: .mp4, .webm or .gif")
    add("--shift", type=cli.number(int, 0), default=16, help="for videos: pixels of 224 that the crop moves up")
    add("--no-rotate", action="store_true", help="for videos: do not rotate frames by 180 degrees")
    cli.shared_flags(
        parser,
        "--batch-size",
        default=batch_size,
        help=f"images per forward pass; more than {features.BATCH} are computed in parts",
    )
    cli.shared_flags(parser, "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")


def film_path(save_dir, name, data, overwrite):
    """The path of a film in save_dir, which is created. UserError if it cannot be written, or exists.

    data: the folder or video that the film shows.
    """
    if Path(name).name != str(name):
        raise UserError(f"--name {name} is not a plain file name; give the folder with --save-dir")
    if len(os.fsencode(name)) > MAX_NAME:
        raise UserError(f"--name {name} is too long for a file name; give a shorter one")
    return files.refuse_overwrite(files.make_output_dir(save_dir, [data]) / name, overwrite)


def color_range(limits):
    """limits, the (low, high) of --range or None; UserError unless they are finite and increasing."""
    if limits is not None and not (all(map(math.isfinite, limits)) and limits[0] < limits[1]):
        raise UserError(f"--range {limits[0]} {limits[1]}: give two finite numbers, the first below the second")
    return limits


@dataclass(frozen=True)
class Crop:
    """How the frames of a video are cropped to squares of size pixels, see images.crop."""

    size: int
    shift: int = 16
    rotate: bool = True


class Clip:
    """The images of a clip: each iteration over it yields (H, W, 3) uint8 RGB, all of one shape, one in memory.

    data: a folder of images, which are resized to a minor edge of crop.size pixels, or a video, which is sampled at fps
    frames per second and cropped. limit: maximum number of images. workers: threads that read images. Images that
    cannot be read are reported and left out. UserError if there is nothing to read.
    """

    def __init__(self, data, crop, limit, fps=5.0, workers=0):
        self.data = data
        self.crop = crop
        self.workers = workers
        self.bad = {}
        if not Path(data).exists():
            raise UserError(f"there is no file or folder {data}; give a video or a folder of images")
        if Path(data).is_file():
            try:
                info = probe(data)
            except video.UnreadableVideo as error:
                raise UserError(f"cannot read the video {data}: {error}") from error
            self.folder = None
            self.selection = info.select(images.sampled_frames(info, fps)[:limit])
        else:
            self.folder = FrameFolder(data)
            self.images = range(min(limit, len(self.folder)))

    def __len__(self):
        """The number of images, including those that cannot be read."""
        return len(self.selection if self.folder is None else self.images)

    def __iter__(self):
        shape = None
        for image in self._video_images() if self.folder is None else self._folder_images():
            shape = shape or image.shape
            yield image if image.shape == shape else _resize_to_cover(image, shape)

    def captions(self):
        """Where each image that could be read comes from, in words; None if no manifest records it."""
        if self.folder is None or self.folder.source(0) is None:
            return None
        return [str(self.folder.source(i)) for i in self.images if i not in self.bad]

    def _video_images(self):
        crop = self.crop
        try:
            for _, frame in video.frames(self.data, self.selection):
                image = images.crop(frame, crop.size, crop.shift, 180 if crop.rotate else 0)
                yield np.ascontiguousarray(image[:, :, ::-1])
        except video.UnreadableVideo as error:
            raise UserError(f"cannot read the video {self.data}: {error}") from error

    def _folder_images(self):
        with ThreadPoolExecutor(max(self.workers, 1)) as threads:
            for start in range(0, len(self), features.BATCH):
                for image in threads.map(self._read, self.images[start : start + features.BATCH]):
                    if image is not None:
                        yield image

    def _read(self, index):
        path = self.folder.path(index)
        try:
            image = augment.decode(self.folder.read(index))
        except (augment.BadImage, OSError) as error:
            if index not in self.bad:
                self.bad[index] = str(error)
                print(f"{path}: {error}; left out")
            return None
        height, width = image.shape[:2]
        if min(height, width) == self.crop.size:
            return image
        scale = self.crop.size / min(height, width)
        return augment.resize(image, int(width * scale + 1e-9), int(height * scale + 1e-9))


def _resize_to_cover(image, shape):
    """image resized to cover shape (H, W, 3), and center-cropped to it."""
    scale = max(shape[0] / image.shape[0], shape[1] / image.shape[1])
    height = max(round(image.shape[0] * scale), shape[0])
    width = max(round(image.shape[1] * scale), shape[1])
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return augment.resize(image, width, height)[top : top + shape[0], left : left + shape[1]]


def upsample(small, height, width, stride=STRIDE):
    """A map (h, w) at the resolution of its image, (height, width): stride pixels per location, bicubic.

    Where the map ends before the image, its edge is repeated.
    """
    large = cv2.resize(small, None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC)[:height, :width]
    missing = height - large.shape[0], width - large.shape[1]
    return cv2.copyMakeBorder(large, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE) if any(missing) else large


class ClipMaps:
    """The maps of a network for a clip, and the ranges of maps and pixels over the whole clip.

    maps: (n, h, w) float32, not upsampled. low, high: minimum and maximum of the upsampled maps. darkest, brightest:
    (3,) uint8, minimum and maximum of each color.
    """

    def __init__(self, clip, network, batch_size, device, stride=STRIDE):
        """network: images (N, 3, H, W) to maps (N, h, w) with stride pixels per location.

        UserError if no frame can be read or a map is not finite.
        """
        self.stride = stride
        parts = []
        self.low, self.high = np.inf, -np.inf
        self.darkest, self.brightest = np.full(3, 255, np.uint8), np.zeros(3, np.uint8)
        mean, std = (255 * torch.tensor([loader.MEAN, loader.STD], device=device)[:, :, None, None]).unbind()
        with cli.Progress(len(clip), "maps", "frames") as progress, distributed.no_tf32():
            for batch in _batches(clip, min(batch_size, features.BATCH)):
                images = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float().sub_(mean).div_(std)
                with torch.inference_mode():
                    maps = network(images).float().cpu().numpy()
                if not np.isfinite(maps).all():
                    raise UserError(f"the maps of {clip.data} are not finite; check the model's weights")
                large = np.stack([upsample(small, *batch.shape[1:3], stride) for small in maps])
                self.low, self.high = min(self.low, large.min()), max(self.high, large.max())
                rows = batch.reshape(-1, batch.shape[2] * 3)  # reducing long rows first is ten times faster
                self.darkest = np.minimum(self.darkest, rows.min(0).reshape(-1, 3).min(0))
                self.brightest = np.maximum(self.brightest, rows.max(0).reshape(-1, 3).max(0))
                parts.append(maps)
                progress.update(len(batch))
        if not parts:
            raise UserError(f"none of the {len(clip)} frames of {clip.data} can be read")
        self.maps = np.concatenate(parts)


def _batches(images, size):
    batch = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def film_frames(clip, clip_maps, title, low, high, side_by_side=False):
    """Yield the frames of the film: the images of clip under the colors of its ClipMaps, from low to high."""
    brightness = film.brightness(clip_maps.darkest, clip_maps.brightest, MEAN, STD)
    layout, captions = None, clip.captions()
    with cli.Progress(len(clip_maps.maps), "film", "frames") as progress:
        for i, (image, small) in enumerate(zip(clip, clip_maps.maps, strict=True)):
            height, width = image.shape[:2]
            if layout is None:
                layout = film.Layout(height, width, title, low, high, 2 if side_by_side else 1)
            if captions:
                layout.set_title(f"{title}: {captions[i]}")
            indices = film.color_indices(upsample(small, height, width, clip_maps.stride), low, high)
            overlay = film.overlay(image, indices, brightness)
            yield layout(image, overlay) if side_by_side else layout(overlay)
            progress.update()


def write_film(path, clip, clip_maps, title, fps, limits=None, side_by_side=False):
    """Write the film of a clip and its ClipMaps to path. limits: (low, high) of the colors; None: those of the clip."""
    low, high = limits or (clip_maps.low, clip_maps.high)
    film.write(path, film_frames(clip, clip_maps, title, low, high, side_by_side), fps)
    print(f"{len(clip_maps.maps)} frames, {title} from {clip_maps.low:.4g} to {clip_maps.high:.4g}: {path}")
    if clip_maps.low == clip_maps.high:
        print(f"{title} is constant over this clip, so the film has a single color")
