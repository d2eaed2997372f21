"""The benchmark measures work that this project and the published code do alike; small versions of its parts."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moco.analysis import units
from moco.data.frame_folder import FrameFolder
from scripts import (
    benchmark,
    benchmark_files,
    benchmark_inside,
    benchmark_loader,
    benchmark_readouts,
    benchmark_train,
    timing,
)
from tests.support import GOLDEN


@pytest.fixture
def images(tmp_path):
    """Ten 224x224 frames in two classes."""
    return benchmark.link_frames(GOLDEN / "images", 10, tmp_path / "links")


def test_both_films_have_every_frame(images, tmp_path, one_thread):
    for make, name in ((benchmark_inside.our_film, "ours"), (benchmark_inside.published_film, "published")):
        (tmp_path / name).mkdir()
        make(images, tmp_path / name)
        assert [path.stem for path in (tmp_path / name).iterdir()] == ["film"]


def test_units_are_collected_in_one_pass_and_in_one_per_layer(images, monkeypatch, one_thread):
    passes = []
    layer_means = units.layer_means
    monkeypatch.setattr(units, "layer_means", lambda *args: passes.append(args[1]) or layer_means(*args))
    monkeypatch.setattr(benchmark_inside, "LAYERS", (1, 2))
    benchmark_inside.our_units(images, layers=(1, 2))
    benchmark_inside.a_pass_for_each(images)
    assert passes == [(1, 2), (1,), (2,)]


def test_hog_features_of_both_ways_are_equal(images, tmp_path, monkeypatch):
    fitted = []
    monkeypatch.setattr(benchmark_readouts.hog_baseline, "readout", lambda x, *rest: fitted.append(np.array(x)))
    benchmark_readouts.our_hog(images, tmp_path)
    benchmark_readouts.plain_hog(images, tmp_path)
    np.testing.assert_allclose(*fitted, atol=1e-5)
    assert len(fitted[0]) == 5


def test_the_loader_reads_the_images_on_worker_and_device(one_thread, monkeypatch):
    monkeypatch.setattr(benchmark_loader, "IMAGES", 50)
    rows = benchmark_loader.loading(SimpleNamespace(frames=GOLDEN / "images", workers=0, runs=1))
    names = ["torchvision", "torchvision v2", "ours on worker", "ours on device"]
    names += ["two views on worker", "two views on device"]
    assert [row["name"] for row in rows if "lightly" not in row["name"]] == [f"{name}, no workers" for name in names]
    assert rows[0]["seconds_ratio"] == 1 and min(row["seconds"] for row in rows) > 0


def test_images_are_written_and_read_as_files_as_tars_and_by_webdataset(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_files, "PER_VIDEO", 12)
    contents = [bytes([i]) * 1000 for i in range(5)]
    expected = [contents[i % 5] for i in range(30)]
    for kind in benchmark_files.KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        benchmark_files.write(kind, contents, 30, folder)
        frames = FrameFolder(folder)
        assert [frames.read(i) for i in range(len(frames))] == expected
        for order, n in (("open", 0), ("random", 30), ("in order", 30)):
            assert benchmark_files.read(kind, folder, n, order).keys() == {"seconds", "cpu_seconds"}
    assert benchmark_files.memory(tmp_path / "tars").keys() == {"main", "worker"}


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_delay_changes_nothing_but_the_time(tmp_path):
    library = benchmark_files.compile_delay(tmp_path)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "a").write_text("content")
    code = (
        "import os, sys; print(os.listdir(sys.argv[1]), open(sys.argv[1] + '/a').read(), os.stat(sys.argv[1]).st_nlink)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "slow")]
    for environment in ({}, {"LD_PRELOAD": str(library), "SLOW_FOLDER": str(tmp_path / "slow")}):
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("['a'] content 2\n", "")


@pytest.mark.parametrize("mode", ["ours", "plain"])
def test_training_steps_run(mode, one_thread):
    benchmark_train.make_steps("moco mobilenet_v2", 4, mode, "")()


def test_epochs_of_the_published_loop_are_extrapolated_linearly():
    rows = [{"seconds": seconds, "cpu_seconds": seconds, "runs": []} for seconds in (1, 10, 30)]
    _, loop = benchmark_readouts.extrapolate(rows, 100)
    assert loop["seconds"] == 10 + 99 * 10


def test_ratios_compare_runs_made_at_the_same_time(monkeypatch):
    times = iter([1, 2, 3, 30])  # the second pair of runs on a busy machine
    monkeypatch.setattr(timing, "measure", lambda *_: dict.fromkeys(("seconds", "cpu_seconds"), next(times)))
    first, second = timing.measure_in_turn({"a": None, "b": None}, 2)
    assert (first["seconds"], second["seconds"]) == (2, 16)
    assert (first["seconds_ratio"], second["seconds_ratio"]) == (1, 6)
