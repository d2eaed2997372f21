"""Fine-tuning: what is frozen stays, what is retained is balanced, runs resume, checkpoints are evaluated."""

import json
import re
import shutil

import pytest
import torch

import imagenet_finetuning
from moco.cli import UserError
from moco.networks import architectures, checkpoint, opening
from moco.training import engine
from tests.support.inputs import make_frames
from tests.support.training import everything, same

pytestmark = pytest.mark.usefixtures("handlers", "forked_launch")
START = "start.tar"


@pytest.fixture
def data(tmp_path):
    """A folder with train/ and val/, and an initial checkpoint with a head of seven outputs beside it."""
    for side in ("train", "val"):
        make_frames(tmp_path / "imagenet" / side)
    torch.manual_seed(1)
    model = architectures.build("shufflenet_v2_x0_5", 7)
    checkpoint.write(tmp_path / START, {"model_state_dict": model.state_dict(), "arch": "shufflenet_v2_x0_5"})
    return tmp_path / "imagenet"


def tune(data, save_dir, *flags):
    small = ["--image-size", "32", "--device", "cpu", "--batch-size", "8", "--workers", "0", "--precision", "fp32"]
    start = ["--model-path", str(data.parent / START), "--epochs", "3", "--schedule", "1", "2"]
    return imagenet_finetuning.main([str(data), "--save-dir", str(save_dir), *small, *start, *map(str, flags)])


def test_learning_rate_falls_to_a_fifth_at_each_milestone():
    rates = [engine.step_learning_rate(epoch, 5e-4, [23, 24], 0.2) for epoch in range(25)]
    assert rates[:23] == [5e-4] * 23
    assert rates[23:] == pytest.approx([1e-4, 2e-5])


def test_a_frozen_trunk_does_not_change_at_all(data, tmp_path, capsys):
    tune(data, tmp_path / "run", "--freeze-trunk")
    before = opening.find(tmp_path / START).state
    content = checkpoint.read(tmp_path / "run" / f"ft_IN_{START}")
    after = {name.removeprefix("module."): value for name, value in content["model_state_dict"].items()}
    assert after["fc.weight"].shape == (3, 1024)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.startswith("fc."))
    assert len(content["acc1_list"]) == len(content["val_acc1_list"]) == 3
    best = checkpoint.read(tmp_path / "run" / f"best_ft_IN_{START}")
    assert best["val_acc1_list"][-1] == max(content["val_acc1_list"])
    scale = "note: the root mean square of .*start.tar's features is .*; the accuracy of the published readout depends"
    assert re.search(scale, capsys.readouterr().out)  # a new network's features are small


def test_a_whole_network_changes_and_resumes_bitwise(data, tmp_path):
    tune(data, tmp_path / "whole")
    tune(data, tmp_path / "cut", "--epochs", 2)
    tune(data, tmp_path / "cut", "--resume")
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))
    content = checkpoint.read(tmp_path / "cut" / "last.tar")
    before = opening.find(tmp_path / START).state
    assert not torch.equal(content["model_state_dict"]["module.conv1.0.weight"], before["conv1.0.weight"])
    assert content["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(5e-4 / 25)


def test_the_list_of_images_is_written_and_read_back(data, tmp_path):
    tune(data, tmp_path / "a", "--epochs", 1, "--frac-retained", 0.5)
    names = (tmp_path / "a" / "train_list.txt").read_text().split()
    assert len(names) == 12 and names[0].startswith("class_0000/")
    tune(data, tmp_path / "b", "--epochs", 1, "--train-list", tmp_path / "a" / "train_list.txt")
    assert (tmp_path / "b" / "train_list.txt").read_text().split() == names
    (tmp_path / "list.txt").write_text("class_0000/nothing.jpeg\n")
    with pytest.raises(UserError, match="names class_0000/nothing.jpeg, which is not in .*train"):
        tune(data, tmp_path / "c", "--train-list", tmp_path / "list.txt")


def test_evaluation_gives_what_training_saw(data, tmp_path, capsys):
    tune(data, tmp_path / "run", "--epochs", 1)
    capsys.readouterr()
    tune(data, tmp_path / "nothing", "--evaluate", "--model-path", tmp_path / "run" / f"ft_IN_{START}")
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert f"top-1 {record['val_acc1']:.2f} %, top-5 100.00 %, 24 images" in capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()


def test_two_processes_evaluate_every_image_once(data, tmp_path, capfd):
    """Also where the last batch has one image, and a process none."""
    shutil.copy(data / "val" / "class_0001" / "img_0000.jpeg", data / "val" / "class_0000" / "img_0008.jpeg")
    model = architectures.build("shufflenet_v2_x0_5", 3)
    checkpoint.write(tmp_path / "three.tar", {"model_state_dict": model.state_dict(), "arch": "shufflenet_v2_x0_5"})
    words = ["--evaluate", "--model-path", tmp_path / "three.tar", "--batch-size", 8]
    tune(data, tmp_path / "run", *words)
    alone = capfd.readouterr().out.splitlines()
    assert alone[-1].endswith("25 images")
    assert tune(data, tmp_path / "run", *words, "--multiprocessing-distributed", "--processes-per-node", 2) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if "top-1" in line] == alone[-1:]


