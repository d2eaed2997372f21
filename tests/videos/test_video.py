"""Frames out of video files of many codecs and containers, with their pixels and colors."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from moco.videos import probe as probing
from moco.videos import video
from moco.videos.probe import probe
from tests.support.videos import number_in, numbered, write_audio, write_video

KINDS = {
    "plain.mp4": dict(),
    "plain.mov": dict(),
    "plain.mkv": dict(),
    "plain.ts": dict(),
    "plain.avi": dict(codec="mpeg4"),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
    "plain.webm": dict(codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "av1.mp4": dict(codec="libsvtav1", options={"g": "20", "preset": "10"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=15:log-level=error"}),
    "mpeg2.mpg": dict(codec="mpeg2video", options={"bf": "2", "g": "12"}),
    "10-bit.mp4": dict(pixels="yuv420p10le"),
    "interlaced.mp4": dict(options={"x264-params": "tff=1"}),
    "gray.mp4": dict(pixels="gray"),
    "wrong key frames.avi": dict(codec="h263p"),
    "odd.mp4": dict(size=(67, 51), pixels="yuv444p"),
    "portrait.mp4": dict(size=(48, 64)),
    "closed groups.mp4": dict(options={"x264-params": "keyint=10:bframes=3"}),
    "open groups.mp4": dict(options={"x264-params": "open-gop=1:keyint=10:bframes=3"}),
    "open groups.ts": dict(options={"x264-params": "open-gop=1:keyint=10:bframes=3"}),
    "hevc open groups.mkv": dict(
        codec="libx265", options={"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=error"}
    ),
    "intra refresh.mp4": dict(options={"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "variable.mp4": dict(times=np.cumsum(np.random.default_rng(0).integers(10, 90, 60))),
}
CODECS = {
    "libx264": {"x264-params": "keyint=40:bframes=3"},
    "libx265": {"x265-params": "keyint=40:log-level=error"},
    "libsvtav1": {"g": "40", "preset": "10"},
    "libvpx": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
    "mpeg4": {"bf": "2"},
    "mpeg2video": {"bf": "2", "b": "400k"},
    "mpeg1video": {"bf": "2", "b": "400k"},
    "msmpeg4": {},
    "wmv2": {},
    "h263p": {},
    "flv": {},
    "mjpeg": {},
    "ffv1": {},
    "huffyuv": {},
    "utvideo": {},
    "rawvideo": {},
    "dnxhd": {"profile": "dnxhr_lb"},
    "prores": {},
    "svq1": {},
    "qtrle": {},
    "gif": {},
}
PIXELS = {"mjpeg": "yuvj420p", "huffyuv": "yuv422p", "dnxhd": "yuv422p", "prores": "yuv422p10le", "svq1": "yuv410p"}
PIXELS |= {"qtrle": "rgb24", "gif": "rgb8"}
SIZES = {"h263p": (64, 48), "dnxhd": (256, 192)}
CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi", "ts", "mpg", "flv", "asf", "ogg", "mxf", "nut", "gif", "3gp")


def all_frames(path):
    """Every frame of a video as plain decoding yields it, with bicubic chroma."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="bgr24", interpolation="BICUBIC") for frame in file.decode(video=0)]


def select(path, indices):
    """[(index, picture)] of some frames of a video."""
    indices = np.asarray(indices)
    return [(int(indices[k]), picture) for k, picture in video.frames(path, probe(path).select(indices))]


@pytest.mark.parametrize("kind", KINDS)
def test_selected_frames_are_those_of_plain_decoding(tmp_path, kind):
    path = write_video(tmp_path / kind, 60, **KINDS[kind])
    info, plain = probe(path), all_frames(path)
    width, height = KINDS[kind].get("size", (64, 48))
    assert (info.width, info.height, info.frames) == (width, height, 60)
    assert info.is_constant_rate() == (kind != "variable.mp4")
    if info.is_constant_rate():
        assert info.rate == pytest.approx(30000 / 1001, rel=0.01)
    for indices in (range(60), range(0, 60, 6), [0], [9], [10], [25, 31], [7, 8, 9, 11, 58, 59]):
        decoded = select(path, indices)
        assert [index for index, _ in decoded] == list(indices)
        for index, picture in decoded:
            assert np.array_equal(picture, plain[index]), index
            assert number_in(picture) == index


