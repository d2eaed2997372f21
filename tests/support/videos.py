"""Small videos for the tests, whose frames say their number."""

from fractions import Fraction

import av
import cv2
import numpy as np

BITS = 10


def numbered(k, width=64, height=48):
    """Frame k as (height, width) uint8: its number in bars, lowest bit left, where the reader's crop keeps them."""
    picture = np.full((height, width), 90, np.uint8)
    for bit in range(BITS):
        left = round(width * (0.2 + 0.06 * bit))
        picture[height // 6 : 2 * height // 3, left : round(width * (0.26 + 0.06 * bit))] = 235 if k >> bit & 1 else 20
    return picture


def number(path, rotated=True):
    """The number of the frame that an image of the reader shows (from a video of 4 by 3)."""
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    image = image[::-1, ::-1] if rotated else image
    side = image.shape[0]
    columns = [((0.23 + 0.06 * bit) * 341 - 58) * side / 224 for bit in range(BITS)]
    row = image[int(side * 0.35) : int(side * 0.55)].mean(0)
    return sum((row[round(column)] > 128) << bit for bit, column in enumerate(columns))


def write_video(
    path, count=60, rate=Fraction(30000, 1001), size=(64, 48), codec="libx264", pixels="yuv420p", times=None, turn=0,
    options=None, **container,
):  # fmt: skip
    """A video of count numbered frames; times: time stamps in milliseconds, in place of an even rate."""
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if turn:
            stream.set_display_rotation(turn)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(k, *size), format="gray").reformat(format=pixels)
            frame.pts = k if times is None else int(times[k])
            frame.time_base = 1 / rate if times is None else Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path
