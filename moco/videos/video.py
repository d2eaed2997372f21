"""Frames out of one video file.

A packet is the coded form of one picture. Packets are numbered in the order in which the file stores them, frames in
the order in which they are displayed; while a file is decoded, a frame is identified by the number of its packet.
"""

import errno
from array import array
from bisect import bisect_left
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

from moco import files

# Containers that store frames themselves. Playlists (HLS, DASH, concat, SDP) are not here: they name files to read.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mxf,dv,ivf,rm,nut,gif"
CONTAINERS += ",yuv4mpegpipe,h264,hevc,m4v,mpegvideo,mjpeg,obu"
END = 2**63 - 1  # the end of a run of packets that goes to the end of the file
MISSING = -(2**63)  # the time stamp of a packet that has none
ALL_PACKETS = np.array([[0, 0, END, MISSING]])
MIN_SEEK = 64  # packets; fewer are read faster than skipped by seeking
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
WIDE_GAMUT = (ColorPrimaries.BT2020, ColorPrimaries.SMPTE428, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)


class UnreadableVideo(Exception):
    """A file that cannot be read as a video; the message is the reason."""


class Run(NamedTuple):
    """Packets to decode one after another, from a key frame on.

    first: the packet of the key frame. resume, end: the others, from resume to before end; packets between first and
    resume are displayed before the key frame and depend on the group of pictures before it. pts: the time
    stamp of first, by which to seek, or MISSING where seeking in this container is not reliable.
    """

    first: int
    resume: int
    end: int
    pts: int


@dataclass(frozen=True)
class FrameSelection:
    """Frames to take out of a video file, and what to decode for them.

    indices: (n,) int64 frames in the order of display. packets: (n,) int64 their packets, or None where frames are
    identified by counting the decoded ones. runs: (r, 4) int64, one Run per row. may_skip: whether packets of these
    runs on which no other frame depends may be skipped.
    """

    indices: np.ndarray
    packets: np.ndarray | None
    runs: np.ndarray
    may_skip: bool

    def __len__(self):
        return len(self.indices)


def frames(path, selection):
    """Yield (position, picture) for the frames of a FrameSelection that can be decoded.

    position: index into the selection; positions rise unless a time stamp contradicts the order of decoding. Pictures
    are (height, width, 3) uint8 BGR, of square pixels, turned and mirrored as the file says, in the colors of BT.709
    where it has HDR or a wide gamut.

    A frame that is damaged, or depends on a damaged one, is left out as far as the decoder can tell. Most decoders
    notice lost data. Flipped bits are noticed nearly always by that of AV1, mostly by those of H.264, MPEG-2, MPEG-4,
    and JPEG, hardly by those of HEVC, VP8, VP9, and uncompressed video: the other frames are output with the damage.

    Decoding uses one thread per file, as many files are read in parallel. Frames on which no other frame depends are
    decoded only where selected, which saves up to half of the work and changes no pixel.
    """
    identities = selection.indices if selection.packets is None else selection.packets
    order = np.argsort(identities)
    identities = array("q", identities[order].tobytes())

    def position(identity):
        k = bisect_left(identities, identity) if identity is not None else len(identities)
        return int(order[k]) if k < len(identities) and identities[k] == identity else None

    missing = np.ones(len(selection), bool)
    count, starts = 0, set(selection.runs[:, 0].tolist())
    with open_video(path) as (container, stream):
        decoder, reformatter = Decoder(stream), VideoReformatter()
        counter = _FrameCounter(int(selection.runs[0, 0]), decoder)
        for number, packet in packets_in(selection.runs, container, stream):
            if count == len(selection):
                return
            skip = selection.may_skip and position(number) is None
            for frame, intact in decoder.decode(number, packet, skip):
                if selection.may_skip and frame.pts in starts and not frame.key_frame:  # the container was wrong
                    yield from _frames_without_skipping(path, selection, missing)
                    return
                k = position(counter.index(frame.pts) if selection.packets is None else frame.pts)
                if k is None or not intact or not missing[k]:
                    continue
                if selection.may_skip and not decoder.errors and k > count:
                    yield from _frames_without_skipping(path, selection, missing)
                    return
                missing[k] = False
                count += 1
                yield k, _picture(frame, reformatter, stream)
    if selection.may_skip and not decoder.errors and count < len(selection):
        yield from _frames_without_skipping(path, selection, missing)


