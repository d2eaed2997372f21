"""Films of maps over images: jet colors, a layout with title and color bar, and video files."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from moco import files, plots
from moco.cli import UserError

CODECS = {
    ".mp4": ("libx264", {"crf": "20", "preset": "ultrafast"}),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"}),
    ".gif": ("gif", {}),
}
MAX_SIDE = 16384  # pixels: the maximum of both H.264 and VP9

# The color map jet, (256, 3), from the positions (0 to 1) and values of the breakpoints of red, green and blue.
JET = np.stack(
    [
        np.interp(np.linspace(0, 1, 256), positions, values)
        for positions, values in (
            ((0, 0.35, 0.66, 0.89, 1), (0, 0, 1, 1, 0.5)),
            ((0, 0.125, 0.375, 0.64, 0.91, 1), (0, 0, 1, 1, 0, 0)),
            ((0, 0.11, 0.34, 0.65, 1), (0.5, 1, 1, 0, 0)),
        )
    ],
    axis=1,
).astype(np.float32)


def color_indices(values, low, high):
    """Indices into JET, (H, W) uint8, of values (H, W): low and below is 0, high and above 255; 0 if low equals high.

    Values between two colors take the lower one, as in the published films.
    """
    scale = 255 / (high - low) if high > low else 0
    return np.clip((values - low) * scale, 0, 255).astype(np.uint8)


def brightness(low, high, mean, std):
    """A table (256, 3) of the brightness, 0 to 1, of each pixel value in a clip of pixels from low to high.

    low, high: (3,), the minimum and maximum of each color, 0 to 255. As in the published films, pixels are normalized
    by mean and std (3,), and then rescaled over the clip, all three colors together.
    """
    table = (np.arange(256)[:, None] / 255 - mean) / std
    minimum = table[low, range(3)].min()
    maximum = table[high, range(3)].max()
    return np.clip((table - minimum) / max(maximum - minimum, 1e-12), 0, 1).astype(np.float32)


def overlay(image, indices, brightness):
    """The colors of indices (H, W) uint8 over image (H, W, 3) uint8 RGB: (H, W, 3) uint8.

    The mean of the jet colors and the image's brightness, a table (256, 3) of brightness(). The published code rescales
    their sum over the clip, which is the same if the sum ranges from black to white within the clip.
    """
    colors = cv2.LUT(cv2.merge([indices] * 3), JET[None] * np.float32(127.5))
    return (colors + cv2.LUT(image, brightness[None] * np.float32(127.5))).astype(np.uint8)


class Layout:
    """The layout of each frame of a film: images side by side, a title above, a color bar from low to high.

    height, width: of an image. columns: number of images.
    """

    def __init__(self, height, width, title, low, high, columns=1):
        text_height = max(12, height // 18)
        edge = max(4, height // 40)
        bar_width = max(8, height // 28)
        font = _load_font(title, text_height)
        self._edge, self._text_height = edge, text_height
        ticks = [f"{value:.2g}" for value in (high, (low + high) / 2, low)]
        tick_width = max(int(font.getlength(tick)) for tick in ticks)
        top = edge + text_height + edge
        self.corners = [(edge + column * (width + edge), top) for column in range(columns)]
        bar_left = self.corners[-1][0] + width + edge
        size = bar_left + bar_width + edge + tick_width + edge, top + height + edge
        canvas = Image.new("RGB", tuple(side + side % 2 for side in size), "white")
        draw = ImageDraw.Draw(canvas)
        for tick, y, anchor in zip(ticks, (0, height / 2, height), ("lt", "lm", "lb"), strict=True):
            draw.text((bar_left + bar_width + edge, top + y), tick, "black", font, anchor=anchor)
        self.canvas = np.array(canvas)
        bar = np.linspace(255, 0, height).round().astype(int)
        self.canvas[top : top + height, bar_left : bar_left + bar_width] = (255 * JET[bar, None]).astype(np.uint8)
        self.set_title(title, font)

    def set_title(self, title, font=None):
        """Write another title above the next frames."""
        font, width = font or _load_font(title, self._text_height), self.canvas.shape[1]
        strip = Image.new("RGB", (width, self._edge + self._text_height + self._edge), "white")
        position = self._edge, self._edge + self._text_height
        text = _truncate(title, font, width - 2 * self._edge)
        ImageDraw.Draw(strip).text(position, text, "black", font, anchor="ls")
        self.canvas[: strip.height] = np.array(strip)

    def __call__(self, *images):
        """A frame (H', W', 3) uint8 with images (height, width, 3); both sides are even."""
        frame = self.canvas.copy()
        for image, (left, top) in zip(images, self.corners, strict=True):
            frame[top : top + image.shape[0], left : left + image.shape[1]] = image
        return frame


def _load_font(text, size):
    """A font for text: Pillow's own, or for other than Latin letters an installed one, if there is one."""
    font = None if text.isascii() else plots.find_font(text)
    return ImageFont.truetype(font[1], size) if font else ImageFont.load_default(size)


def _truncate(text, font, width):
    """text, truncated with dots to at most width pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def file_name(text):
    """text as a Path, if its extension is that of a film (an argparse type); UserError if not."""
    if Path(text).suffix.lower() not in CODECS:
        raise UserError(f"{text} does not end in {', '.join(CODECS)}; choose one of these formats")
    return Path(text)


def write(path, frames, fps):
    """Write frames, an iterable of (H, W, 3) uint8 RGB of one size, as a film of fps frames per second to path.

    The format follows from the extension: H.264 (.mp4, with its index first), VP9 (.webm) or .gif; all play in a
    browser. Odd sides are made even by repeating the last row or column. One frame at a time is in memory. UserError
    for a frame too large, an unknown extension or a full disk; ValueError for no frames.
    """
    codec, options = CODECS[file_name(path).suffix.lower()]
    rate = Fraction(fps).limit_denominator(1001)
    stream, reformatter = None, VideoReformatter()
    movflags = {"movflags": "faststart"} if codec == "libx264" else {}
    with files.atomic_write(path) as part, av.open(part, "w", options=movflags) as container:
        for number, image in enumerate(frames):
            height, width = image.shape[:2]
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            if stream is None:
                if max(image.shape) > MAX_SIDE:
                    raise UserError(f"{width} x {height} pixels are too many for a film; give a smaller --image-size")
                stream = _add_stream(container, codec, rate, options, image.shape)
            frame = _to_palette(image) if codec == "gif" else _to_yuv(image, reformatter)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("a film without frames")
        container.mux(stream.encode(None))


def _add_stream(container, codec, rate, options, shape):
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "pal8" if codec == "gif" else "yuv420p"
    if codec != "gif":  # browsers guess the color space of a film that does not state it
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def _to_yuv(image, reformatter):
    frame = av.VideoFrame.from_ndarray(image, "rgb24")
    return reformatter.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
        threads=1,
    )


def _to_palette(image):
    """image in a palette of 256 colors, dithered to hide the steps between them."""
    image = Image.fromarray(image)
    image = image.quantize(palette=image.quantize(256, Image.Quantize.FASTOCTREE), dither=Image.Dither.FLOYDSTEINBERG)
    palette = np.full((256, 4), 255, np.uint8)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(colors), 1:] = colors
    return av.VideoFrame.from_ndarray((np.array(image), palette), "pal8")
