"""Checkpoints are read safely, written atomically, and opened as models."""

import os
import pickle
import random

import pytest
import torch
import torchvision
from torch import nn

from moco.cli import UserError
from moco.networks import architectures, checkpoint
from moco.networks.checkpoint import CheckpointError
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
    model = architectures.build("mobilenet_v2", 5)
    content = {"model_state_dict": prefixed(model), "acc1_list": [1.0]}
    path = saved(tmp_path / "TC-S.tar", content, _use_new_zipfile_serialization=False)
    loaded, weights = checkpoint.load(path)
    assert (weights.arch, weights.n_out, weights.classes) == ("mobilenet_v2", 5, None)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("mlp", [False, True])
def test_moco_gives_its_query_encoder_without_head(tmp_path, mlp):
    model, other = architectures.build("resnet18", 128), architectures.build("resnet18", 128)
    if mlp:
        model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.fc)
    state = {**prefixed(model, "module.encoder_q."), **prefixed(other, "module.encoder_k.")}
    state |= {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    path = saved(tmp_path / "moco_img_0011.pth.tar", {"epoch": 12, "arch": "resnet18", "state_dict": state})
    loaded, weights = checkpoint.load(path, n_out=4)
    assert weights.n_out is None and architectures.head(loaded).out_features == 4
    assert torch.equal(loaded.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_torchvision_file_with_its_dropout_layer(tmp_path):
    model = torchvision.models.mobilenet_v2()
    loaded, weights = checkpoint.load(saved(tmp_path / "mobilenet_v2.pth", model.state_dict()))
    assert weights.n_out == 1000
    assert torch.equal(loaded.classifier.weight, model.classifier[1].weight)


def test_published_snippet_loads_what_we_write(tmp_path):
    ours = architectures.build("resnet18", 6)
    checkpoint.write(tmp_path / "a.tar", {"model_state_dict": prefixed(ours)})
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 6)
    model = nn.DataParallel(model)
    model.load_state_dict(torch.load(tmp_path / "a.tar", weights_only=True)["model_state_dict"])
    assert torch.equal(model.module.fc.weight, ours.fc.weight)


def test_what_does_not_fit_a_model_is_listed(tmp_path):
    state = architectures.build("resnet18", 3).state_dict()
    del state["layer1.0.conv1.weight"]
    state["extra"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    weights = checkpoint.Weights(tmp_path / "a.tar", state, "resnet18", 3)
    with pytest.raises(CheckpointError) as error:
        checkpoint.fill(architectures.build("resnet18", 3), weights)
    assert str(error.value) == (
        f"{tmp_path / 'a.tar'} (resnet18) does not fit this ResNet: layer1.0.conv1.weight is missing; "
        "extra is unexpected; conv1.weight is (64, 3, 3, 3), not (64, 3, 7, 7)"
    )


@pytest.mark.parametrize("arch", ["mnasnet0_5", "regnet_x_400mf", "efficientnet_b0"])
def test_any_architecture_is_opened_and_resumed(tmp_path, arch):
    """MNASNet needs its version, a regular module none; RegNet computes while it is built."""
    torch.manual_seed(0)
    model = architectures.build(arch, 3)
    path = saved(tmp_path / "a.tar", {"model_state_dict": prefixed(model), "arch": arch})
    loaded, weights = checkpoint.load(path)
    resumed = checkpoint.fill(architectures.build(arch, 3), checkpoint.Weights(path, model.state_dict(), arch, 3))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(resumed.state_dict()[name], value)


def test_the_stored_architecture_wins(tmp_path):
    """Over another one that the user names; a stored one that does not fit, or is unknown, does not count."""
    state = architectures.build("resnet18", 3).state_dict()
    for stored in ("resnet18", "resnet50", "vit_small", 3, None):
        path = saved(tmp_path / "a.tar", {"model_state_dict": state, "arch": stored})
        assert checkpoint.load(path)[1].arch == "resnet18"
        if stored == "resnet18":
            assert checkpoint.load(path, "mobilenet_v2")[1].arch == "resnet18"
        else:
            with pytest.raises(CheckpointError, match="does not fit (mobilenet_v2|resnet50): "):
                checkpoint.load(path, "mobilenet_v2")


@pytest.mark.parametrize("classes", [["a", "b"], "abc", [1, 2, 3], {"a": 1, "b": 2, "c": 3}, None], ids=str)
def test_class_names_that_are_none_are_ignored(tmp_path, classes):
    state = architectures.build("resnet18", 3).state_dict()
    path = saved(tmp_path / "a.tar", {"model_state_dict": state, "classes": classes})
    assert checkpoint.weights(path).classes is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_but_read(tmp_path, value):
    """A trainer that resumes reads the file, and checks the weights itself."""
    model = architectures.build("resnet18", 3)
    model.layer2[0].bn1.running_var[1] = value
    path = saved(tmp_path / "a.tar", {"model_state_dict": prefixed(model)})
    with pytest.raises(CheckpointError, match=r"a.tar are not finite \(layer2.0.bn1.running_var"):
        checkpoint.open_model(path)
    with pytest.raises(CheckpointError, match="are not finite"):
        checkpoint.load(path)
    assert not checkpoint.read(path)["model_state_dict"]["module.layer2.0.bn1.running_var"].isfinite().all()


class OnGpu(torch.Tensor):
    """Stands for a tensor on another device, which only cpu() brings here."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def detach(self):
        return super().detach().as_subclass(OnGpu)


def test_tensors_of_other_devices_are_written_as_cpu_tensors(tmp_path):
    def on_gpu():
        return torch.ones(2).as_subclass(OnGpu)

    content = {
        "state_dict": {"fc.weight": on_gpu()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": on_gpu()}}, "groups": [(on_gpu(), 2)]},
        "plain": [1, "a", None, (2, 3)],
    }
    checkpoint.write(tmp_path / "a.tar", content)
    loaded = checkpoint.read(tmp_path / "a.tar")
    tensors = [loaded["state_dict"]["fc.weight"], loaded["optimizer"]["state"][0]["exp_avg"]]
    tensors.append(loaded["optimizer"]["groups"][0][0])
    assert all(type(tensor) is torch.Tensor and tensor.tolist() == [1, 1] for tensor in tensors)
    assert loaded["plain"] == content["plain"] and loaded["optimizer"]["groups"][0][1] == 2
    assert type(content["state_dict"]["fc.weight"]) is OnGpu


def test_head_of_another_size(tmp_path):
    path = saved(tmp_path / "a.tar", architectures.build("resnet18", 3).state_dict())
    with pytest.raises(CheckpointError, match="the head of .* has 3 outputs, not 7"):
        checkpoint.load(path, n_out=7)
    model = architectures.build("resnet18", 7)
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
    with pytest.raises(
        CheckpointError, match="refused: loading it would run code" if protocol != "pickle" else "bad.tar"
    ):
        checkpoint.read(path)
    assert not made.exists()


def test_damaged_files_are_one_error_that_names_the_file(tmp_path):
    """Empty, cut at many lengths, flipped in a zip, HTML, a folder, no file."""
    intact = saved(tmp_path / "whole.tar", {"state_dict": {"fc.weight": torch.randn(100, 100)}}).read_bytes()
    draws = random.Random(0)
    cuts = [(LEGACY.read_bytes(), draws.randrange(1500)) for _ in range(20)] + [
        (intact, draws.randrange(40000)) for _ in range(10)
    ]
    damaged = [b"", b"<html>404</html>", *(data[:end] for data, end in cuts)]
    flipped = bytearray(intact)
    flipped[20000] ^= 4  # in the tensor
    for data in [*damaged, bytes(flipped)]:
        path = tmp_path / "damaged.tar"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged.tar"):
            checkpoint.read(path)
    for path in (tmp_path, tmp_path / "missing.tar", tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), {}, {"model_state_dict": 3}, {"epoch": 4}, {0: torch.zeros(3)}, [1]], ids=str
)
def test_a_file_without_weights(tmp_path, content):
    with pytest.raises(CheckpointError, match="contains no weights"):
        checkpoint.weights(saved(tmp_path / "a.tar", content))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02}q\x00.",
        (10**15).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (80).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(80) + b"1234",
        (80).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(80) + b"1234",
        (80).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'.ljust(80) + b"1234",
    ],
    ids=["empty", "a pickle", "huge header", "no JSON", "cut", "shape beyond the data", "offsets beyond the file"],
)
def test_damaged_and_malicious_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a.safetensors is damaged or not a safetensors file"):
        checkpoint.open_model(path)


def test_full_disk_is_a_clear_error_and_keeps_the_last_good_file(small_disk):
    disk = small_disk("1m")
    checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000)})
    with pytest.raises(UserError, match=r"cannot write .*a\.tar: No space left on device"):
        checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000000)})
    assert checkpoint.read(disk / "a.tar")["x"].shape == (1000,)
    assert [path.name for path in disk.iterdir()] == ["a.tar"]


def test_ctrl_c_while_saving_is_ctrl_c_and_keeps_the_previous_file(tmp_path, monkeypatch):
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