def _frames_without_skipping(path, selection, missing):
    """Like frames, for the missing ones, (n,) bool, of a selection.

    Necessary where decoding cannot start at a key frame (H.264 with intra refresh), where the container marks others as
    key frames (H.263 in AVI), or where seeking fails.
    """
    positions = np.flatnonzero(missing)
    rest = FrameSelection(selection.indices[missing], selection.packets[missing], ALL_PACKETS, False)
    for k, picture in frames(path, rest):
        yield int(positions[k]), picture


@contextmanager
def open_video(path):
    """Open a video file: (container, video stream). FFmpeg's errors become UnreadableVideo."""
    # Without correction of overflows, the clock of a recording that was joined to another visibly falls back.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "correct_ts_overflow": "0"}
    try:
        with av.open(f"file:{path}", container_options=options) as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise UnreadableVideo("it has no video stream")
            if streams[0].codec_context is None:
                raise UnreadableVideo("there is no decoder for its codec")
            yield container, streams[0]
    except av.error.MemoryError as error:
        raise UnreadableVideo("it is damaged: it needs an implausible amount of memory") from error
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        raise UnreadableVideo("it is not a video in a supported container, or its index is missing") from error
    except av.error.FFmpegError as error:
        raise UnreadableVideo(error.strerror or str(error)) from error
    except UnicodeError as error:
        raise UnreadableVideo("its name is not UTF-8") from error


def check_disk(path, error=None):
    """Raise the OSError of a failing disk, which FFmpeg may have taken for damage or for the end of a video file.

    error: what FFmpeg raised, if anything. Its demuxers raise EIO and EAGAIN for files that are cut, too.
    """
    if files.is_transient(error) and error.errno not in (errno.EIO, errno.EAGAIN):
        raise OSError(error.errno, error.strerror, path)
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass
    except OSError as failure:
        if files.is_transient(failure):
            raise


def reason_to_leave_out(path, error):
    """The reason why a video is left out after an exception, whatever a library raises.

    Raises instead what is no fault of the file: MemoryError, and OSError for a failing disk.
    """
    if isinstance(error, MemoryError) or files.is_transient(error):
        raise error
    check_disk(path, error.__cause__)
    return str(error) if isinstance(error, UnreadableVideo) else f"reading it fails with {error!r}"


