"""Maps of a network over images: class activation maps, attention, their colors over the images, and films of these."""

import textwrap
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from scipy.special import expit

from moco import cli, distributed, files, plots
from moco.analysis import features
from moco.cli import UserError
from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.networks import architectures, opening

FPS, FPS_BOUNDS = 5.0, (0.01, 1000)  # frames per second of a film, as published, and what it can have
WIDTH = 224  # smallest width of an image in a film, so that it can be seen and its title read
STRIDE = 32  # pixels of the image per location of the last maps of a spatial trunk


def add_flags(parser, frames, batch_size):
    """Add the flags that both kinds of film share, with a script's default length and batch size, to parser."""
    add = parser.add_argument
    add("data", help="folder of images, which are shown in order")
    opening.add_model_flags(parser)
    add("--frames", type=cli.number(int, 1), default=frames, metavar="N", help="maximum length of the film")
    add(
        "--fps",
        type=cli.number(float, *FPS_BOUNDS),
        help="frames per second; default: those of the sampled frames, 5 if unknown",
    )
    add(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="activations at the two ends of the color scale; default: the range over the film",
    )
    add("--side-by-side", action="store_true", help="also show the images without colors, on the left")
    add("--name", type=_file_name, metavar="FILE.mp4", help="name of the film in --save-dir")
    help_text = f"images per forward pass; more than {features.BATCH} are computed in parts"
    cli.shared_flags(parser, "--batch-size", default=batch_size, help=help_text)
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device", "--overwrite")


def _file_name(text):
    if Path(text).name != text or Path(text).suffix.lower() != ".mp4":
        raise UserError(f"--name {text}: give a plain file name that ends in .mp4; the folder is --save-dir")
    return text


def open_inputs(args, head_required=False):
    """The FrameFolder and the opened model, frozen and on its device, that the flags of a film or of maps ask for."""
    frames, opened = FrameFolder(args.data), opening.open_for(args, head_required)
    architectures.freeze(opened.network).to(distributed.select_device(args.device))
    return frames, opened


def animate(args, frames, opened, function, name, title, stride=STRIDE):
    """Write the film that the flags ask for: the maps that function makes of the first of frames.

    function: normalized images (n, 3, H, W) to maps (n, h, w), see images_and_maps. name: of the film without --name.
    title: of all its frames. stride: pixels of the image per location of the maps.
    """
    if args.range and not args.range[0] < args.range[1]:
        raise UserError(f"--range {args.range[0]} {args.range[1]}: give two numbers, the first below the second")
    save_dir = files.make_output_dir(args.save_dir, [args.data])
    path = files.refuse_overwrite(save_dir / (args.name or name), args.overwrite)
    device, indices = next(opened.network.parameters()).device, frames.in_time()[: args.frames]
    images, maps, indices = images_and_maps(
        function, frames, indices, args.image_size, device, args.batch_size, args.workers
    )
    files.write_args(save_dir, cli.flags(args), opened.checkpoints)
    heatmaps, fps = upsample(maps, images.shape[1:3], stride), args.fps or frame_rate(frames, indices)
    write(path, images, heatmaps, titles(frames, indices, title), fps, args.range, args.side_by_side)


def images_and_maps(network, frames, indices, size, device, batch_size=features.BATCH, workers=0, square=False):
    """Some images of a FrameFolder, the maps that a network makes of them, and the indices of those that can be read.

    network: normalized images (n, 3, H, W) to maps (n, ..., h, w). indices: (N,) of the images. size: of their minor
    edge, to which they are resized. square: use center squares; otherwise images keep their aspect ratio, and those
    with another shape than the first are resized to cover it. workers: threads that read images. Images that cannot be
    read are named and left out.
    Returns images (n, H, W, 3) uint8 RGB, maps (n, ..., h, w) float32 on the CPU, and indices (n,). UserError if no
    image can be read, or a map is not finite.
    """
    images, kept, maps = None, [], []
    with ThreadPoolExecutor(max(workers, 1)) as threads:
        for i, image in zip(indices, threads.map(lambda i: _read(frames, i, size, square), indices), strict=True):
            if image is not None:
                images = np.empty((len(indices), *image.shape), np.uint8) if images is None else images
                images[len(kept)] = _cover(image, images.shape[1:])
                kept.append(i)
    if not kept:
        raise UserError(f"none of the {len(indices)} images of {frames.folder} can be read")
    images = images[: len(kept)]
    mean, std = (255 * torch.tensor([loader.MEAN, loader.STD], device=device)[:, :, None, None]).unbind()
    step = min(batch_size, features.BATCH)
    with cli.Progress(len(kept), "maps", "images") as progress, torch.inference_mode(), distributed.no_tf32():
        for start in range(0, len(kept), step):
            batch = torch.from_numpy(images[start : start + step]).to(device).permute(0, 3, 1, 2)
            maps.append(network(batch.float().sub_(mean).div_(std)).float().cpu())
            features.check_finite(maps[-1].flatten(1).numpy(), frames, kept[start : start + step])
            progress.update(len(batch))
    return images, torch.cat(maps), np.array(kept)


