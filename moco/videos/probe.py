"""What one video file contains: how many frames, in which order, when, and what to decode for some of them."""

from array import array
from dataclasses import dataclass
from itertools import pairwise

import av
import numpy as np

from moco.videos.video import (
    ALL_PACKETS,
    END,
    MISSING,
    Decoder,
    FrameSelection,
    Run,
    UnreadableVideo,
    display_axes,
    displayed_width,
    open_video,
    packets,
    packets_in,
)

MIN_HEADER_RATE, MAX_RATE = 1 / 60, 1000  # frames per second, from time-lapse to high speed
MAX_GAP = 60  # seconds between frames; longer ones do not count for the rate
# Packets to decode as a trial: of a stream without reordering of frames; with it; and with it, but with time stamps
# that do not show it.
SHORT_TRIAL, TRIAL, LONG_TRIAL = 2, 32, 256


@dataclass(frozen=True)
class VideoInfo:
    """What a video file contains.

    width, height: square pixels as displayed, after rotation.
    frames: their number, from the first key frame on: those before it cannot be decoded.
    rate: native frames per second. header_rate: those that the file's header says.
    start: seconds from the beginning of the file, as a player counts them, to the first frame.
    tick: seconds.
    times: (frames,) int64 time stamps in ticks, rising, or None where the file's are missing or cannot be true.
    packets: (frames,) int64 the packet of each frame, or None where only decoding shows the order of display.
    keys: (k,) int64 packets at which decoding can start.
    key_pts: (k,) int64 their time stamps, or None where seeking by them is not reliable.
    may_skip: whether packets may be skipped, because packets and frames match one to one.
    """

    width: int
    height: int
    frames: int
    rate: float
    header_rate: float
    start: float
    tick: float
    times: np.ndarray | None
    packets: np.ndarray | None
    keys: np.ndarray
    key_pts: np.ndarray | None
    may_skip: bool

    def is_constant_rate(self):
        """Whether every frame is displayed within one frame's time of where a constant rate puts it."""
        if self.times is None or self.frames < 3:
            return True
        spacing = (self.times[-1] - self.times[0]) / (self.frames - 1)
        late = np.arange(self.frames, dtype=np.float64)
        late *= -spacing
        late += self.times
        late -= self.times[0]
        return bool(max(late.max(), -late.min()) <= spacing)

    def seconds(self, indices):
        """When frames are displayed, in seconds from the beginning of the file: (n,) float64."""
        if self.times is None:
            return np.asarray(indices) / self.rate
        return self.start + (self.times[indices] - self.times[0]) * self.tick

    def select(self, indices):
        """The FrameSelection of the frames at indices, (n,) int, rising.

        Frames are decoded from the last key frame before them on, so that groups of pictures without any of them are
        skipped. Frames of an open group that are displayed before its key frame need the group before it as well.
        """
        indices = np.asarray(indices, np.int64)
        numbers = None if self.packets is None else self.packets[indices]
        if not self.may_skip or not len(indices):
            runs = ALL_PACKETS.copy()
            runs[0, :2] = self.keys[0]
            return FrameSelection(indices, numbers, runs, False)
        displayed = np.full(max(self.packets.max(), self.keys[-1]) + 2, END)  # index of the frame of each packet
        displayed[self.packets] = np.arange(self.frames)
        group = np.searchsorted(self.keys, numbers, side="right") - 1
        key_displayed = displayed[self.keys[group]]
        group -= (key_displayed > indices) & (key_displayed < END)
        order = np.argsort(group, kind="stable")
        groups, begin = np.unique(group[order], return_index=True)
        runs, last_key = [], 0
        for g, end in zip(groups.tolist(), np.maximum.reduceat(numbers[order] + 1, begin).tolist(), strict=True):
            first = int(self.keys[g])
            # Decoding a few packets more is cheaper and safer than starting again at a key frame.
            if runs and first - runs[-1][2] <= (runs[-1][2] - last_key) // 8:
                runs[-1][2] = max(runs[-1][2], end)
                last_key = first
                continue
            last_key = first
            resume = first + 1
            while displayed[resume] < displayed[first] < END:
                resume += 1
            runs.append([first, resume, end, MISSING if self.key_pts is None else int(self.key_pts[g])])
        return FrameSelection(indices, numbers, np.array(runs), True)


