"""How a player shows a video: its pixels, turned and mirrored, and its seconds."""

from fractions import Fraction
from itertools import product

import av
import numpy as np
import pytest

from moco.data import manifest, recordings
from moco.videos import planning, video
from moco.videos.probe import probe
from tests.support.videos import number, read, remux, write_video

GRAY = np.array([[230, 160], [90, 30]])  # of the quarters of a picture


def write_quarters(path, size=(96, 64), aspect=None):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        picture = np.kron(GRAY.astype(np.uint8), np.ones((size[1] // 2, size[0] // 2), np.uint8))
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "gray").reformat(format="yuv420p")))
        file.mux(stream.encode())
    return path


def first_picture(path):
    info = probe(path)
    (_, picture), *_ = video.frames(path, info.select([0]))
    assert picture.shape[:2] == (info.height, info.width)
    return picture


@pytest.mark.parametrize("exchanged, x, y", [*product((False, True), (1, -1), (1, -1))])
def test_a_display_matrix_turns_and_mirrors(tmp_path, exchanged, x, y):
    a, b, c, d = (0, y, x, 0) if exchanged else (x, 0, 0, y)
    path = write_quarters(tmp_path / "v.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = (np.array([a, b, 0, c, d, 0, 0, 0, 2**14]) * 2**16).astype(">i4").tobytes()
    path.write_bytes(data)
    picture = first_picture(path)[:, :, 0].astype(int)
    height, width = picture.shape
    assert (width, height) == ((64, 96) if exchanged else (96, 64))
    for row, column in product((0, 1), repeat=2):  # from the center, a point goes where the matrix says
        from_x, from_y = 2 * column - 1, 2 * row - 1
        to_x, to_y = a * from_x + c * from_y, b * from_x + d * from_y
        shown = picture[height // 2 + to_y * height // 4, width // 2 + to_x * width // 4]
        assert abs(shown - GRAY[row, column]) < 4


@pytest.mark.parametrize(
    "size, aspect, width",
    [
        ((720, 480), (8, 9), 640), ((720, 480), (32, 27), 853), ((720, 576), (16, 15), 768),
        ((720, 576), (64, 45), 1024), ((1440, 1080), (4, 3), 1920), ((640, 480), None, 640),
    ],
)  # fmt: skip
def test_pixels_are_square(tmp_path, size, aspect, width):
    path = write_quarters(tmp_path / "v.mp4", size, aspect and Fraction(*aspect))
    assert first_picture(path).shape == (size[1], width, 3)


def test_the_aspect_ratio_of_the_container_precedes_that_of_the_stream(tmp_path):
    path = write_quarters(tmp_path / "v.mp4", aspect=Fraction(4, 3))
    data = path.read_bytes()
    box = b"pasp" + np.array([4, 3], ">i4").tobytes()
    assert data.count(box) == 1
    path.write_bytes(data.replace(box, b"pasp" + np.array([2, 1], ">i4").tobytes()))
    assert first_picture(path).shape == (64, 192, 3)


def write_late(path, seconds, rate=10, **options):
    """A video of 40 frames whose picture begins some seconds after its sound."""
    source = write_video(path.with_name("source.mp4"), 40, rate=rate, **options)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        pictures = new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream("aac", rate=8000)
        for k in range(40):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.rate, tone.pts, tone.time_base = 8000, 1024 * k, Fraction(1, 8000)
            new.mux(sound.encode(tone))
        for packet in old.demux(video=0):
            if packet.size:
                late = round(seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, pictures
                new.mux(packet)
        new.mux(sound.encode())
    return path


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_seconds_count_from_the_beginning_of_the_file(tmp_path, name):
    (tmp_path / "videos").mkdir()
    write_late(tmp_path / "videos" / name, 1.5, options={"bf": "0"})
    (tmp_path / "videos" / "source.mp4").unlink()
    (tmp_path / "moments.csv").write_text(f"file,seconds\n{name},3.0\n{name},0.2\n")
    read(tmp_path / "videos", tmp_path / "out", "--moments", tmp_path / "moments.csv")
    begin = probe(tmp_path / "videos" / name).start
    assert begin == pytest.approx(1.5, abs=0.13)  # an encoder of sound adds up to 1024 samples before it
    images = manifest.load(tmp_path / "out")
    assert [number(tmp_path / "out" / images.path(i)) for i in range(2)] == [0, round(10 * (3 - begin))]
    read(tmp_path / "videos", tmp_path / "regular", "--fps", 2)
    images = manifest.load(tmp_path / "regular")
    assert [images.source(i).second for i in (0, 3)] == pytest.approx([begin, begin + 1.5], abs=0.002)
    assert images.source(recordings.find_moment(images, name, begin + 3.9)).frame == 35


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_seconds_of_a_file_cut_without_re_encoding_begin_at_0(tmp_path, name):
    """As by `ffmpeg -ss 1 -c copy`: the file begins at a key frame before the cut, with negative time stamps."""
    options = {"g": "10", "bf": "0", "x264-params": "scenecut=0"}
    source = write_video(tmp_path / "source.mp4", 50, rate=25, options=options)

    def shift(k, packet):
        packet.pts = packet.dts = packet.pts - round(1 / packet.time_base)

    info = probe(remux(source, tmp_path / name, shift, first=20))
    assert info.seconds([0, info.frames - 1]) == pytest.approx([0, (info.frames - 1) / 25], abs=0.002)
    assert info.frames == (25 if name == "v.mp4" else 30)  # the edit list of MP4 hides what comes before the cut


def test_the_rate_is_that_of_the_time_stamps(tmp_path):
    """An MKV that says 30 and has 29.75 would be 30 seconds off after an hour."""
    times = np.round(np.arange(300) * 1000 / 29.75)
    path = write_video(tmp_path / "v.mkv", 300, rate=30, times=times, options={"bf": "0"})
    with av.open(str(path)) as file:
        header = float(file.streams.video[0].average_rate)
    info = probe(path)
    assert header == pytest.approx(30) and info.rate == pytest.approx(29.75, abs=0.005)
    read(tmp_path, tmp_path / "out")
    images = manifest.load(tmp_path / "out")
    for i in (0, 25, len(images) - 1):
        source = images.source(i)
        assert source.second == pytest.approx(times[source.frame] / 1000, abs=0.002)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.avi"])
@pytest.mark.parametrize("rate", [30, Fraction(30000, 1001), 25])
def test_a_right_header_keeps_its_rate(tmp_path, name, rate):
    info = probe(write_video(tmp_path / name, 100, rate=rate, options={"bf": "0"}))
    assert info.rate == info.header_rate == pytest.approx(float(rate), abs=1e-9)


@pytest.mark.parametrize("is_constant", [True, False])
def test_seconds_of_an_uneven_rate_are_those_of_its_time_stamps(tmp_path, is_constant):
    """As phones record them: each frame some milliseconds late, or at any time."""
    random = np.random.default_rng(0)
    times = np.arange(90) * 40 + random.integers(0, 13, 90) if is_constant else np.cumsum(random.integers(10, 90, 90))
    path = write_video(tmp_path / "v.mkv", 90, times=times, options={"bf": "0"})
    assert probe(path).is_constant_rate() == is_constant
    read(tmp_path, tmp_path / "out")
    images = manifest.load(tmp_path / "out")
    for i in range(len(images)):
        source = images.source(i)
        assert source.frame == number(tmp_path / "out" / images.path(i)) == (5 * i if is_constant else source.frame)
        assert source.second == pytest.approx((times[source.frame] - times[0]) / 1000, abs=0.001)


@pytest.mark.parametrize("rate, container", [("7.5", "mp4"), ("12.5", "mkv"), ("24", "mp4"), ("24", "avi")])
def test_where_no_whole_step_fits_images_are_sampled_by_time(tmp_path, rate, container):
    rate = Fraction(rate)
    write_video(tmp_path / f"v.{container}", int(10 * rate), rate=rate, options={"bf": "0"})
    read(tmp_path, tmp_path / "out", "--fps", 5, "--seg-len", 4)
    images = manifest.load(tmp_path / "out")
    assert len(images) == 50 and images.counts == [20, 20, 10]
    sources = [images.source(i) for i in range(50)]
    assert [source.frame for source in sources] == [-(-k * rate // 5) for k in range(50)]
    assert [sources[k].second for k in (20, 40)] == pytest.approx([4, 8], abs=0.0011)
    assert [number(tmp_path / "out" / images.path(i)) for i in range(50)] == [source.frame for source in sources]


def test_the_published_step_says_what_it_gives(tmp_path, capsys):
    write_video(tmp_path / "v.mp4", 70, rate=30)
    read(tmp_path, tmp_path / "out", "--published-step")
    assert "--published-step gives 4.29 images per second, not 5" in capsys.readouterr().out
    assert manifest.load(tmp_path / "out").source(1).frame == 7
    assert planning.sampled_frames(probe(tmp_path / "v.mp4"), 5)[1] == 6
