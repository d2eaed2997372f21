"""Damaged videos: what is output is intact, as far as the decoder can tell."""

import collections

import av
import numpy as np
import pytest

from moco.videos import probe as probing
from moco.videos import video
from moco.videos.probe import probe
from tests.support.videos import flip_bits, number_in, overwrite, packet_bytes, remux, write_video

FILES = {
    "h264.mp4": dict(options={"x264-params": "keyint=20:scenecut=0"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=20:log-level=error"}),
    "av1.mp4": dict(codec="libsvtav1", options={"g": "20", "preset": "10"}),
    "vp8.webm": dict(codec="libvpx", options={"g": "20", "b": "200k"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"g": "20", "cpu-used": "8", "deadline": "realtime"}),
    "mpeg4.avi": dict(codec="mpeg4", options={"g": "20"}),
    "mpeg2.ts": dict(codec="mpeg2video", options={"g": "20", "bf": "2"}),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
}
# The largest share of output images that may be wrong after 10 flipped bits per file. HEVC, VP8 and VP9 do not notice.
WRONG = {"h264.mp4": 0.2, "av1.mp4": 0.05, "mpeg4.avi": 0.2, "mpeg2.ts": 0.2, "mjpeg.avi": 0.1}


def make(folder, name):
    return write_video(folder / name, 120, size=(128, 96), **FILES[name])


def decode(path, step=1):
    """{index: picture} of every step-th frame."""
    info = probe(path)
    indices = np.arange(0, info.frames, step)
    return {int(indices[k]): picture for k, picture in video.frames(path, info.select(indices))}


@pytest.mark.parametrize("name", ["h264.mp4", "av1.mp4", "mpeg4.avi"])
def test_frames_after_damage_are_left_out_until_the_next_key_frame(tmp_path, name):
    path = make(tmp_path, name)
    plain, stored = decode(path), packet_bytes(path)
    keys = [number for number, (_, _, is_key) in enumerate(stored) if is_key]
    position, size, _ = stored[keys[2] + 3]
    overwrite(path, position + 8, bytes(size - 8))
    decoded = decode(path)
    lost = sorted(set(range(120)) - set(decoded))
    assert 0 < len(lost) <= 30 and lost[-1] - lost[0] <= 45
    assert all(np.array_equal(picture, plain[index]) for index, picture in decoded.items())


@pytest.mark.parametrize("delay", [0, 2])
def test_a_key_frame_that_comes_out_after_an_error_does_not_end_the_damage(tmp_path, monkeypatch, delay):
    """Key frames are output with a delay: one that precedes the error does not show that later frames are intact."""
    path = write_video(tmp_path / "v.mp4", 60, options={"x264-params": f"keyint=20:scenecut=0:bframes={delay}"})
    with video.open_video(path) as (container, stream):
        decoder, intact = video.Decoder(stream), []
        for number, packet in video.packets_in(video.ALL_PACKETS, container, stream):
            if number == 21:  # just after a key frame
                decoder._mark_damaged(number)
            intact += [(frame.pts, ok) for frame, ok in decoder.decode(number, packet)]
    assert all(ok == (number >= 40) for number, ok in intact if number > 21)


def test_a_damaged_picture_of_mjpeg_is_not_replaced_by_the_previous_one(tmp_path):
    path = make(tmp_path, "mjpeg.avi")
    position, size, _ = packet_bytes(path)[50]
    overwrite(path, position + size // 2, bytes(size // 4))
    decoded = decode(path)
    assert sorted(set(range(120)) - set(decoded)) == [50]
    assert all(number_in(picture) == index for index, picture in decoded.items())


def test_after_an_error_the_order_of_frames_without_time_stamps_is_kept(tmp_path):
    options = {"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=2"}
    path = remux(write_video(tmp_path / "source.ts", 120, rate=25, options=options), tmp_path / "v.avi")
    for number in (43, 60):
        position, size, _ = packet_bytes(path)[number]
        overwrite(path, position + 8, bytes(size - 8))
    decoded = decode(path)
    assert probe(path).packets is None
    assert 70 < len(decoded) < 120 and max(decoded) == 119
    assert all(number_in(picture) == index for index, picture in decoded.items())


def test_an_absurd_amount_of_memory_is_a_fault_of_the_file(tmp_path, monkeypatch):
    path = make(tmp_path, "mjpeg.avi")

    def demux(*_):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(probing, "packets", demux)
    with pytest.raises(video.UnreadableVideo, match="implausible amount of memory"):
        probe(path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", FILES)
def test_200_files_with_flipped_bits(tmp_path, name, capsys):
    data, count = make(tmp_path, name).read_bytes(), collections.Counter()
    for seed in range(200):
        path = flip_bits(tmp_path / f"damaged_{name}", data, 10, seed)
        try:
            decoded = decode(path, 2)
        except video.UnreadableVideo:
            count["unreadable"] += 1
            continue
        count["images"] += len(decoded)
        count["wrong"] += sum(number_in(picture) != index for index, picture in decoded.items())
    with capsys.disabled():
        print(f"\n{name}: {dict(count)}", end="")
    assert count["images"] > 0
    assert count["wrong"] <= WRONG.get(name, 1) * count["images"]
