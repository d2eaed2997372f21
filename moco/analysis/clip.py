"""A clip: the frames of a folder or a video in their order, the map a network makes of each, and the film of both."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from moco import checkpoint, cli, distributed, files
from moco.analysis import features, film
from moco.cli import UserError
from moco.data import augment, loader
from moco.videos import video

STRIDE = 32  # pixels of the image to one place of a last map
MEAN, STD = np.array(loader.MEAN), np.array(loader.STD)


def add_flags(parser):
    """Add the flags that both films have, but for what is shown; a script sets frames and batch_size."""
    add = parser.add_argument
    add("data", help="folder of images, taken in their order, or a video file, sampled at --fps")
    checkpoint.add_flags(parser)
    add("--frames", type=cli.number(int, 1), metavar="N", help="length of the film at most")
    add("--fps", type=cli.number(float, 0.01), default=5.0, help="pictures a second; 5 shows each for 200 ms")
    add("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="ends of the colors; default: those of the clip")
    add("--side-by-side", action="store_true", help="also show the picture without colors, on the left")
    add("--name", type=film.name, metavar="FILE", help="name of the film in --save-dir: .mp4, .webm or .gif")
    add("--shift", type=cli.number(int, 0), default=16, help="of a video: pixels of 224 that the crop moves up")
    add("--no-rotate", action="store_true", help="of a video: do not turn frames by 180 degrees")
    cli.shared_flags(parser, "--batch-size", help=f"images a forward pass, {features.BATCH} at most")
    cli.shared_flags(parser, "--image-size", "--workers")
    cli.shared_flags(parser, "--save-dir", "--seed", "--device", "--overwrite")


class Clip:
    """The pictures of a clip: every time it is iterated over, (H, W, 3) uint8 RGB, all of one size; one in memory.

    data: a folder of images, whose minor edge is made size pixels, or a video, of which fps frames a second are cut to
    size x size and turned as read_saycam.py does, with its shift and rotate. limit: the most pictures. An image that
    cannot be read is named and left out. UserError where there is nothing to read.
    """

    def __init__(self, data, size, limit, fps, shift, rotate, workers):
        self.data, self.size, self.workers, self.bad = data, size, workers, {}
        self.crop = dict(size=size, shift=shift, rotate=rotate)
        if Path(data).is_file():
            try:
                self.held = video.probe(data)
            except video.UnreadableVideo as error:
                raise UserError(f"cannot read the video {data}: {error}") from error
            self.frames, self.wanted = None, video.sampled_frames(self.held, fps)[:limit]
        else:
            self.frames = loader.FrameFolder(data)
            self.wanted = np.arange(min(limit, len(self.frames)))

    def __len__(self):
        """The number of pictures, those that cannot be read included."""
        return len(self.wanted)

    def __iter__(self):
        shape = None
        for picture in self._of_video() if self.frames is None else self._of_folder():
            shape = shape or picture.shape
            yield picture if picture.shape == shape else _covering(picture, shape)

    def _of_video(self):
        try:
            for place, picture in video.frames(self.data, self.wanted, self.held):
                yield np.ascontiguousarray(video.crop(picture, **self.crop)[:, :, ::-1])
                if place == len(self.wanted) - 1:
                    return
        except video.UnreadableVideo as error:
            raise UserError(f"cannot read the video {self.data}: {error}") from error

    def _of_folder(self):
        with ThreadPoolExecutor(max(self.workers, 1)) as threads:
            for part in np.split(self.wanted, range(features.BATCH, len(self.wanted), features.BATCH)):
                for picture in threads.map(self._image, part):
                    if picture is not None:
                        yield picture

    def _image(self, index):
        path = self.frames.path(index)
        try:
            picture = augment.decode(path.read_bytes())
        except (augment.BadImage, OSError) as error:
            if index not in self.bad:
                self.bad[index] = str(error)
                print(f"{path}: {error}; left out")
            return None
        height, width = picture.shape[:2]
        if min(height, width) == self.size:
            return picture
        scale = self.size / min(height, width)
        return augment.resize(picture, int(width * scale + 1e-9), int(height * scale + 1e-9))


def _covering(picture, shape):
    """picture scaled to cover shape (H, W, 3), and its middle cut out."""
    scale = max(shape[0] / picture.shape[0], shape[1] / picture.shape[1])
    height, width = (max(round(side * scale), least) for side, least in zip(picture.shape[:2], shape[:2], strict=True))
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return augment.resize(picture, width, height)[top : top + shape[0], left : left + shape[1]]


def upsampled(small, height, width):
    """A map (h, w) at the scale of its picture, (height, width): each place made STRIDE pixels wide, bicubic."""
    large = cv2.resize(small, None, fx=STRIDE, fy=STRIDE, interpolation=cv2.INTER_CUBIC)
    return large[:height, :width]


class Look:
    """What a network makes of a clip: its small maps, and over the whole clip the extremes of maps and of pixels.

    maps: (n, h, w) float32, 0.2 kB a picture. low, high: of the maps once upsampled. darkest, brightest: (3,) uint8.
    """

    def __init__(self, clip, network, batch_size, device):
        """network: images (N, 3, H, W) to maps (N, h, w). UserError where no frame can be read, a map is not finite."""
        maps, self.low, self.high = [], np.inf, -np.inf
        self.darkest, self.brightest = np.full(3, 255, np.uint8), np.zeros(3, np.uint8)
        mean, std = (255 * torch.tensor([loader.MEAN, loader.STD], device=device)[:, :, None, None]).unbind()
        with cli.Progress(len(clip), "maps", "frames") as progress, distributed.no_tf32():
            for batch in _batches(clip, min(batch_size, features.BATCH)):
                images = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float().sub_(mean).div_(std)
                with torch.inference_mode():
                    found = network(images).float().cpu().numpy()
                if not np.isfinite(found).all():
                    raise UserError(f"the maps of {clip.data} are not finite; look at the weights")
                large = np.stack([upsampled(small, *batch.shape[1:3]) for small in found])
                self.low, self.high = min(self.low, large.min()), max(self.high, large.max())
                lines = batch.reshape(-1, batch.shape[2] * 3)  # long rows first: ten times as fast
                self.darkest = np.minimum(self.darkest, lines.min(0).reshape(-1, 3).min(0))
                self.brightest = np.maximum(self.brightest, lines.max(0).reshape(-1, 3).max(0))
                maps.append(found)
                progress.update(len(batch))
        if not maps:
            raise UserError(f"none of the {len(clip)} frames of {clip.data} can be read")
        self.maps = np.concatenate(maps)


def _batches(clip, size):
    batch = []
    for picture in clip:
        batch.append(picture)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def pages(clip, look, title, low, high, side_by_side=False):
    """The pictures of the film, one after another: the clip under the colors of its maps from low to high."""
    brightness, page = film.brightness(look.darkest, look.brightest, MEAN, STD), None
    with cli.Progress(len(look.maps), "film", "frames") as progress:
        for picture, small in zip(clip, look.maps, strict=True):
            height, width = picture.shape[:2]
            page = page or film.Page(height, width, title, low, high, 1 + side_by_side)
            under = film.overlay(picture, film.heat(upsampled(small, height, width), low, high), brightness)
            yield page(picture, under) if side_by_side else page(under)
            progress.update()


def animate(args, network, title, name):
    """Make the film that the flags ask for, of the maps of a network; name: how it is called unless they say.

    network: an nn.Module or function, images (N, 3, H, W) to maps (N, h, w).
    """
    path = Path(args.save_dir) / (args.name or name)
    files.make_output_dir(path.parent)
    files.refuse_overwrite(path, args.overwrite)
    if args.range and not args.range[0] < args.range[1]:
        raise UserError(f"--range {args.range[0]} {args.range[1]}: the first must be below the second")
    clip = Clip(args.data, args.image_size, args.frames, args.fps, args.shift, not args.no_rotate, args.workers)
    look = Look(clip, network, args.batch_size, distributed.select_device(args.device))
    low, high = args.range or (look.low, look.high)
    film.write(path, pages(clip, look, title, low, high, args.side_by_side), args.fps)
    print(f"{len(look.maps)} pictures, {title} from {look.low:.4g} to {look.high:.4g}: {path}")
    if look.low == look.high:
        print(f"{title} is the same everywhere in this clip, so that the film has one color")