def packets(container, stream):
    """The packets of a stream that have content, up to the end of the file or to its first unreadable part."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.error.FFmpegError as error:
        if files.is_transient(error):
            check_disk(container.name.removeprefix("file:"), error)
        return
    except IndexError:  # PyAV's, at the end of a file in which a stream appeared that its header did not announce
        return


def packets_in(runs, container, stream):
    """Yield (number, packet) for the packets in runs, (r, 4); after each run (None, None), to drain the decoder."""
    position, numbered = 0, enumerate(packets(container, stream))
    for run in map(Run._make, runs.tolist()):
        if run.pts != MISSING and run.first - position >= MIN_SEEK:
            container.seek(run.pts, stream=stream)
            numbered = enumerate(packets(container, stream), run.first)
        for number, packet in numbered:
            position = number + 1
            if number == run.first and run.pts not in (MISSING, packet.pts):
                return  # seeking failed
            if number == run.first or run.resume <= number < run.end:
                yield number, packet
            if position >= run.end:
                break
        yield None, None


class Decoder:
    """The decoder of a stream, which tells intact frames from damaged ones.

    After an error, frames are intact again from the first key frame on whose packet comes after it. errors: how many
    packets and frames were damaged. keys: packets of key frames that were decoded.
    """

    def __init__(self, stream):
        self.context = stream.codec_context
        self.context.thread_count = 1
        if self.context.name == "mjpeg":
            self.context.options = {"err_detect": "explode"}  # otherwise it outputs the previous frame again
        self.context.open(strict=False)  # before anything is skipped, because AV1's decoder would continue to skip
        self.errors, self.keys = 0, set()
        self._damaged = None  # the last damaged packet, until a key frame after it is decoded
        self._skipping = False

    def decode(self, number, packet, skip=False):
        """Yield (frame, whether it is intact) as they come out of the decoder; frame.pts is the number of its packet.

        skip: do not decode the packet if no frame depends on it. Without a packet, the decoder is drained and reset.
        """
        if packet is not None:
            packet.pts = packet.dts = number
            if packet.is_keyframe:
                self.keys.add(number)
        if skip != self._skipping:
            self.context.skip_frame = "NONREF" if skip else "DEFAULT"
            self._skipping = skip
        try:
            decoded = self.context.decode(packet)
        except av.error.EOFError:
            decoded = []
        except av.error.FFmpegError:
            decoded = []
            self._mark_damaged(END if packet is None else number)
        for frame in decoded:
            if frame.is_corrupt:
                self._mark_damaged(max(frame.pts or 0, self._damaged or 0))
            elif self._damaged is not None and frame.key_frame and frame.pts in self.keys and frame.pts > self._damaged:
                self._damaged = None
            yield frame, self._damaged is None
        if packet is None:
            self.context.flush_buffers()
            self.keys.clear()
            self._damaged = None

    def _mark_damaged(self, number):
        self._damaged = number
        self.errors += 1


class _FrameCounter:
    """Numbers the frames of a stream by the order in which they come out of its decoder.

    Packets that cannot be decoded yield no frame. So after errors, the number of a key frame is that of the packets
    before it, plus the later packets that were displayed before it.
    """

    def __init__(self, first, decoder):
        self.first, self.decoder = first, decoder
        self.count, self.leading, self.recent = None, 0, deque(maxlen=64)

    def index(self, number):
        """The index of the next frame out of the decoder, which comes from packet number; None before the first."""
        later = sum(other > number for other in self.recent)
        if number == self.first:
            self.count, self.leading = 0, later
        elif number in self.decoder.keys and (self.decoder.errors or self.count is None):
            self.count = number - self.first - self.leading + later
        elif self.count is not None:
            self.count += 1
        self.recent.append(number)
        return self.count


def displayed_width(width, stream):
    """The width of a picture of a stream with square pixels; the container's aspect ratio precedes the stream's."""
    return round(width * (stream.sample_aspect_ratio or 1))


def display_axes(frame):
    """How a frame is displayed: whether its axes are exchanged, and then whether x and y are reversed.

    By its display matrix, as phones record it, to the nearest quarter turn: x' = a x + c y, y' = b x + d y.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    exchanged = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if exchanged else (a, d)
    return exchanged, x < 0, y < 0


def _picture(frame, reformatter, stream):
    width = displayed_width(frame.width, stream)
    options = dict(format="bgr24", width=width, interpolation="BICUBIC", threads=1)
    if frame.color_trc in HDR or frame.color_primaries in WIDE_GAMUT:
        options["dst_color_trc"] = ColorTrc.BT709 if frame.color_trc in HDR else frame.color_trc
        options["dst_color_primaries"] = ColorPrimaries.BT709
    try:
        picture = reformatter.reformat(frame, **options)
    except av.error.FFmpegError:  # a color matrix that swscale does not know: BT.601, as published
        picture = reformatter.reformat(frame, src_colorspace="ITU601", **options)
    picture, (exchanged, x_reversed, y_reversed) = picture.to_ndarray(), display_axes(frame)
    picture = picture.transpose(1, 0, 2) if exchanged else picture
    return np.ascontiguousarray(picture[:: -1 if y_reversed else 1, :: -1 if x_reversed else 1])
