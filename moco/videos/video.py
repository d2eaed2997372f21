"""One video file: its properties, which of its frames to sample, those frames, and the square image of each."""

from array import array
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

# Containers that hold their own pictures. Playlists (HLS, DASH, concat, SDP) are not here: they name files to read.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mxf,dv,ivf,rm,y4m,nut,gif"
RATES = (1 / 60, 1000)  # frames per second, from time-lapse to high speed


class UnreadableVideo(Exception):
    """A file that cannot be read as a video; the message is the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video file, known without decoding it.

    width, height: pixels as shown, after rotation. times: (frames,) int64 time stamps in ticks, rising, or None where
    the container keeps none and frames are known by their order only. frames: their number. tick: seconds. rate: native
    frames a second.
    """

    width: int
    height: int
    frames: int
    rate: float
    tick: float
    times: np.ndarray | None

    def is_constant_rate(self):
        """Whether every frame comes within one frame's time of where an even rate puts it."""
        if self.times is None or self.frames < 3:
            return True
        spacing = (self.times[-1] - self.times[0]) / (self.frames - 1)
        late = np.arange(self.frames, dtype=np.float64)
        late *= -spacing
        late += self.times
        late -= self.times[0]
        return bool(max(late.max(), -late.min()) <= spacing)


def probe(path):
    """The VideoInfo of the video file path, by counting its packets; UnreadableVideo says why it has none."""
    with _opened(path) as (container, stream):
        stamps, untimed = array("q"), False  # a day of video has millions
        try:
            for packet in container.demux(stream):
                if _shown(packet):
                    stamps.append(packet.dts or 0 if packet.pts is None else packet.pts)
                    untimed |= packet.pts is None
        except av.error.FFmpegError:
            if not stamps:
                raise
        except IndexError:  # PyAV's, where a stream appears that the header did not announce: the file ends there
            pass
        header = float(stream.average_rate or stream.guessed_rate or 0)
        width, height, tick = stream.codec_context.width, stream.codec_context.height, float(stream.time_base or 0)
    if not stamps:
        raise UnreadableVideo("it holds no frames")
    if min(width, height) < 1:
        raise UnreadableVideo("it does not say how large its pictures are")
    if max(width, height) > 32 * min(width, height):
        raise UnreadableVideo(f"its pictures of {width} by {height} pixels hold no square worth cutting out")
    times = np.frombuffer(stamps, np.int64)
    times.sort()
    if untimed or not tick or (times[1:] == times[:-1]).any():
        times = None
    return VideoInfo(width, height, len(stamps), _rate(header, times, tick), tick, times)


def _rate(header, times, tick):
    """Native frames per second: the header's, unless the time stamps differ from it by more than a hundredth."""
    rate = header
    if times is not None and len(times) > 1:
        measured = (len(times) - 1) / ((int(times[-1]) - int(times[0])) * tick)
        if not abs(header - measured) <= measured / 100:
            rate = measured
    if not RATES[0] <= rate <= RATES[1]:
        raise UnreadableVideo(f"its frame rate of {rate:g} a second cannot be right")
    return rate


def frames(path, frame_indices, info):
    """Yield (position, picture) for some frames of a video, in order, as they can be decoded.

    frame_indices: (n,) increasing int indices of frames in the order of display. info: the VideoInfo of path. Pictures
    are (height, width, 3) uint8 BGR, upright. A frame that is damaged, or depends on a damaged one, is left out.

    One decoding thread per file: many files are read in parallel. Frames on which no other frame depends are decoded
    only if they are among frame_indices, which saves half the work and changes no pixel.
    """
    keys = array(
        "q", np.asarray(frame_indices if info.times is None else info.times[frame_indices], np.int64).tobytes()
    )

    def position(key):
        k = bisect_left(keys, key)
        return k if k < len(keys) and keys[k] == key else None

    reformatter = VideoReformatter()
    with _opened(path) as (container, stream):
        decoder = stream.codec_context
        decoder.thread_count = 1
        intact, order, skipping = True, 0, None
        for packet in _packets(container, stream):
            if info.times is not None:
                skip = "DEFAULT" if packet is None or position(packet.pts) is not None else "NONREF"
                if skip != skipping:
                    decoder.skip_frame = skipping = skip
            try:
                decoded = decoder.decode(packet)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                intact = False
                continue
            for frame in decoded:
                intact = not frame.is_corrupt and (intact or frame.key_frame)
                k = position(order if info.times is None else frame.pts)
                order += 1
                if k is not None and intact:
                    yield k, _picture(frame, reformatter)


def _picture(frame, reformatter):
    picture = reformatter.reformat(frame, format="bgr24", threads=1).to_ndarray()
    turns = round(frame.rotation / 90) % 4  # phones record how they were held
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _packets(container, stream):
    """The packets of a stream up to the end or to where the file breaks off, then None, which ends decoding."""
    with suppress(av.error.FFmpegError, IndexError):  # PyAV's IndexError: a stream that the header did not announce
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    yield None


def _shown(packet):
    """Whether a packet holds a frame to be shown: VP8 has others, which only serve as reference."""
    hidden = packet.size and packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10
    return bool(packet.size) and not packet.is_discard and not hidden


def frame_step(native, fps, published=False):
    """Every how many frames one is taken, to come nearest to fps of native frames a second, or as published."""
    return int(int(native) // fps) + 1 if published else max(1, round(native / fps))


def sampled_frames(info, fps, published=False):
    """Indices of the frames to take from a video, (n,) int64 rising.

    A steady video gives every frame_step-th frame. One of variable rate gives the first frame in each 1/fps seconds.
    """
    if info.is_constant_rate():
        return np.arange(0, info.frames, frame_step(info.rate, fps, published))
    ticks = np.floor((info.times - info.times[0]) * (info.tick * fps) + 1e-6)
    return np.flatnonzero(np.diff(ticks, prepend=-1))


def crop(picture, size=224, shift=16, rotate=True):
    """A video frame, (height, width, 3) uint8, as an image of (size, size, 3).

    The minor edge is scaled to size * 256 / 224 pixels (bicubic), the center cut out, moved up by shift pixels of a
    224-pixel image as far as the picture extends (the camera prints the time at the bottom), and rotated by 180
    degrees (the head camera hangs upside down).
    """
    height, width = picture.shape[:2]
    edge, minor = round(size * 256 / 224), min(height, width)
    width, height = width * edge // minor, height * edge // minor
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    left = (width - size) // 2
    top = min(max((height - size) // 2 - round(shift * size / 224), 0), height - size)
    picture = picture[top : top + size, left : left + size]
    return cv2.flip(picture, -1) if rotate else np.ascontiguousarray(picture)


class _opened:
    """A video file opened for reading: gives (container, stream of pictures); any failure is an UnreadableVideo."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        try:
            self.container = av.open(f"file:{self.path}", container_options=options)
        except (av.error.FFmpegError, UnicodeError) as error:
            raise UnreadableVideo(_reason(error)) from error
        try:
            streams = [s for s in self.container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise UnreadableVideo("it has no video stream")
            if streams[0].codec_context is None:
                raise UnreadableVideo("there is no decoder for its codec")
            return self.container, streams[0]
        except BaseException:
            self.container.close()
            raise

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, av.error.FFmpegError):
            raise UnreadableVideo(_reason(error)) from error


def _reason(error):
    if isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
        return "it is no video in a container known here, or its index is missing"
    if isinstance(error, UnicodeError):
        return "its name is not UTF-8"
    return getattr(error, "strerror", None) or str(error)
