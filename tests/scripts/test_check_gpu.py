"""check_gpu.py runs on a CPU with what can be checked there, and reports what does not hold."""

import json

import pytest

from scripts import check_gpu, check_gpu_training
from scripts.check_gpu import Result

CHECKED = [  # on a CPU, by the beginning of their names
    *(
        "torch",
        "color of released",
        "bf16 logits: moco_temp, augmentation on device",
        "channels last: moco_img, 2 processes",
    ),
    *("time: temporal_classification", "speed, 0 workers", "SIGUSR2 saves", "resume with --deterministic"),
    *("a checkpoint opens", "equal weights: moco_img, 2 processes", "every image once", "an error in one process"),
]
NEED_GPU = ["kernels for the GPU", "features, GPU and CPU", "no host sync: moco_img", "speed, images on the device"]


def test_all_that_a_cpu_can_check_holds(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = check_gpu.main(["--device", "cpu", "--save-dir", str(tmp_path)])
    results = json.loads((tmp_path / "check_gpu.json").read_text())
    assert status == 0, [result for result in results if result["holds"] is False]
    for holds, names in ((True, CHECKED), (None, NEED_GPU)):
        for name in names:
            assert {result["holds"] for result in results if result["name"].startswith(name)} == {holds}, name
    lines = capsys.readouterr().out.splitlines()[-len(results) :]
    assert [line.split("  ")[0] for line in lines] == [result["name"] for result in results]


def test_what_does_not_hold_is_reported_and_ends_with_status_1(tmp_path, monkeypatch, capsys):
    def check_one(setup):
        """One."""
        yield Result("one", True, "")
        yield Result("two", False, "because")

    def check_other(setup):
        """Other."""
        yield Result("three", None, "needs more")
        raise ValueError("broken")

    monkeypatch.setattr(check_gpu, "CHECKS", (check_one, check_other))
    assert check_gpu.main(["--device", "cpu", "--save-dir", str(tmp_path)]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[1] for row in rows] == ["holds", "FAILS", "not", "FAILS"]
    assert rows[3] == ["check_other", "FAILS", "ValueError:", "broken"]


@pytest.mark.parametrize(
    "precision, dtype", [pytest.param("fp32", "float32", marks=pytest.mark.thorough), ("bf16", "bfloat16")]
)
def test_observations_tell_the_precision_and_the_weights(frames, tmp_path, handlers, one_thread, precision, dtype):
    flags = [str(frames), "--model", "mobilenet_v2", "--image-size", "32", "--batch-size", "8", "--epochs", "1"]
    flags += ["--workers", "0", "--device", "cpu", "--augment-on", "device", "--precision", precision]
    seen = [
        check_gpu_training.observe("temporal_classification", [*flags, "--save-dir", str(tmp_path / name), *more])
        for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"]))
    ]
    assert [each["dtypes"] for each in seen] == [[dtype]] * 3
    assert seen[0]["weights"] == seen[1]["weights"] != seen[2]["weights"]
    assert len(seen[0]["color_ms"]) == 3 and min(seen[0]["color_ms"]) > 0
