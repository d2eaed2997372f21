"""Odd video files: made-up, repeated and missing time stamps, joined and cut recordings, unusual streams."""

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from moco.videos import planning, video
from moco.videos.probe import probe
from tests.support import videos
from tests.support.field_coded import write_field_coded
from tests.support.videos import number_in, remux, write_video

B_FRAMES = dict(options={"bf": "2", "g": "15", "x264-params": "b-adapt=0:scenecut=0"})
NO_B_FRAMES = dict(options={"bf": "0", "g": "15", "x264-params": "scenecut=0"})


def numbers(path, step=1):
    """The numbers in every step-th frame, as the reader selects them."""
    info = probe(path)
    decoded = list(video.frames(path, info.select(np.arange(0, info.frames, step))))
    assert [position for position, _ in decoded] == list(range(len(decoded)))
    return [number_in(picture) for _, picture in decoded]


def assert_all_frames(path, expected):
    """All frames come in the expected order, and each of a selection is the same."""
    expected = list(expected)
    assert probe(path).frames == len(expected)
    for step in (1, 6, 25):
        assert numbers(path, step) == expected[::step]


def join(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("container", ["v.avi", "v.asf"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_are_in_order_where_the_container_keeps_no_display_times(tmp_path, codec, container):
    options = B_FRAMES["options"] if codec == "libx264" else {"bf": "2", "g": "15"}
    source = write_video(tmp_path / "source.ts", 60, codec=codec, rate=25, options=options)
    assert_all_frames(remux(source, tmp_path / container), range(60))


@pytest.mark.parametrize("container", ["v.mkv", "v.mp4", "v.ts"])
def test_frames_are_in_order_after_display_times_were_replaced_by_decoding_times(tmp_path, container):
    """As copies from AVI to other containers have them."""

    def replace(number, packet):
        packet.pts = packet.dts = number * step

    source = write_video(tmp_path / "source.mp4", 60, rate=25, **B_FRAMES)
    with av.open(str(source)) as file:
        step = int(1 / (25 * file.streams.video[0].time_base))
    assert_all_frames(remux(source, tmp_path / container, replace), range(60))


def test_b_frames_that_begin_late_are_noticed(tmp_path):
    options = {"bf": "2", "g": "250", "x264-params": "b-adapt=1:scenecut=0:rc-lookahead=10"}
    path = tmp_path / "v.ts"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(150):
            frame = av.VideoFrame.from_ndarray(videos.numbered(k), format="gray").reformat(format="yuv420p")
            frame.pts = k
            frame.pict_type = PictureType.P if 0 < k < 100 else PictureType.NONE
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert_all_frames(path, range(150))
    assert_all_frames(remux(path, tmp_path / "v.avi"), range(150))


def pack_b_frames(source, path):
    """Copy MPEG-4 to AVI as DivX 5 packs it: a B-frame in the packet of the frame it is stored after."""
    not_coded = b"\0\0\1\xb6\x51\x00\x3f"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        chunks, types = [], []
        for packet in old.demux(video=0):
            if packet.size:
                content = bytes(packet)
                types.append(content[content.index(b"\0\0\1\xb6") + 4] >> 6)  # 0 I, 1 P, 2 B
                chunks.append((content, packet.is_keyframe))
        packed, n = [], 0
        while n < len(chunks):
            content, is_key = chunks[n]
            following = [chunks[m][0] for m in range(n + 1, min(n + 2, len(chunks))) if types[m] == 2]
            packed.append((b"".join([content, *following]), is_key))
            packed += [(not_coded, False)] * len(following)
            n += 1 + len(following)
        marker = b"\0\0\1\xb2DivX503b1393p"
        packed[0] = (stream.codec_context.extradata + marker + packed[0][0], True)
        for number, (content, is_key) in enumerate(packed):
            packet = av.Packet(content)
            packet.stream, packet.is_keyframe = stream, is_key
            packet.pts = packet.dts = number
            packet.time_base = 1 / old.streams.video[0].average_rate
            new.mux(packet)
    return path


def test_b_frames_packed_into_the_packets_of_others_are_all_read(tmp_path):
    source = write_video(tmp_path / "v.mp4", 60, codec="mpeg4", rate=25, options={"bf": "1", "g": "15"})
    assert_all_frames(pack_b_frames(source, tmp_path / "packed.avi"), range(60))


@pytest.mark.parametrize("options", [B_FRAMES, NO_B_FRAMES])
@pytest.mark.parametrize("start", [0, 45_000, 95_000 * 90_000])
def test_joined_transport_streams_follow_one_another(tmp_path, options, start):
    """The clock of the second falls back, a little or far, as also where a clock of 33 bits overflows."""

    def shift(number, packet):
        packet.pts += start
        packet.dts += start

    first = write_video(tmp_path / "1.ts", 60, rate=25, **options)
    late = remux(first, tmp_path / "2.ts", shift)
    second = write_video(tmp_path / "3.ts", 40, rate=25, first=100, **options)
    path = join(tmp_path / "joined.ts", late, second)
    assert_all_frames(path, [*range(60), *range(100, 140)])
    assert probe(path).rate == pytest.approx(25, rel=0.001)


def change_time(frame, milliseconds):
    """A change for remux that moves the time stamp of one packet."""

    def change(number, packet):
        if number == frame:
            packet.pts += milliseconds
            packet.dts = min(packet.dts, packet.pts)

    return change


def test_a_repeated_time_stamp_changes_nothing_else(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 200))
    source = write_video(tmp_path / "source.mkv", 200, times=times, **NO_B_FRAMES)
    path = remux(source, tmp_path / "v.mkv", change_time(101, int(times[100] - times[101])))
    times[101] = times[100]
    info = probe(path)
    assert np.array_equal(info.times, times)
    sampled = planning.sampled_frames(info, 5)[0]
    assert np.array_equal(np.floor((times[sampled] - times[0]) / 200), np.arange(len(sampled)))
    assert [number_in(picture) for _, picture in video.frames(path, info.select(sampled))] == sampled.tolist()
    assert_all_frames(path, range(200))


@pytest.mark.parametrize("frame", [5, 70, 149])
@pytest.mark.parametrize("options", [B_FRAMES, NO_B_FRAMES])
def test_one_time_stamp_far_off_changes_nothing_else(tmp_path, frame, options):
    source = write_video(tmp_path / "source.mkv", 150, rate=25, **options)
    path = remux(source, tmp_path / "v.mkv", change_time(frame, 20_000_000))
    info = probe(path)
    assert info.rate == pytest.approx(25, rel=0.02)
    decoded = video.frames(path, info.select(np.arange(150)))
    assert sorted(number_in(picture) for _, picture in decoded) == list(range(150))
    sampled = info.select(planning.sampled_frames(info, 5)[0])
    shown = [number_in(picture) for _, picture in video.frames(path, sampled)]
    assert 29 <= len(shown) <= 32
    assert sum(n % 5 == 0 for n in shown) >= 29


def test_20_frames_in_an_hour_are_a_video(tmp_path):
    path = write_video(tmp_path / "v.mkv", 20, times=np.arange(20) * 180_000, **NO_B_FRAMES)
    info = probe(path)
    assert info.rate == pytest.approx(1 / 180)
    assert_all_frames(path, range(20))


@pytest.mark.parametrize("coded", [[True] * 20, [False] * 20, [False] * 12 + [True] * 8, [True] * 12 + [False] * 8])
def test_the_fields_of_a_frame_count_once(tmp_path, coded):
    path = write_field_coded(tmp_path / "v.ts", coded)
    assert_all_frames(path, range(20))
    info = probe(path)
    assert info.rate == pytest.approx(25, rel=0.001) and info.is_constant_rate()


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_a_file_cut_at_a_key_frame_is_complete(tmp_path, codec):
    source = write_video(tmp_path / "source.mp4", 90, codec=codec, rate=25, options={"g": "15"})
    key = [n for n, (_, _, is_key) in enumerate(videos.packet_bytes(source)) if is_key][2]
    path = remux(source, tmp_path / ("v.ivf" if codec == "libsvtav1" else "v.mp4"), first=key)
    shown = numbers(path)
    assert_all_frames(path, range(shown[0], 90))
    assert shown[0] <= 45


@pytest.mark.parametrize("container", ["v.mkv", "v.ts", "v.avi"])
def test_frames_before_the_first_key_frame_are_absent_not_damaged(tmp_path, container):
    source = write_video(tmp_path / "source.ts", 60, rate=25, **NO_B_FRAMES)
    path = remux(source, tmp_path / container, first=20)
    assert_all_frames(path, range(30, 60))


@pytest.mark.parametrize(
    "name, codec", [("v.h264", "libx264"), ("v.h265", "libx265"), ("v.m2v", "mpeg2video"), ("v.mjpeg", "mjpeg")]
)
def test_raw_streams_are_read_in_order(tmp_path, name, codec):
    container = {"v.h265": "hevc", "v.m2v": "mpeg2video"}.get(name, name[2:])
    options = {"libx265": {"x265-params": "log-level=error"}, "mpeg2video": {"bf": "2"}, "mjpeg": {}}
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(
        tmp_path / name, 60, codec=codec, rate=25, pixels=pixels, format=container,
        options=options.get(codec, B_FRAMES["options"]),
    )  # fmt: skip
    assert_all_frames(path, range(60))
    assert probe(path).rate == pytest.approx(25)


def test_y4m_is_read(tmp_path):
    path = tmp_path / "v.y4m"
    with open(path, "wb") as file:
        file.write(b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420jpeg\n")
        for k in range(20):
            file.write(b"FRAME\n" + videos.numbered(k).tobytes() + bytes([128]) * (64 * 48 // 2))
    assert_all_frames(path, range(20))
    assert probe(path).rate == 25


def test_a_stream_that_appears_late_ends_the_file(tmp_path):
    """PyAV raises IndexError there."""
    first = write_video(tmp_path / "1.ts", 60, rate=25, **NO_B_FRAMES)
    with av.open(str(tmp_path / "2.ts"), "w", options={"tables_version": "1"}) as file:
        pictures = file.add_stream("libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = file.add_stream("aac", rate=44100)
        for k in range(60):
            frame = av.VideoFrame.from_ndarray(videos.numbered(k), format="gray").reformat(format="yuv420p")
            frame.pts = k
            file.mux(pictures.encode(frame))
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.rate = 44100
            file.mux(sound.encode(tone))
        file.mux([*pictures.encode(), *sound.encode()])
    stuffing = (b"\x47\x1f\xff\x10" + b"\xff" * 184) * 30_000  # FFmpeg examines 5 MB, and the end, in advance
    path = tmp_path / "v.ts"
    path.write_bytes(stuffing.join([first.read_bytes(), (tmp_path / "2.ts").read_bytes(), first.read_bytes()]))
    with av.open(str(path)) as file, pytest.raises(IndexError):
        list(file.demux(video=0))
    shown = numbers(path)
    assert shown[:58] == list(range(58))
