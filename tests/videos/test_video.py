"""Video files of many kinds: what they hold, and the wanted frames out of them."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from moco.videos import video
from tests.support.videos import numbered, write_video

KINDS = {
    "plain.mp4": dict(),
    "plain.mov": dict(),
    "plain.mkv": dict(),
    "plain.ts": dict(),
    "plain.avi": dict(codec="mpeg4"),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
    "plain.webm": dict(codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "10-bit.mp4": dict(pixels="yuv420p10le"),
    "interlaced.mp4": dict(options={"x264-params": "tff=1"}),
    "gray.mp4": dict(pixels="gray"),
    "odd.mp4": dict(size=(67, 51), pixels="yuv444p"),
    "portrait.mp4": dict(size=(48, 64)),
    "open groups.mp4": dict(options={"x264-params": "open-gop=1:keyint=10:bframes=3"}),
    "variable.mp4": dict(times=np.cumsum(np.random.default_rng(0).integers(10, 90, 60))),
}


def all_frames(path):
    """Every frame of a video as plain decoding gives it."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="bgr24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 6])
def test_wanted_frames_are_those_of_plain_decoding(tmp_path, kind, step):
    path = write_video(tmp_path / kind, 60, **KINDS[kind])
    held, wanted = video.probe(path), np.arange(0, 60, step)
    width, height = KINDS[kind].get("size", (64, 48))
    assert (held.width, held.height, held.frames) == (width, height, 60)
    assert held.is_constant_rate() == (kind != "variable.mp4")
    if held.is_constant_rate():
        assert held.rate == pytest.approx(30000 / 1001, rel=0.01)
    got, plain = list(video.frames(path, wanted, held)), all_frames(path)
    assert [place for place, _ in got] == list(range(len(wanted)))
    assert all(np.array_equal(picture, plain[wanted[place]]) for place, picture in got)
    assert np.abs(got[0][1][:, :, 1].astype(int) - numbered(0, width, height)).mean() < 20


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_rotated_video_is_upright_as_opencv_shows_it(tmp_path, turn):
    path = write_video(tmp_path / "v.mp4", 3, turn=turn)
    (_, picture), *_ = video.frames(path, np.arange(1), video.probe(path))
    assert np.array_equal(picture, cv2.VideoCapture(str(path)).read()[1])


def test_pictures_equal_those_of_opencv(tmp_path):
    path = write_video(tmp_path / "v.mp4", 20)
    capture = cv2.VideoCapture(str(path))
    for _, picture in video.frames(path, np.arange(20), video.probe(path)):
        assert np.array_equal(picture, capture.read()[1])


def test_the_first_of_several_video_streams_is_read_and_sound_is_passed_over(tmp_path):
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
    held = video.probe(path)
    assert held.frames == 5
    assert all(abs(int(picture.mean()) - 60) < 12 for _, picture in video.frames(path, np.arange(5), held))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        file.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(video.UnreadableVideo, match="no video stream"):
        video.probe(tmp_path / "sound.mp4")


def test_frames_after_damage_are_not_given_until_the_next_key_frame(tmp_path):
    options = dict(options={"x264-params": "keyint=20:scenecut=0"}, container_options={"movflags": "faststart"})
    path = write_video(tmp_path / "v.mp4", 200, **options)
    plain, data = all_frames(path), bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size and not packet.is_keyframe][100]
        data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    path.write_bytes(data)
    got = dict(video.frames(path, np.arange(200), video.probe(path)))
    lost = sorted(set(range(200)) - set(got))
    assert 0 < len(lost) <= 25 and lost[-1] // 20 - lost[0] // 20 <= 1
    assert all(np.array_equal(picture, plain[k]) for k, picture in got.items())


@pytest.mark.parametrize("header", [Fraction(0), Fraction(1, 1000), Fraction(100_000)])
def test_time_stamps_count_more_than_a_rate_in_the_header_that_cannot_be(header):
    times = np.arange(0, 100) * 40
    assert video._rate(float(header), times, 0.001) == 25
    with pytest.raises(video.UnreadableVideo, match="cannot be right"):
        video._rate(float(header), None, 0.001)


@pytest.mark.parametrize("content", [b"", b"text " * 1000, b"\0\0\0\x18ftypmp42" + bytes(1000), b"RIFF\xff\xffAVI "])
def test_what_is_no_video_is_said_to_be_none(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(video.UnreadableVideo):
        video.probe(tmp_path / "v.mp4")
    with pytest.raises(video.UnreadableVideo):
        video.probe(tmp_path / "missing.mp4")
