"""The decoders that the benchmark compares read the same frames."""

import pytest

from scripts import benchmark_readers
from tests.support.videos import write_video


@pytest.mark.parametrize("fps, expected", [(0.2, 2), (1, 7), (5, 34), (30, 200)])
def test_all_decoders_read_the_same_number_of_frames(tmp_path, fps, expected):
    path = str(write_video(tmp_path / "v.mp4", 200))
    assert benchmark_readers.ours(path, fps) == benchmark_readers.opencv(path, fps) == expected
    if benchmark_readers.has_torchcodec():
        assert benchmark_readers.torchcodec(path, fps) == expected