@pytest.mark.thorough
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_in_all_containers_at_all_rates(tmp_path, codec, capsys):
    """At 0.2, 1, 5 and 30 frames per second; the difference from OpenCV is printed."""
    for container in CONTAINERS:
        if (codec, container) == ("h263p", "mpg"):  # opened as a raw H.263 stream, which is not a supported container
            continue
        path = tmp_path / f"v.{container}"
        try:
            write_video(
                path, 310, codec=codec, rate=25 if codec.startswith(("mpeg", "msmpeg")) else Fraction(30000, 1001),
                pixels=PIXELS.get(codec, "yuv420p"), size=SIZES.get(codec, (128, 96)), options=CODECS[codec],
            )  # fmt: skip
            plain = len(all_frames(path))
        except (av.error.FFmpegError, ValueError, IndexError):  # this container cannot store this codec
            continue
        info, capture = probe(path), cv2.VideoCapture(str(path))
        pictures = dict(select(path, range(info.frames)))
        same, difference = 0, 0
        for index in range(info.frames):
            ok, picture = capture.read()
            if ok:
                difference = max(difference, int(abs(picture.astype(int) - pictures[index]).max()))
                same += np.array_equal(picture, pictures[index])
        right = sum(number_in(picture) == index for index, picture in pictures.items())
        with capsys.disabled():
            print(f"\n{codec:12}{container:6}{right:4} of {plain} right, {same} as OpenCV's, {difference}", end="")
        assert right == info.frames == plain
        for step in (6, 30, 150):
            decoded = select(path, range(0, 310, step))
            assert [index for index, _ in decoded] == list(range(0, 310, step))
            assert all(np.array_equal(picture, pictures[index]) for index, picture in decoded)


def test_groups_of_pictures_without_selected_frames_are_not_decoded(tmp_path):
    path = write_video(tmp_path / "v.mp4", 400, options={"x264-params": "keyint=20:min-keyint=20:scenecut=0"})
    selection = probe(path).select([10, 200])
    assert selection.runs[:, 0].tolist() == [0, 200]
    assert selection.runs[-1, 2] == 201
    with video.open_video(path) as (container, stream):
        numbers = [number for number, _ in video.packets_in(selection.runs, container, stream) if number is not None]
    assert len(numbers) <= 16
    assert [(index, number_in(picture)) for index, picture in select(path, [10, 200])] == [(10, 10), (200, 200)]


def test_a_seek_that_fails_costs_no_frame(tmp_path):
    path = write_video(tmp_path / "v.mp4", 400, options={"x264-params": "keyint=20:min-keyint=20:scenecut=0"})
    selection = probe(path).select([10, 200, 399])
    selection.runs[1:, 3] += 1
    assert [number_in(picture) for _, picture in video.frames(path, selection)] == [10, 200, 399]


COLORS = {
    "8-bit.mp4": dict(),
    "10-bit.mp4": dict(pixels="yuv420p10le"),
    "full range.mp4": dict(pixels="yuvj420p"),
    "bt709.mp4": dict(options={"x264-params": "colormatrix=bt709"}),
    "pq.mp4": dict(
        pixels="yuv420p10le",
        options={"x264-params": "colormatrix=bt2020nc:colorprim=bt2020:transfer=smpte2084"},
    ),
    "hlg.mp4": dict(
        pixels="yuv420p10le",
        options={"x264-params": "colormatrix=bt2020nc:colorprim=bt2020:transfer=arib-std-b67"},
    ),
    "p3.mp4": dict(options={"x264-params": "colormatrix=bt709:colorprim=smpte432:transfer=iec61966-2-1"}),
    "svq1.mov": dict(codec="svq1", pixels="yuv410p"),
}