def probe(path):
    """The VideoInfo of the video file path, from its packets and its first frames; raises UnreadableVideo.

    Frames are in the order of their time stamps where every packet has one, the clock never falls back, and the first
    frames come out of the decoder in this order. Otherwise (B-frames in AVI, joined recordings, raw streams) they are
    in the order in which they come out. Where packets and frames do not match one to one (H.264 with a packet per
    field), the file is decoded once to find its frames.
    """
    with open_video(path) as (container, stream):
        index = _PacketIndex(container, stream)
        header = float(stream.average_rate or stream.guessed_rate or 0)
        tick = float(stream.time_base or 0)
        width, height = displayed_width(stream.codec_context.width, stream), stream.codec_context.height
        late = (stream.start_time or 0) * tick - (container.start_time or 0) / av.time_base  # after the sound
        seekable = container.format.name.startswith("mov,")
    with open_video(path) as (container, stream):
        trial, tried, errors = _decode_trial(stream, packets_in(np.array([index.trial_run()]), container, stream))
    if trial and display_axes(trial[0])[0]:
        width, height = height, width
    if min(width, height) < 1:
        raise UnreadableVideo("its header has no picture size")
    if max(width, height) > 32 * min(width, height):
        raise UnreadableVideo(f"its frames of {width} by {height} pixels are too narrow to crop a square")

    output = [frame.pts for frame in trial]
    numbers, may_skip = index.by_time(), True
    expected = index.expected(tried)
    if index.ambiguous or (not errors and not expected <= set(output)):
        numbers, may_skip = _decoding_order(path, index.first), False
    elif numbers is not None and not index.rises(number for number in output if number in expected):
        numbers = None
    if numbers is None:
        leading = output.index(index.first) if index.first in output else 0
        frames, stamps, may_skip = len(index.shown) - leading, index.dts, False
    else:
        frames, stamps = len(numbers), index.pts[numbers]
    known = np.flatnonzero(stamps != MISSING)
    rising = numbers is not None and len(known) == frames and not (np.diff(stamps) < 0).any()
    rate = _rate(header, known, stamps[known], tick, rising)
    # The first stamp itself may be made up, as in AVI, where it counts the delay of a decoder.
    times, start = (stamps, max(0.0, late + (stamps[0] - index.earliest) * tick)) if rising else (None, 0.0)
    key_pts = index.pts[index.keys] if seekable and may_skip else None
    header = header if MIN_HEADER_RATE <= header <= MAX_RATE else rate
    start = round(start, 4)
    return VideoInfo(
        width, height, frames, rate, header, start, tick, times, numbers, index.keys, key_pts, may_skip
    )


def _decode_trial(stream, numbered):
    """Decode (number, packet) pairs until a frame comes out in another order than that of storage.

    Returns the frames, the numbers of the decoded packets, and how many of them were damaged.
    """
    decoder, frames, tried = Decoder(stream), [], set()
    for number, packet in numbered:
        if number is None or any(later.pts < frame.pts for frame, later in pairwise(frames)):
            break
        frames += [frame for frame, _ in decoder.decode(number, packet) if frame.pts is not None]
        tried.add(number)
    frames += [frame for frame, _ in decoder.decode(None, None) if frame.pts is not None]
    return frames, tried, decoder.errors