def test_a_process_without_any_image_evaluates_along(data, tmp_path, capfd):
    for path in [*sorted((data / "val").rglob("*.jpeg"))][1:]:
        path.unlink()
    model = architectures.build("shufflenet_v2_x0_5", 1)
    checkpoint.write(tmp_path / "one.tar", {"model_state_dict": model.state_dict(), "arch": "shufflenet_v2_x0_5"})
    words = ["--evaluate", "--model-path", tmp_path / "one.tar", "--batch-size", 8]
    assert tune(data, tmp_path / "run", *words, "--multiprocessing-distributed", "--processes-per-node", 2) == 0
    assert "top-5 100.00 %, 1 images" in capfd.readouterr().out


def test_a_published_format_file_continues_with_its_accuracies(data, tmp_path):
    tune(data, tmp_path / "a", "--epochs", 1)
    content = checkpoint.read(tmp_path / "a" / f"ft_IN_{START}")
    content["val_acc1_list"] = [100.0]
    checkpoint.write(tmp_path / "a" / f"ft_IN_{START}", content)
    tune(data, tmp_path / "b", "--epochs", 2, "--resume", tmp_path / "a" / f"ft_IN_{START}")
    found = checkpoint.read(tmp_path / "b" / f"ft_IN_{START}")
    assert len(found["acc1_list"]) == 2 and found["val_acc1_list"][0] == 100
    assert not (tmp_path / "b" / f"best_ft_IN_{START}").exists()


def test_only_the_files_of_a_first_epoch_are_replaced_without_last_tar(data, tmp_path):
    for epochs in (1, 2):
        tune(data, tmp_path / "run", "--epochs", epochs, "--resume")
        (tmp_path / "run" / "last.tar").unlink()
    with pytest.raises(UserError, match=f"ft_IN_{START} exists"):
        tune(data, tmp_path / "run", "--epochs", 2, "--resume")


def test_wrong_input_is_one_line(data, tmp_path):
    with pytest.raises(UserError, match="the head of .* has 7 outputs, not 9"):
        tune(data, tmp_path / "run", "--n_out", 9)
    with pytest.raises(UserError, match="has 7 outputs, but .*val has 3 classes"):
        tune(data, tmp_path / "run", "--evaluate")
    with pytest.raises(UserError, match="--evaluate needs --model-path"):
        imagenet_finetuning.parse_args([str(data), "--evaluate"])
    for words in (["--freeze-trunk", "--n_out", "6269", "--resume", "X.tar"], [str(data), "--n_out", "6", "--resume"]):
        with pytest.raises(UserError, match="has train/ and val/ as an argument .*start from as --model-path"):
            imagenet_finetuning.parse_args(words)
    (data / "train" / "class_0002").rename(data / "train" / "class_0005")
    with pytest.raises(UserError, match="have different classes"):
        tune(data, tmp_path / "run")
