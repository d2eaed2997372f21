"""The benchmark runs; all implementations of a part do the same work."""

from argparse import Namespace

import pytest

from moco.data import augment, loader
from moco.data.folders import FrameFolder
from scripts import benchmark
from tests.support import GOLDEN
from tests.support.videos import write_video

pytestmark = pytest.mark.usefixtures("handlers", "empty_figures")
IMAGES = GOLDEN / "images"


def test_both_readers_write_the_same_number_of_images(tmp_path):
    write_video(tmp_path / "v.mp4", 200)
    assert benchmark.plain_reader(tmp_path) == benchmark.read_saycam(tmp_path, 0) == 34


def test_both_loaders_read_all_images_and_are_measured(capfd):
    assert benchmark.torchvision_loader(IMAGES, 20, 0) == benchmark.frame_loader(IMAGES, 20, 0) == 48
    benchmark.main(["loader", str(IMAGES), "--workers", "1", "--runs", "1"])
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["torchvision", "ours,"]
    assert [row[-2] for row in rows] == ["ratio", "ratio"] and rows[0][-1] == "1"


@pytest.mark.parametrize("trainer", ["temporal_classification", "moco_img"])
def test_training_is_measured_on_made_up_frames(trainer, tmp_path, monkeypatch):
    args = Namespace(data=tmp_path, trainer=trainer, arch="shufflenet_v2_x0_5", batch_size=8, images=16, device="cpu")
    args.compile, args.workers = False, [1]
    benchmark.write_frames(tmp_path, args.images)
    assert len(FrameFolder(tmp_path)) == 16
    assert 15_000 < sum(path.stat().st_size for path in tmp_path.glob("*/*")) / 16 < 20_000
    monkeypatch.setattr(loader.FrameLoader, "epoch", benchmark.read_epoch)  # restored after the replacements
    results = {name: benchmark.measure(work) for name, work in benchmark.training(args).items()}
    plain, one_batch, folder = results.values()
    assert list(results) == ["plain float32, one batch", "one batch", "folder, 1 workers"]
    assert plain.keys() == {"images/s", "GiB"} and min(plain.values()) > 0
    assert one_batch.keys() == folder.keys() == {"images/s", "waiting", "GiB"}


def test_the_same_batch_comes_in_all_epochs():
    frames = FrameFolder(IMAGES)
    batches = loader.FrameLoader(frames, augment.RECIPES["none"], 32, loader.EpochSampler(48, 20), "cpu")
    both = [*benchmark.same_batch(batches, 0), *benchmark.same_batch(batches, 1)]
    assert len(both) == 6 and all(batch is both[0] for batch in both)


def test_ratios_compare_runs_of_the_same_turn():
    turns = {"a": [1, 3], "b": [2, 30]}  # the second turn on a faster machine
    rows = benchmark.medians({name: [{"images/s": rate} for rate in rates] for name, rates in turns.items()})
    assert rows == {"a": {"images/s": 2, "ratio": 1}, "b": {"images/s": 16, "ratio": 6}}
