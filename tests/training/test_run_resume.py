"""What a resume refuses, what it lets differ, and whose files it leaves alone."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

import imagenet_finetuning
import moco_img
import moco_temp
import temporal_classification
from moco.cli import UserError
from moco.networks import architectures, checkpoint
from moco.training.run import Run
from tests.support import ROOT
from tests.support.inputs import make_frames
from tests.support.training import everything, same, train

pytestmark = pytest.mark.usefixtures("handlers", "empty_figures")
EPOCH_0 = "shufflenet_v2_x0_5_epoch_0.tar"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs over the frames of the fixture of that name, and beside it what it saved in the second."""

    def save_if_due(run):
        original(run)
        if run.epoch == 1:
            shutil.copy(run.folder / "last.tar", folder / "within.tar")

    folder, original = tmp_path_factory.mktemp("finished"), Run.save_if_due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_if_due", save_if_due)
        train(make_frames(folder / "frames"), folder / "run", "--save-minutes", 0, "--print-freq", 1)
    return folder / "run"


@pytest.fixture
def within_an_epoch(finished, tmp_path):
    """A copy of the run as it was before the last save of its last epoch."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished.parent / "within.tar", tmp_path / "run" / "last.tar")
    return tmp_path / "run"


def listing(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


moco = partial(train, script=moco_img)


def test_the_checkpoint_of_an_epoch_is_compared_like_last_tar(frames, finished, tmp_path):
    """It holds classes and flags, too: other labels, or another learning rate, would go unnoticed."""
    with pytest.raises(UserError, match="lr was 0.0005 and is 0.001; --override continues"):
        train(frames, tmp_path / "run", "--resume", finished / EPOCH_0, "--lr", 0.001)
    (frames / "class_0002").rename(frames / "a_class")
    with pytest.raises(UserError, match=r"classes was 3 \(class_0000, .* and is 3 \(a_class"):
        train(frames, tmp_path / "run", "--resume", finished / EPOCH_0, "--override")
    assert not (tmp_path / "run").exists()


def test_the_state_of_the_optimizer_takes_the_memory_format_of_the_weights(frames, finished, tmp_path, monkeypatch):
    """Fused optimizers refuse others on a GPU, and published files are contiguous."""
    content = checkpoint.read(finished / "last.tar")
    for state in content["optimizer_state_dict"]["state"].values():
        state.update({key: value.contiguous() for key, value in state.items()})
    checkpoint.write(tmp_path / "contiguous.tar", content)
    runs = []
    monkeypatch.setattr(Run, "epochs", lambda run: runs.append(run) or [])
    train(frames, tmp_path / "run", "--resume", tmp_path / "contiguous.tar")
    state = runs[0].optimizer.state
    assert any(not weight.is_contiguous() for weight in state)
    for weight, values in state.items():
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == weight.stride()


@pytest.mark.parametrize("flag, value", [("--batch-size", 4), ("--seed", 5), ("--lr", 1e-3)])
def test_an_epoch_begins_anew_with_other_flags(frames, within_an_epoch, finished, flag, value):
    """The rest of an epoch in another order would not be its rest. The epochs before it stay as they are."""
    before = listing(within_an_epoch)
    with pytest.raises(UserError, match=f"{flag[2:].replace('-', '_')} was .*; --override continues with the new"):
        train(frames, within_an_epoch, "--resume", flag, value)
    assert listing(within_an_epoch) == before
    train(frames, within_an_epoch, "--resume", "--override", flag, value, "--print-freq", 1)
    old, new = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                for folder in (finished, within_an_epoch))  # fmt: skip
    steps = 6 if flag == "--batch-size" else 3
    assert [record.get("step") for record in new] == [1, 2, 3, None, *range(1, steps + 1), None]
    assert new[:4] == old[:4] and new[-1]["images"] == 24 and (new[5]["loss"] != old[5]["loss"])
    group = checkpoint.read(within_an_epoch / "last.tar")["optimizer_state_dict"]["param_groups"][0]
    assert group["lr"] == (value if flag == "--lr" else 5e-4)


def test_more_epochs_of_a_cosine_schedule_need_override(frames, tmp_path):
    moco(frames, tmp_path / "cosine", "--cos", "--epochs", 1)
    with pytest.raises(UserError, match="epochs was 1 and is 2; --override continues"):
        moco(frames, tmp_path / "cosine", "--cos", "--resume")
    moco(frames, tmp_path / "cosine", "--cos", "--resume", "--override")
    assert len(checkpoint.read(tmp_path / "cosine" / "last.tar")["records"]) == 2


def test_a_run_of_another_script_is_named(frames, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = listing(tmp_path / "run")
    with pytest.raises(UserError, match="last.tar cannot be continued by this script: it has no optimizer"):
        moco(frames, tmp_path / "run", "--resume")
    assert listing(tmp_path / "run") == before


def test_damaged_lines_of_the_log_are_dropped(frames, within_an_epoch, finished):
    last, log = within_an_epoch / "last.tar", within_an_epoch / "log.jsonl"
    content = checkpoint.read(last)
    content["args"]["a_flag_of_another_version"] = "x"  # is no difference: nobody can change it
    checkpoint.write(last, content)
    log.write_bytes(b'\xff\xfe\n[1, 2]\n{"epoch": "x"}\n' + log.read_bytes() + b'{"epoch": 1, "st')
    train(frames, within_an_epoch, "--resume", "--print-freq", 1)
    epochs = [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
    assert epochs == [json.loads(line)["epoch"] for line in (finished / "log.jsonl").read_text().splitlines()]
    assert same(everything(within_an_epoch), everything(finished))


HOLD = """
import sys
from moco import files
lock = files.lock(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_run_is_writing_to_is_refused_untouched(frames, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / f".last.{os.getppid()}.part.tar").write_bytes(b"being written")
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        before = listing(folder)
        for flags in (("--resume",), ("--overwrite",), ()):
            with pytest.raises(UserError, match="another run is writing to|exists; give --resume"):
                train(frames, folder, *flags)
            assert listing(folder) == before
        process.communicate("")
    train(frames, folder, "--resume", "--epochs", 3)
    assert checkpoint.read(folder / "last.tar")["epoch"] == 3


FILES_OF_A_USER = (
    ".thesis.part1.tex", ".videos.part01.rar", "last_weeks_frames.tar", "last.tar.gz", "the_last.tar",
    "shufflenet_v2_x0_5_epoch_0_labeledS_5_iid.tar", "shufflenet_v2_x0_5_epoch_best.tar", "log.jsonl.bak",
    "my_shufflenet_v2_x0_5_epoch_0.tar", ".part.tar", ".last.12.part.tar.txt",
)  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_files_of_a_user_are_left_alone(frames, tmp_path, flags):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in FILES_OF_A_USER:
        (folder / name).write_text(name)
    (folder / ".folder.part").mkdir()
    (folder / ".last.999999.part.tar").mkdir()
    train(frames, folder, "--epochs", 1, *flags)
    assert all((folder / name).read_text() == name for name in FILES_OF_A_USER)
    assert (folder / ".folder.part").is_dir() and (folder / ".last.999999.part.tar").is_dir()


def test_a_start_checkpoint_may_have_any_name(tmp_path):
    name = "a{0}b 50%d [ab]*?"
    for side in ("train", "val"):
        make_frames(tmp_path / "imagenet" / side)
    model = architectures.build("shufflenet_v2_x0_5", 7)
    checkpoint.write(tmp_path / name, {"model_state_dict": model.state_dict(), "arch": "shufflenet_v2_x0_5"})
    flags = ["--image-size", "32", "--device", "cpu", "--batch-size", "8", "--workers", "0", "--precision", "fp32"]
    flags += ["--model-path", str(tmp_path / name), "--save-dir", str(tmp_path / "run")]
    imagenet_finetuning.main([str(tmp_path / "imagenet"), *flags, "--epochs", "1"])
    with pytest.raises(UserError, match="exists; give --resume"):
        imagenet_finetuning.main([str(tmp_path / "imagenet"), *flags, "--epochs", "1"])
    imagenet_finetuning.main([str(tmp_path / "imagenet"), *flags, "--epochs", "2", "--resume"])
    assert checkpoint.read(tmp_path / "run" / f"ft_IN_{name}")["epoch"] == 1


@pytest.mark.parametrize("script", [temporal_classification, moco_img, moco_temp, imagenet_finetuning])
def test_a_run_inside_its_data_is_refused(tmp_path, script):
    """Its own pictures would be a class of the next run."""
    data = make_frames(tmp_path / "data" / "train").parent
    make_frames(data / "val")
    data = data if script is imagenet_finetuning else data / "train"
    with pytest.raises(UserError, match=f"--save-dir .*runs is inside the data folder {data}"):
        script.main([str(data), "--save-dir", str(data / "runs"), "--device", "cpu", "--workers", "0"])
    assert not (data / "runs").exists()
