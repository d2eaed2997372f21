"""Static MoCo, run as its user runs it: its files, exact resume, several processes, mistakes as one line."""

import json
from functools import partial

import pytest
import torch

import linear_decoding
import moco_img
import moco_utils
from moco.cli import UserError
from moco.networks import checkpoint, opening
from tests.support import training
from tests.support.inputs import make_frames
from tests.support.training import at_step, die, everything, same

pytestmark = pytest.mark.usefixtures("handlers")
LAST = "moco_img_checkpoint_0001.pth.tar"
train = partial(training.train, script=moco_img)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of two epochs of three steps over the frames of the fixture of that name."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_frames(folder / "frames"), folder / "run", "--print-freq", 1)
    return folder / "run"


def test_files_are_those_of_the_published_code(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"moco_img_checkpoint_0000.pth.tar", LAST, "last.tar", "args.json", "training_curve.pdf"} < names
    content = checkpoint.read(whole / LAST)
    assert (content["epoch"], content["arch"]) == (2, "shufflenet_v2_x0_5")
    state = content["state_dict"]
    assert all(name.startswith("module.") for name in state)
    assert state["module.queue"].shape == (8, 16) and state["module.queue_ptr"].tolist() == [6 * 8 % 16]
    assert state["module.encoder_q.fc.2.weight"].shape == state["module.encoder_k.fc.2.weight"].shape == (8, 1024)
    assert content["optimizer"]["param_groups"][0]["momentum"] == 0.9
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record.get("step") for record in records] == [1, 2, 3, None] * 2
    assert records[-1]["images"] == 24 and records[-1]["lr"] == 0.03


def test_a_run_that_dies_continues_bitwise(frames, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        at_step(patch, 3, die, moco_utils, "objective")
        train(frames, tmp_path / "cut", "--save-minutes", 0, "--workers", 2)
    train(frames, tmp_path / "cut", "--resume")
    assert same(everything(whole), everything(tmp_path / "cut"))
    assert same(checkpoint.read(whole / LAST)["state_dict"], checkpoint.read(tmp_path / "cut" / LAST)["state_dict"])


def test_a_published_file_continues_at_its_epoch(frames, tmp_path, capsys, whole):
    content = checkpoint.read(whole / "moco_img_checkpoint_0000.pth.tar")
    published = {key: content[key] for key in ("epoch", "arch", "state_dict", "optimizer")}
    torch.save(published, tmp_path / "0000.pth.tar")
    train(frames, tmp_path / "more", "--resume", tmp_path / "0000.pth.tar")
    assert "starting at epoch 1" in capsys.readouterr().out
    names = [path.name for path in sorted((tmp_path / "more").glob("*.pth.tar"))]
    assert names == [LAST]
    assert same(checkpoint.read(whole / LAST)["state_dict"], checkpoint.read(tmp_path / "more" / LAST)["state_dict"])


def test_an_empty_resume_is_none_and_the_learning_rate_is_the_one_used(frames, tmp_path, capsys):
    train(frames, tmp_path / "run", "--resume", "", "--epochs", 3, "--schedule", 1, 2, "--lr", 0.02, "--aug-plus")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "learning rate" in line] == [
        f"epoch {epoch}: learning rate {lr}" for epoch, lr in enumerate(["0.02", "0.002", "0.0002"])
    ]
    groups = [
        checkpoint.read(tmp_path / "run" / f"moco_img_checkpoint_{epoch:04d}.pth.tar")["optimizer"]["param_groups"][0]
        for epoch in range(3)
    ]
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.002, 0.0002])


def test_several_processes_fill_one_queue(frames, tmp_path, forked_launch, capfd):
    train(frames, tmp_path / "run", "--multiprocessing-distributed", "--processes-per-node", 2, "--epochs", 1)
    assert capfd.readouterr().out.count("24 frames, 3 steps of 8 pairs per epoch") == 1
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert content["records"][0]["images"] == 24
    assert content["state_dict"]["module.queue_ptr"].tolist() == [8] and content["args"]["bn_splits"] == 1


def test_mistakes_are_one_line_and_a_queue_that_the_data_do_not_fill_is_said(frames, tmp_path, capsys):
    with pytest.raises(UserError, match="--moco-k 20 is not a multiple of the 8 keys per step; 16 is"):
        train(frames, tmp_path / "run", "--moco-k", 20)
    with pytest.raises(UserError, match="--batch-size 32 exceeds the 24 frames; use a smaller one"):
        train(frames, tmp_path / "run", "--batch-size", 32, "--moco-k", 32)
    assert not (tmp_path / "run").exists()
    train(frames, tmp_path / "small", "--epochs", 1, "--moco-k", 32)
    assert "--moco-k 32 exceeds the 24 frames" in capsys.readouterr().out


def test_the_last_incomplete_batch_is_left_out(frames, tmp_path):
    (frames / "class_0002" / "img_0007.jpeg").unlink()
    train(frames, tmp_path / "run", "--epochs", 1)
    assert checkpoint.read(tmp_path / "run" / "last.tar")["records"][0]["images"] == 16


def test_a_checkpoint_decodes_as_it_is(frames, tmp_path, whole):
    flags = ["--image-size", "64", "--epochs", "2", "--device", "cpu", "--save-dir", str(tmp_path / "decoded")]
    linear_decoding.main([str(frames), "--model-path", str(whole / LAST), *flags])
    decoded = opening.find(tmp_path / "decoded" / "moco_img_checkpoint_0001_labeledS_5_iid.tar")
    assert (decoded.arch, decoded.n_out) == ("shufflenet_v2_x0_5", 3)
    trunk = checkpoint.read(whole / LAST)["state_dict"]
    assert torch.equal(decoded.state["conv1.0.weight"], trunk["module.encoder_q.conv1.0.weight"])


def test_a_run_starts_from_the_encoder_of_another(frames, tmp_path, whole):
    """Query and key encoder both, with the head of MoCo; of other checkpoints, and other heads, the backbone."""
    last = checkpoint.read(whole / LAST)["state_dict"]
    backbone = {name: value for name, value in opening.find(whole / LAST).state.items() if value.dim() > 1}
    frozen = ("--lr", 0, "--epochs", 1)
    for name, flags in {"same": [], "other": ["--moco-dim", 4]}.items():
        train(frames, tmp_path / name, "--model-path", whole / LAST, *frozen, *flags)
        state = checkpoint.read(tmp_path / name / "moco_img_checkpoint_0000.pth.tar")["state_dict"]
        for encoder in ("encoder_q", "encoder_k"):
            for key, value in backbone.items():
                assert torch.equal(state[f"module.{encoder}.{key}"], value), (name, encoder, key)
        same_head = torch.equal(state["module.encoder_k.fc.0.weight"], last["module.encoder_q.fc.0.weight"])
        assert same_head == (name == "same")