def _read(frames, i, size, square):
    """Image i of frames with a minor edge of size pixels; None, and a line of output, if it cannot be read."""
    try:
        image = augment.decode(frames.read(i), frames.path(i))
    except (augment.BadImage, OSError) as error:
        print(f"{frames.path(i)}: {error}; left out")
        return None
    height, width = image.shape[:2]
    short = min(height, width)
    if square:
        return augment.resize_center_crop(image, size)
    return image if short == size else augment.resize(image, size * width // short, size * height // short)


def _cover(image, shape):
    """image, if it has another shape than (H, W, 3), resized to cover that and center-cropped."""
    if image.shape == shape:
        return image
    scale = max(shape[0] / image.shape[0], shape[1] / image.shape[1])
    height, width = max(round(image.shape[0] * scale), shape[0]), max(round(image.shape[1] * scale), shape[1])
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return augment.resize(image, width, height)[top : top + shape[0], left : left + shape[1]]


def class_activation_map(maps, weights):
    """The evidence for a class at each location, (N, h, w): the last maps (N, C, h, w) weighted by weights (C,).

    weights are the class's row of the linear head. The mean of the map over space is the class's logit without its
    bias (Zhou et al. 2016, Learning Deep Features for Discriminative Localization).
    """
    return torch.einsum("nchw,c->nhw", maps, weights)


def upsample(maps, shape, stride=STRIDE):
    """Maps (N, h, w) at the resolution of their images, as an array (N, *shape): bicubic, stride pixels per location.

    Where a map ends before its image, its edge is repeated.
    """
    large = np.empty((len(maps), *shape), np.float32)
    for i, small in enumerate(np.asarray(maps)):
        wide = cv2.resize(small, None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC)[: shape[0], : shape[1]]
        missing = [(0, side - present) for side, present in zip(shape, wide.shape, strict=True)]
        large[i] = np.pad(wide, missing, mode="edge")
    return large


def attention_mask(heatmaps):
    """Masks (N, H, W) from 0 to 1 of upsampled maps (N, H, W): sigmoid(10 m / std(m)), with the std over all of them.

    Orhan, Gupta & Lake (2020), Figure 6.
    """
    return expit(10 * heatmaps / max(heatmaps.std(), 1e-12))


def overlay(images, heatmaps, low=None, high=None):
    """Heatmaps (N, H, W) in jet colors over images (N, H, W, 3) uint8: (N, H, W, 3) uint8.

    low, high: values at the ends of the color scale; None: the range of the heatmaps. As in the published films, the
    pixels are normalized, rescaled to 0..1 over all images and colors, and added to the colors of the maps. The
    published code rescales the sum over the film; the mean, taken here, is the same if the sum ranges from black to
    white.
    """
    low, high = (heatmaps.min(), heatmaps.max()) if low is None else (low, high)
    scale = 255 / (high - low) if high > low else 0
    rows = images.reshape(-1, images.shape[2] * 3)  # reducing long rows first is ten times faster
    darkest, brightest = rows.min(0).reshape(-1, 3).min(0), rows.max(0).reshape(-1, 3).max(0)
    normalized = (np.arange(256)[:, None] / 255 - loader.MEAN) / np.array(loader.STD)  # by pixel value and color
    black, white = normalized[darkest, range(3)].min(), normalized[brightest, range(3)].max()
    brightness = np.clip((normalized - black) / max(white - black, 1e-12), 0, 1).astype(np.float32)[None]
    jet, shown = plots.jet()[None], np.empty_like(images)
    for frame, image, heatmap in zip(shown, images, heatmaps, strict=True):
        colors = cv2.merge([np.clip((heatmap - low) * scale, 0, 255).astype(np.uint8)] * 3)
        frame[:] = cv2.LUT(colors, jet * np.float32(127.5)) + cv2.LUT(image, brightness * np.float32(127.5))
    return shown


def frame_rate(frames, indices):
    """The rate at which some images of a FrameFolder, in time, were sampled, per second; FPS if no manifest records it.

    It is within the bounds of FPS_BOUNDS.
    """
    sources = [frames.source(i) for i in indices]
    steps = [b.second - a.second for a, b in pairwise(sources) if a and b and a.name == b.name and a.second < b.second]
    return float(np.clip(1 / np.median(steps), *FPS_BOUNDS)) if steps else FPS


def titles(frames, indices, title):
    """A title for each of some images of a FrameFolder: with where it is from, if a manifest records it."""
    return [f"{title}: {source}" if (source := frames.source(i)) else title for i in indices]


def film_frames(columns, titles, low, high):
    """Yield the frames of a film, (height, width, 3) uint8 with even sides: images side by side, a title, a color bar.

    columns: the images from left to right, (N, H, W, 3) uint8 each; small ones are enlarged by a whole number. titles:
    of the N frames, in as many lines as they need; characters that are not Latin are written as codes. low, high:
    values at the ends of the color bar.
    """
    zoom = -(-WIDTH // min(WIDTH, columns[0].shape[2]))
    height, width = (zoom * side for side in columns[0].shape[1:3])
    text_height, edge, bar_width = max(12, height // 18), max(4, height // 40), max(8, height // 28)
    font = ImageFont.load_default(text_height)
    ticks = [f"{value:.2g}" for value in (high, (low + high) / 2, low)]
    bar_left = edge + len(columns) * (width + edge)
    tick_left = bar_left + bar_width + edge
    right = tick_left + max(int(font.getlength(tick)) for tick in ticks) + edge
    titles = [
        _wrap(title.encode("latin-1", "backslashreplace").decode("latin-1"), font, right - edge) for title in titles
    ]
    line_height = text_height + edge
    top = max(map(len, titles)) * line_height + edge
    canvas = Image.new("RGB", tuple(side + side % 2 for side in (right, top + height + edge)), "white")
    draw = ImageDraw.Draw(canvas)
    for tick, y, anchor in zip(ticks, (0, height / 2, height), ("lt", "lm", "lb"), strict=True):
        draw.text((tick_left, top + y), tick, "black", font, anchor=anchor)
    bar = (255 * plots.jet()[np.linspace(255, 0, height).round().astype(int)]).astype(np.uint8)
    canvas.paste(Image.fromarray(np.repeat(bar[:, None], bar_width, 1)), (bar_left, top))
    for title, *images in zip(titles, *columns, strict=True):
        draw.rectangle((0, 0, canvas.width, top - 1), "white")
        for number, line in enumerate(title, 1):
            draw.text((edge, number * line_height), line, "black", font, anchor="ls")
        frame = np.array(canvas)
        for column, image in enumerate(images):
            left = edge + column * (width + edge)
            frame[top : top + height, left : left + width] = cv2.resize(image, (width, height))
        yield frame


def _wrap(text, font, width):
    """The lines of text, as few as fit into width pixels, broken at spaces, or within a word that is longer."""
    wrapped = (textwrap.wrap(text, length, break_on_hyphens=False) for length in range(len(text), 0, -1))
    return next((lines for lines in wrapped if all(font.getlength(line) <= width for line in lines)), [])


def write(path, images, heatmaps, titles, fps, limits=None, side_by_side=False):
    """Write the film of heatmaps (N, H, W) over images (N, H, W, 3) uint8 to path, with fps frames per second.

    titles: of the N frames. limits: (low, high) of the colors; None: the range of the heatmaps. side_by_side: also show
    the images alone. H.264 in MP4 that plays in browsers: the index comes first, and the color space is stated.
    UserError if the disk is full.
    """
    low, high = limits or (heatmaps.min(), heatmaps.max())
    columns = [images] * side_by_side + [overlay(images, heatmaps, low, high)]
    frames = film_frames(columns, titles, low, high)
    first = next(frames)
    bt709 = dict(dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    bt709 |= dict(dst_color_primaries=ColorPrimaries.BT709, dst_color_trc=ColorTrc.BT709)
    rate, reformatter = Fraction(fps).limit_denominator(1001), VideoReformatter()
    with files.atomic_write(path) as part, av.open(part, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, image in enumerate(chain([first], frames)):
            frame = reformatter.reformat(av.VideoFrame.from_ndarray(image), format="yuv420p", threads=1, **bt709)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    low, high = heatmaps.min(), heatmaps.max()
    print(f"{len(images)} frames at {float(rate):.4g} a second, maps from {low:.4g} to {high:.4g}: {path}")
    if low == high:
        print("the maps are constant, so the film has a single color")
