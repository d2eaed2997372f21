"""Small videos whose frames show their number, also damaged, joined and odd ones; and the reader that reads them."""

import subprocess
import sys
from fractions import Fraction

import av
import cv2
import numpy as np

import read_saycam
from moco.data import manifest, tars

BITS = 10
RATE = Fraction(30000, 1001)


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


def number_in(picture):
    """The number that a decoded frame shows, (height, width, 3) uint8."""
    height, width = picture.shape[:2]
    row = picture[int(height * 0.25) : int(height * 0.6)].mean((0, 2))
    return sum(int(row[int(width * (0.23 + 0.06 * bit))] > 128) << bit for bit in range(BITS))


def write_video(
    path, count=60, rate=RATE, size=(64, 48), codec="libx264", pixels="yuv420p", times=None, turn=0, first=0,
    options=None, **container,
):  # fmt: skip
    """A video of count numbered frames, from number first on; times: time stamps in ms instead of a constant rate."""
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if turn:
            stream.set_display_rotation(turn)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(first + k, *size), format="gray").reformat(format=pixels)
            frame.pts = k if times is None else int(times[k])
            frame.time_base = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_videos(folder, counts):
    """A folder of videos of {name: number of frames}, which is made; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        write_video(folder / (name if "." in name else f"{name}.mp4"), count)
    return folder


def damaged(path, count=300):
    """A video whose index comes first, with damage in the middle of its frames."""
    data = write_video(path, count, options={"g": "25"}, container_options={"movflags": "faststart"}).read_bytes()
    return overwrite(path, (data.find(b"mdat") + len(data)) // 2, np.random.default_rng(0).bytes(400))


def read(folders, save_dir, *flags, workers=0):
    """Run the reader on a folder of videos, or on several, in this process; its exit status."""
    folders = folders if isinstance(folders, list) else [folders]
    return read_saycam.main([*map(str, [*folders, "--save-dir", save_dir, "--workers", workers, *flags])])


def start_reading(folder, save_dir, *flags):
    """Start the reader in a process of its own."""
    command = [sys.executable, read_saycam.__file__, str(folder), "--save-dir", str(save_dir), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_out(save_dir):
    """{name: reason} of what the reader left out of a frame folder."""
    return dict(manifest.left_out(manifest.read(save_dir)))


def tree(folder):
    """{relative path: bytes} of all files below folder without the index of tars, which has times of modification."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != tars.INDEX)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_audio(path):
    """A file with one short audio stream."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        file.mux([*stream.encode(frame), *stream.encode()])
    return path


def remux(source, path, change=None, first=0, **container):
    """Copy the packets of a video, from packet first on, to another container.

    change(number, packet) may change the time stamps of a packet.
    """
    with av.open(str(source)) as old, av.open(str(path), "w", **container) as new:
        if old.streams.video[0].codec_context.name.endswith("dav1d"):  # it has no encoder to copy the settings of
            stream = new.add_mux_stream("av1", rate=25, width=64, height=48)
        else:
            stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number >= first:
                packet.stream = stream
                if change:
                    change(number, packet)
                new.mux(packet)
    return path


def packet_bytes(path):
    """[(position in the file, size, whether it is a key frame)] of the packets of a video."""
    with av.open(str(path)) as file:
        return [(packet.pos, packet.size, packet.is_keyframe) for packet in file.demux(video=0) if packet.size]


def overwrite(path, position, content):
    """Overwrite bytes of a file from a position on."""
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)
    return path


def flip_bits(path, data, count, seed):
    """Write data with count random bits inverted."""
    random = np.random.default_rng(seed)
    damaged = np.frombuffer(data, np.uint8).copy()
    positions = random.integers(0, len(damaged), count)
    np.bitwise_xor.at(damaged, positions, (1 << random.integers(0, 8, count)).astype(np.uint8))
    path.write_bytes(damaged.tobytes())
    return path
