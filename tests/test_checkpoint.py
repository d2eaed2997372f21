"""Reading any checkpoint of the family safely, and writing that leaves no half file."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from moco import checkpoint, models
from moco.checkpoint import CheckpointError
from moco.cli import UserError
from tests import support

LEGACY = support.GOLDEN / "legacy_tiny.tar"  # written by torch 1.5.1


class RunsCode:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def prefixed(model, prefix="module."):
    return {prefix + name: value for name, value in model.state_dict().items()}


def test_legacy_file_of_torch_1_5():
    content = checkpoint.read(LEGACY)
    assert torch.equal(content["model_state_dict"]["module.classifier.weight"], torch.arange(12.0).view(3, 4))
    assert content["model_state_dict"]["module.classifier.bias"].tolist() == [0.5, -1, 2]
    assert [float(acc1) for acc1 in content["acc1_list"]] == [71.5]


def test_released_format_is_read_with_architecture_and_head_inferred(tmp_path):
    model = models.build("mobilenet_v2", 5)
    content = {"model_state_dict": prefixed(model), "acc1_list": [1.0]}
    path = saved(tmp_path / "TC-S.tar", content, _use_new_zipfile_serialization=False)
    loaded, found = checkpoint.load(path)
    assert (found.arch, found.n_out, found.classes) == ("mobilenet_v2", 5, None)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2"])
def test_architecture_is_inferred_from_names_and_shapes(arch):
    with torch.device("meta"):
        state = models.build(arch, 3).state_dict()
    assert checkpoint._fitting_arch("x.tar", state) == arch


def test_moco_gives_its_query_encoder_without_head(tmp_path):
    model = models.build("resnet18", 128)
    state = {**prefixed(model, "module.encoder_q."), **prefixed(models.build("resnet18", 128), "module.encoder_k.")}
    state |= {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    path = saved(tmp_path / "moco_img_0011.pth.tar", {"epoch": 12, "arch": "resnet18", "state_dict": state})
    loaded, found = checkpoint.load(path, n_out=4)
    assert found.n_out is None and models.head(loaded).out_features == 4
    assert torch.equal(loaded.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_torchvision_file_with_its_dropout_layer(tmp_path):
    model = torchvision.models.mobilenet_v2()
    loaded, found = checkpoint.load(saved(tmp_path / "mobilenet_v2.pth", model.state_dict()))
    assert found.n_out == 1000
    assert torch.equal(loaded.classifier.weight, model.classifier[1].weight)


def test_published_snippet_loads_what_we_write(tmp_path):
    ours = models.build("resnet18", 6)
    checkpoint.write(tmp_path / "a.tar", {"model_state_dict": prefixed(ours)})
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 6)
    model = nn.DataParallel(model)
    model.load_state_dict(torch.load(tmp_path / "a.tar", weights_only=True)["model_state_dict"])
    assert torch.equal(model.module.fc.weight, ours.fc.weight)


def test_what_does_not_fit_is_listed(tmp_path):
    state = models.build("resnet18", 3).state_dict()
    del state["layer1.0.conv1.weight"]
    state["extra"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    path = saved(tmp_path / "a.tar", state)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, "resnet18")
    for line in ("layer1.0.conv1.weight is missing", "extra is left over", "conv1.weight is (64, 3, 3, 3)"):
        assert line in str(error.value)
    with pytest.raises(CheckpointError, match="fits none of"):
        checkpoint.load(path)


def test_head_of_another_size(tmp_path):
    path = saved(tmp_path / "a.tar", models.build("resnet18", 3).state_dict())
    with pytest.raises(CheckpointError, match="the head of .* has 3 outputs, not 7"):
        checkpoint.load(path, n_out=7)
    model = models.build("resnet18", 7)
    own_head = model.fc.weight.clone()
    checkpoint.fill(model, checkpoint.weights(path), drop_head=True)
    assert torch.equal(model.fc.weight, own_head)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "pickle"])
def test_code_is_refused_whatever_the_environment_says(tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, made = tmp_path / "bad.tar", tmp_path / "made"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(made), protocol=2))
    else:
        saved(path, {"model_state_dict": RunsCode(made)}, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(CheckpointError, match="refused: it asks to run code" if protocol != "pickle" else "bad.tar"):
        checkpoint.read(path)
    assert not made.exists()


@pytest.mark.parametrize(
    "content", [nn.Linear(2, 2), {"a": np.array([object()], dtype=object)}], ids=["module", "objects"]
)
def test_whole_modules_and_object_arrays_are_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.read(saved(tmp_path / "a.tar", content))


def test_damaged_files_are_one_error_that_names_the_file(tmp_path):
    """Empty, cut at many places, flipped in a zip, HTML, a folder, nothing there."""
    whole = saved(tmp_path / "whole.tar", {"state_dict": {"fc.weight": torch.randn(100, 100)}}).read_bytes()
    draws = random.Random(0)
    cuts = [(LEGACY.read_bytes(), draws.randrange(1500)) for _ in range(20)] + [
        (whole, draws.randrange(40000)) for _ in range(10)
    ]
    damaged = [b"", b"<html>404</html>", *(data[:end] for data, end in cuts)]
    flipped = bytearray(whole)
    flipped[20000] ^= 4  # in the tensor
    for data in [*damaged, bytes(flipped)]:
        path = tmp_path / "damaged.tar"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged.tar"):
            checkpoint.read(path)
    for path in (tmp_path, tmp_path / "missing.tar"):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoint.read(path)


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"model_state_dict": 3}, {"epoch": 4}], ids=str)
def test_a_file_without_weights(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoint.weights(saved(tmp_path / "a.tar", content))


def test_full_disk_is_a_clear_error_and_keeps_the_last_good_file(small_disk):
    disk = small_disk("1m")
    checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000)})
    with pytest.raises(UserError, match=r"cannot write .*a\.tar: No space left on device"):
        checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000000)})
    assert checkpoint.read(disk / "a.tar")["x"].shape == (1000,)
    assert [path.name for path in disk.iterdir()] == ["a.tar"]


def test_ctrl_c_while_saving_is_ctrl_c_and_keeps_what_was_there(tmp_path, monkeypatch):
    def save_until_ctrl_c(content, file):
        class Interrupted:
            writes = 0

            def write(self, part):
                self.writes += 1
                if self.writes == 3:  # by then torch hides it behind an error of its own
                    raise KeyboardInterrupt
                return file.write(part)

            def flush(self):
                file.flush()

        save(content, Interrupted())

    checkpoint.write(tmp_path / "a.tar", {"epoch": 1})
    save = torch.save
    monkeypatch.setattr(torch, "save", save_until_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "a.tar", {"epoch": 2, "weights": torch.zeros(100_000)})
    assert checkpoint.read(tmp_path / "a.tar") == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1