def write_colors(path, codec="libx264", pixels="yuv420p", options=None):
    """A video of 5 frames with all hues."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 96, pixels
        y, x = np.mgrid[:96, :128]
        for k in range(5):
            picture = np.stack([2 * x, 255 - 2 * y, (x * 3 + y * 5 + 20 * k) % 256], 2).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format=pixels)))
        file.mux(stream.encode())
    return path


SLOW_COLORS = [pytest.param(kind, marks=pytest.mark.thorough) for kind in ("hlg.mp4", "p3.mp4")]


@pytest.mark.parametrize("kind", [*(kind for kind in COLORS if kind not in ("hlg.mp4", "p3.mp4")), *SLOW_COLORS])
def test_pixels_equal_those_of_opencv(tmp_path, kind):
    path = write_colors(tmp_path / kind, **COLORS[kind])
    capture = cv2.VideoCapture(str(path))
    for _, picture in select(path, range(5)):
        assert np.array_equal(picture, capture.read()[1])


@pytest.mark.parametrize("matrix", ["YCgCo", "bt2020c", "chroma-derived-c", "ICtCp"])
def test_a_color_matrix_that_cannot_be_converted_is_read_as_bt601(tmp_path, matrix):
    options = {"x264-params": f"colormatrix={matrix}"}
    path = write_colors(tmp_path / "v.mp4", options=options)
    plain = write_colors(tmp_path / "plain.mp4", options={"x264-params": "colormatrix=smpte170m"})
    decoded, expected = select(path, range(5)), select(plain, range(5))
    assert len(decoded) == 5
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(decoded, expected, strict=True))


def test_the_first_of_several_video_streams_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        streams = [file.add_stream("libx264", rate=25), file.add_stream("libx264", rate=25)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k, stream in enumerate(streams):
            for _ in range(5 + k):
                gray = np.full((48, 64), 60 + 100 * k, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="gray").reformat(format="yuv420p")))
            file.mux(stream.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        file.mux([*sound.encode(frame), *sound.encode()])
    assert probe(path).frames == 5
    assert all(abs(int(picture.mean()) - 60) < 12 for _, picture in select(path, range(5)))


@pytest.mark.parametrize("header", [Fraction(0), Fraction(1, 1000), Fraction(100_000)])
def test_time_stamps_replace_an_implausible_rate_in_the_header(header):
    numbers, times = np.arange(100), np.arange(100) * 40
    assert probing._rate(float(header), numbers, times, 0.001, True) == 25
    with pytest.raises(video.UnreadableVideo, match="not plausible"):
        probing._rate(float(header), numbers[:0], times[:0], 0.001, False)


@pytest.mark.parametrize("content", [b"", b"text " * 1000, b"\0\0\0\x18ftypmp42" + bytes(1000), b"RIFF\xff\xffAVI "])
def test_a_file_that_is_not_a_video_is_unreadable(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    for name in ("v.mp4", "missing.mp4"):
        with pytest.raises(video.UnreadableVideo):
            probe(tmp_path / name)


def test_sound_alone_and_a_frame_too_narrow_for_a_square_are_unreadable(tmp_path):
    with pytest.raises(video.UnreadableVideo, match="no video stream"):
        probe(write_audio(tmp_path / "sound.mp4"))
    with pytest.raises(video.UnreadableVideo, match="too narrow"):
        probe(write_video(tmp_path / "v.mp4", 3, size=(1320, 40)))


def test_numbers_of_the_tests_are_those_of_the_frames():
    assert [number_in(np.repeat(numbered(k)[:, :, None], 3, 2)) for k in (0, 5, 1023)] == [0, 5, 1023]