class _PacketIndex:
    """The time stamps and kinds of all packets of a stream; raises UnreadableVideo if there are none.

    pts, dts: (packets,) int64. keys: int64 packets of key frames, or the first one. first: the first of them. shown:
    int64 packets from there on that contain a frame to be displayed. earliest: the first time stamp of such a packet,
    also before first. timed: whether the time stamps can give the order. ambiguous: whether only decoding can tell
    which packets are frames, and in which order.
    """

    def __init__(self, container, stream):
        pts, dts, keys, shown = array("q"), array("q"), array("q"), array("q")  # a day has millions
        is_vp8 = stream.codec_context.name == "vp8"
        self.reorders = bool(stream.codec_context.has_b_frames)
        for number, packet in enumerate(packets(container, stream)):
            if packet.is_keyframe:
                keys.append(number)
            if not packet.is_discard and not (is_vp8 and _is_hidden_vp8(packet)):
                shown.append(number)
            pts.append(MISSING if packet.pts is None else packet.pts)
            dts.append(MISSING if packet.dts is None else packet.dts)
        if not shown:
            raise UnreadableVideo("it contains no frames")
        self.keys, self.pts, self.dts = (np.array(each or [0], np.int64) for each in (keys, pts, dts))
        self.first = int(self.keys[0])
        self.shown = np.array(shown, np.int64)
        self.earliest = int(self.pts[self.shown].min())
        self.shown = self.shown[self.shown >= self.first]
        stamps, clock = self.pts[self.shown], self.dts[self.dts != MISSING]
        stamped = stamps != MISSING
        self.timed = bool(stamped.all() and (np.diff(clock) >= 0).all())
        rising = np.sort(stamps)
        repeated = (np.diff(rising) == 0).any() and (rising != stamps).any()
        may_be_fields = container.format.name == "mpegts" and stream.codec_context.name == "h264"
        self.ambiguous = bool(
            (self.timed and repeated)
            or (stamped.any() and not stamped.all())
            or (self.timed and may_be_fields and _is_uneven(rising))
        )

    def trial_run(self):
        """The Run of packets to decode as a trial, which shows whether the time stamps are those of display.

        Where the stamps first contradict the order of storage; at the beginning where they never do.
        """
        falls = np.diff(self.pts[self.shown]) < 0
        if self.timed and falls.any():
            fall = int(self.shown[np.argmax(falls)])
            key = int(self.keys[np.searchsorted(self.keys, fall, side="right") - 1])
            return Run(key, key + 1, fall + TRIAL, MISSING)
        length = SHORT_TRIAL if not self.reorders else LONG_TRIAL if self.timed else TRIAL
        return Run(self.first, self.first + 1, self.first + length, MISSING)

    def by_time(self):
        """The shown packets in the order of their time stamps, from the first key frame on; None without a clock."""
        if not self.timed:
            return None
        numbers = self.shown[np.argsort(self.pts[self.shown], kind="stable")]
        return numbers[np.argmax(numbers == self.first) :]

    def expected(self, tried):
        """The packets of a set that must yield a frame: all but those displayed before the first, a key frame."""
        shown = tried & set(self.shown.tolist())
        return {number for number in shown if not self.timed or self.pts[number] >= self.pts[min(tried)]}

    def rises(self, numbers):
        """Whether the packets with these numbers follow each other in the order of their time stamps."""
        stamps = [(self.pts[number], number) for number in numbers]
        return stamps == sorted(stamps)


def _is_hidden_vp8(packet):
    """Whether a packet of VP8 contains a frame that only serves as a reference for others."""
    return not bytes(packet)[0] & 0x10


def _is_uneven(stamps):
    """Whether the spacing of rising time stamps varies, as where some pictures are stored as fields."""
    spacings = np.diff(stamps)
    return len(spacings) > 0 and bool((abs(spacings - np.median(spacings)) > np.median(spacings) / 4).any())


def _decoding_order(path, first):
    """The packets of all frames, int64, in the order in which they are decoded, from the key frame first on."""
    numbers = array("q")
    with open_video(path) as (container, stream):
        decoder = Decoder(stream)
        for number, packet in packets_in(ALL_PACKETS, container, stream):
            if number is None or number >= first:
                numbers.extend(frame.pts for frame, _ in decoder.decode(number, packet) if frame.pts is not None)
    numbers = np.array(numbers, np.int64)
    if not len(numbers):
        raise UnreadableVideo("none of its frames can be decoded")
    return numbers[np.argmax(numbers == first) :]


def _rate(header, numbers, stamps, tick, rising):
    """Native frames per second: those of the time stamps, or the header's where they agree with it.

    numbers, stamps: (n,) int64 some frames and their time stamps in ticks. rising: whether the stamps are those of
    display; then they agree if the header puts the last frame within a millisecond or a tick of its stamp, otherwise
    within a hundredth. A few gaps or wrong stamps change the mean spacing of frames, but not the median. So where the
    two differ, only spacings that are not too long count; those close to the median, if the stamps are not those of
    display.
    """
    measured, tolerance = 0, 0.01
    if len(numbers) > 1 and tick:
        counts, spans = np.diff(numbers), np.diff(stamps)
        spacings = spans / counts
        median = np.median(spacings[spacings > 0]) if (spacings > 0).any() else 0
        count, span = int(numbers[-1] - numbers[0]), int(stamps[-1] - stamps[0])
        if not rising or not median / 2 <= span / count <= 2 * median:
            normal = abs(spacings - median) <= max(median / 10, min(1, median / 3))
            if rising:
                normal = spacings <= max(MAX_GAP / tick, 2 * median)
            count, span = int(counts[normal].sum()), int(spans[normal].sum())
        if span > 0:
            measured = count / (span * tick)
            tolerance = max(0.001, tick) / (span * tick) if rising else 0.01
    if 0 < measured <= MAX_RATE and not abs(header - measured) <= measured * tolerance:
        return measured
    if not MIN_HEADER_RATE <= header <= MAX_RATE:
        raise UnreadableVideo(f"its frame rate of {header:g} per second is not plausible")
    return header
