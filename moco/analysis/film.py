"""Pictures into a film: a map laid over a picture in jet colors, a frame with title and color bar, and the file."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from moco import files
from moco.cli import UserError

CODECS = {
    ".mp4": ("libx264", {"crf": "20", "preset": "ultrafast"}),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"}),
    ".gif": ("gif", {}),
}
MAX_SIDE = 16384  # pixels: the most that H.264 and VP9 both take

# The segments of matplotlib's jet: where a color turns, from 0 to 1, and its red, green or blue there.
JET = np.stack(
    [
        np.interp(np.linspace(0, 1, 256), places, values)
        for places, values in (
            ((0, 0.35, 0.66, 0.89, 1), (0, 0, 1, 1, 0.5)),
            ((0, 0.125, 0.375, 0.64, 0.91, 1), (0, 0, 1, 1, 0, 0)),
            ((0, 0.11, 0.34, 0.65, 1), (0.5, 1, 1, 0, 0)),
        )
    ],
    axis=1,
).astype(np.float32)


def heat(values, low, high):
    """Values (H, W) as indices (H, W) uint8 into JET: low and below is 0, high and above 255; all 0 if both are equal.

    What lies between two colors takes the lower one, as published.
    """
    scale = 255 / (high - low) if high > low else 0
    return np.clip((values - low) * scale, 0, 255).astype(np.uint8)


def brightness(low, high, mean, std):
    """The brightness from 0 to 1 of the 256 values of each color, (256, 3), in a clip of pixels from low to high.

    low, high: (3,), the darkest and the brightest value of each color, 0 to 255. As published the pixels are first
    normalized by mean and std (3,), and then rescaled over the whole clip, all three colors together.
    """
    table = (np.arange(256)[:, None] / 255 - mean) / std
    darkest, brightest = table[low, range(3)].min(), table[high, range(3)].max()
    return np.clip((table - darkest) / max(brightest - darkest, 1e-12), 0, 1).astype(np.float32)


def overlay(picture, heat, brightness):
    """picture (H, W, 3) uint8 RGB under the colors of heat (H, W) uint8: (H, W, 3) uint8.

    The mean of the picture's brightness (256, 3), see brightness(), and the jet colors. The published code rescales
    their sum over the clip, which is the same wherever the sum reaches from black to white in some pixel of the clip.
    """
    colors = cv2.LUT(cv2.merge([heat] * 3), JET[None] * np.float32(127.5))
    return (colors + cv2.LUT(picture, brightness[None] * np.float32(127.5))).astype(np.uint8)


class Page:
    """What every picture of a film has around it: a title above, a color bar from low to high on the right.

    height, width: of a picture. columns: how many pictures side by side.
    """

    def __init__(self, height, width, title, low, high, columns=1):
        text, edge, bar = max(12, height // 18), max(4, height // 40), max(8, height // 28)
        font = ImageFont.load_default(text)
        ticks = [f"{value:.2g}" for value in (high, (low + high) / 2, low)]
        top, label = edge + text + edge, max(int(font.getlength(tick)) for tick in ticks)
        self.corners = [(edge + column * (width + edge), top) for column in range(columns)]
        left = self.corners[-1][0] + width + edge
        total = left + bar + edge + label + edge, top + height + edge
        page = Image.new("RGB", tuple(side + side % 2 for side in total), "white")
        draw = ImageDraw.Draw(page)
        draw.text((edge, top - edge), _shortened(title, font, total[0] - 2 * edge), "black", font, anchor="ls")
        for tick, place, anchor in zip(ticks, (0, height / 2, height), ("lt", "lm", "lb"), strict=True):
            draw.text((left + bar + edge, top + place), tick, "black", font, anchor=anchor)
        self.blank = np.array(page)
        shades = np.linspace(255, 0, height).round().astype(int)
        self.blank[top : top + height, left : left + bar] = (255 * JET[shades, None]).astype(np.uint8)

    def __call__(self, *pictures):
        """The page (H', W', 3) uint8 with pictures (height, width, 3), both sides even."""
        page = self.blank.copy()
        for picture, (left, top) in zip(pictures, self.corners, strict=True):
            page[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return page


def _shortened(text, font, width):
    """text, cut off with dots so that it takes at most width pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def name(text):
    """text as a Path, if its ending is that of a film; UserError if not (an argparse type)."""
    if Path(text).suffix.lower() not in CODECS:
        raise UserError(f"{text} does not end in {', '.join(CODECS)}; give a film a name with one of these endings")
    return Path(text)


def write(path, pictures, fps):
    """Write pictures, any iterable of (H, W, 3) uint8 RGB of one size, as a film of fps pictures a second to path.

    The ending of path is the format: H.264 (.mp4, which starts to play before it is all there), VP9 (.webm), .gif. All
    play in a browser. Odd sides are made even by showing the last row or column twice. One picture is in memory at a
    time. UserError for a picture too large, an unknown ending or a full disk; ValueError for no pictures.
    """
    codec, options = CODECS[name(path).suffix.lower()]
    rate, stream, reformatter = Fraction(fps).limit_denominator(1001), None, VideoReformatter()
    movflags = {"movflags": "faststart"} if codec == "libx264" else {}
    with files.atomic_write(path) as part, av.open(part, "w", options=movflags) as container:
        for number, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            picture = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            if stream is None:
                if max(picture.shape) > MAX_SIDE:
                    raise UserError(f"{width} x {height} pixels are too many for a film; give a smaller --image-size")
                stream = _stream(container, codec, rate, options, picture.shape)
            frame = _paletted(picture) if codec == "gif" else _yuv(picture, reformatter)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("a film without pictures")
        container.mux(stream.encode(None))


def _stream(container, codec, rate, options, shape):
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "pal8" if codec == "gif" else "yuv420p"
    if codec != "gif":  # browsers guess the colors of a film that does not say them
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def _yuv(picture, reformatter):
    frame = av.VideoFrame.from_ndarray(picture, "rgb24")
    return reformatter.reformat(
        frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709, dst_color_trc=ColorTrc.BT709, threads=1,
    )  # fmt: skip


def _paletted(picture):
    """picture in 256 colors of its own, dithered, which hides the steps between them."""
    image = Image.fromarray(picture)
    image = image.quantize(palette=image.quantize(256, Image.Quantize.FASTOCTREE), dither=Image.Dither.FLOYDSTEINBERG)
    palette = np.full((256, 4), 255, np.uint8)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((np.array(image), palette), "pal8")
